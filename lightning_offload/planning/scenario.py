"""One configuration of a run, and its dry run turned into a plan."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_offload.memory.allocator import MIB, replay
from lightning_offload.memory.blocks import partition
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.host_limits import cpu_model
from lightning_offload.memory.virtual import VirtualLanes
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.drivers import Driver, EngineDriver, NativeDriver, WatchedEngine
from lightning_offload.methods.dryrun import DryRun, Timing
from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.meft import MEFT, attach, join
from lightning_offload.methods.method import Method
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.row_source import PUBLISHED_UNION
from lightning_offload.methods.settings import CommonSettings
from lightning_offload.methods.twin import HostRead, Step, Twin, forward_context, pretending
from lightning_offload.methods.zeroth_dryrun import ZerothDriver, ZerothDryRun
from lightning_offload.methods.zo2 import ZO2
from lightning_offload.parts import parts_of
from lightning_offload.planning import rows
from lightning_offload.planning.methods import (
    FULL,
    NATIVE,
    SERIAL,
    ZEROTH,
    Precision,
    check_precision,
    default_optimizer,
    method_for,
    settings_for,
)
from lightning_offload.planning.result import THE_RUN_ITSELF, Memory, Plan
from lightning_offload.planning.steps import optimizer_of, own_step
from lightning_offload.planning.streamed import tips
from lightning_offload.planning.waiting import Waiting, count_of
from lightning_offload.timeline import LaneUse
from lightning_offload.words import count, gigabytes

WORKSPACE_BYTES = 2 * (8 * MIB + MIB // 8)
"""cuBLAS keeps one workspace per thread and stream: of the forward, and of autograd's own thread."""

MARGIN = 1.02
"""Kernels' own workspaces, which no dispatcher sees."""


@dataclass(frozen=True)
class Scenario:
    """What is to be planned.

    Attributes:
        module: The model; never touched.
        batch: One micro-batch.
        machine: With rates.
        method: One of ``methods()``.
        settings: Of the method; of another's, what all methods have is taken over.
        precision: Lightning's name of it.
        plugin: What else is asked of dtypes; ``None`` is nothing.
        micro_batches: Per step.
        clip: The gradient clipping.
        optimizer: Over the module's parameters; ``None`` asks the module, else takes AdamW, of zo2 SGD.
        step: The loss of a micro-batch; ``None`` is the module's own.
        checkpointing: Turn on the model's own gradient checkpointing.
        loss_chunk_tokens: For a model whose loss comes in chunks; ``None`` leaves it as it is.
        union: Of meft: share of a layer's rows that the tokens of a micro-batch use.
        serial: ZeRO-Offload's schedule: the host begins after backward, the next forward after the last arrival.
    """

    module: nn.Module
    batch: Any
    machine: Machine
    method: str = FULL
    settings: CommonSettings = field(default_factory=FullSettings)
    precision: str = "32-true"
    plugin: Precision | None = None
    micro_batches: int = 1
    clip: Clip | None = None
    optimizer: torch.optim.Optimizer | None = None
    step: Step | None = None
    checkpointing: bool = False
    loss_chunk_tokens: int | None = None
    union: float = PUBLISHED_UNION
    serial: bool = False

    def __post_init__(self) -> None:
        """Settings are the method's."""
        check_precision(self.method, self.precision)
        object.__setattr__(self, "settings", settings_for(self.method, self.settings))

    @property
    def waits(self) -> bool:
        """Whether its schedule is ZeRO-Offload's."""
        return self.serial or self.method == SERIAL

    @property
    def batch_size(self) -> int:
        """Samples of the micro-batch."""
        return next((t.shape[0] for t in tree_leaves(self.batch) if isinstance(t, Tensor) and t.dim()), 1)

    def with_batch_size(self, size: int) -> Scenario:
        """The same number of samples per step in micro-batches of ``size``."""
        whole = self.batch_size
        batch = tree_map(
            lambda x: x[:size] if isinstance(x, Tensor) and x.dim() and x.shape[0] == whole else x, self.batch
        )
        return replace(self, batch=batch, micro_batches=self.micro_batches * -(-whole // size))


class Dry:
    """A scenario that has been run dry."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        zeroth = scenario.method == ZEROTH
        method: Method | ZO2 = ZO2(scenario.settings) if zeroth else method_for(scenario.method, scenario.settings)  # type: ignore[arg-type]
        plugin = scenario.plugin if scenario.method != NATIVE else None  # there is no link, and there are no masters
        wished = plugin.under(scenario.precision).dtypes(method) if plugin is not None else None
        self.dtypes = wished or DTypes.of(scenario.precision, method.rounding)
        twin = Twin(scenario.module, self.dtypes.compute)
        if scenario.checkpointing:
            _enable_checkpointing(twin.module)
        if scenario.loss_chunk_tokens is not None:
            twin.module.loss_chunk_tokens = scenario.loss_chunk_tokens  # type: ignore[assignment]
        self._at_home: set[int] = set()  # ids of parameters that are in host memory all the time
        if isinstance(method, MEFT):
            with pretending(), twin.mode:
                adapters = attach(twin.module, method.settings, dtype=self.dtypes.compute or torch.float32)
            self._at_home = {id(p) for adapter in adapters for p in (adapter.keys, adapter.values)}
        optimizer = optimizer_of(twin, scenario.optimizer, default_optimizer(scenario.method))
        if isinstance(method, MEFT):
            join(optimizer, twin.module)
        self.trained = sum(p.numel() for g in optimizer.param_groups for p in g["params"] if p.requires_grad)
        self.parameters = sum(p.numel() for p in twin.module.parameters())
        self.notes: list[str] = []
        self._decides_late = False
        self.run: DryRun | ZerothDryRun
        if isinstance(method, ZO2):
            self.run = self._zeroth(twin, optimizer, method)
        else:
            self.run = self._with_gradients(twin, optimizer, method)
        self.run.record()

    def _with_gradients(self, twin: Twin, optimizer: torch.optim.Optimizer, method: Method) -> DryRun:
        scenario, dtypes = self.scenario, self.dtypes
        units = partition(twin.module, scenario.settings.blocks)
        if scenario.method != NATIVE:
            self.notes = method.resolve(
                twin.module, units, scenario.machine, dtypes, accumulates=scenario.micro_batches > 1
            )
        checks = method.settings.skip_nonfinite and not method.layer_wise
        self._decides_late = checks or scenario.waits or scenario.clip is not None

        def attach(lanes: VirtualLanes) -> Driver:
            if scenario.method == NATIVE:
                return NativeDriver(units, optimizer, lanes, clip=scenario.clip)
            late = scenario.clip is not None or scenario.waits
            engine = WatchedEngine(twin.module, optimizer, method, lanes, dtypes, expects_clip=late, units=units)
            if isinstance(engine.own, RowOptimizer):
                engine.own.expect_union(scenario.union)
            return EngineDriver(engine, clip=scenario.clip, serial=scenario.waits)

        return DryRun(
            twin,
            attach,
            scenario.machine,
            step=scenario.step or own_step(scenario.module),
            batch=twin.batch(scenario.batch, dtypes.compute),
            micro_batches=scenario.micro_batches,
            context=forward_context(scenario.precision),
            pin=method.settings.pin_memory is not False,
            at_home=self._at_home,
        )

    def _zeroth(self, twin: Twin, optimizer: torch.optim.Optimizer, method: ZO2) -> ZerothDryRun:
        scenario, dtypes = self.scenario, self.dtypes
        self.notes = method.resolve(partition(twin.module, method.settings.blocks), scenario.machine, dtypes)
        if not method.settings.train_mode:
            for part in twin.module.modules():
                part.training = False
        return ZerothDryRun(
            twin,
            optimizer,
            method,
            scenario.machine,
            dtypes,
            step=scenario.step or own_step(scenario.module, backward=False),
            parts=parts_of(twin.batch(scenario.batch, dtypes.compute), method.settings.micro_batches),
            micro_batches=scenario.micro_batches,
            context=forward_context(scenario.precision),
            clip=scenario.clip,
        )

    @cached_property
    def timing(self) -> Timing:
        """Of one step; what it costs to know is a few replayed ones."""
        return self.run.time()

    @property
    def device(self) -> Memory:
        """The peak, by what it holds; on a GPU as the caching allocator would reserve it."""
        return self._device(expandable=_has_expandable_segments())

    @property
    def device_expandable(self) -> Memory:
        """The same with ``PYTORCH_ALLOC_CONF=expandable_segments:True``."""
        return self._device(expandable=True)

    def _device(self, *, expandable: bool) -> Memory:
        machine, meter = self.scenario.machine, self.run.meter
        kinds = Counter(dict(meter.peak.kinds))
        kinds.pop("weights", 0)
        streamed = self.scenario.method == ZEROTH
        holds = {
            **({} if streamed else self._weights()),
            **{kind: count for kind, count in sorted(kinds.items()) if count},
        }
        if machine.device_type == "cpu":
            return Memory(holds, None)
        outside = machine.context_bytes + WORKSPACE_BYTES
        found = replay(meter.allocations, expandable=expandable)
        room = int((machine.device_budget_bytes - outside) / MARGIN)
        if found.peak_bytes > room:  # the allocator then gives back what is wholly free before it fails
            pressed = replay(meter.allocations, room, expandable=expandable)
            found = pressed if pressed.fits else found
        holds["allocator (rounding, fragments)"] = max(found.peak_bytes - meter.peak.bytes, 0)
        holds["CUDA context, workspaces"] = outside + int((MARGIN - 1) * found.peak_bytes)
        return Memory(holds, machine.device_budget_bytes)

    @property
    def host(self) -> Memory:
        """The arenas; on a CPU the rest of the run is there too."""
        driver, machine = self.run.driver, self.scenario.machine
        holds: dict[str, int] = {}
        if isinstance(driver, EngineDriver):
            held = Counter[str]()
            for part in driver.engine.senders:
                held.update(part.holdings)
            holds |= held
            report = self.run.lanes.memory.report()
            holds["alignment, small buffers"] = report.allocated_bytes - sum(holds.values())
            holds["casts"] = max(part.scratch_bytes for part in driver.engine.senders)
        if isinstance(driver, ZerothDriver):
            held_bytes = driver.engine.streaming.host_bytes
            holds = {"weights": held_bytes, "alignment": self.run.lanes.memory.report().allocated_bytes - held_bytes}
        if machine.device_type == "cpu":
            holds[THE_RUN_ITSELF] = self.device.bytes
        here = sum(t.nbytes for t in tensors_of(self.scenario.module) if t.device.type == "cpu")  # taken already
        return Memory(holds, min(machine.host_available_bytes + here, machine.host_total_bytes))

    @property
    def pinned(self) -> Memory:
        """What of the arenas is page-locked."""
        locked = self.run.lanes.memory.report().locked_bytes
        kind = "weights" if self.scenario.method == ZEROTH else "wire and rings"
        return Memory({kind: locked} if locked else {}, self.scenario.machine.lockable_bytes)

    @property
    def waiting(self) -> Waiting:
        """What a step waits for."""
        return Waiting(self.scenario, self.timing, self._decides_late)

    def plan(self, *, only_if_it_fits: bool = False) -> Plan:
        """All of it as a plan, without advice.

        Args:
            only_if_it_fits: Leave the times out where it does not: knowing them costs more than memory.
        """
        scenario = self.scenario
        if only_if_it_fits and not (self.device.fits and self.host.fits):
            self.timing = Timing.unknown()
        timing = self.timing
        tokens, unit = count_of(scenario.batch)
        waiting = self.waiting
        uses = self.run.driver.uses
        lanes = {lane: LaneUse(total.bytes, total.seconds) for lane, total in timing.lanes.items()}
        machine = scenario.machine
        return Plan(
            model=f"{type(scenario.module).__name__} of {count(self.parameters)} parameters",
            method=scenario.method,
            precision=scenario.precision,
            hardware=_hardware(machine),
            parameters=self.parameters,
            trained=self.trained,
            micro_batches=scenario.micro_batches,
            tokens=tokens * scenario.micro_batches,
            unit=unit,
            flops=self.run.flops,
            device=self.device,
            device_expandable=self.device_expandable,
            host=self.host,
            pinned=self.pinned,
            step_s=timing.step_s,
            bound_s=waiting.bound_s,
            forward_s=timing.forward_s,
            backward_s=timing.backward_s,
            lanes={"compute": LaneUse(0, timing.compute_s), **lanes},
            bottleneck=waiting.bottleneck,
            notes=(*self.notes, *self._traffic(), *_notes(self.run, machine)),
            union=self._union(),
            uses=uses,
            units=uses.order,
            spans=timing.spans,
        )

    def _union(self) -> float | None:
        driver = self.run.driver
        if not isinstance(driver, EngineDriver) or not self.timing.kinds:
            return None
        own = driver.engine.own
        if not isinstance(own, RowOptimizer):
            return None
        return rows.union_share(self.timing, driver.engine, own, self.scenario.micro_batches)

    def _weights(self) -> dict[str, int]:
        """Weights by where they stand: what runs before the blocks, the blocks, what runs after them."""
        place = {name: at for at, name in enumerate(self.run.driver.uses.order)}
        units = sorted(self.run.driver.units, key=lambda unit: place.get(unit.name, unit.index))
        first_block = next((at for at, unit in enumerate(units) if unit.is_block), len(units))
        sums: Counter[str] = Counter()
        for at, unit in enumerate(units):
            kind = "blocks" if unit.is_block else _OUTSIDE[at > first_block]
            sums[f"weights: {kind}"] += sum(p.nbytes for p in unit.parameters.values() if id(p) not in self._at_home)
        return dict(sums)

    def _traffic(self) -> Iterator[str]:
        """What lsp and meft move, and what others would have; what zo2 leaves unused."""
        driver = self.run.driver
        if isinstance(driver, ZerothDriver) and self.timing.kinds:
            yield from tips(self.scenario, self.timing, self.device, driver.engine)
        if not isinstance(driver, EngineDriver) or driver.engine.own is None or not self.timing.kinds:
            return
        if isinstance(driver.engine.own, RowOptimizer):
            tokens, _ = count_of(self.scenario.batch)
            yield from rows.notes(self.timing, driver.engine, driver.engine.own, self.scenario.micro_batches, tokens)
        else:
            moved = sum(total.bytes for kind, total in self.timing.kinds.items() if kind[0] in ("d2h", "h2d"))
            downs = self.scenario.micro_batches if driver.engine.own.sums_on_host else 1
            of_full = sum(t.parameter.nbytes for part in driver.engine.senders for t in part.trained) * (downs + 1)
            yield f"the link carries {gigabytes(moved)} a step, {100 * moved / of_full:.0f} % of what full moves"


def _hardware(machine: Machine) -> str:
    """The name of its file, or of the device that was found."""
    if machine.name not in ("auto", "cpu"):
        return machine.name
    return f"this CPU, {cpu_model()}" if machine.device_type == "cpu" else machine.device_name


def _has_expandable_segments() -> bool:
    """Whether the allocator of a run in this environment would have them."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return "expandable_segments:true" in settings.lower().replace(" ", "")


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def _enable_checkpointing(module: nn.Module) -> None:
    from lightning_offload.text.loading import recompute_blocks

    recompute_blocks(next(p for p in module.modules() if getattr(p, "supports_gradient_checkpointing", False)))


_OUTSIDE = ("before blocks (embeddings)", "after blocks (head)")
"""Where a unit that is no block stands; of a model without blocks all are before them."""


def _sizes(read: HostRead) -> str:
    return "; pass `step=` if sizes depend on it" if read.answer == "1" else ""


def _notes(run: DryRun | ZerothDryRun, machine: Machine) -> list[str]:
    """What is unusual about the model, and what costs a wait."""
    uses = run.driver.uses
    blocks = {unit.name for unit in run.driver.units if unit.is_block}
    waits = "a value is read" if machine.device_type == "cpu" else "a step waits for the device"
    # a truth value changes nothing on a CPU; what may be a size does
    reads = [r for r in run.meter.reads if machine.device_type != "cpu" or r.answer not in ("True", "False", "1.0")]
    notes = [f"{waits} at {r.where} ({r.what}), taken as {r.answer}{_sizes(r)}" for r in reads]
    notes += [f"`{name}` is used outside its module's call; it is waited for early" for name in uses.functional]
    notes += [f"`{name}` is tied: also used in `{', '.join(users)}`" for name, users in uses.users.items()]
    # a head that takes a long sequence in pieces is nothing unusual
    notes += [
        f"block `{name}` runs {calls} times in a forward" for name, calls in uses.repeats.items() if name in blocks
    ]
    if uses.skipped:
        notes.append(f"never used: {', '.join(sorted(uses.skipped))}")
    return notes
