"""Tests the tester, as ``test_dependencies``: every dependency that the rows of meft declare is removed in turn.

A dependency is a pair of kinds of operations at one line of the source.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lightning_offload.errors import RaceError
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import Event
from lightning_offload.methods import row_source
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.row_source import TURNS
from tests.meft import FFNNet, adapted, make_engine, micro_batch, step, tokens_of, undecayed

Kind = tuple[str, str, str]
"""The function that declares it, what waits, and what for."""

FILES = ("row_source.py", "row_optimizer.py", "slots.py")
BF16 = DTypes.of("bf16-true")


class Recorder(CheckedLanes):
    """Notes each kind of dependency, and leaves one of them out."""

    def __init__(self, without: Kind | None = None) -> None:
        super().__init__(HostMemory(pin=False))
        self.without, self.kinds = without, set[Kind]()

    def kept(self, operation: str, after: Iterable[Event]) -> list[Event]:
        site = sys._getframe(2).f_code
        kept = []
        for event in after:
            waits = (site.co_name, operation, event.name)  # type: ignore[attr-defined]
            kind: Any = tuple(part.replace("select", "gather") for part in waits)  # one line for both
            if Path(site.co_filename).name in FILES:
                self.kinds.add(kind)
            if kind != self.without:
                kept.append(event)
        return kept

    def copy(self, dst: Any, src: Any, lane: Any, *, after: Any = (), priority: int = 0, tag: str = "") -> Event:
        return super().copy(dst, src, lane, after=self.kept(f"{lane} {tag}", after), tag=tag)

    def host(
        self, fn: Callable[[], object], *, after: Any = (), priority: int = 0, tag: str = "", traffic_bytes: int = 0
    ) -> Event:
        return super().host(fn, after=self.kept(f"host {tag}", after), tag=tag)

    def wait_compute(self, *events: Event) -> None:
        super().wait_compute(*self.kept("compute", events))


def scenario(
    placement: str, *, dtypes: DTypes | None = None, turns: int = TURNS, **settings: Any
) -> Callable[[Recorder], None]:
    """Micro-batches of all lengths, and what users do between them."""

    def run(lanes: Recorder) -> None:
        more = {"make_optimizer": undecayed} if settings.get("row_optimizer") == "lazy" else {}
        with patch.object(row_source, "TURNS", turns):
            engine = make_engine(adapted(FFNNet(depth=2), **settings), placement, lanes, dtypes, **more, **settings)
        with lanes.checking():
            step(engine, tokens_of(0, length=3), tokens_of(1, length=2))
            step(engine, tokens_of(2, length=4))
            evaluates_before_the_step(engine)
            is_interrupted(engine)
            if dtypes is None:  # torch refuses it where a router is written by a copy
                goes_backward_again_after_the_step(engine)
            with torch.no_grad():
                engine.module.loss(tokens_of(2))
            engine.flush()
            step(engine, tokens_of(1))
            engine.adopt()
            step(engine, tokens_of(3))
        engine.detach()

    return run


def evaluates_before_the_step(engine: Engine) -> None:
    micro_batch(engine, tokens_of(3), last=True)
    with torch.no_grad():
        engine.module.loss(tokens_of(4))
    engine.step()


def is_interrupted(engine: Engine) -> None:
    """A network fails (say, for lack of memory), and training goes on without that micro-batch."""

    def fail(*_: Any) -> None:
        raise MemoryError

    for block in (0, 1, 1):
        hook = engine.module.blocks[block].mlp.down.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            micro_batch(engine, tokens_of(5))
        hook.remove()
    step(engine, tokens_of(6))


def goes_backward_again_after_the_step(engine: Engine) -> None:
    with engine.micro_batch():
        loss = engine.module.loss(tokens_of(7))
    loss.backward(retain_graph=True)
    engine.step()
    loss.backward()
    engine.step()


SCENARIOS = [
    scenario("host"),
    scenario("host", turns=5),
    scenario("host", dtypes=BF16, skip_nonfinite=False),
    scenario("host", row_optimizer="deferred"),
    scenario("host", row_optimizer="deferred", top_k=12, skip_nonfinite=False),
    scenario("host", row_optimizer="lazy", gate="none", skip_nonfinite=False),
    scenario("keys"),
    scenario("keys", row_optimizer="deferred", skip_nonfinite=False),
    scenario("device", dtypes=BF16),
]


BEYOND_BUFFERS = {
    ("_bring_up", "compute", "host gather"),
    ("_gradient", "d2h row gradients", "compute"),
}
"""The number of rows is a number, and gradients are tensors of autograd's: no buffers of the engine."""


def kinds_of(run: Callable[[Recorder], None]) -> set[Kind]:
    lanes = Recorder()
    run(lanes)
    return lanes.kinds


def is_caught(kind: Kind, run: Callable[[Recorder], None]) -> bool:
    try:
        run(Recorder(kind))
    except RaceError:
        return True
    return False


def test_every_dependency_that_is_removed_is_caught() -> None:
    kinds = [kinds_of(run) for run in SCENARIOS]
    declared = set[Kind]().union(*kinds)
    assert declared > BEYOND_BUFFERS
    where = {kind: [run for run, of in zip(SCENARIOS, kinds, strict=True) if kind in of] for kind in declared}
    unseen = {kind for kind in declared if not any(is_caught(kind, run) for run in where[kind])}
    assert unseen == BEYOND_BUFFERS


@pytest.mark.parametrize("scenario", range(len(SCENARIOS)))
def test_with_all_of_them_nothing_is_found(scenario: int) -> None:
    SCENARIOS[scenario](Recorder())
