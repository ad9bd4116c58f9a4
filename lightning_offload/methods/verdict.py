"""What one step is decided by: all gradients' norms, the clip coefficient, and whether they are finite.

With gradients on the device the numbers are computed there and copied down, and the main thread waits for none of it.
With gradients that accumulate on the host they are computed there and copied up for the small parameters, which wait
for them, as the first layer of the next forward would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_offload.errors import NonFiniteError
from lightning_offload.memory.lanes import Event, Lanes
from lightning_offload.methods.base import StepReport, Trained, Verdict
from lightning_offload.numerics.norms import clip_coefficient, gradient_norm, total_norm

HEAD = 3
"""Numbers before the norms: total norm, coefficient, found_inf."""

HostSum = tuple[Trained, Tensor, list[Event]]
"""A sum over micro-batches on the host, and the events after which it may be read."""


class Judge:
    """Owns the small buffers in which verdicts travel, and what is reported of them.

    Attributes:
        report: What the last step did that the host has finished judging.
        readers: Events after which the host has read the last verdict.
    """

    def __init__(self, lanes: Lanes, parameters: int, max_skips: int) -> None:
        self.report = StepReport()
        self.readers: list[Event] = []
        self._max_skips = max_skips
        self._lanes = lanes
        (self._device,) = lanes.buffers("verdict.device", [HEAD + parameters], torch.float32, "device")
        (self._host,) = lanes.buffers("verdict.host", [HEAD + parameters], torch.float32, "pinned")
        (self._landed,) = lanes.buffers("verdict.landed", [parameters], torch.float32, "pinned")
        self._sent: Event | None = None

    def resume(self, step: int, *, skipped_in_a_row: int, skipped_total: int) -> None:
        """Go on counting where a checkpoint stopped."""
        self.report = StepReport(step=step, skipped_in_a_row=skipped_in_a_row, skipped_total=skipped_total)

    def decide(self, verdict: Verdict, present: Sequence[Trained], sums: Sequence[HostSum]) -> None:
        """Fill in ``verdict`` and report it.

        Args:
            verdict: To be filled in.
            present: The parameters with a gradient, in optimizer order.
            sums: Those whose micro-batches add up on the host.

        Raises:
            NonFiniteError: Too many steps in a row were skipped; here, or at the next call of any lane.
        """
        on_host = {trained.name: (total, events) for trained, total, events in sums}
        if self._sent is not None:
            self._lanes.wait_compute(self._sent)  # the last verdict has left the device buffer
        verdict.on_device = self._device[:HEAD]
        verdict.on_host = self._host[: HEAD + len(present)]
        if on_host:
            self._on_host(verdict, verdict.on_host, present, on_host)
        else:
            self._on_device(verdict, verdict.on_host, present)
        assert verdict.host_ready is not None
        self.readers = [
            self._lanes.host(lambda: self._record(verdict), after=[verdict.host_ready], priority=-1, tag="report")
        ]

    def _record(self, verdict: Verdict) -> None:
        assert verdict.on_host is not None
        total, coefficient, skipped = (float(verdict.on_host[at]) for at in range(HEAD))
        self._keep(verdict, total, coefficient, skipped=bool(skipped))
        if self.report.skipped_in_a_row > self._max_skips:
            finite = torch.isfinite(verdict.on_host[HEAD : HEAD + len(verdict.names)]).tolist()
            bad = [name for name, is_finite in zip(verdict.names, finite, strict=True) if not is_finite]
            raise NonFiniteError(_explain_skips(self.report, bad, "No weight was changed in these steps."))

    def _keep(self, verdict: Verdict, total: float, coefficient: float, *, skipped: bool) -> None:
        self.report = StepReport(
            step=verdict.step,
            grad_norm=total,
            clip_coefficient=coefficient,
            skipped=skipped,
            skipped_in_a_row=self.report.skipped_in_a_row + 1 if skipped else 0,
            skipped_total=self.report.skipped_total + int(skipped),
        )

    def _on_device(self, verdict: Verdict, on_host: Tensor, present: Sequence[Trained]) -> None:
        norms = torch.stack([_norm(trained) for trained in present])
        with torch.no_grad():
            self._device[: len(on_host)].copy_(torch.cat([judge(list(norms), verdict), norms]))
        verdict.host_ready = self._sent = self._lanes.copy(
            [on_host],
            [self._device[: len(on_host)]],
            "d2h",
            after=[self._lanes.compute(), *self.readers],
            priority=-1,
            tag="verdict",
        )

    def _on_host(
        self,
        verdict: Verdict,
        on_host: Tensor,
        present: Sequence[Trained],
        totals: dict[str, tuple[Tensor, list[Event]]],
    ) -> None:
        """Norms of the host's sums, beside those of the small parameters, which come down for it."""
        norms = on_host[HEAD:]
        ready = [self._sent] if self._sent is not None else []  # the last verdict has gone up from the same memory
        small = [at for at, trained in enumerate(present) if trained.name not in totals]
        if small:
            with torch.no_grad():
                self._device[HEAD : HEAD + len(small)].copy_(torch.stack([_norm(present[at]) for at in small]))
            ready.append(
                self._lanes.copy(
                    [self._landed[: len(small)]],
                    [self._device[HEAD : HEAD + len(small)]],
                    "d2h",
                    after=[self._lanes.compute(), *self.readers],
                    priority=-1,
                    tag="verdict",
                )
            )
        for at, trained in enumerate(present):
            if trained.name in totals:
                total, events = totals[trained.name]
                ready.append(
                    self._lanes.host(
                        partial(_norm_into, norms[at], total),
                        after=[*events, *self.readers],
                        priority=-1,
                        tag="norm",
                        traffic_bytes=4 * total.numel(),
                    )
                )

        def decide() -> None:
            for landed, at in enumerate(small):
                norms[at].copy_(self._landed[landed])
            on_host[:HEAD].copy_(judge(list(norms), verdict))

        verdict.host_ready = self._lanes.host(decide, after=ready, priority=-1, tag="verdict")
        verdict.device_ready = self._sent = self._lanes.copy(
            [self._device[:HEAD]],
            [on_host[:HEAD]],
            "h2d",
            after=[verdict.host_ready],  # and so after compute of this step: the device buffer's readers are done
            priority=-1,
            tag="verdict",
        )


class Tally(Judge):
    """Reports steps with a local verdict; decides for the small parameters on the device, all together.

    Args:
        lanes: Where it runs.
        small: How many of these there are.
        max_skips: Steps in a row in which a parameter may be skipped.
    """

    def __init__(self, lanes: Lanes, small: int, max_skips: int) -> None:
        super().__init__(lanes, small, max_skips)
        self._small: list[str] = []

    def decide(self, verdict: Verdict, present: Sequence[Trained], sums: Sequence[HostSum] = ()) -> None:
        """Fill in what the small parameters are decided by: those of them that have a gradient."""
        self._small = [trained.name for trained in present]
        if not present:
            return
        if self._sent is not None:
            self._lanes.wait_compute(self._sent)
        norms = torch.stack([_norm(trained) for trained in present])
        with torch.no_grad():
            self._device[: HEAD + len(norms)].copy_(torch.cat([judge(list(norms), verdict), norms]))
        verdict.on_device = self._device[:HEAD]
        self._sent = self._lanes.copy(
            [self._landed[: len(norms)]],
            [self._device[HEAD : HEAD + len(norms)]],
            "d2h",
            after=[self._lanes.compute(), *self.readers],
            priority=-1,
            tag="verdict",
        )

    def count(self, verdict: Verdict, stepped: Sequence[Event]) -> None:
        """Report the step once ``stepped`` have happened.

        Raises:
            NonFiniteError: As of ``decide``.
        """
        after = [*stepped, *([self._sent] if self._sent is not None else [])]
        small = list(self._small)
        self.readers = [
            self._lanes.host(lambda: self._record_own(verdict, small), after=after, priority=-1, tag="report")
        ]

    def _record_own(self, verdict: Verdict, small: Sequence[str]) -> None:
        norms = verdict.own_norms | dict(zip(small, self._landed[: len(small)].tolist(), strict=True))
        bad = [name for name in verdict.names if not math.isfinite(norms[name])]
        total = total_norm([torch.tensor(norms[name], dtype=torch.float32, device="cpu") for name in verdict.names])
        self._keep(verdict, float(total), 1.0, skipped=bool(bad))
        if self.report.skipped_in_a_row > self._max_skips:
            raise NonFiniteError(_explain_skips(self.report, bad, "It was not changed in this step."))


def judge(norms: Sequence[Tensor], verdict: Verdict) -> Tensor:
    """``[total norm, clip coefficient, found_inf]`` from the norms of all gradients, in optimizer order."""
    total = total_norm(norms)
    clip = verdict.clip
    coefficient = torch.ones_like(total)
    if clip is not None and clip.algorithm == "norm":
        coefficient = clip_coefficient(total, clip.value)
    bad = torch.zeros_like(total)
    if verdict.skip_nonfinite:
        bad = (~torch.isfinite(total)).to(total.dtype)
    return torch.stack([total, coefficient, bad])


def _explain_skips(report: StepReport, bad: Sequence[str], unchanged: str) -> str:
    first = f"the first parameter with a non-finite gradient is `{bad[0]}`" if bad else "the norm itself overflowed"
    return (
        f"{report.skipped_in_a_row} steps in a row had a non-finite gradient norm (`max_skips` allows "
        f"{report.skipped_in_a_row - 1}); in step {report.step} {first}. {unchanged} Lower "
        "the learning rate, look at the loss of these batches, or train in `bf16-mixed` or `32-true`."
    )


def _norm_into(target: Tensor, gradient: Tensor) -> None:
    target.copy_(gradient_norm(gradient))


def _norm(trained: Trained) -> Tensor:
    assert trained.norm is not None, trained.name
    return trained.norm
