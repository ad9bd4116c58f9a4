"""Tests the tester, as ``test_dependencies``: every dependency that zo2 declares is removed in turn.

A dependency is a pair of kinds of operations at one line of the source, so that no line hides behind another that
gives the same pair.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_offload.errors import RaceError
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import Event
from lightning_offload.methods.base import DTypes
from tests.helpers import Net, every
from tests.methods.test_zo2_independence import Kept, Sometimes, skip
from tests.zeroth import by_engine, net_loss, token_batches

Kind = tuple[str, str, str]
"""The function that declares it, what waits, and what for."""

BF16 = DTypes(compute=torch.bfloat16, rounding="stochastic")


class Recorder(CheckedLanes):
    """Notes each kind of dependency, and leaves one of them out."""

    def __init__(self, without: Kind | None = None) -> None:
        super().__init__(HostMemory(pin=False))
        self.without, self.kinds = without, set[Kind]()
        self.homes: dict[Event, int] = {}  # where a copy down lands

    def kept(self, operation: str, home: int, after: Iterable[Event]) -> list[Event]:
        site = sys._getframe(2).f_code
        assert Path(site.co_filename).name in ("streaming.py", "perturbed.py", "zeroth.py")
        kept = []
        for event in after:
            own = "its own " if home and self.homes.get(event) == home else ""
            kind = (site.co_name, operation, own + event.name)  # type: ignore[attr-defined]
            self.kinds.add(kind)
            if kind != self.without:
                kept.append(event)
        return kept

    def copy(self, dst: Any, src: Any, lane: Any, *, after: Any = (), priority: int = 0, tag: str = "") -> Event:
        home = (src if lane == "h2d" else dst)[0].data_ptr()
        event = super().copy(dst, src, lane, after=self.kept(f"{lane} {tag}", home, after), tag=tag)
        if lane == "d2h":
            self.homes[event] = home
        return event

    def wait_compute(self, *events: Event) -> None:
        super().wait_compute(*self.kept("compute", 0, events))


def scenario(make: Callable[[], Net], **more: Any) -> Callable[[Recorder], None]:
    def run(lanes: Recorder) -> None:
        by_engine(make(), token_batches(5), lanes=lanes, **more)

    return run


def evaluate(engine: Any, step: int) -> None:
    with torch.no_grad():
        net_loss(engine.module, token_batches(1)[0])


def flush(engine: Any, step: int) -> None:
    engine.flush()


SCENARIOS = [
    scenario(lambda: Net(depth=4)),
    scenario(lambda: Net(depth=4), slots=5, prefetch=3),
    scenario(lambda: Net(depth=2)),  # all of them stay in their slots
    scenario(lambda: Net(depth=4, frozen=True), write_back_every=2),
    scenario(lambda: Net(depth=4), noise="mezo"),
    scenario(lambda: Net(depth=4), dtypes=BF16, after_step=evaluate),
    scenario(lambda: Net(depth=4), slots=4, after_step=flush),
    scenario(lambda: Sometimes(depth=4), before_step=lambda net, step: skip(2, net, step)),
    scenario(lambda: Sometimes(depth=5), before_step=lambda net, step: skip(4, net, step), slots=4),
    scenario(Kept),
]


def all_kinds() -> list[Kind]:
    kinds: set[Kind] = set()
    for run in SCENARIOS:
        lanes = Recorder()
        run(lanes)
        kinds |= lanes.kinds
    return sorted(kinds)


def is_caught(kind: Kind) -> bool:
    for run in SCENARIOS:
        try:
            run(Recorder(kind))
        except RaceError:
            return True
    return False


def test_every_dependency_that_is_removed_is_caught() -> None:
    kinds = all_kinds()
    assert len(kinds) >= 7
    assert [kind for kind in kinds if not is_caught(kind)] == []


@pytest.mark.parametrize("scenario", every(2, range(len(SCENARIOS))))
def test_with_all_of_them_nothing_is_found(scenario: int) -> None:
    SCENARIOS[scenario](Recorder())
