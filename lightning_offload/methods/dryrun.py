"""One training step without a machine: the real engine and method, on a fake twin, on lanes that keep time.

The module's own code runs once per kind of micro-batch and is written down on a *tape*: the work between the moments
at which the engine is called. Later steps replay the tape and run the engine alone, so that a steady state, another
schedule or another machine cost little.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.ledger import Span, Total
from lightning_offload.memory.virtual import VirtualLanes
from lightning_offload.methods.drivers import Driver
from lightning_offload.methods.meter import Work, seconds
from lightning_offload.methods.twin import Step, Twin, TwinMeter, explaining, pretending
from lightning_offload.numerics.adapter import imitating_gpu


@dataclass(frozen=True)
class Call:
    """The engine was called: what of it, and with what; of tensors their shapes and dtypes."""

    fn: Callable[..., object]
    args: tuple[Any, ...]

    @classmethod
    def of(cls, fn: Callable[..., object], args: Sequence[Any]) -> Call:
        """Keeps no tensor: its memory would seem to be in use."""
        return cls(fn, tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in args))

    def other_args(self) -> list[Any]:
        """With other tensors."""
        return [torch.empty(a[0], dtype=a[1]) if isinstance(a, tuple) else a for a in self.args]


@dataclass(eq=False)
class Happening:
    """Work of the module, and the engine's cue at its end: a unit that is entered, a gradient in ``p.grad``, a call."""

    work: list[Work] = field(default_factory=list)
    entered: int | None = None
    gradient: str | None = None
    called: Call | None = None


@dataclass
class Tape:
    """What the module did in one micro-batch, cut at the engine's cues."""

    forward: list[Happening] = field(default_factory=lambda: [Happening()])
    backward: list[Happening] = field(default_factory=lambda: [Happening()])
    flops: int = 0
    is_backward: bool = False

    @property
    def _part(self) -> list[Happening]:
        return self.backward if self.is_backward else self.forward

    def add(self, work: Work) -> None:
        """The module has done this."""
        self._part[-1].work.append(work)
        self.flops += work.flops

    def cue(self, *, entered: int | None = None, gradient: str | None = None, called: Call | None = None) -> None:
        """The engine comes in."""
        last = self._part[-1]
        last.entered, last.gradient, last.called = entered, gradient, called
        self._part.append(Happening())


@dataclass(frozen=True)
class Timing:
    """One step in the steady state.

    Attributes:
        step_s: From one optimizer step to the next.
        forward_s: Compute of the first micro-batch's forward, under which the host's work can hide.
        backward_s: Compute of the last micro-batch's backward.
        module_s: Compute of the module in all micro-batches.
        compress_s: Compute of the engine as gradients leave.
        apply_s: Compute of the engine in forwards: as units are entered, as rows are chosen.
        compute_s: All compute of a step.
        kinds: Operations, bytes and busy seconds of each (lane, kind of operation).
        spans: Every operation of that step, and what it leaves to the next.
    """

    step_s: float
    forward_s: float
    backward_s: float
    module_s: float
    compress_s: float
    apply_s: float
    compute_s: float
    kinds: dict[tuple[str, str], Total]
    spans: tuple[Span, ...]

    @classmethod
    def unknown(cls) -> Timing:
        """Where nobody wants to know."""
        unknown_s = math.nan
        return cls(unknown_s, unknown_s, unknown_s, unknown_s, unknown_s, unknown_s, unknown_s, {}, ())

    @property
    def lanes(self) -> dict[str, Total]:
        """The same of each lane."""
        lanes: dict[str, Total] = {}
        for (lane, _), total in self.kinds.items():
            lanes[lane] = lanes.get(lane, Total()).plus(total)
        return lanes


class DryRun:
    """See the module docstring.

    Attributes:
        meter: Memory by what it holds, FLOPs, and where a real run would wait for a value.
        lanes: The clock, and what was asked of host memory.
        driver: What trains the twin.
        tapes: The first micro-batch, and a later one where a step has several.

    Args:
        twin: The model.
        attach: Makes the driver, given the lanes; runs in the twin's fake mode.
        machine: What is imitated.
        step: The loss of one micro-batch.
        batch: One micro-batch, fake.
        micro_batches: How many make a step.
        context: What a forward runs in.
        pin: Whether host memory is page-locked, as far as the machine allows.
        at_home: Ids of parameters that are in host memory before the driver comes.

    Raises:
        TwinError: The step cannot be run on fake tensors.
    """

    def __init__(
        self,
        twin: Twin,
        attach: Callable[[VirtualLanes], Driver],
        machine: Machine,
        *,
        step: Step,
        batch: Any,
        micro_batches: int = 1,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
        pin: bool = True,
        at_home: Collection[int] = (),
    ) -> None:
        self._twin, self._step, self._batch, self._context = twin, step, batch, context
        self._micro_batches = micro_batches
        self._cost, self._on_gpu = costs(machine), machine.device_type != "cpu"
        self._tape: Tape | None = None  # that is being recorded; None while the driver runs
        self._spent_s: defaultdict[str, float] = defaultdict(float)  # compute of the driver
        self._seen_block = False
        self.meter = TwinMeter(self._work)
        self.lanes = VirtualLanes(machine, self.meter.counting_as, pin=pin)
        self.tapes: list[Tape] = []
        self._hooks: list[RemovableHandle] = []
        self._recording: Tape | None = None
        self._parameters = dict(twin.module.named_parameters())
        with self._active():
            self._hold_module(at_home)
            for name, parameter in self._parameters.items():
                if parameter.requires_grad:  # before the driver's own hook, and after it
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient_cue(name)))
            with self.meter.counting_as("optimizer state"):
                self.driver = attach(self.lanes)
            self.driver.watch(self._watch)
            for parameter in self._parameters.values():
                if parameter.requires_grad:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._resume))
            self._in_blocks = {name for unit in self.driver.units if unit.is_block for name in unit.parameters}
            for unit in self.driver.units:
                for module in unit.entry_modules:
                    module.register_forward_pre_hook(self._entry_cue(unit), prepend=True)

    def record(self) -> None:
        """Run the module for one step: memory, FLOPs and the tapes are known afterwards.

        Of many micro-batches the first two: the others are like the second.
        """
        with self._active(), ExitStack() as stack:
            stack.callback(self.driver.unhook)
            for hook in self._hooks:
                stack.callback(hook.remove)
            kinds = min(self._micro_batches, 2)
            for index in range(kinds):
                self._record(last=index == kinds - 1)
            self.driver.step()

    def time(self) -> Timing:
        """Replay until every step is like the one before, and time the last."""
        with self._active():
            self.lanes.remembers = True
            for _ in range(self.driver.warm_up - 1):
                self._replay_step()
            self.lanes.ledger.start_trace()
            before_s, busy_before_s, asked_before = self.lanes.now_s, self.lanes.busy_s, deepcopy(self.lanes.asked)
            self._spent_s.clear()
            self._replay_step()
            step_s, compute_s = self.lanes.now_s - before_s, self.lanes.busy_s - busy_before_s
            kinds = {kind: total.since(asked_before.get(kind, Total())) for kind, total in self.lanes.asked.items()}
            self.driver.flush()
        return Timing(
            step_s=step_s,
            forward_s=self._duration(self.tapes[0].forward),
            backward_s=self._duration(self.tapes[-1].backward),
            module_s=sum(
                self._duration(tape.forward + tape.backward) for tape in map(self._tape_of, range(self._micro_batches))
            ),
            compress_s=self._spent_s["gradient"],
            apply_s=self._spent_s["entered"],
            compute_s=compute_s,
            kinds=kinds,
            spans=tuple(self.lanes.ledger.stop_trace()),
        )

    @property
    def flops(self) -> int:
        """FLOPs of the module in one step."""
        return sum(self._tape_of(index).flops for index in range(self._micro_batches))

    def _tape_of(self, index: int) -> Tape:
        """Of a micro-batch of the step: all after the first are alike, adding to gradients that are there."""
        return self.tapes[min(index, 1)]

    def _duration(self, happenings: Sequence[Happening]) -> float:
        return sum(self._cost(work) for happening in happenings for work in happening.work)

    # Recording.

    def _record(self, *, last: bool) -> None:
        tape = self._recording = self._tape = Tape()
        self._seen_block = False
        self.meter.kind = "activations"
        with explaining(type(self._twin.module).__name__, OWN_STEP):
            with self._context(), self.driver.micro_batch(last=last):
                loss = self._step(self._twin.module, self._batch) / self._micro_batches
            tape.is_backward = True
            loss.backward()
        self._recording = self._tape = None
        self.tapes.append(tape)

    def _work(self, work: Work) -> None:
        self.lanes.advance(self._cost(work))
        if self._tape is not None:
            self._tape.add(work)

    def _gradient_cue(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self._recording is not None and parameter.grad is not None:  # told of those that get none, too
                self._recording.cue(gradient=name)
                self._tape = None
                self.meter.hold(parameter.grad, "gradients")
                if name in self._in_blocks:  # backward has come to the blocks
                    self.meter.kind = "activations"

        return hook

    @contextmanager
    def _watch(self, fn: Callable[..., object], args: Sequence[Any]) -> Iterator[None]:
        """Nothing where the hook of the parameter itself has told, or in a replay."""
        if self._tape is None:
            yield
            return
        self._tape.cue(called=Call.of(fn, args))
        self._tape = None
        yield
        self._tape = self._recording

    def _resume(self, parameter: Tensor) -> None:
        """The driver has returned; what follows is the module's again."""
        self._tape = self._recording

    def _entry_cue(self, unit: Unit) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self._recording is not None:
                self._recording.cue(entered=unit.index)
                self._seen_block |= unit.is_block
                self.meter.kind = "activations" if unit.is_block or not self._seen_block else "logits"

        return hook

    def _hold_module(self, at_home: Collection[int]) -> None:
        for buffer in self._twin.module.buffers():
            self.meter.hold(buffer, "buffers")
        for parameter in self._parameters.values():
            if id(parameter) not in at_home:
                self.meter.hold(parameter, "weights")
        for tensor in tree_leaves(self._batch):
            if isinstance(tensor, Tensor):
                self.meter.hold(tensor, "batch")

    # Replaying.

    def _replay_step(self) -> None:
        for index in range(self._micro_batches):
            self._replay(self._tape_of(index), last=index == self._micro_batches - 1)
        self.driver.step()

    def _replay(self, tape: Tape, *, last: bool) -> None:
        with self.driver.micro_batch(last=last):
            for happening in tape.forward:
                self._play(happening, recomputed=False)
        for happening in tape.backward:
            self._play(happening, recomputed=True)

    def _play(self, happening: Happening, *, recomputed: bool) -> None:
        self.lanes.advance(self._duration([happening]))
        if happening.entered is not None:
            with self._spending("entered"):
                self.driver.enter(happening.entered, recomputed=recomputed)
        if happening.gradient is not None:
            parameter = self._parameters[happening.gradient]
            if parameter.grad is None:
                with self.meter.counting_as(None):
                    parameter.grad = torch.empty_like(parameter)
            with self._spending("gradient"):
                self.driver.gradient_arrived(happening.gradient)
        if (call := happening.called) is not None:
            with self.meter.counting_as(None):
                args = call.other_args()
            with self._spending("gradient" if recomputed else "entered"):
                call.fn(*args)

    @contextmanager
    def _spending(self, what: str) -> Iterator[None]:
        before_s = self.lanes.busy_s
        yield
        self._spent_s[what] += self.lanes.busy_s - before_s

    @contextmanager
    def _active(self) -> Iterator[None]:
        as_machine = imitating_gpu(self._on_gpu)
        with pretending(), as_machine, warnings.catch_warnings(), self._twin.mode, self.meter:
            warnings.simplefilter("ignore")
            yield


OWN_STEP = "Pass `step=`, a function (module, batch) -> loss that leaves this out."


def costs(machine: Machine) -> Callable[[Work], float]:
    """Seconds of one operation on this machine."""
    rates = machine.rates
    assert rates is not None
    return partial(
        seconds,
        wide_flops=1e12 * rates.fp32_tflops,
        narrow_flops=1e12 * rates.bf16_tflops,
        bytes_per_s=1e9 * rates.device_gb_per_s,
        least_s=1e-6 * rates.op_us,
    )
