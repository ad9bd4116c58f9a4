"""Steps of ``zo2`` without a machine: the real engine on a fake twin, on lanes that keep time.

The module runs for a step or two. What it computes between the moments at which its weights come, change and go is
written down; later steps replay that and run the engine's part alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.ledger import Total
from lightning_offload.memory.virtual import VirtualLanes
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.dryrun import OWN_STEP, Timing, costs
from lightning_offload.methods.lockstep import Lockstep, Visitor
from lightning_offload.methods.meter import Work
from lightning_offload.methods.noises import Noise
from lightning_offload.methods.priced_noise import PricedNoise
from lightning_offload.methods.twin import Step, Twin, TwinMeter, explaining, pretending
from lightning_offload.methods.uses import Uses
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2

T = TypeVar("T")


class Tape:
    """Work of the module in one micro-batch, cut where its weights come, change or go; stands before the visitor.

    Attributes:
        recording: Whether work is written down; not while the visitor works.
        seconds: Of the module.

    Args:
        visitor: What is told of the visits.
        met: Told of every unit as its visit begins.
    """

    def __init__(self, visitor: Visitor, met: Callable[[Unit], None]) -> None:
        self.recording = False
        self._visitor, self._met = visitor, met
        self._cues: list[tuple[float, Callable[[], None]]] = []
        self._since_s = 0.0

    @property
    def seconds(self) -> float:
        """See the attributes."""
        return self._since_s + sum(seconds for seconds, _ in self._cues)

    def start(self) -> None:
        """A micro-batch begins."""
        self.recording, self._cues, self._since_s = True, [], 0.0

    def add(self, seconds: float) -> None:
        """The module was busy."""
        if self.recording:
            self._since_s += seconds

    def arrive(self, unit: Unit) -> None:
        """See ``Visitor``."""
        self._met(unit)
        self._cue(partial(self._visitor.arrive, unit))

    def present(self, unit: Unit, stream: int) -> None:
        """See ``Visitor``."""
        self._cue(partial(self._visitor.present, unit, stream))

    def leave(self, unit: Unit) -> None:
        """See ``Visitor``."""
        self._cue(partial(self._visitor.leave, unit))

    def play(self, advance: Callable[[float], None]) -> None:
        """The same again without the module."""
        for seconds, call in self._cues:
            advance(seconds)
            call()
        advance(self._since_s)

    def _cue(self, call: Callable[[], None]) -> None:
        self._cues.append((self._since_s, call))
        recording, self.recording, self._since_s = self.recording, False, 0.0
        call()
        self.recording = recording


class _TapedLockstep(Lockstep):
    """Writes a run down; while ``replays``, plays the last one again."""

    def __init__(self, engine: TwinEngine, always: Collection[int]) -> None:
        self.tape = Tape(engine.streaming, engine.met)
        self.replays = False
        self._engine = engine
        super().__init__(engine.module, engine.units, self.tape, always=always)

    def run(self, fn: Callable[[int], T], streams: int) -> list[T]:
        """See ``Lockstep.run``."""
        if self.replays:
            self.tape.play(self._engine.advance)
            return cast("list[T]", [torch.zeros(())] * streams)
        self.tape.start()
        try:
            return super().run(fn, streams)
        finally:
            self.tape.recording = False


class TwinEngine(ZerothEngine):
    """An engine on a twin.

    Attributes:
        advance: Told of the seconds that compute is busy.
        met: Told of every unit as its visit begins.
        price: Makes the noise.
        found: What the first forward did with the weights.
    """

    lockstep: _TapedLockstep
    found = Uses()

    def __init__(
        self,
        *args: Any,
        advance: Callable[[float], None],
        met: Callable[[Unit], None],
        price: Callable[[], Noise],
        **kwargs: Any,
    ) -> None:
        self.advance, self.met, self._price = advance, met, price
        super().__init__(*args, **kwargs)

    def _make_noise(self) -> Noise:
        return self._price()

    def _make_lockstep(self, always: Collection[int]) -> Lockstep:
        return _TapedLockstep(self, always)

    def _learn(self, uses: Uses) -> None:
        self.found = uses
        super()._learn(uses)


class ZerothDriver:
    """What ``DryRun.driver`` is of the other methods.

    Attributes:
        engine: On the twin.
        units: Of the twin.
    """

    def __init__(self, engine: TwinEngine) -> None:
        self.engine, self.units = engine, engine.units

    @property
    def uses(self) -> Uses:
        """What the forward does with the weights."""
        return self.engine.found


class ZerothDryRun:
    """See the module docstring; what ``DryRun`` is of the other methods.

    Attributes:
        meter: Memory by what it holds, and where a real run would wait for a value.
        lanes: The clock, and what was asked of host memory.
        driver: The engine on the twin.
        flops: FLOPs of the module in one step.

    Args:
        twin: The model.
        optimizer: Over its parameters.
        method: Resolved.
        machine: What is imitated.
        dtypes: Which dtype lives where.
        step: The loss of one micro-batch.
        parts: Of one micro-batch, fake.
        micro_batches: How many make a step.
        context: What a forward runs in.
        clip: Of the projected gradient.

    Raises:
        TwinError: The step cannot be run on fake tensors.
    """

    def __init__(
        self,
        twin: Twin,
        optimizer: torch.optim.Optimizer,
        method: ZO2,
        machine: Machine,
        dtypes: DTypes,
        *,
        step: Step,
        parts: Sequence[Any],
        micro_batches: int = 1,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
        clip: Clip | None = None,
    ) -> None:
        self._twin, self._step, self._parts, self._context = twin, step, parts, context
        self._micro_batches, self._clip = micro_batches, clip
        self._period = method.settings.write_back_every
        self._cost = costs(machine)
        self.flops = 0
        self._seen_block = False
        self.meter = TwinMeter(self._work)
        self.lanes = VirtualLanes(machine, self.meter.counting_as, pin=method.settings.pin_memory is not False)
        price = partial(
            PricedNoise, method.settings, dtypes.rounding, machine, self.lanes.advance, self.meter.counting_as
        )
        with self._active():
            for buffer in twin.module.buffers():
                self.meter.hold(buffer, "buffers")
            for leaf in tree_leaves(list(parts)):
                if isinstance(leaf, Tensor):
                    self.meter.hold(leaf, "batch")
            with self.meter.counting_as(None):  # weights come to rest: before all steps, and from host memory
                engine = TwinEngine(
                    twin.module,
                    optimizer,
                    method,
                    self.lanes,
                    dtypes,
                    advance=self.lanes.advance,
                    met=self._met,
                    price=price,
                )
        self.driver = ZerothDriver(engine)

    def record(self) -> None:
        """Run the module: memory, FLOPs and the tape are known afterwards."""
        with self._active(), ExitStack() as stack:
            stack.callback(self._engine.unhook)
            reads = dict(self.meter.reads)
            self._forwards(lambda: self._engine.rehearse(self._loss, self._parts[0]))
            self.meter.reads = reads
            for _ in range(2 if self.lanes.shares_memory else 1):  # in the first no update takes memory
                before = self.meter.flops
                self._forwards(lambda: self._engine.micro_batch(self._loss, self._parts))
                self.flops = (self.meter.flops - before) * self._micro_batches
                self._close_step()

    def time(self) -> Timing:
        """Replay until every step is like the one before, and time the next; with ``write_back_every`` their mean."""
        with self._active():
            self.lanes.remembers = self._engine.lockstep.replays = True
            for _ in range(2 * self._period):
                self._replay_step()
            self.lanes.ledger.start_trace()
            before_s, busy_before_s, asked_before = self.lanes.now_s, self.lanes.busy_s, deepcopy(self.lanes.asked)
            for _ in range(self._period):
                self._replay_step()
            step_s, compute_s = self.lanes.now_s - before_s, self.lanes.busy_s - busy_before_s
            asked = {kind: total.since(asked_before.get(kind, Total())) for kind, total in self.lanes.asked.items()}
            self._engine.flush()
        module_s = self._engine.lockstep.tape.seconds * self._micro_batches
        return Timing(
            step_s=step_s / self._period,
            forward_s=self._engine.lockstep.tape.seconds,
            backward_s=0.0,
            module_s=module_s,
            compress_s=0.0,
            apply_s=compute_s / self._period - module_s,
            compute_s=compute_s / self._period,
            kinds={kind: _mean(total, self._period) for kind, total in asked.items() if total.operations},
            spans=tuple(self._engine.stop_trace()),
        )

    @property
    def _engine(self) -> TwinEngine:
        return self.driver.engine

    def _met(self, unit: Unit) -> None:
        self._seen_block |= unit.is_block
        self.meter.kind = "activations" if unit.is_block or not self._seen_block else "logits"

    def _forwards(self, run: Callable[[], Any]) -> None:
        self.meter.kind, self._seen_block = "activations", False
        # around all streams, as in a real run: a default dtype is the process's, and streams take turns
        with explaining(type(self._twin.module).__name__, OWN_STEP), self._context():
            run()

    def _loss(self, part: Any) -> Tensor:
        return self._step(self._twin.module, part)

    def _replay_step(self) -> None:
        for _ in range(self._micro_batches):
            self._engine.micro_batch(self._loss, self._parts)
        self._close_step()

    def _close_step(self) -> None:
        reads = dict(self.meter.reads)
        with self.meter.counting_as(None):  # a few numbers on the host
            self._engine.step(self._clip)
        self.meter.reads = reads

    def _work(self, work: Work) -> None:
        seconds = self._cost(work)
        self.lanes.advance(seconds)
        self._engine.lockstep.tape.add(seconds)

    @contextmanager
    def _active(self) -> Iterator[None]:
        with pretending(), warnings.catch_warnings(), self._twin.mode, self.meter:
            warnings.simplefilter("ignore")
            yield


def _mean(total: Total, steps: int) -> Total:
    return Total(total.operations // steps, total.bytes // steps, total.seconds / steps)
