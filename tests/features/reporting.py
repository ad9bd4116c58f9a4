"""What says what a run does: loggers, bars, summaries, profilers."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.features.arm import Arm
from tests.features.checkpoints import Sized
from tests.features.registry import Refusal, feature


@feature("`CSVLogger`, `self.log` by step and by epoch")
def csv_logger(strategy: Arm) -> None:
    logger = CSVLogger(strategy.folder)
    strategy.fit(strategy.lit(), logger=logger, log_every_n_steps=1, limit_val_batches=1)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 10
    assert len(set(losses)) > 5
    assert sum(bool(row["val/loss"]) for row in rows) == 2


class Example(Sized):
    def __init__(self, size: int = 3, **build: Any) -> None:
        super().__init__(size, **build)
        self.example_input_array = torch.zeros(1, 6, dtype=torch.int64)


def events(logger: TensorBoardLogger) -> EventAccumulator:
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    return found


NO_TRACE = Refusal(
    MisconfigurationException,
    r"`TensorBoardLogger\(log_graph=True\)` traces the module.*Remove `log_graph=True`, and call.*before `fit`",
    "`torch.jit` cannot trace weights that come and go: remove `log_graph=True`, and call "
    "`logger.experiment.add_graph(module, module.example_input_array)` before `fit`",
)


@feature("`TensorBoardLogger(log_graph=True)` with `example_input_array`", zo2_offload=NO_TRACE, meft_offload=NO_TRACE)
def graph(strategy: Arm) -> None:
    logger, module = TensorBoardLogger(strategy.folder, log_graph=True), strategy.lit(Example)
    strategy.fit(module, logger=logger)
    assert events(logger).Tags()["graph"]
    assert strategy.same(module, strategy.trained())


@feature("`TensorBoardLogger`: curves, hyper-parameters")
def tensorboard_logger(strategy: Arm) -> None:
    logger, module = TensorBoardLogger(strategy.folder), strategy.lit(Example)
    strategy.fit(module, logger=logger, log_every_n_steps=1)
    assert len(events(logger).Scalars("train/loss")) == 10
    assert "size: 3" in (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert strategy.same(module, strategy.trained())


@feature("`ModelSummary`, `RichModelSummary`, with `example_input_array`")
def summary(strategy: Arm) -> None:
    counted: list[int] = []

    class Counts(ModelSummary):
        @staticmethod
        def summarize(summary_data: Any, total_parameters: int, *_: Any, **__: Any) -> None:
            counted.append(total_parameters)

    module = strategy.lit(Example)
    strategy.fit(module, callbacks=[Counts(max_depth=-1)], enable_model_summary=True)
    assert counted == [sum(p.numel() for p in module.parameters())]
    rich = strategy.lit(Example)
    strategy.fit(rich, callbacks=[RichModelSummary()], enable_model_summary=True)
    assert strategy.same(rich, module)
    assert strategy.same(rich, strategy.trained())


@feature("`TQDMProgressBar`, `RichProgressBar`")
def bars(strategy: Arm) -> None:
    class Bar(TQDMProgressBar):
        def init_train_tqdm(self) -> Any:
            made = super().init_train_tqdm()
            made.fp = io.StringIO()
            return made

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            done.append(self.train_progress_bar.n)

    class Rich(RichProgressBar):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            done.append(self.progress.tasks[0].completed)
            super().on_train_epoch_end(trainer, pl_module)

    done: list[float] = []
    for bar in (Bar(), Rich(refresh_rate=1)):
        strategy.fit(strategy.lit(), callbacks=[bar], enable_progress_bar=True)
    assert done == [5, 5, 5, 5]


@feature("`SimpleProfiler`, `AdvancedProfiler`, `PyTorchProfiler`")
def profilers(strategy: Arm) -> None:
    step = f"[Strategy]{strategy.kind.__name__}.training_step"
    simple = SimpleProfiler()
    strategy.fit(strategy.lit(), profiler=simple)
    assert len(simple.recorded_durations[step]) == 10
    advanced = AdvancedProfiler(strategy.folder, "advanced")
    strategy.fit(strategy.lit(), profiler=advanced, max_epochs=1)
    assert step in (strategy.folder / "fit-advanced.txt").read_text()
    traced = PyTorchProfiler(strategy.folder, "torch", export_to_chrome=False)
    module = strategy.lit()
    strategy.fit(module, profiler=traced, max_epochs=1)
    assert "aten::" in next(strategy.folder.glob("fit-torch*.txt")).read_text()
    assert strategy.same(module, strategy.trained(max_epochs=1))
