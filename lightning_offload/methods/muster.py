"""Gradients of several ranks meet: in one order everywhere, whatever order they come in and whoever has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_offload.memory.peers import Peers
from lightning_offload.methods.base import Trained


class Muster:
    """See the module docstring. With one rank it stands in nobody's way.

    Every rank averages every gradient in one order, zeros where it has none; then they tell each other who had any.

    Attributes:
        met: Whether everything of this step has been averaged already, while it was visible.

    Args:
        peers: The other ranks.
        deliver: Averages one gradient and sends it off.
        waits: Whether a parameter has a gradient that has not been sent.
        forget: Takes back what has been sent for a parameter that no rank has a gradient of.
    """

    def __init__(
        self,
        peers: Peers,
        deliver: Callable[[Trained], None],
        waits: Callable[[Trained], bool],
        forget: Callable[[Trained], None],
    ) -> None:
        self._peers, self._deliver, self._waits, self._forget = peers, deliver, waits, forget
        self.met = False
        self._order: list[Trained] = []
        self._place: dict[int, int] = {}
        self._staying: list[Trained] = []
        self._here: set[int] = set()
        self._next = 0

    def expect(self, leaving: Sequence[Trained], staying: Sequence[Trained]) -> None:
        """Whose gradients leave, the last unit's first as backward has it, and whose stay until the step."""
        self._order = sorted(leaving, key=lambda t: (-t.unit.index, t.group, t.position))
        self._place = {id(trained): place for place, trained in enumerate(self._order)}
        self._staying = list(staying)

    def arrived(self, trained: Trained) -> None:
        """Deliver it when its turn comes: after all that come before it on every rank."""
        place = self._place.get(id(trained), -1)
        if self._peers.world == 1 or place < self._next:  # or a second gradient of this step
            self._deliver(trained)
            return
        self._here.add(place)
        while self._next in self._here:
            self._next += 1
            self._deliver(self._order[self._next - 1])

    def finish(self) -> None:
        """Backward is over: deliver the others."""
        if self._peers.world == 1 or self.met:
            return
        had = self._fill()
        for trained in self._order[self._next :]:
            self._deliver(trained)
        self._next = len(self._order)
        again = [self._waits(trained) for trained in self._order]  # a second one has come, the first was taken back
        anywhere = self._peers.any([*had, *again])
        for trained, there, here in zip(self._order, anywhere[len(had) :], again, strict=True):
            if there and not here:
                trained.parameter.grad = _zeros(trained)
                self._deliver(trained)
        self._leave_alone(anywhere)

    def meet(self) -> None:
        """Backward is over and others are to look: every gradient becomes the mean over ranks, where it is."""
        had = self._fill()
        self.mean_([t.gradient() for t in (*self._order, *self._staying)], "gradients")
        self.met = True
        self._leave_alone(self._peers.any(had))

    def mean_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Means over ranks, unless these have met."""
        if tensors and not self.met:
            self._peers.mean_(tensors, what)

    def reset(self) -> None:
        """The step is over, or given up."""
        self.met, self._next = False, 0
        self._here.clear()

    def release(self) -> None:
        """Hold nobody any more: hooks in C++ hide from the collector that nothing else does."""
        self._deliver = self._forget = lambda trained: None
        self._waits = lambda trained: False

    def _fill(self) -> list[bool]:
        """Zeros where this rank has nothing; whether it had something."""
        had = []
        for place, trained in enumerate((*self._order, *self._staying)):
            delivered = place < min(self._next, len(self._order))
            had.append(delivered or self._waits(trained))
            if not had[-1]:
                trained.parameter.grad = _zeros(trained)
        return had

    def _leave_alone(self, had: Sequence[bool]) -> None:
        """What no rank has had is not stepped."""
        for trained, there in zip((*self._order, *self._staying), had, strict=False):
            if not there:
                self._forget(trained)
                trained.parameter.grad = None


def _zeros(trained: Trained) -> Tensor:
    return torch.zeros_like(trained.parameter, memory_format=torch.preserve_format)
