"""What trains the twin in a dry run: a method on its engine, or nothing but an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.virtual import VirtualLanes
from lightning_offload.methods.base import Clip, Trained
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.meft import adapters_of
from lightning_offload.methods.row_source import LaneSource
from lightning_offload.methods.row_tables import Rows
from lightning_offload.methods.sparse_adapter import Fetched
from lightning_offload.methods.twin import explaining
from lightning_offload.methods.uses import Uses
from lightning_offload.numerics.adapter import Picks

Watch = Callable[[Callable[..., object], Sequence[Any]], AbstractContextManager[None]]
"""Around a call of the engine by the module or its backward: what is called, and with what, to be called again."""


class Driver(Protocol):
    """What trains the twin: an engine, or nothing but an optimizer."""

    def watch(self, watch: Watch) -> None:
        """Have calls watched; the first of those for a gradient in ``p.grad`` is a hook's."""
        ...

    @property
    def units(self) -> Sequence[Unit]:
        """Of the twin."""
        ...

    @property
    def uses(self) -> Uses:
        """What the recorded forward did with the weights."""
        ...

    @property
    def warm_up(self) -> int:
        """Steps after which every step is like the one before."""
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one forward; ``last``: the step follows its backward."""
        ...

    def enter(self, unit: int, *, recomputed: bool) -> None:
        """Replayed: a module that needs the unit's weights is about to run."""
        ...

    def gradient_arrived(self, name: str) -> None:
        """Replayed: the parameter of this name has its gradient."""
        ...

    def step(self) -> None:
        """One optimizer step."""
        ...

    def flush(self) -> None:
        """Nothing is in flight afterwards."""
        ...

    def unhook(self) -> None:
        """Take every hook off the twin: autograd keeps those of parameters, and all they refer to, for good."""
        ...


class WatchedEngine(Engine):
    """An engine that can be watched."""

    watch: Watch = staticmethod(lambda fn, args: nullcontext())

    def gradient_arrived(self, trained: Trained) -> None:
        """See ``Engine.gradient_arrived``."""
        with self.watch(partial(self.gradient_arrived, trained), ()):
            super().gradient_arrived(trained)

    def factors_arrived(self, trained: Trained, left: Tensor, right: Tensor) -> None:
        """See ``Engine.factors_arrived``."""
        with self.watch(partial(self.factors_arrived, trained), (left, right)):
            super().factors_arrived(trained, left, right)


class WatchedSource:
    """Rows of an adapter, whose coming and going is watched; see ``RowSource``."""

    def __init__(self, source: LaneSource, watch: Watch) -> None:
        self._source, self._watch, self._told = source, watch, source.told
        source.told = self._tell

    def start(self, x: Tensor) -> None:
        """See ``RowSource.start``."""
        with self._watch(self._source.start, (x,)):
            self._source.start(x)

    def rows(self) -> Fetched:
        """See ``RowSource.rows``."""
        with self._watch(self._source.rows, ()):
            return self._source.rows()

    def again(self, picks: Picks) -> Fetched:
        """See ``RowSource.again``: no lane is asked."""
        return self._source.again(picks)

    def _tell(self, table: Rows, rows: Tensor, gradient: Tensor) -> None:
        with self._watch(partial(self._told, table), (rows, gradient)):
            self._told(table, rows, gradient)


class EngineDriver:
    """A method on its engine.

    Args:
        engine: On the twin.
        clip: The gradient clipping of each step.
        serial: Wait for the new weights after each step, as ZeRO-Offload does.
    """

    def __init__(self, engine: WatchedEngine, *, clip: Clip | None, serial: bool = False) -> None:
        self.engine, self.units = engine, engine.units
        self._clip, self._serial = clip, serial
        self._offloaded = {t.name: t for part in engine.senders for t in part.trained}

    def watch(self, watch: Watch) -> None:
        """See ``Driver.watch``."""
        self.engine.watch = watch
        for adapter in adapters_of(self.engine.module):
            if isinstance(adapter.source, LaneSource):
                adapter.source = WatchedSource(adapter.source, watch)

    @property
    def uses(self) -> Uses:
        """See ``Driver.uses``."""
        return self.engine.arrivals.uses

    @property
    def warm_up(self) -> int:
        """See ``Driver.warm_up``: the first step never runs under backward, so the second may overlap another way."""
        return 2 if self.engine.steps_early else 1

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """See ``Driver.micro_batch``."""
        self.engine.stepping = last
        with self.engine.micro_batch():
            yield

    def enter(self, unit: int, *, recomputed: bool) -> None:
        """See ``Driver.enter``."""
        self.engine.arrivals.enter(self.engine.arrivals.flights[unit], recomputed=recomputed)

    def gradient_arrived(self, name: str) -> None:
        """See ``Driver.gradient_arrived``."""
        if name in self._offloaded:
            self.engine.gradient_arrived(self._offloaded[name])

    def step(self) -> None:
        """See ``Driver.step``."""
        self.engine.step(self._clip)
        if self._serial:
            self.engine.flush()

    def flush(self) -> None:
        """See ``Driver.flush``."""
        self.engine.flush()

    def unhook(self) -> None:
        """See ``Driver.unhook``."""
        self.engine.unhook()


class NativeDriver:
    """Everything on the device: what offloading is compared with.

    Args:
        units: Of the twin.
        optimizer: Over its parameters; its state is made at once.
        lanes: Told of the marks.
        clip: The gradient clipping of each step.
    """

    def __init__(
        self, units: Sequence[Unit], optimizer: torch.optim.Optimizer, lanes: VirtualLanes, *, clip: Clip | None
    ) -> None:
        self.units, self.warm_up = units, 1
        self._optimizer, self._lanes, self._clip = optimizer, lanes, clip
        self._trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        self._update()
        for unit in self.units:
            for entry in unit.entry_modules:
                entry.register_forward_pre_hook(self._entering(unit.index))
        self.uses = Uses(order=tuple(unit.name for unit in self.units))

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """See ``Driver.micro_batch``."""
        yield
        self._lanes.mark("backward", len(self.units))

    def enter(self, unit: int, *, recomputed: bool) -> None:
        """See ``Driver.enter``."""
        self._lanes.mark("backward" if recomputed else "forward", unit + 1)

    def watch(self, watch: Watch) -> None:
        """See ``Driver.watch``: there is no engine."""

    def gradient_arrived(self, name: str) -> None:
        """See ``Driver.gradient_arrived``."""

    def step(self) -> None:
        """See ``Driver.step``."""
        self._lanes.mark("step")
        if self._clip is not None and self._clip.algorithm == "norm":
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip.value)
        elif self._clip is not None:
            torch.nn.utils.clip_grad_value_(self._trained, self._clip.value)
        self._update()
        self._lanes.mark("")

    def flush(self) -> None:
        """See ``Driver.flush``."""

    def unhook(self) -> None:
        """See ``Driver.unhook``: it has hung none on parameters."""

    def _update(self) -> None:
        with explaining(type(self._optimizer).__name__, "Pass `optimizer=torch.optim.AdamW(...)` to plan without it."):
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _entering(self, unit: int) -> Callable[..., None]:
        return lambda *_: self.enter(unit, recomputed=torch._C._current_graph_task_id() != -1)
