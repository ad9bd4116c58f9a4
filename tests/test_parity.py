"""`Trainer(strategy="full_offload")` against the plain Trainer, bit for bit, over what users combine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_offload import OffloadPrecision
from tests.helpers import adamw, mostly_slow, pairwise, row_id, two_groups
from tests.lit import Lit, Manual, assert_equal_modules, fit, offload, shuffled

OPTIMIZERS = {"adamw": adamw, "groups": two_groups}
CLIPS: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.05},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}
FACTORS: dict[str, list[Any]] = {
    "accumulate_grad_batches": [1, 2, 4],  # nine batches: the last window is ragged
    "clip": list(CLIPS),
    "model": ["plain", "tied", "frozen", "sometimes_unused", "functional_head"],
    "optimizer": list(OPTIMIZERS),
    "schedule": [None, "step", "epoch"],
    "dropout": [0.0, 0.2],
    "recompute": ["no", "non-reentrant", "reentrant"],
    "accumulate": ["auto", "host"],
    "validate": [False, True],
    "manual": [False, True],
    "skip_nonfinite": [True, False],
}


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=1), ids=row_id)
def test_equals_the_plain_trainer(row: dict[str, Any]) -> None:
    flags = {} if row["model"] == "plain" else {row["model"]: True}
    build = {
        "make_optimizer": OPTIMIZERS[row["optimizer"]],
        "schedule": row["schedule"],
        "dropout": row["dropout"],
        "recompute": row["recompute"],
        **flags,
    }
    step = {"accumulate_grad_batches": row["accumulate_grad_batches"], **CLIPS[row["clip"]]}
    run = {"limit_val_batches": 2, "val_check_interval": 3} if row["validate"] else {}
    plain = Lit(**build)
    fit(plain, **step, **run)
    strategy = offload(accumulate=row["accumulate"], skip_nonfinite=row["skip_nonfinite"])
    ours: Lit = Manual(**build) if row["manual"] else Lit(**build)
    if isinstance(ours, Manual):
        ours.offload = step
        step = {}
    done = fit(ours, strategy, **step, **run)
    assert_equal_modules(plain, ours)
    assert strategy.engine is not None
    moved = strategy.engine.lanes.ledger.moved("h2d", "weights")
    if row["model"] in ("sometimes_unused", "frozen"):  # some trained parameters get no gradient
        assert moved > 0
    else:
        trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
        assert moved == 4 * trained * done.global_step


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_mixin_has_the_bits_of_automatic_optimization(precision: Any) -> None:
    automatic, manual, plain = (kind(dropout=0.1, schedule="step") for kind in (Lit, Manual, Manual))
    step = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    manual.offload = plain.offload = step
    done = fit(automatic, offload(), precision=precision, **step)
    assert fit(manual, offload(), precision=precision).global_step == done.global_step == 10
    assert_equal_modules(automatic, manual)
    if precision == "32-true":  # stock Lightning refuses fused optimizers with clipping under bf16-mixed
        assert fit(plain).global_step == 10
        assert_equal_modules(automatic, plain)


@pytest.mark.parametrize("strategy", ["auto", "full"])
def test_a_validation_inside_a_window_of_the_mixin_leaves_its_gradients(strategy: str) -> None:
    automatic, manual = Lit(), Manual()
    manual.offload = {"accumulate_grad_batches": 2}
    validate = {"limit_val_batches": 1, "val_check_interval": 3}
    fit(automatic, accumulate_grad_batches=2, **validate)
    fit(manual, offload() if strategy == "full" else strategy, **validate)
    assert_equal_modules(automatic, manual)


def test_mixed_precision_equals_the_plain_trainer() -> None:
    plain, ours = Lit(dropout=0.1), Lit(dropout=0.1)
    fit(plain, precision="bf16-mixed", accumulate_grad_batches=2)
    fit(ours, offload(), precision="bf16-mixed", accumulate_grad_batches=2)
    assert_equal_modules(plain, ours)


def test_bf16_true_keeps_what_bf16_alone_loses() -> None:
    def small_steps(module: nn.Module) -> torch.optim.Optimizer:
        return adamw(module, lr=1e-6, weight_decay=0.0)

    ours = Lit(make_optimizer=small_steps)
    before = ours.net.head.weight.detach().clone()
    strategy = offload()
    fit(ours, strategy, precision="bf16-true", max_epochs=4)
    assert ours.net.head.weight.dtype == torch.bfloat16
    assert strategy.engine is not None
    master = strategy.engine.extras()["masters"]["net.head.weight"]
    assert master.dtype == torch.float32
    assert not torch.equal(master, before)  # fp32 masters start from the weights before rounding, and move
    assert (master - before).abs().max() < 1e-4


class CustomClipping(Lit):
    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        for p in self.net.blocks.parameters():
            p.grad *= 0.5
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        self.losses.append(float(self.net.head.weight.grad.norm()))


class ReadsGradients(Lit):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.losses.append(float(sum(p.grad.square().sum() for p in self.parameters())))

    def on_after_backward(self) -> None:
        self.losses.append(float(self.net.embed.weight.grad.sum()))


class OwnOptimizerStep(Lit):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + batch_idx)
        optimizer.step(closure=optimizer_closure)


class OwnBackward(Lit):
    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for p in self.parameters():
            p.grad.mul_(0.5)


class TensorLearningRate(Lit):
    """Torch's schedulers write into the tensor: a step that runs later must not see the next value."""

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self, lr=torch.tensor(3e-2))
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


class SkipsSomeSteps(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


class UserManual(Lit):
    """Manual optimization as users write it, knowing nothing of offloading."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.one(batch))
        self.manual_backward(0.5 * self.net.loss(batch))  # a second backward in one step
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        self.losses.append(float(self.net.head.weight.grad.norm()))
        optimizer.step()


@pytest.mark.parametrize(
    "kind",
    [CustomClipping, ReadsGradients, OwnOptimizerStep, OwnBackward, TensorLearningRate, SkipsSomeSteps, UserManual],
)
@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("make", [offload, shuffled])
def test_overridden_hooks_behave_as_under_plain_lightning(kind: type[Lit], accumulate: str, make: Any) -> None:
    plain, ours = kind(dropout=0.1), kind(dropout=0.1)
    window = {} if kind is UserManual else {"accumulate_grad_batches": 2}
    fit(plain, **window)
    fit(ours, make(accumulate=accumulate), **window)
    assert_equal_modules(plain, ours)


class ReadsWeights(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.losses.append(float(pl_module.net.head.weight.double().sum()))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.losses.append(float(pl_module.net.embed.weight.double().sum()))


class WritesWeights(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        with torch.no_grad():
            pl_module.net.head.weight[0] *= 0.5
            pl_module.net.norm.weight.data.copy_(pl_module.net.norm.weight.data.clamp(max=1.0))


class SwapsForValidation(L.Callback):
    """As weight averaging does it, through ``.data``."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.kept = pl_module.net.head.weight.data.clone()
        pl_module.net.head.weight.data.zero_()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.net.head.weight.data.copy_(self.kept * 0.9)


class LooksEarly(L.Callback):
    """In hooks that run before the strategy hears of the validation, or of the end."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.losses.append(float(pl_module.net.head.weight.double().sum()))
        with torch.no_grad():
            pl_module.net.head.weight[1] *= 0.5

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.losses.append(float(pl_module.net.embed.weight.double().sum()))
        with torch.no_grad():
            pl_module.net.embed.weight[1] *= 0.5


class LoadsWeights(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        state = pl_module.state_dict()
        pl_module.load_state_dict({name: v * 0.5 if "head" in name else v for name, v in state.items()})


class Ema(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(device="cpu", avg_fn=lambda average, current, count: average * 0.5 + current * 0.5)


@pytest.mark.parametrize(
    "make",
    [
        ReadsWeights,
        WritesWeights,
        SwapsForValidation,
        LooksEarly,
        LoadsWeights,
        Ema,
        lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
        lambda: GradientAccumulationScheduler({0: 3, 1: 2}),
    ],
    ids=["reads", "writes", "swaps", "early", "loads", "ema", "swa", "accumulation"],
)
@pytest.mark.parametrize(
    ("kind", "window", "min_numel"),
    mostly_slow(
        [(kind, window, numel) for kind, window in [(offload, 1), (shuffled, 1), (shuffled, 2)] for numel in (0, 60)],
        lambda at, row: at in (0, 3, 4),
    ),
)
def test_callbacks_behave_as_under_plain_lightning(make: Any, min_numel: int, kind: Any, window: int) -> None:
    if isinstance(make(), GradientAccumulationScheduler):
        window = 1  # Lightning allows one of the two
    plain, ours = Lit(dropout=0.1), Lit(dropout=0.1)
    run = {"max_epochs": 3, "limit_val_batches": 2, "val_check_interval": 4, "accumulate_grad_batches": window}
    fit(plain, callbacks=[make()], **run)
    fit(ours, kind(min_numel=min_numel), callbacks=[make()], **run)
    assert_equal_modules(plain, ours)


@pytest.mark.parametrize("make", [WritesWeights, Ema, LoadsWeights], ids=["writes", "ema", "loads"])
def test_writers_are_followed_under_bf16(make: Any) -> None:
    ours = Lit()
    strategy = offload()
    fit(ours, strategy, callbacks=[make()], precision="bf16-true", limit_val_batches=1)
    assert strategy.engine is not None
    masters = strategy.engine.extras()["masters"]
    for name, p in ours.named_parameters():
        assert torch.equal(masters[name].to(torch.bfloat16), p), name
    assert any(not torch.equal(master, master.to(torch.bfloat16).float()) for master in masters.values())


class TunedLit(Lit):
    """For the tuner's callbacks: attributes of the names they look for."""

    lr, batch_size = 3e-2, 2

    def configure_optimizers(self) -> Any:
        return adamw(self, lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(super().train_dataloader().dataset, batch_size=self.batch_size)


class OutOfMemoryLit(TunedLit):
    """Runs out of memory above four samples, in the middle of backward."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if len(batch) > 4:
            handle = self.net.blocks[1].up.weight.register_hook(lambda _: (handle.remove(), _run_out()))
        return loss


def _run_out() -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("make", [offload, shuffled])
def test_learning_rate_finder(make: Any, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rates, modules = [], []
    for strategy in ("auto", make()):
        modules.append(TunedLit(samples=60))
        finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        fit(modules[-1], strategy, precision=precision, callbacks=[finder], max_epochs=1)
        rates.append(modules[-1].lr)
        assert finder.optimal_lr is not None
    if precision == "32-true":  # plain bf16 keeps no masters, so its curve is another
        assert rates[0] == rates[1]
        assert_equal_modules(*modules)


@pytest.mark.parametrize("accumulate", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_batch_size_finder_leaves_no_gradient_behind(
    accumulate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    modules = []
    for strategy in ("auto", offload(accumulate=accumulate)):
        modules.append(OutOfMemoryLit(samples=24))
        finder = BatchSizeFinder(init_val=2, steps_per_trial=1, max_trials=3)
        fit(modules[-1], strategy, callbacks=[finder], max_epochs=1)
        assert modules[-1].batch_size == 4
    for name, p in modules[0].named_parameters():
        assert torch.equal(p, dict(modules[1].named_parameters())[name]), name


def test_compiled_blocks_train_to_the_same_bits() -> None:
    modules = []
    for strategy, compile_one in (("auto", False), (shuffled(), True)):
        module = Lit(depth=2)
        if compile_one:
            module.net.blocks[0] = torch.compile(module.net.blocks[0], backend="eager")
            module.net.blocks[1].compile(backend="eager")
        fit(module, strategy, max_epochs=1)
        modules.append(module)
    assert modules[0].losses == modules[1].losses


def test_learning_rate_monitor_and_logger_see_the_schedule(tmp_path: Any) -> None:
    files = []
    for name, strategy in (("plain", "auto"), ("ours", offload())):
        logger = CSVLogger(tmp_path, name=name)
        fit(Lit(schedule="step"), strategy, logger=logger, callbacks=[LearningRateMonitor("step")], log_every_n_steps=1)
        files.append((Path(logger.log_dir) / "metrics.csv").read_text())
    assert files[0] == files[1]
    assert "lr-AdamW" in files[0]
    assert len(files[0].splitlines()) > 18


def test_dtypes_can_be_named_one_by_one() -> None:
    ours = Lit()
    strategy = offload(precision_plugin=OffloadPrecision("bf16-true", master="float32", wire=torch.bfloat16))
    fit(ours, strategy)
    assert next(ours.parameters()).dtype == torch.bfloat16
