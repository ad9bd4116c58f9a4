"""Traces a few steps of a fit and compares all of them with the plan."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_offload.behaviour import OffloadBehaviour
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.ledger import Ledger, Span, Total
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.timeline import LANES, LaneUse, Prediction, StepUse, draw, summary, write_trace

TRACE_FILE, PICTURE_FILE = "trace.json", "timeline.png"

_OUTSIDE_STEPS = {"adopt"}
"""Kinds of operations that belong to no step."""


class OffloadTimeline(Callback):
    """Writes ``trace.json`` (for https://ui.perfetto.dev) and ``timeline.png`` of a few optimizer steps.

    Nothing is in flight when the first traced step begins and when the last one ends; in between, and in every other
    step, nothing waits for the trace. At the end of fit the cost of one step, over all steps from the first traced
    one on, is printed beside the prediction: bytes to the last one, the median wall time; how long the
    device computes is known of the traced steps alone. Steps are counted from the start of this fit. Without
    offloading it says so and does nothing.

    Args:
        out: Folder of the two files.
        first_step: Number of the first traced optimizer step, from 1; those before warm up. The order in which units
            run is learned in step 1.
        steps: How many are traced; 0 compares, and writes nothing.
        predicted: What a plan expects; drawn above what is measured.

    Raises:
        ValueError: ``first_step`` is below 1, or ``steps`` below 0.
    """

    def __init__(
        self, out: str | Path, *, first_step: int = 3, steps: int = 2, predicted: Prediction | None = None
    ) -> None:
        for name, value, least in (("first_step", first_step, 1), ("steps", steps, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}")
        self.out = Path(out)
        self.first_step, self.steps, self.predicted = first_step, steps, predicted
        self._engine: Engine | ZerothEngine | None = None
        self._before: dict[tuple[str, str], Total] | None = None  # totals when the first traced step began
        self._seconds: list[float] = []  # per step from the first traced one on
        self._tracing, self._done = False, 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        self._restart(strategy.engine if isinstance(strategy, OffloadBehaviour) else None, trainer.global_step)
        if self._engine is None:
            rank_zero_info("OffloadTimeline: nothing is offloaded, so there is no timeline to write.")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._engine is None or self._before is not None or self._done < self.first_step - 1:
            return
        self._engine.flush()
        self._before = _totals(self._engine.lanes.ledger)
        if self.steps:
            self._engine.lanes.ledger.start_trace()
        self._tracing, self._since_s = bool(self.steps), Ledger.clock()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step - self._start == self._done:
            return
        self._done = trainer.global_step - self._start
        if self._before is not None:
            self._seconds.append(Ledger.clock() - self._since_s)
        if self._tracing and len(self._seconds) == self.steps:
            self._write(trainer)
        self._since_s = Ledger.clock()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engine = self._engine
        if engine is None:
            return
        if not self._seconds:
            self._abandon()
            rank_zero_info(
                f"OffloadTimeline: the run ended after {self._done} steps, before step first_step={self.first_step} "
                "was done, so no timeline was written."
            )
            return
        if self._tracing:
            self._write(trainer)
        engine.flush()
        predicted = self.predicted.use if self.predicted is not None else None
        rank_zero_info(summary(predicted, self._measured(engine)))
        if isinstance(engine, Engine) and isinstance(engine.own, RowOptimizer):
            used, planned = engine.own.union_share, self.predicted.union if self.predicted is not None else None
            said = "" if planned is None else f"; bytes were predicted for {planned:.0%} (plan with union={used:.2g})"
            rank_zero_info(f"forwards of this run used {used:.0%} of a layer's rows{said}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._abandon()

    def _restart(self, engine: Engine | ZerothEngine | None, global_step: int) -> None:
        self._engine, self._start, self._done = engine, global_step, 0
        self._before, self._seconds, self._since_s = None, [], 0.0
        self._tracing, self._traced_compute_s = False, 0.0

    def _write(self, trainer: Trainer) -> None:
        engine = self._engine
        assert engine is not None
        engine.flush()
        spans = self._abandon()
        self._traced_compute_s = sum(s.end_s - s.start_s for s in spans if s.lane == "compute") / len(self._seconds)
        if not trainer.is_global_zero:
            return
        timelines = {"predicted": self.predicted.spans} if self.predicted is not None else {}
        timelines |= {"measured": spans}
        units = engine.unit_names
        write_trace(timelines, self.out / TRACE_FILE, units=units)
        picture = draw(timelines, self.out / PICTURE_FILE, units=units, title=self._title(engine))
        rank_zero_info(f"OffloadTimeline: {picture}, and {TRACE_FILE} beside it for https://ui.perfetto.dev")

    def _abandon(self) -> list[Span]:
        """Stop tracing, if it runs."""
        if not self._tracing or self._engine is None:
            return []
        self._tracing = False
        return self._engine.stop_trace()

    def _title(self, engine: Engine | ZerothEngine) -> str:
        last = self.first_step + len(self._seconds) - 1
        parameters = sum(parameter.numel() for parameter in engine.module.parameters())
        return f"method {engine.method.name}, {parameters:,} parameters, steps {self.first_step} to {last}"

    def _measured(self, engine: Engine | ZerothEngine) -> StepUse:
        """One step, on average; nothing is in flight."""
        assert self._before is not None
        steps = len(self._seconds)
        lanes = {"compute": LaneUse(0, self._traced_compute_s)} if self.steps else {}
        now = _totals(engine.lanes.ledger)
        for lane in LANES.keys() & {lane for lane, _ in now} - {"compute"}:
            pairs = [(total, self._before.get(key, Total())) for key, total in now.items() if key[0] == lane]
            moved = sum(total.bytes - before.bytes for total, before in pairs)
            lanes[lane] = LaneUse(round(moved / steps), sum(t.seconds - b.seconds for t, b in pairs) / steps)
        return StepUse(lanes, median(self._seconds), _device_peak_bytes(engine.lanes.device))


def _device_peak_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved(device) + Machine.detect(device).context_bytes


def _totals(ledger: Ledger) -> dict[tuple[str, str], Total]:
    return {
        key: Total(total.operations, total.bytes, total.seconds)
        for key, total in ledger.kinds.items()
        if key[1] not in _OUTSIDE_STEPS
    }
