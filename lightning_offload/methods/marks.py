"""Which unit compute is working for, as far as hooks can tell: what a timeline shows of the compute lane."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from lightning_offload.memory.lanes import Lanes
from lightning_offload.methods.base import Flight, Trained


class Marks:
    """Tells the lanes where forward, backward and step of each unit begin; orders nothing.

    A forward is seen at the door of each unit. Backward is seen only through recomputations and through the gradients
    that are offloaded: with the last of a unit it goes on to the unit before that has any. So what a unit without
    them costs (a norm between the blocks and the head) is counted with the next one.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._expected: Counter[int] = Counter()  # gradients of one backward, per unit
        self._arrived: Counter[int] = Counter()
        self._flights: set[Flight] = set()
        self._before: dict[int, int] = {}  # the unit that backward reaches next, by their orders
        self._now = ("", -1)

    def expect(self, trained: Sequence[Trained]) -> None:
        """These gradients will be told of."""
        self._expected = Counter(t.unit.index for t in trained)
        self._flights = {t.flight for t in trained}

    def unit(self, flight: Flight, *, recomputed: bool) -> None:
        """A call of the unit begins."""
        if recomputed:
            self._mark("backward", flight.order)
            return
        if self._now[0] != "forward":
            self._begin()
        self._mark("forward", flight.order)

    def forward_done(self) -> None:
        """Backward follows, and begins where forward ended; nothing to say where it has already been."""
        if self._now[0] == "forward":
            self._mark("backward", self._now[1])

    def gradient(self, trained: Trained) -> None:
        """A gradient has arrived and has been taken."""
        index, order = trained.unit.index, trained.flight.order
        self._arrived[index] += 1
        if order == 0:  # its place is not known
            return
        if self._arrived[index] >= self._expected[index]:
            order = self._before.get(order, 0)
        self._mark(*(("backward", order) if order else ("", -1)))

    def step(self) -> None:
        """The compute lane's part of the optimizer step begins."""
        self._mark("step", -1)

    def done(self) -> None:
        """Nothing is issued until somebody says so."""
        self._mark("", -1)

    def _begin(self) -> None:
        self._arrived.clear()
        orders = sorted({flight.order for flight in self._flights})
        self._before = {order: before for before, order in pairwise(orders)}

    def _mark(self, kind: str, order: int) -> None:
        self._now = (kind, order)
        self._lanes.mark(kind, order)
