"""Preallocated device buffers that are used in turn: fixed memory, so no allocator growth and no ``record_stream``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_offload.memory.lanes import Event, Lanes


@dataclass(eq=False)
class Slot:
    """One buffer of a ring and the event after which its last reader is done."""

    buffer: Tensor
    free: Event | None = None


class Ring:
    """``count`` device buffers of ``numel`` elements each, handed out in turn.

    ``take`` makes the *compute* lane wait until the slot's last reader is done; the caller then fills the buffer on
    the compute lane and sets ``slot.free`` to the event of whatever reads it.
    """

    def __init__(self, lanes: Lanes, name: str, numel: int, dtype: torch.dtype, count: int) -> None:
        self.numel = numel
        self._lanes = lanes
        self._slots = [Slot(buffer) for buffer in lanes.buffers(name, [numel] * count, dtype, "device")]
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Device bytes the ring holds."""
        return sum(slot.buffer.numel() * slot.buffer.element_size() for slot in self._slots)

    def take(self) -> Slot:
        """The next slot, safe to be overwritten by compute issued from here on."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        if slot.free is not None:
            self._lanes.wait_compute(slot.free)  # its last copy down has read the buffer
        return slot


class Staging:
    """Page-locked host buffers that are taken in turn; one that turns out too small is made anew, larger.

    Whoever takes one puts ``slot.free`` into the ``after=`` of what writes it, and sets it to the event of its reader.
    """

    def __init__(self, lanes: Lanes, name: str, dtype: torch.dtype, count: int, *, numel: int = 0) -> None:
        self._lanes, self._name, self._dtype = lanes, name, dtype
        self._made = 0
        self._slots = [self._make(numel) for _ in range(count)]
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Host bytes of the buffers."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    def take(self, numel: int) -> Slot:
        """The next one, with at least ``numel`` elements."""
        at, self._next = self._next, (self._next + 1) % len(self._slots)
        held = self._slots[at].buffer.numel()
        if held < numel:  # at least doubled: what was outgrown stays mapped
            self._slots[at] = self._make(max(numel, 2 * held))
        return self._slots[at]

    def _make(self, numel: int) -> Slot:
        self._made += 1
        (buffer,) = self._lanes.buffers(f"{self._name}.{self._made}", [numel], self._dtype, "pinned")
        return Slot(buffer)


class Loans:
    """Device buffers of any size that are lent one by one, and are all given back at once.

    Whoever fills one again does so after all compute that was issued before it was given back.
    """

    SPARE = 1.25
    """Room for a larger need of the same borrower, so that buffers are seldom made."""

    def __init__(self, lanes: Lanes, name: str, dtype: torch.dtype) -> None:
        self._lanes, self._name, self._dtype = lanes, name, dtype
        self._idle: list[Tensor] = []
        self._lent: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Device bytes of all buffers."""
        return sum(buffer.nbytes for buffer in (*self._idle, *self._lent))

    def lend(self, numel: int, most: int) -> Tensor:
        """One of at least ``numel`` elements, the smallest there is; made for up to ``most`` where there is none."""
        fitting = [buffer for buffer in self._idle if buffer.numel() >= numel]
        if fitting:
            chosen = self._remove(min(fitting, key=Tensor.numel))
        else:
            if self._idle:  # all too small
                self._lanes.unwatch(self._remove(max(self._idle, key=Tensor.numel)))
            (chosen,) = self._lanes.buffers(self._name, [min(int(numel * self.SPARE), most)], self._dtype, "device")
        self._lent.append(chosen)
        return chosen

    def give_back(self) -> None:
        """Nobody who is issued from here on reads them."""
        self._idle += self._lent
        self._lent = []

    def close(self) -> None:
        """Let go of all; nothing is in flight."""
        self._idle, self._lent = [], []

    def _remove(self, buffer: Tensor) -> Tensor:
        self._idle = [other for other in self._idle if other is not buffer]
        return buffer
