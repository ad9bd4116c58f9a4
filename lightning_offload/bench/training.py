"""Whole training steps: every arm trains the same model by shape, some steps at a time, in turns."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_offload.behaviour import OffloadBehaviour
from lightning_offload.bench.arms import Arm, state_bytes
from lightning_offload.bench.bounds import Counts
from lightning_offload.bench.measure import CannotRun, ratio, round_robin
from lightning_offload.bench.report import Row
from lightning_offload.errors import OffloadError
from lightning_offload.memory.budget import GIB
from lightning_offload.memory.ledger import Total
from lightning_offload.memory.rates import Rates
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.text import CausalLM, batch_by_shape

WARM_UP = 2
"""Steps of each turn before its clock starts: they allocate."""

_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every arm trains.

    Attributes:
        title: For the table.
        config: The model by shape.
        batch: Sequences per step.
        length: Tokens of each.
        device: ``cpu`` or ``cuda``.
        precision: As the Trainer has it.
        clip: Largest norm of all gradients, or None.
        recompute: Compute each block again in the backward pass.
    """

    title: str
    config: dict[str, Any]
    batch: int
    length: int
    device: str
    precision: str
    clip: float | None = None
    recompute: bool = False

    @property
    def dtype(self) -> str:
        """Of the weights while computing."""
        return "bfloat16" if self.precision == "bf16-true" else "float32"

    def counts(self) -> Counts:
        """What a step has to do, without making the model."""
        with torch.device("meta"):
            network = CausalLM(config=self.config, init="random", dtype=self.dtype).network
        wire_bytes = 2 if self.dtype == "bfloat16" else 4
        return Counts.of(network, batch=self.batch, length=self.length, recompute=self.recompute, wire_bytes=wire_bytes)


@dataclass(frozen=True)
class Turn:
    """A few steps of one arm: seconds of each on average, and what else was seen."""

    step_s: float
    values: dict[str, float]


def compare(
    workload: Workload, arms: Sequence[Arm], *, rounds: int, steps: int, rates: Rates | None
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Rows, and notes on those that are not there; ratios are to the first arm, percentages of a method's own bound."""
    turns = {arm.name: partial(take_turn, workload, arm, steps) for arm in arms}
    results, failed = round_robin(turns, rounds)
    base = [turn.step_s for turn in results.get(arms[0].name, [])]
    counts = workload.counts() if rates is not None else None
    rows = []
    for arm in arms:
        if arm.name in results:
            bound_s = arm.bound_s(counts, rates) if arm.bound_s and counts and rates else None
            rows.append(_row(workload, arm.name, results[arm.name], base, bound_s))
    notes = [f"{name}: {why}" for name, why in failed.items()]
    notes += [f"{arm.name}: {arm.note}" for arm in arms if arm.note and arm.name in results]
    return tuple(rows), tuple(notes)


def _row(workload: Workload, name: str, turns: list[Turn], base: list[float], bound_s: float | None) -> Row:
    samples = [turn.step_s for turn in turns]
    step_s = median(samples)
    values = {"step_s": step_s, "tokens_per_s": workload.batch * workload.length / step_s}
    if base:
        values |= ratio(samples, base)
    if bound_s is not None:
        values |= {"bound_s": bound_s, "percent_of_bound": 100 * bound_s / step_s}
    seen = {key: median(turn.values[key] for turn in turns) for key in turns[0].values}
    return Row(name, values | seen, tuple(samples))


def take_turn(workload: Workload, arm: Arm, steps: int) -> Turn:
    """Make the model anew, warm up, take the time of ``steps`` steps, and leave nothing behind.

    Raises:
        CannotRun: What it needs is not here, or it does not fit.
    """
    arm.require()
    try:
        with _silence():
            return _fit(workload, arm, steps)
    except torch.OutOfMemoryError:
        why = "does not fit on the device"
    except OffloadError as error:
        why = str(error)
    finally:
        _leave_nothing(workload.device)
    raise CannotRun(why)  # not in a handler: the exception's frames would keep the model alive


def _leave_nothing(device: str) -> None:
    """Give back what the allocators keep; page-locked memory that a peer has used would be missing for the next."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def _fit(workload: Workload, arm: Arm, steps: int) -> Turn:
    clock = _Clock(steps)
    cuda = workload.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    L.Trainer(
        strategy=arm.strategy(),
        accelerator=workload.device,
        devices=1,
        max_epochs=1,
        precision=workload.precision,  # type: ignore[arg-type]  # one of Lightning's names
        gradient_clip_val=workload.clip if arm.clips else None,
        callbacks=[clock],
        **_QUIET,
    ).fit(_Fitted(workload, arm, WARM_UP + steps))
    if cuda:
        clock.values["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        clock.values["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return Turn(clock.seconds / steps, clock.values)


@contextmanager
def _silence() -> Iterator[None]:
    """Lightning says the same at every turn, and warns of what is meant: no workers, short epochs."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Fitted(CausalLM):
    """Random weights, made where they are trained, and batches of random tokens."""

    def __init__(self, workload: Workload, arm: Arm, steps: int) -> None:
        self._arm = arm
        with torch.device(workload.device):
            super().__init__(
                config=workload.config,
                init="random",
                dtype=workload.dtype,
                gradient_checkpointing=workload.recompute,
            )
        arm.prepare(self)
        self.automatic_optimization = not arm.steps_itself
        self._batches = [
            batch_by_shape(workload.batch, workload.length, workload.config["vocab_size"]) for _ in range(steps)
        ]

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        if not self._arm.steps_itself:
            return loss
        self.manual_backward(loss)
        self.own.step()
        self.own.zero_grad()
        return None

    @override
    def configure_optimizers(self) -> Optimizer | None:
        self.own = self._arm.optimizer(self)
        return None if self._arm.steps_itself else self.own

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]


class _Clock(L.Callback):
    """Wall time of the steps after the warm-up, and how much of it each lane was busy.

    Nothing is waited for in between, so that what overlaps is seen to overlap.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds = steps, 0.0
        self.values: dict[str, float] = {}
        self._before: dict[str, Total] = {}

    @override
    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self._before = _settled(trainer)
            self.seconds = -perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 < WARM_UP + self.steps:
            return
        after = _settled(trainer)
        self.seconds += perf_counter()
        for lane, total in after.items():
            busy_s = total.seconds - self._before.get(lane, Total()).seconds
            self.values[f"{lane}_busy_percent"] = 100 * busy_s / self.seconds
        engine = _engine(trainer)
        if isinstance(engine, ZerothEngine):
            held = engine.streaming.host_bytes
        else:
            held = engine.host_bytes(engine.trained) if engine else state_bytes(module.own)
        self.values["state_gib"] = held / GIB


def _engine(trainer: L.Trainer) -> Any:
    return trainer.strategy.engine if isinstance(trainer.strategy, OffloadBehaviour) else None


def _settled(trainer: L.Trainer) -> dict[str, Total]:
    """Lane totals with nothing in flight."""
    engine = _engine(trainer)
    if engine is not None:
        engine.flush()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return engine.lanes.ledger.snapshot() if engine is not None else {}
