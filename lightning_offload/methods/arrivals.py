"""Whose new weights compute must wait for, and when: each unit's own, at the door of its own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.lanes import Lanes
from lightning_offload.methods.base import Flight


class Arrivals:
    """Hooks that make each unit wait for its own weights; learns from the first forward what hooks cannot see.

    That is the order in which units run, which is not module order and decides who is served first, and the units
    whose weights are used before any hook of theirs fires: functionally, or in a module that is never called. Those
    are waited for when a forward begins.

    Attributes:
        flights: What is in flight, per unit.
    """

    def __init__(self, units: Sequence[Unit], lanes: Lanes) -> None:
        self.flights = [Flight(unit.index) for unit in units]
        self._units = units
        self._lanes = lanes
        self._early: set[int] = set()
        self._entered: list[int] = []  # units in the order of their first hook
        # compiled code may take hooks and weights apart as it likes, and a function mode would break it
        self._compiled = any(_is_compiled(module) for unit in units for module in unit.module.modules())
        self._learned = False

    def install(self) -> Iterator[Callable[[], None]]:
        """Hang the hooks on; yields how to take each off."""
        for unit in self._units:
            hook = _landing(self.flights[unit.index], self._lanes, self._entered, unit.index)
            for module in unit.entry_modules:  # first of all hooks: another one may read the weights
                yield module.register_forward_pre_hook(hook, prepend=True).remove

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward of training."""
        for index in self._early:
            self.flights[index].land(self._lanes)
        if self._compiled:
            self.publish()
        if self._learned or self._compiled:
            yield
            return
        self._entered.clear()
        with _EarlyUse(self._units, self.flights) as recorder:
            yield
        self._learned = True
        self._early = recorder.early | {unit.index for unit in self._units} - set(self._entered)
        for flight in self.flights:
            flight.order = 0  # who was never entered may be needed at once
        for place, index in enumerate(self._entered):
            self.flights[index].order = place + 1

    def publish(self) -> None:
        """Compute issued from here on sees every new weight."""
        for flight in self.flights:
            flight.land(self._lanes)

    def landed(self) -> None:
        """Nothing is in flight any more."""
        for flight in self.flights:
            flight.waited = True


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _landing(flight: Flight, lanes: Lanes, entered: list[int], index: int) -> Callable[..., None]:
    """A plain function: deep copies of the module (weight averaging) share it instead of copying the engine."""

    def hook(module: nn.Module, args: Any) -> None:
        if not flight.entered:
            flight.entered = True
            entered.append(index)
        flight.land(lanes)

    return hook


class _EarlyUse(TorchFunctionMode):
    """Finds units whose weights are used in a forward before a hook of theirs has fired."""

    def __init__(self, units: Sequence[Unit], flights: Sequence[Flight]) -> None:
        super().__init__()
        self.early: set[int] = set()
        self._flights = flights
        self._unit = {id(p): unit.index for unit in units for p in unit.parameters.values()}
        for flight in flights:
            flight.entered = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # `weight.dtype` reads no weight
            for value in tree_leaves((args, kwargs)):
                index = self._unit.get(id(value))
                if index is not None and not self._flights[index].entered:
                    self.early.add(index)
        return func(*args, **(kwargs or {}))
