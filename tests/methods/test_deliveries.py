"""Who comes up when: three units at most, those that are needed first come first, and out of turn all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import Event, InlineLanes
from lightning_offload.methods.base import Clip, Flight
from lightning_offload.methods.deliveries import Deliveries, Parcel, slot_bytes
from tests.helpers import Net, lanes_of, train
from tests.projected import lsp

AHEAD = 3


class Noting(InlineLanes):
    """Keeps what was asked of each lane, in order."""

    def __init__(self) -> None:
        super().__init__(HostMemory())
        self.asked: list[tuple[str, str, int]] = []

    def copy(self, dst: Any, src: Any, lane: Any, *, after: Any = (), priority: int = 0, tag: str = "") -> Event:
        self.asked.append((lane, tag, priority))
        return super().copy(dst, src, lane, after=after, priority=priority, tag=tag)

    def host(self, fn: Callable[[], object], *, priority: int = 0, tag: str = "", **kwargs: Any) -> Event:
        self.asked.append(("host", tag, priority))
        return super().host(fn, priority=priority, tag=tag, **kwargs)


class Depot:
    """Units with one delta each, ``Deliveries`` between them, and what has been applied."""

    def __init__(self, count: int) -> None:
        self.lanes, self.applied = Noting(), list[tuple[int, float]]()
        self.flights = [Flight(order + 1) for order in range(count)]
        self.wires = [torch.zeros(4 + unit) for unit in range(count)]
        largest = slot_bytes([(4 + count, torch.float32)])
        self.deliveries = Deliveries(self.lanes, self.flights, largest, AHEAD)

    def send(self, unit: int, value: float) -> None:
        self.wires[unit].fill_(value)

        def apply(parcel: Parcel, deltas: list[Tensor]) -> None:
            assert len(deltas[0].unique()) == 1
            assert deltas[0].numel() == 4 + unit
            self.applied.append((unit, float(deltas[0][0])))

        wire = self.wires[unit]
        sizes = [(wire.numel(), wire.dtype)]
        self.deliveries.send(Parcel(self.flights[unit], sizes, [wire], self.lanes.compute(), apply))

    @property
    def on_their_way(self) -> int:
        return sum(1 for lane, tag, _ in self.lanes.asked if (lane, tag) == ("h2d", "deltas")) - len(self.applied)


def test_three_units_are_ahead_and_each_further_one_follows_an_application() -> None:
    depot = Depot(7)
    for unit in reversed(range(7)):
        depot.send(unit, unit)
    depot.deliveries.settle()
    assert [order for _, _, order in depot.lanes.asked] == [3, 2, 1]
    for unit in range(7):
        assert depot.on_their_way == min(AHEAD, 7 - unit)
        depot.flights[unit].land()
    assert [order for _, _, order in depot.lanes.asked] == [3, 2, 1, 4, 5, 6, 7]
    assert depot.applied == [(unit, unit) for unit in range(7)]


def test_a_unit_without_a_delta_is_not_waited_for() -> None:
    depot = Depot(7)
    for unit in (6, 5, 4, 3):
        depot.send(unit, unit)
    assert depot.on_their_way == 0  # their predecessors may still be sent
    depot.deliveries.settle()
    assert depot.on_their_way == AHEAD
    for unit in range(7):
        depot.flights[unit].land()
    assert depot.applied == [(unit, unit) for unit in (3, 4, 5, 6)]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), count=st.integers(1, 9))
def test_any_entry_order_applies_each_delta_once_and_before_its_unit(data: st.DataObject, count: int) -> None:
    """Steps in which some units send and all enter, in any order; a unit that enters has nothing under way."""
    depot, expected = Depot(count), dict[int, list[float]]()
    for step in range(3):
        senders = data.draw(st.lists(st.sampled_from(range(count)), unique=True))
        for unit in senders:
            depot.send(unit, step * 100 + unit)
            expected.setdefault(unit, []).append(step * 100 + unit)
            assert depot.on_their_way <= AHEAD
        depot.deliveries.settle()
        for unit in data.draw(st.permutations(range(count))):
            depot.flights[unit].land()
            assert [value for which, value in depot.applied if which == unit] == expected.get(unit, [])
            assert depot.on_their_way <= AHEAD
    assert depot.on_their_way == 0


class Backwards(Net):
    """Runs its blocks in an order of its own from the third forward on."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(tokens)
        for block in self.blocks if self.calls < 3 else reversed(self.blocks):
            x = block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("kind", ["checked", "shuffled"])
@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_units_that_enter_out_of_turn_have_the_same_weights(kind: str, skip_nonfinite: bool) -> None:
    """Deltas land for a unit that is not in its turn as if everything had been flushed after each step."""
    method = {"skip_nonfinite": skip_nonfinite, "refit_every": 1, "projector": "block"}
    kept: list[Any] = []
    patient = train(
        Backwards(depth=7),
        lanes_of("inline"),
        method=lsp(**method),
        after_attach=lambda engine: kept.append(flushing(engine)),
    )
    ours = train(Backwards(depth=7), lanes_of(kind), method=lsp(**method))
    assert ours.losses == patient.losses
    assert all(torch.equal(weight, patient.weights[name]) for name, weight in ours.weights.items())
    assert kept[0]


def flushing(engine: Any) -> list[int]:
    """Waits for all deltas after each step."""
    plain, flushed = engine.step, list[int]()

    def step(clip: Any = None) -> None:
        plain(clip)
        engine.flush()
        flushed.append(1)

    engine.step = step
    return flushed


@pytest.mark.parametrize("clip", [False, True])
def test_who_is_needed_first_comes_first(clip: bool) -> None:
    """On host and h2d lanes the place in the forward is the priority, and not the place in the module."""

    class Reordered(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for index in (4, 2, 0, 3, 1):
                x = self.blocks[index](x)
            return self.head(self.norm(x))

    lanes = Noting()
    run = train(
        Reordered(depth=5), lanes, steps=3, clip=Clip(0.05) if clip else None, method=lsp(refit_every=float("inf"))
    )
    assert run.engine is not None
    place = {unit.name: run.engine.arrivals.flights[unit.index].order for unit in run.engine.units}
    orders = [place[f"blocks.{index}"] for index in (4, 2, 0, 3, 1)]
    assert orders == sorted(orders)
    assert len(set(orders)) == 5
    deltas = [order for lane, tag, order in lanes.asked if (lane, tag) == ("h2d", "deltas")]
    assert set(deltas) == set(orders)
    assert sorted(deltas[5:8]) == orders[:3]  # those needed first went up when they were made
    assert deltas[8:10] == orders[3:]  # the others when a slot was free again
    steps = [order for lane, tag, order in lanes.asked if (lane, tag) == ("host", "step")]
    assert set(steps) >= set(orders)
    assert sum(order in orders for order in steps) == 3 * 5 * 2  # what is projected of a unit, and its norm and bias
