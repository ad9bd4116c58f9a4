"""What one step is decided by: all gradients' norms, the clip coefficient, and whether they are finite.

The main thread waits for none of it. With gradients on the device the numbers are computed there and copied down;
with gradients that accumulate on the host they are computed there and copied up for the small parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_offload.memory.lanes import Event, Lanes
from lightning_offload.methods.base import Trained, Verdict
from lightning_offload.methods.host import HostOptimizer
from lightning_offload.numerics.norms import clip_coefficient, gradient_norm, total_norm

HEAD = 3
"""Numbers before the norms: total norm, coefficient, found_inf."""


class Judge:
    """Owns the two small buffers in which verdicts travel.

    Attributes:
        readers: Events after which the host has read the last verdict.
    """

    def __init__(self, lanes: Lanes, parameters: int) -> None:
        self.readers: list[Event] = []
        self._lanes = lanes
        (self._device,) = lanes.buffers("verdict.device", [HEAD + parameters], torch.float32, "device")
        (self._host,) = lanes.buffers("verdict.host", [HEAD + parameters], torch.float32, "pinned")
        (self._landed,) = lanes.buffers("verdict.landed", [parameters], torch.float32, "pinned")
        self._sent: Event | None = None

    def decide(self, verdict: Verdict, present: Sequence[Trained], host: HostOptimizer, backward_done: Event) -> None:
        """Fill in ``verdict``; ``present`` are the parameters with a gradient, in optimizer order."""
        on_host = {trained.name: (total, events) for trained, total, events in host.host_norms()}
        if self._sent is not None:
            self._lanes.wait_compute(self._sent)  # the last verdict has left the device buffer
        verdict.on_device = self._device[:HEAD]
        verdict.on_host = self._host[: HEAD + len(present)]
        if on_host:
            self._on_host(verdict, verdict.on_host, present, on_host)
        else:
            self._on_device(verdict, verdict.on_host, present)

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


def _norm_into(target: Tensor, gradient: Tensor) -> None:
    target.copy_(gradient_norm(gradient))


def _norm(trained: Trained) -> Tensor:
    assert trained.norm is not None, trained.name
    return trained.norm
