"""Weights of ``zo2``: seen moved along z in forwards, and up to date with the log of updates when they are needed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor

from lightning_offload.methods.noises import Noise
from lightning_offload.methods.steplog import Entry
from lightning_offload.methods.streaming import Berth, Leaf, Streaming

MOST_KEPT = 64
"""Steps by which a unit that does not run may fall behind; then it is brought up for its updates alone."""


@dataclass(frozen=True)
class Stream:
    """One of the forwards of a micro-batch.

    Attributes:
        direction: Which draw of z.
        sign: +1 or -1.
        part: Which part of the batch.
    """

    direction: int
    sign: int
    part: int


class Perturbed(Streaming):
    """Weights that are shown moved along z while streams are set, and that catch up with the updates when they come.

    Attributes:
        streams: Of the micro-batch that is running; empty where forwards see the weights as they are.
        step: Whose z they are moved along.
        seed: Of that z.
        updates: Entries of each step that some unit may not have seen, oldest first.
        gone: Steps before those.
        write_back_every: Steps between two copies home.
    """

    noise: Noise
    streams: Sequence[Stream] = ()
    step = 0
    seed = 0
    gone = 0
    write_back_every = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.updates: list[list[Entry]] = []
        super().__init__(*args, **kwargs)

    @property
    def head(self) -> int:
        """Updates so far."""
        return self.gone + len(self.updates)

    def push(self, entries: list[Entry]) -> None:
        """One step's updates, for every unit to apply when it comes by."""
        self.updates.append(entries)
        self.catch_up(behind=max(MOST_KEPT, self.write_back_every))
        seen = min((berth.host_seen for berth in self.berths if berth.trained), default=self.head)
        del self.updates[: seen - self.gone]
        self.gone = seen

    def catch_up(self, behind: int = 0) -> None:
        """Every unit that is more than ``behind`` updates behind sees all of them, at home too."""
        for berth in self.berths:
            if berth.trained and berth.host_seen < self.head - behind:
                self._come_up(berth)
                self._apply(berth)
                self._write_back(berth)
                self._release(berth)

    def skip_to_head(self) -> None:
        """The weights at rest have seen all updates: they were loaded so."""
        for berth in self.berths:
            berth.host_seen = berth.device_seen = self.head

    def _refresh(self, berth: Berth) -> None:
        self._apply(berth)
        behind = berth.device_seen - berth.host_seen
        if behind >= (1 if berth.resident else self.write_back_every):
            self._write_back(berth)

    def _apply(self, berth: Berth) -> None:
        if not berth.trained or berth.device_seen == self.head:
            return
        entries = list(chain.from_iterable(self.updates[berth.device_seen - self.gone :]))
        berth.device_seen = self.head
        self._lanes.mark("update", berth.unit.index)
        if berth.written is not None:  # of a unit that has stayed in its slot since it was written back
            self._lanes.wait_compute(berth.written)
        for leaf, weight in zip(berth.trained, berth.on_device, strict=False):
            key = ("update", leaf.parameter.shape, weight.dtype, len(entries))
            self._lanes.run(key, partial(self.noise.apply, leaf, weight, entries))

    def _phase(self, stream: int) -> str:
        if not self.streams:
            return super()._phase(stream)
        return "l+" if self.streams[stream].sign > 0 else "l-"

    def _changes(self, leaf: Leaf) -> bool:
        return leaf.group is not None or super()._changes(leaf)

    def _fill(self, leaf: Leaf, weight: Tensor, out: Tensor, stream: int) -> None:
        if leaf.group is None or not self.streams:
            super()._fill(leaf, weight, out, stream)
            return
        seen, step, seed = self.streams[stream], self.step, self.seed
        self._lanes.run(
            ("perturb", leaf.parameter.shape, weight.dtype, out.dtype),
            lambda: self.noise.show(leaf, weight, out, seed=seed, step=step, direction=seen.direction, sign=seen.sign),
        )

    def _kind(self, stream: int) -> Hashable:
        return (self.streams[stream].direction, self.streams[stream].sign) if self.streams else None

    def _version(self, berth: Berth) -> Hashable:
        return (berth.device_seen, self.step, self.seed)  # a step that was dropped is begun anew with another seed
