"""Whose new weights compute must wait for, and when: each unit's own, at the door of its own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.lanes import Lanes
from lightning_offload.memory.peers import Alone, Peers
from lightning_offload.methods.base import Flight
from lightning_offload.methods.marks import Marks
from lightning_offload.methods.uses import Recorder, Uses


class Arrivals:
    """Hooks that make each unit wait for its own weights; learns from the first forward what hooks cannot see.

    That is the order in which units run, which is not module order and decides who is served first, and the units
    whose weights are used before any hook of theirs fires: functionally, or in a module that is never called. Those
    are waited for when a forward begins.

    Attributes:
        flights: What is in flight, per unit.
        uses: What is known of the forward.
        marks: Told of every unit that is entered.

    Args:
        module: The model.
        units: Its units.
        lanes: Where weights arrive.
        uses: What a dry run has found out; what the first forward shows is added to it.
        peers: The other ranks; units then land in one order on all of them, for weights come from their owners.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        lanes: Lanes,
        uses: Uses | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._peers: Peers = peers or Alone()
        self.flights = [Flight(unit.index) for unit in units]
        self.uses = Uses()
        self.marks = Marks(lanes)
        self._module, self._units = module, units
        self._early: set[int] = set()
        self._line = list(self.flights)
        # compiled code may take hooks and weights apart as it likes, and a function mode would break it
        self._compiled = find_compiled(module, units) is not None
        self._learned = False
        if uses is not None:
            self._learn(uses)

    def install(self) -> Iterator[Callable[[], None]]:
        """Hang the hooks on; yields how to take each off."""
        for unit in self._units:
            hook = _entering(self, self.flights[unit.index])
            if self._compiled:
                hook = torch.compiler.disable(hook)  # else it is traced with the block, its state guarded
            for module in unit.entry_modules:  # first of all hooks: another one may read the weights
                yield module.register_forward_pre_hook(hook, prepend=True).remove

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward of training."""
        for index in self._early:
            self._land(self.flights[index])
        if self._compiled:
            self.publish()
        if self._learned or self._compiled:
            yield
            return
        recorder = Recorder(self._units)
        with recorder.watching():
            yield
        self._learned = True
        self._learn(recorder.uses(self._module))

    def enter(self, flight: Flight, *, recomputed: bool) -> None:
        """A module that needs the unit's weights is about to run; in backward it is a recomputation."""
        self._land(flight)
        self.marks.unit(flight, recomputed=recomputed)

    def publish(self) -> None:
        """Compute issued from here on sees every new weight."""
        for flight in self._line:
            flight.land()

    def _land(self, flight: Flight) -> None:
        ahead = self._line[: self._line.index(flight)] if self._peers.world > 1 else []
        for other in (*ahead, flight):
            other.land()

    def _learn(self, uses: Uses) -> None:
        uses = self._peers.first(uses)
        index = {unit.name: unit.index for unit in self._units}
        self.uses = uses
        self._early |= {index[name] for name in uses.early if name in index}
        for flight in self.flights:
            flight.order = 0  # who is never entered may be needed at once
        for place, name in enumerate(uses.order):
            if name in index:
                self.flights[index[name]].order = place + 1
        self._line = sorted(self.flights, key=lambda flight: flight.order)


def is_compiled(module: nn.Module) -> bool:
    """Whether hooks and weights inside may be taken apart; Lightning keeps a context of what is compiled whole."""
    whole = getattr(module, "_compiler_ctx", None) is not None
    return whole or hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def find_compiled(module: nn.Module, units: Sequence[Unit]) -> str | None:
    """What of ``module`` is compiled, by name: the first unit, or its class where it is compiled as a whole."""
    if is_compiled(module):
        return type(module).__name__
    return next((unit.name for unit in units if any(map(is_compiled, unit.module.modules()))), None)


def _entering(arrivals: Arrivals, flight: Flight) -> Callable[..., None]:
    """A plain function: deep copies of the module (weight averaging) share it instead of copying the engine."""

    def hook(module: nn.Module, args: Any) -> None:
        arrivals.enter(flight, recomputed=torch._C._current_graph_task_id() != -1)

    return hook
