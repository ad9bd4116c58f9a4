"""What would make a plan fit: the smallest changes, each tried by planning it.

A trial is a dry run, so none is made of a change that cannot reach what is missing (no batch is small enough for
weights that are too many), and none twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_offload.errors import OffloadError
from lightning_offload.planning.result import Advice, Plan
from lightning_offload.planning.scenario import FULL, NATIVE, Dry, Scenario, has_checkpointing

LEAST_CHUNK = 128
"""Tokens per chunk of the loss below which its matrix products become slow."""

EXPANDABLE = "PYTORCH_ALLOC_CONF=expandable_segments:True"
"""Not a key: it goes before the command."""

SUMS = "sums over micro-batches"
"""Row of host memory."""

_TRANSIENT = ("activations", "logits", "gradients", "batch", "allocator")


@dataclass(frozen=True)
class _Change:
    """One thing that is done differently: in words, on the command line, and to a scenario."""

    words: str
    override: str
    apply: Callable[[Scenario], Scenario]


@dataclass(frozen=True)
class _Tried:
    """A scenario after some changes, and what came of it."""

    scenario: Scenario
    plan: Plan
    changes: tuple[_Change, ...] = ()


def advise(scenario: Scenario, plan: Plan) -> tuple[Advice, ...]:
    """Changes after which the plan fits, the smallest first: each that is enough alone; where none is, several at once.

    Nothing where all that is known here, alone or together, is not enough.
    """
    return () if plan.fits else _Search(scenario, plan).advice()


class _Search:
    """Trials from one plan that does not fit."""

    def __init__(self, scenario: Scenario, plan: Plan) -> None:
        self.asked = _Tried(scenario, plan)
        self._known = {frozenset[str](): self.asked}

    def advice(self) -> tuple[Advice, ...]:
        """See ``advise``."""
        if _is_too_large(self.asked.plan):
            return ()
        alone = [self._expandable(), *(self._alone(propose) for propose in (*_PROPOSALS, _keep_on_device))]
        enough = [tried for tried in alone if tried is not None and tried.plan.fits]
        if not enough and (_can_reach(self.asked.plan) or any(propose(self.asked) for propose in _LASTING)):
            together = self._together()
            enough = [together] if together.plan.fits else []
        return tuple(self._advice(tried) for tried in enough)

    def _expandable(self) -> _Tried | None:
        """The allocator's other way, which costs no trial and no time."""
        plan = self.asked.plan
        other = plan.device_expandable
        if other is None or other.bytes >= plan.device.bytes:
            return None
        change = _Change("expandable segments, by the environment", EXPANDABLE, lambda scenario: scenario)
        return _Tried(self.asked.scenario, replace(plan, device=other), (change,))

    def _alone(self, propose: _Proposal) -> _Tried | None:
        if propose is _smaller_batch:
            return self._batch(self.asked) if _can_reach(self.asked.plan) else None
        change = propose(self.asked)
        if change is None or (propose in _TRANSIENT_ONLY and not _can_reach(self.asked.plan)):
            return None
        return self._try([change])

    def _together(self) -> _Tried:
        """One change after the other until it fits; then without those that were not needed."""
        tried = self.asked
        for propose in _PROPOSALS:
            change = propose(tried)
            if change is not None:
                tried = self._try([*tried.changes, change])
            if tried.plan.fits:
                break
        for change in tried.changes[:-1] if tried.plan.fits else ():
            tried = self._without(tried, change)
        return tried

    def _without(self, tried: _Tried, change: _Change) -> _Tried:
        """The same without this change where it still fits then; with larger micro-batches, where they were halved."""
        fewer = self._try([other for other in tried.changes if other is not change])
        if not fewer.plan.fits and change.override.startswith("data."):
            fewer = self._batch(fewer) or fewer
        return fewer if fewer.plan.fits else tried

    def _batch(self, tried: _Tried) -> _Tried | None:
        """The largest micro-batch that fits and leaves the samples per step as they are."""
        smallest = _smaller_batch(tried)
        if smallest is None:
            return None
        least = self._try([*tried.changes, smallest])
        if not least.plan.fits:
            return None
        whole = tried.scenario.batch_size
        most = 1 + (whole - 1) * _missing(least.plan) / (_missing(least.plan) - _missing(tried.plan))  # by a line
        likely = [size for size in range(2, whole) if whole % size == 0 and size <= most]
        for size in likely[:-3:-1]:
            larger = self._try([*tried.changes, _micro_batches(tried.scenario, size)])
            if larger.plan.fits:
                return larger
        return least

    def _try(self, changes: Sequence[_Change]) -> _Tried:
        key = frozenset(change.override for change in changes)
        if key not in self._known:
            scenario = self.asked.scenario
            for change in changes:
                scenario = change.apply(scenario)
            try:
                plan = Dry(scenario).plan(only_if_it_fits=True)
            except OffloadError:  # a step that needs several samples, say
                plan = self.asked.plan
            self._known[key] = _Tried(scenario, plan, tuple(changes))
        return self._known[key]

    def _advice(self, tried: _Tried) -> Advice:
        asked = self.asked.plan
        return Advice(
            changes=tuple(change.words for change in tried.changes),
            overrides=tuple(change.override for change in tried.changes),
            device_bytes_saved=asked.device.bytes - tried.plan.device.bytes,
            host_bytes_saved=asked.host.bytes - tried.plan.host.bytes,
            step_s=tried.plan.step_s,
        )


_Proposal = Callable[[_Tried], _Change | None]


def _offload(tried: _Tried) -> _Change | None:
    if tried.scenario.method != NATIVE:
        return None
    words = "optimizer state and masters in host memory"
    return _Change(words, "method=full", lambda scenario: replace(scenario, method=FULL))


def _checkpoint(tried: _Tried) -> _Change | None:
    scenario = tried.scenario
    if scenario.checkpointing or not has_checkpointing(scenario.module):
        return None
    return _Change(
        "activations computed again in backward",
        "model.gradient_checkpointing=true",
        lambda scenario: replace(scenario, checkpointing=True),
    )


def _chunked_loss(tried: _Tried) -> _Change | None:
    """For models that take their loss in chunks, as those of the package do."""
    scenario = tried.scenario
    now = getattr(scenario.module, "loss_chunk_tokens", None) if scenario.step is None else None
    tokens = tried.plan.tokens // scenario.micro_batches
    if now is None or scenario.loss_chunk_tokens is not None or min(now or tokens, tokens) <= LEAST_CHUNK:
        return None
    return _Change(
        f"the loss in chunks of {LEAST_CHUNK} tokens",
        f"model.loss_chunk_tokens={LEAST_CHUNK}",
        lambda scenario: replace(scenario, loss_chunk_tokens=LEAST_CHUNK),
    )


def _smaller_batch(tried: _Tried) -> _Change | None:
    return _micro_batches(tried.scenario, 1) if tried.scenario.batch_size > 1 else None


def _micro_batches(scenario: Scenario, size: int) -> _Change:
    count = scenario.with_batch_size(size).micro_batches
    return _Change(
        f"micro-batches of {size}, {count} of them per step",
        f"data.batch_size={size} trainer.accumulate_grad_batches={count}",
        lambda scenario: scenario.with_batch_size(size),
    )


def _accumulate_elsewhere(tried: _Tried) -> _Change | None:
    """On the device where the host has too little, in host memory where the device has."""
    scenario, plan = tried.scenario, tried.plan
    if scenario.method == NATIVE or scenario.micro_batches < 2 or scenario.machine.device_type == "cpu":
        return None
    sums = plan.host.holds.get(SUMS, 0)
    if sums and not plan.host.fits:
        return _accumulate("device", "micro-batches accumulate on the device")
    if not sums and not plan.device.fits:
        return _accumulate("host", "micro-batches accumulate in host memory")
    return None


def _accumulate(where: Literal["device", "host"], words: str) -> _Change:
    def apply(scenario: Scenario) -> Scenario:
        return replace(scenario, settings=replace(scenario.settings, accumulate=where))

    return _Change(words, f"trainer.strategy.accumulate={where}", apply)


def _precision(tried: _Tried) -> _Change | None:
    if tried.scenario.precision == "bf16-true":
        return None
    masters = "without fp32 masters" if tried.scenario.method == NATIVE else "fp32 masters on the host"
    return _Change(
        f"bf16 weights, {masters}", "precision=bf16-true", lambda scenario: replace(scenario, precision="bf16-true")
    )


def _keep_on_device(tried: _Tried) -> _Change | None:
    """Where the host is what is too small; under bf16-true small updates would be lost without masters."""
    if tried.scenario.method == NATIVE or tried.plan.host.fits or tried.scenario.precision == "bf16-true":
        return None
    return _Change("everything on the device", "method=none", lambda scenario: replace(scenario, method=NATIVE))


_PROPOSALS: tuple[_Proposal, ...] = (
    _offload,
    _checkpoint,
    _chunked_loss,
    _smaller_batch,
    _accumulate_elsewhere,
    _precision,
)
"""In the order in which they are put together: what changes least first."""

_TRANSIENT_ONLY = (_checkpoint, _chunked_loss)
"""Those that save nothing of what is held all the time."""

_LASTING = (_offload, _accumulate_elsewhere, _precision)
"""Those that do."""


def _is_too_large(plan: Plan) -> bool:
    """Whether the weights alone are too many for the device, even in 16 bits."""
    return plan.device.limit_bytes is not None and 2 * plan.parameters > plan.device.limit_bytes


def _can_reach(plan: Plan) -> bool:
    """Whether there is room for what is held all the time, all of it in host memory where the device is another."""
    transient = sum(count for kind, count in plan.device.holds.items() if kind.startswith(_TRANSIENT))
    places = [(plan.device, transient), (plan.host, transient if plan.device.limit_bytes is None else 0)]
    return all(
        memory.fits or memory.bytes - 1.02 * transient <= (memory.limit_bytes or 0)  # kernels' workspaces: 2 %
        for memory, transient in places
    )


def _missing(plan: Plan) -> int:
    """Bytes too many, of the place where that is most; negative where there is room."""
    places = (plan.device, plan.host)
    return max(memory.bytes - memory.limit_bytes for memory in places if memory.limit_bytes is not None)
