"""Deltas on their way up through a few device slots, in the order in which the next forward needs them.

A unit has its slot by its place in that order. Those that come first go up as soon as the host has made them; each
further one when the unit before it in its slot has been applied, some units ahead of its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lightning_offload.memory.arena import aligned
from lightning_offload.memory.lanes import Event, Lanes
from lightning_offload.methods.base import Flight

Apply = Callable[["Parcel", list[Tensor]], None]
"""Puts deltas, as they lie in a slot, into the weights; runs on the compute lane."""


@dataclass(eq=False)
class Parcel:
    """The deltas of one unit.

    Attributes:
        flight: The unit's.
        deltas: Elements and dtype of each.
        wires: Where the host has them; None: another rank's host has it.
        made: After this they are there.
        apply: See ``Apply``.
        left: The copy up, once it has been issued.
        landed: Whether they have been applied.
    """

    flight: Flight
    deltas: list[tuple[int, torch.dtype]]
    wires: list[Tensor | None]
    made: Event
    apply: Apply
    left: Event | None = None
    landed: bool = False


@dataclass(eq=False)
class _Slot:
    buffer: Tensor
    free: Event | None = None
    holds: Parcel | None = None
    waiting: list[Parcel] = field(default_factory=list)


class Deliveries:
    """See the module docstring.

    Args:
        lanes: Where it runs.
        flights: Those of all units that may send.
        slot_bytes: Of the largest parcel, see ``slot_bytes``.
        ahead: How many units may be on their way at once.
    """

    def __init__(self, lanes: Lanes, flights: Sequence[Flight], slot_bytes: int, ahead: int) -> None:
        self._lanes, self._flights = lanes, list(flights)
        buffers = lanes.buffers("deltas", [slot_bytes] * min(ahead, len(flights)), torch.uint8, "device")
        self._slots = [_Slot(buffer) for buffer in buffers]

    @property
    def nbytes(self) -> int:
        """Device bytes."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def send(self, parcel: Parcel) -> None:
        """Send up as soon as its turn comes; those that follow others in their slot wait for ``settle`` at least."""
        place = sorted(self._flights, key=lambda flight: flight.order).index(parcel.flight)
        slot = self._slots[place % len(self._slots)]
        slot.waiting.append(parcel)
        parcel.flight.launch(partial(self._land, slot, parcel))
        if place < len(self._slots):
            self._fill(slot)

    def settle(self) -> None:
        """Every unit of this step has been sent: nobody waits for one that does not come."""
        for slot in self._slots:
            self._fill(slot)

    def close(self) -> None:
        """Give the slots back to the device; nothing is in flight, and nothing will be sent any more."""
        self._slots = []

    def _fill(self, slot: _Slot) -> None:
        """Send up the first that waits, if the slot is empty."""
        if slot.holds is not None or not slot.waiting:
            return
        parcel = slot.holds = min(slot.waiting, key=lambda parcel: parcel.flight.order)
        slot.waiting.remove(parcel)
        places = views(slot.buffer, parcel.deltas)
        mine = [(place, wire) for place, wire in zip(places, parcel.wires, strict=True) if wire is not None]
        parcel.left = self._lanes.copy(
            [place for place, _ in mine],
            [wire for _, wire in mine],
            "h2d",
            after=[parcel.made, *([slot.free] if slot.free is not None else [])],
            priority=parcel.flight.order,
            tag="deltas",
        )

    def _land(self, slot: _Slot, parcel: Parcel) -> None:
        """Out of turn, whoever is in its place is applied first: its weights are not in use either."""
        while not parcel.landed:
            self._fill(slot)
            assert slot.holds is not None
            self._apply(slot, slot.holds)
        self._fill(slot)

    def _apply(self, slot: _Slot, parcel: Parcel) -> None:
        assert parcel.left is not None
        self._lanes.wait_compute(parcel.left)
        parcel.apply(parcel, views(slot.buffer, parcel.deltas))
        slot.holds, slot.free, parcel.landed = None, self._lanes.compute(), True


def slot_bytes(wires: Sequence[tuple[int, torch.dtype]]) -> int:
    """Device bytes that these deltas (elements, dtype) take in a slot."""
    return sum(aligned(numel * dtype.itemsize) for numel, dtype in wires)


def views(buffer: Tensor, deltas: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Where each of ``deltas`` (elements, dtype) lies in a slot."""
    made, start = [], 0
    for numel, dtype in deltas:
        nbytes = numel * dtype.itemsize
        made.append(buffer[start : start + nbytes].view(dtype))
        start += aligned(nbytes)
    return made
