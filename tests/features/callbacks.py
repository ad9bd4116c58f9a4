"""Lightning's callbacks that watch, stop, average, tune or change a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    StochasticWeightAveraging,
    ThroughputMonitor,
)
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from tests.features.arm import Arm, ByIndex, weights
from tests.features.registry import Refusal, feature


def logged(strategy: Arm, module: Any, *callbacks: L.Callback, **options: Any) -> list[dict[str, str]]:
    """The rows that a run leaves in its csv."""
    logger = CSVLogger(strategy.folder)
    strategy.fit(module, logger=logger, callbacks=list(callbacks), log_every_n_steps=1, **options)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


@feature("`EarlyStopping`")
def early_stopping(strategy: Arm) -> None:
    stops = EarlyStopping("val/loss", mode="max", patience=1, min_delta=100)
    run = strategy.fit(strategy.lit(), callbacks=[stops], max_epochs=9, limit_val_batches=1)
    assert run.current_epoch == 2
    assert stops.stopped_epoch == 1
    nan = EarlyStopping("val/loss", check_finite=True, stopping_threshold=1e9, mode="min")
    assert strategy.fit(strategy.lit(), callbacks=[nan], max_epochs=9, limit_val_batches=1).global_step == 5


@feature("`LearningRateMonitor`")
def learning_rate_monitor(strategy: Arm) -> None:
    module = strategy.lit(schedule="step")
    rows = logged(strategy, module, LearningRateMonitor("step", log_weight_decay=True))
    name, base = f"lr-{type(module.make_optimizer(module)).__name__}", module.make_optimizer(module).defaults["lr"]
    assert column(rows, name) == pytest.approx([base * min(1.0, (step + 1) / 4) for step in range(10)])
    assert len(column(rows, f"{name}-weight_decay")) == 10


class Weights(L.Callback):
    """Those after every step and at the start of every epoch, in double precision."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append({name: value.double() for name, value in weights(pl_module).items()})

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.epochs.append({name: value.double() for name, value in weights(pl_module).items()})


def ends_with(module: Any, expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(value.double(), expected[n], atol=1e-6) for n, value in weights(module).items())


@feature("`WeightAveraging`")
def weight_averaging(strategy: Arm) -> None:
    module, seen = strategy.lit(), Weights()
    halves = WeightAveraging(device="cpu", avg_fn=lambda average, current, count: (average + current) / 2)
    strategy.fit(module, callbacks=[seen, halves], limit_val_batches=1)
    expected = seen.steps[0]
    for step in seen.steps[1:]:
        expected = {name: (value + step[name]) / 2 for name, value in expected.items()}
    assert ends_with(module, expected)
    assert not ends_with(module, seen.steps[-1])


@feature("`EMAWeightAveraging`, resumed")
def ema(strategy: Arm) -> None:
    def averaging() -> EMAWeightAveraging:
        return EMAWeightAveraging(device="cpu", decay=0.5)

    whole, first, rest = strategy.lit(), strategy.lit(), strategy.lit()
    strategy.fit(whole, callbacks=[averaging()], limit_val_batches=1)
    run = strategy.trainer(callbacks=[averaging()], max_epochs=1, limit_val_batches=1, enable_checkpointing=True)
    torch.manual_seed(3)
    run.fit(first)
    path = next(strategy.folder.rglob("*.ckpt"))
    strategy.fit(rest, callbacks=[averaging()], ckpt_path=path, limit_val_batches=1)
    assert strategy.same(rest, whole)
    assert not strategy.same(whole, strategy.trained())


@feature("`StochasticWeightAveraging`")
def swa(strategy: Arm) -> None:
    module, seen = strategy.lit(), Weights()
    averaging = StochasticWeightAveraging(swa_lrs=1e-4, swa_epoch_start=2, annealing_epochs=1)
    strategy.fit(module, callbacks=[seen, averaging], max_epochs=3)
    starts = seen.epochs[1:3]
    expected = {name: torch.stack([start[name] for start in starts]).mean(0) for name in starts[0]}
    assert ends_with(module, expected)
    assert not ends_with(module, starts[-1])


@feature("`DeviceStatsMonitor`")
def device_stats(strategy: Arm) -> None:
    rows = logged(strategy, strategy.lit(), DeviceStatsMonitor(cpu_stats=True))
    assert len(column(rows, "DeviceStatsMonitor.on_train_batch_end/cpu_percent")) == 10


@feature("`ThroughputMonitor`")
def throughput(strategy: Arm) -> None:
    monitor = ThroughputMonitor(batch_size_fn=len, length_fn=lambda batch: batch.shape[1], window_size=3)
    rows = logged(strategy, strategy.lit(), monitor)
    assert column(rows, "train/samples")[-1] == 20
    assert min(column(rows, "train/device/samples_per_sec")) > 0


class Tuned:
    """Attributes of the names that tuners look for; runs out of memory above four samples."""

    lr, batch_size = 1e-3, 2

    def configure_optimizers(self) -> Any:
        return type(self.make_optimizer(self))([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(super().train_dataloader().dataset, batch_size=self.batch_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if len(batch) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")
        return super().training_step(batch, batch_idx)


@feature("`LearningRateFinder`, `Tuner.lr_find`: the run after it is as without")
def lr_finder(strategy: Arm) -> None:
    finder = LearningRateFinder(num_training_steps=8, early_stop_threshold=None, update_attr=False)
    module, whole = strategy.lit(Tuned, samples=20), strategy.lit(Tuned, samples=20)
    strategy.fit(module, callbacks=[finder])
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["lr"]) >= 8
    strategy.fit(whole)
    assert strategy.same(module, whole)
    tuned, run = strategy.lit(Tuned, samples=20), strategy.trainer()
    assert Tuner(run).lr_find(tuned, num_training=8, early_stop_threshold=None) is not None
    run.fit(tuned)
    assert run.global_step == 20


@feature("`BatchSizeFinder`, `Tuner.scale_batch_size`: the run after it is as without")
def batch_size_finder(strategy: Arm) -> None:
    module, whole = strategy.lit(Tuned, samples=20), strategy.lit(Tuned, samples=20)
    trials = {"init_val": 4, "steps_per_trial": 1, "max_trials": 2}
    with mock.patch("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda"):  # takes seconds among tests
        strategy.fit(module, callbacks=[BatchSizeFinder(**trials)])
        assert Tuner(strategy.trainer()).scale_batch_size(strategy.lit(Tuned, samples=20), **trials) == 4
    whole.batch_size = 4
    strategy.fit(whole)
    assert module.batch_size == 4
    assert strategy.same(module, whole)


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.blocks[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.blocks[0], optimizer)


FINETUNING = Refusal(
    NotImplementedError,
    "`Unfreezes` is a `BaseFinetuning`.*cannot grow.*`requires_grad` before `fit`",
    "host memory is laid out once, when `fit` begins: instead of unfreezing in a `BaseFinetuning`, set "
    "`requires_grad` before `fit`, with one `fit` for each phase, or give what comes later a group with `lr=0`",
)


@feature("`BaseFinetuning`, `BackboneFinetuning`", FINETUNING)
def finetuning(strategy: Arm) -> None:
    assert issubclass(BackboneFinetuning, BaseFinetuning)
    strategy.fit(strategy.lit(), callbacks=[Unfreezes()])


@feature("`ModelPruning`")
def pruning(strategy: Arm) -> None:
    module = strategy.lit(ByIndex)
    part = module.net.blocks[0].mlp.up if strategy.name == "meft_offload" else module.net.blocks[0].up
    prune = ModelPruning("l1_unstructured", parameters_to_prune=[(part, "weight")], amount=0.5)
    run = strategy.fit(module, callbacks=[prune], max_epochs=1)
    assert run.global_step == 5
    assert float((part.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert strategy.moved(module)


@feature("`LambdaCallback`, callbacks of your own that read and write weights")
def own_callbacks(strategy: Arm) -> None:
    seen: list[float] = []

    def halve(trainer: L.Trainer, module: Any, *_: Any) -> None:
        seen.append(float(module.net.head.weight.detach().double().sum()))
        with torch.no_grad():
            module.net.head.weight[0] = 7.0

    module = strategy.lit()
    strategy.fit(module, callbacks=[LambdaCallback(on_train_batch_end=halve)])
    assert len(seen) == 10
    assert bool((module.net.head.weight[0] == 7.0).all())
    assert not strategy.same(module, strategy.trained())


@feature("`BasePredictionWriter`")
def prediction_writer(strategy: Arm) -> None:
    class Writes(BasePredictionWriter):
        def write_on_batch_end(self, trainer: L.Trainer, pl_module: Any, prediction: Tensor, *_: Any) -> None:
            written.append(prediction)

    written: list[Tensor] = []
    module = strategy.lit()
    strategy.fit(module)
    strategy.trainer(callbacks=[Writes("batch")]).predict(module, module.train_dataloader(), return_predictions=False)
    with torch.no_grad():
        assert torch.equal(written[0], module.eval()(next(iter(module.train_dataloader()))))
    assert len(written) == 5
