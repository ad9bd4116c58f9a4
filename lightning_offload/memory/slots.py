"""Preallocated device buffers that are used in turn: fixed memory, so no allocator growth and no ``record_stream``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_offload.memory.lanes import Event, Lanes


@dataclass
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
