"""Several forwards of one unmodified model that pass each unit together, so that its weights are fetched once.

Each forward is a stream. A hook at the door of a unit gives the other streams their turn, so that all of them pass
one visit before any begins the next (ZO2, arXiv 2503.12668, runs its two forwards so, with forked models). Masks,
routing, losses are the model's own code on its own shapes: every stream computes the bits of a forward of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from lightning_offload.errors import OffloadError
from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.turns import Turns
from lightning_offload.methods.arrivals import find_compiled
from lightning_offload.methods.muting import Muting
from lightning_offload.methods.randomness import Randomness

T = TypeVar("T")


class Visitor(Protocol):
    """What happens to the weights of a unit when streams come by."""

    def arrive(self, unit: Unit) -> None:
        """Once per visit, before its first stream: make the unit resident."""
        ...

    def present(self, unit: Unit, stream: int) -> None:
        """This stream is about to use the unit's weights, or to go on using them."""
        ...

    def leave(self, unit: Unit) -> None:
        """Once per visit, after its last stream: weights back at rest. Also after an ``arrive`` that failed."""
        ...


@dataclass(eq=False)
class _Visit:
    unit: Unit
    arrived: bool = False
    left: int = 0


@dataclass(eq=False)
class _Call:
    """A module being called; without visits if the stream was inside its units already."""

    module: nn.Module | None
    visits: list[_Visit]


@dataclass(eq=False)
class _Walk:
    """Where each stream is: the visits that stream 0 has begun, how many the others have, and what they are inside."""

    streams: int
    visits: list[_Visit] = field(default_factory=list)
    begun: list[int] = field(init=False)
    stacks: list[list[_Call]] = field(init=False)

    def __post_init__(self) -> None:
        """The visits there are from the start span the whole walk."""
        self.begun = [len(self.visits)] * self.streams
        self.stacks = [[_Call(None, [*self.visits])] if self.visits else [] for _ in range(self.streams)]

    def held(self, stream: int) -> list[_Visit]:
        return [visit for call in self.stacks[stream] for visit in call.visits]

    def begin(self, stream: int, units: Sequence[Unit]) -> list[_Visit]:
        """The next visits of ``stream``, which all other streams must begin with it."""
        first = self.begun[stream]
        if stream == 0:
            self.visits += [_Visit(unit) for unit in units]
        expected = self.visits[first:]
        if [visit.unit for visit in expected] != list(units):
            raise OffloadError(_disagreement(first, stream, expected, units))
        self.begun[stream] = len(self.visits)
        return expected

    def end(self, stream: int) -> None:
        if expected := self.visits[self.begun[stream] :]:
            raise OffloadError(_disagreement(self.begun[stream], stream, expected, ()))


def refuse_compiled(module: nn.Module, units: Sequence[Unit]) -> None:
    """Units are left and entered again in the middle of a forward, on several threads.

    Raises:
        ValueError: ``module`` or a module in it is compiled.
    """
    if name := find_compiled(module, units):
        raise ValueError(
            "method `zo2` passes each unit with several forwards at once and changes its weights between them, which "
            f"the compiled `{name}` would not see. Leave `torch.compile` out, or use `full_offload` or `lsp_offload`, "
            "under which it may be compiled"
        )


class Lockstep:
    """See the module docstring.

    Outside ``run`` the hooks work as one stream, number 0, without threads. A unit that is entered again inside itself
    (a tied head with a weight of its own) is not visited again.

    Attributes:
        visits: Indices of units in the order of the last run that succeeded, with repeats.

    Args:
        module: Its metrics and its logging are kept from streams beyond the first.
        units: The units of the model.
        visitor: Told of every visit, on the thread of the stream.
        always: Indices of units whose weights are used outside any call. One visit of each spans the whole of a run.
    """

    def __init__(
        self, module: nn.Module, units: Sequence[Unit], visitor: Visitor, *, always: Collection[int] = ()
    ) -> None:
        self.visits: tuple[int, ...] = ()
        self._visitor = visitor
        self._always = [unit for unit in units if unit.index in always]
        self._modules: dict[int, nn.Module] = {id(entry): entry for unit in units for entry in unit.entry_modules}
        self._units: dict[int, list[Unit]] = {key: [] for key in self._modules}
        for unit in units:
            for key in dict.fromkeys(map(id, unit.entry_modules)):
                self._units[key].append(unit)
        self._turns = Turns()
        self._randomness = Randomness()
        self._muting = Muting(module, lambda: self.stream)
        self._module = module
        self._alone = self._walk = _Walk(1)

    @property
    def stream(self) -> int:
        """The stream that runs now."""
        return self._turns.stream

    def install(self) -> list[Callable[[], Any]]:
        """Hang the hooks on; returns how to take each off."""
        before, after = _entering(self), _leaving(self)
        removers: list[Callable[[], Any]] = []
        for module in self._modules.values():
            removers.append(module.register_forward_pre_hook(before, prepend=True).remove)
            removers.append(module.register_forward_hook(after, always_call=True).remove)
        return removers

    def run(self, fn: Callable[[int], T], streams: int) -> list[T]:
        """``[fn(0), ..., fn(streams - 1)]`` without gradients, passing each visit together.

        Every stream starts from the same random states, and the process ends with those of stream 0. Side effects of
        ``fn`` other than logging and metrics happen once per stream.

        Raises:
            OffloadError: The streams do not visit the same units in the same order, or a run is under way.
            BaseException: What ``fn`` or the visitor raised first. All streams have ended then, weights are at rest.
        """
        if streams < 1:
            raise ValueError(f"streams={streams}; a run needs at least one")
        if self._turns.running:
            raise OffloadError("run() was called inside run(); let the first one end before the next")
        self.settle()
        self._walk = walk = _Walk(streams, [_Visit(unit) for unit in self._always])
        try:
            if streams > 1:
                self._randomness.start(streams)
                self._muting.start(streams)
            results = self._turns.run(lambda stream: self._stream(fn, stream), streams, self._switch)
            self.visits = tuple(visit.unit.index for visit in walk.visits)
        finally:
            with ExitStack() as stack:  # the last first, and all of them whatever one raises
                stack.callback(setattr, self, "_walk", self._alone)
                stack.callback(self._rest, walk)
                stack.callback(self._muting.stop)
        return results

    def rehearse(self, fn: Callable[[], T]) -> T:
        """``run`` with one stream that leaves nothing: it logs nothing, metrics and random states are as before.

        Raises:
            OffloadError: A run is under way.
            BaseException: What ``fn`` or the visitor raised.
        """
        muting, randomness = Muting(self._module, lambda: 1), Randomness()
        with ExitStack() as stack:
            randomness.start(2)
            muting.start(2)
            stack.callback(randomness.switch, 0)
            stack.callback(muting.stop)
            randomness.switch(1)  # as the second of two streams does
            muting.switch(1)
            return self.run(lambda _: fn(), 1)[0]

    def settle(self) -> None:
        """Leave whatever a forward outside ``run`` that was interrupted (``KeyboardInterrupt``) had not left."""
        alone, self._alone = self._alone, _Walk(1)
        self._walk = self._alone
        self._rest(alone)

    def close(self) -> None:
        """Joins the threads. Idempotent; a later run starts new ones."""
        self._turns.close()

    def enter(self, module: nn.Module) -> None:
        """A module is about to be called: give the other streams their turn if that begins a visit."""
        walk, stream = self._walk, self.stream
        inside = {visit.unit.index for visit in walk.held(stream)}
        visits = []
        if new := [unit for unit in self._units[id(module)] if unit.index not in inside]:
            visits = walk.begin(stream, new)
            if walk.streams > 1:
                self._turns.give()
                self._present(walk.held(stream))
        self._arrive(visits)
        walk.stacks[stream].append(_Call(module, visits))
        self._present(visits)

    def exit(self, module: nn.Module) -> None:
        """A module was called, or raised."""
        walk, stack = self._walk, self._walk.stacks[self.stream]
        if not stack or stack[-1].module is not module:  # it raised at its door
            return
        for visit in reversed(stack.pop().visits):
            visit.left += 1
            if visit.left == walk.streams:
                self._leave(visit)
        if walk is self._alone and not stack:
            self.settle()

    def knows(self, module: nn.Module) -> bool:
        """Whether this is a module of the model, not of a copy of it that shares the hooks."""
        return id(module) in self._modules

    def _stream(self, fn: Callable[[int], T], stream: int) -> T:
        walk = self._walk
        self._arrive(walk.held(stream))
        self._present(walk.held(stream))
        with torch.no_grad():
            result = fn(stream)
        walk.end(stream)
        return result

    def _switch(self, stream: int) -> None:
        if self._walk.streams > 1:
            self._randomness.switch(stream)
            self._muting.switch(stream)

    def _arrive(self, visits: Sequence[_Visit]) -> None:
        for visit in visits:
            if not visit.arrived:
                visit.arrived = True
                self._visitor.arrive(visit.unit)

    def _present(self, visits: Sequence[_Visit]) -> None:
        for visit in visits:
            self._visitor.present(visit.unit, self.stream)
        if visits:
            torch.clear_autocast_cache()  # it would answer with the weights of another stream

    def _leave(self, visit: _Visit) -> None:
        visit.arrived = False
        self._visitor.leave(visit.unit)
        torch.clear_autocast_cache()

    def _rest(self, walk: _Walk) -> None:
        with ExitStack() as stack:
            for visit in walk.visits:
                if visit.arrived:
                    stack.callback(self._leave, visit)


def _entering(lockstep: Lockstep) -> Callable[..., None]:
    """A plain function: deep copies of the module share it instead of copying the engine."""

    def hook(module: nn.Module, args: Any) -> None:
        if lockstep.knows(module):
            lockstep.enter(module)

    return hook


def _leaving(lockstep: Lockstep) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if lockstep.knows(module):
            lockstep.exit(module)

    return hook


def _disagreement(place: int, stream: int, expected: Sequence[_Visit], units: Sequence[Unit]) -> str:
    def does(names: list[str]) -> str:
        return f"enters {' and '.join(map(repr, names))}" if names else "ends"

    first, other = does([visit.unit.name for visit in expected]), does([unit.name for unit in units])
    return (
        f"streams of one run disagree at visit {place + 1}: stream 0 {first}, but stream {stream} {other}. All of them "
        "must run the same units in the same order: a choice between units (layer drop, early exit, a loop until "
        "something converges) must not depend on values or differ between streams."
    )
