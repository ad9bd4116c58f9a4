"""What would make a plan fit: the smallest changes, each tried by planning it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lightning_offload.planning.result import Advice, Plan
from lightning_offload.planning.scenario import FULL, NATIVE, Dry, Scenario, has_checkpointing

_TRANSIENT = ("activations", "logits", "gradients", "batch", "allocator")


@dataclass(frozen=True)
class _Tried:
    """A scenario after some changes, and what came of it."""

    scenario: Scenario
    plan: Plan
    words: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def then(self, words: str, override: str, scenario: Scenario) -> _Tried:
        return _Tried(scenario, Dry(scenario).plan(), (*self.words, words), (*self.overrides, override))


_Change = Callable[[_Tried], _Tried | None]


def advise(scenario: Scenario, plan: Plan) -> tuple[Advice, ...]:
    """Changes after which the plan fits, fastest first: each that is enough alone; where none is, several together.

    Nothing where no change that is known here is enough. A change that cannot reach what is missing is not tried: no
    batch is small enough for weights that are too many.
    """
    if plan.fits:
        return ()
    asked = _Tried(scenario, plan)
    alone = [tried for change in _CHANGES if (tried := change(asked)) is not None and tried.plan.fits]
    if alone:
        return tuple(_advice(asked, tried) for tried in sorted(alone, key=lambda tried: tried.plan.step_s))
    together = asked
    for change in _CHANGES:
        together = change(together) or together
        if together.plan.fits:
            return (_advice(asked, together),)
    return ()


def _advice(asked: _Tried, tried: _Tried) -> Advice:
    return Advice(
        changes=tried.words,
        overrides=tried.overrides,
        device_bytes_saved=asked.plan.device.bytes - tried.plan.device.bytes,
        host_bytes_saved=asked.plan.host.bytes - tried.plan.host.bytes,
        step_s=tried.plan.step_s,
    )


def _checkpoint(tried: _Tried) -> _Tried | None:
    scenario = tried.scenario
    if scenario.checkpointing or not has_checkpointing(scenario.module) or not _can_save_transient(tried.plan):
        return None
    changed = replace(scenario, checkpointing=True)
    return tried.then("recompute activations in backward", "model.gradient_checkpointing=true", changed)


def _batch(tried: _Tried) -> _Tried | None:
    """The largest micro-batch that fits, by what a sample takes; the smallest if none does."""
    if tried.scenario.batch_size < 2 or not _can_save_transient(tried.plan):
        return None
    return next((smaller for smaller in _smaller(tried) if smaller.plan.fits or smaller.scenario.batch_size == 1), None)


def _smaller(tried: _Tried) -> Iterator[_Tried]:
    size, plan = tried.scenario.batch_size, tried.plan
    while size > 1:
        room = min(_share_of_room(plan), 0.999)
        size = max(1, int(size * room))
        scenario = tried.scenario.with_batch_size(size)
        words = f"micro-batches of {size}, {scenario.micro_batches} of them per step"
        override = f"data.batch_size={size} trainer.accumulate_grad_batches={scenario.micro_batches}"
        smaller = tried.then(words, override, scenario)
        plan = smaller.plan
        yield smaller


def _share_of_room(plan: Plan) -> float:
    """How much of what grows with the batch there is room for."""
    place = plan.device if plan.device.limit_bytes is not None else plan.host
    grows = sum(count for kind, count in plan.device.holds.items() if kind.startswith(_TRANSIENT))
    assert place.limit_bytes is not None
    return (place.limit_bytes - place.bytes + grows) / max(grows, 1)


def _accumulate_on_host(tried: _Tried) -> _Tried | None:
    scenario = tried.scenario
    if scenario.method != FULL or scenario.micro_batches < 2 or scenario.settings.accumulate == "host":
        return None
    if scenario.machine.device_type == "cpu" or not _can_save_transient(tried.plan):
        return None
    changed = replace(scenario, settings=replace(scenario.settings, accumulate="host"))
    return tried.then("micro-batches accumulate in host memory", "trainer.strategy.accumulate=host", changed)


def _precision(tried: _Tried) -> _Tried | None:
    if tried.scenario.precision == "bf16-true":
        return None
    changed = replace(tried.scenario, precision="bf16-true")
    return tried.then("bf16 weights on the device, fp32 masters on the host", "precision=bf16-true", changed)


def _offload(tried: _Tried) -> _Tried | None:
    if tried.scenario.method != NATIVE:
        return None
    return tried.then("optimizer state and masters in host memory", "method=full", replace(tried.scenario, method=FULL))


_CHANGES: tuple[_Change, ...] = (_offload, _checkpoint, _batch, _accumulate_on_host, _precision)
"""In the order in which they are put together: what costs least first."""


def _can_save_transient(plan: Plan) -> bool:
    return _share_of_room(plan) > 0
