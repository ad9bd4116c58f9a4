"""What a user sees: columns in the progress bar, numbers in the logger, and when training starts a table."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_offload.attachment import Attachment
from lightning_offload.behaviour import OffloadBehaviour
from lightning_offload.memory.budget import GIB
from lightning_offload.memory.ledger import Total
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.tables import AnyEngine, summary

__all__ = ["OffloadStats", "OffloadSummary", "memory_gib", "summary"]


class OffloadStats(Callback):
    """Throughput, memory and what the step did: in the progress bar, and in any Lightning logger as ``offload/...``.

    Bar columns: ``tok/s`` (``samples/s`` where batches have no ``input_ids``), ``device GiB`` (peak), ``host GiB``, on
    a GPU the link's ``d2h GB/s`` and ``h2d GB/s`` over the wall time, and where ``bound_s`` is known ``% of bound``.
    Validation counts as no time. Logged besides: the same rates, seconds per step, gradient norm, clip coefficient,
    skipped steps. On a GPU the last three belong to the newest step the host has finished, which
    may be the one before. Of `zo2`: the mean of l+ and l- (the bar has it too), the projected gradient, skipped steps,
    and the bytes of weights that are streamed and that stay. Of `meft`: the union (the bar has it too), the share of
    rows that a micro-batch used, on average since the row before.

    Args:
        every_n_steps: Optimizer steps between two rows.
        bound_s: Seconds of a step that no schedule can beat, ``Plan.bound_s``; the command line fills it in.
    """

    def __init__(self, every_n_steps: int = 10, bound_s: float | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be an integer >= 1, got {every_n_steps!r}")
        if bound_s is not None and bound_s <= 0:
            raise ValueError(f"`bound_s` must be positive seconds or None, got {bound_s!r}")
        self.every_n_steps, self.bound_s = every_n_steps, bound_s
        self._step = 0
        self._restart(None)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._restart(_engine(trainer))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_s, self._at_pause = perf_counter(), _moved(_engine(trainer))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since += perf_counter() - self._paused_s
        for lane, total in _moved(_engine(trainer)).items():
            apart = total.since(self._at_pause.get(lane, Total()))
            self._before[lane] = self._before.get(lane, Total()).plus(apart)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        count, unit = _count(batch)
        self._counted += count
        step = trainer.global_step
        if step == self._step or step % self.every_n_steps:
            return
        engine, elapsed = _engine(trainer), max(perf_counter() - self._since, 1e-9)
        step_s, self._step = elapsed / (step - self._step), step
        bar = {f"{unit}/s": self._counted / elapsed} | memory_gib(engine, pl_module.device)
        if engine is not None and pl_module.device.type == "cuda":
            bar |= self._rates(engine, elapsed)
        if isinstance(engine, ZerothEngine):
            bar["loss +-"] = engine.report.loss
        elif engine is not None and isinstance(engine.own, RowOptimizer):
            bar["union"] = engine.own.take_union_share()
        row = {f"offload/{key.replace(' ', '_')}": value for key, value in bar.items() if key != "loss +-"}
        row["offload/step_s"] = step_s
        if self.bound_s is not None:
            row["offload/bound_share"] = self.bound_s / step_s
            bar["% of bound"] = 100 * self.bound_s / step_s
        pl_module.log_dict({key: float(value) for key, value in bar.items()}, prog_bar=True, logger=False)
        if engine is not None:
            row |= {f"offload/{lane[:3]}_gb_per_s": rate for lane, rate in self._rates(engine, elapsed).items()}
            row |= {f"offload/{key}": value for key, value in _of_step(engine).items()}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        self._restart(engine)

    def _rates(self, engine: AnyEngine, elapsed: float) -> dict[str, float]:
        now, before = _moved(engine), self._before
        moved = {lane: now.get(lane, Total()).bytes - before.get(lane, Total()).bytes for lane in ("d2h", "h2d")}
        return {f"{lane} GB/s": nbytes / elapsed / 1e9 for lane, nbytes in moved.items()}

    def _restart(self, engine: AnyEngine | None) -> None:
        self._counted = 0
        self._since = perf_counter()
        self._before = _moved(engine)


class OffloadSummary(Callback):
    """Prints, when training starts, each unit with its parameters, dtype, where they are trained, and bytes by place.

    Equal blocks are one row.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engine = _engine(trainer)
        if engine is not None:
            rank_zero_info(summary(engine))


def _of_step(engine: AnyEngine) -> dict[str, float]:
    """What the last step did, by name."""
    skipped = {"skipped_steps": float(engine.report.skipped_total)}
    if isinstance(engine, ZerothEngine):
        return {
            "loss": engine.report.loss,
            "projected_gradient": engine.report.coefficient,
            **skipped,
            "streamed_gib": engine.streaming.host_bytes / GIB,
            "resident_gib": engine.streaming.resident_bytes / GIB,
        }
    return {"grad_norm": engine.report.grad_norm, "clip_coefficient": engine.report.clip_coefficient, **skipped}


def memory_gib(engine: AnyEngine | None, device: torch.device) -> dict[str, float]:
    """Most device memory that torch has held so far, and the host memory of the arenas."""
    used = {}
    if device.type == "cuda":
        used["device GiB"] = torch.cuda.max_memory_allocated(device) / GIB
    if engine is not None:
        used["host GiB"] = engine.lanes.memory.report().allocated_bytes / GIB
    return used


def _moved(engine: AnyEngine | None) -> dict[str, Total]:
    """So far, by lane."""
    return engine.lanes.ledger.snapshot() if engine is not None else {}


def _engine(trainer: Trainer) -> AnyEngine | None:
    strategy, attachment = trainer.strategy, Attachment.of(trainer)
    if isinstance(strategy, OffloadBehaviour):
        engine: AnyEngine | None = strategy.engine
        return engine
    return attachment.engine if attachment is not None else None


def _count(batch: Any) -> tuple[int, str]:
    """Tokens of a batch, or its samples."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return batch["input_ids"].numel(), "tok"
    first = next(iter(batch.values())) if isinstance(batch, Mapping) and batch else batch
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    return (len(first) if isinstance(first, Tensor) and first.dim() else 1), "samples"
