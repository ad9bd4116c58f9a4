"""Hooks and callbacks that look at rows, or at their gradients: what plain Lightning shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers import adamw, mostly_slow
from tests.lit import assert_equal_modules, fit
from tests.meft import FFNNet
from tests.meft_lit import MLit, MManual, MOwn, meft, shuffled_meft


def adapter(module: Any, block: int = 0) -> Any:
    return module.net.blocks[block].mlp.meft


# Gradients


class CustomClipping(MLit):
    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        for p in self.net.blocks.parameters():
            if p.grad is not None:
                p.grad *= 0.5
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        self.losses.append(float(adapter(self).values.grad.norm()))


class ReadsGradients(MLit):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.losses.append(float(sum(p.grad.square().sum() for p in self.parameters() if p.grad is not None)))

    def on_after_backward(self) -> None:
        self.losses.append(float(adapter(self).keys.grad.sum()))


class OwnOptimizerStep(MLit):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + batch_idx)
        optimizer.step(closure=optimizer_closure)


class OwnBackward(MLit):
    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for p in self.parameters():
            if p.requires_grad:
                p.grad.mul_(0.5)


class ReplacesGradients(MLit):
    """By another tensor; by noise in rows that had none; by nothing."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        adapter(self).values.grad = adapter(self).values.grad * 0.5
        adapter(self).keys.grad.add_(0.01)
        adapter(self, 1).keys.grad = None


class SkipsSomeSteps(MLit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


class UserManual(MLit):
    """Manual optimization as users write it, knowing nothing of offloading."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx == 5:  # a gradient that no step takes
            self.manual_backward(self.one(batch))
        optimizer.zero_grad()
        self.manual_backward(self.one(batch))
        self.manual_backward(0.5 * self.net.loss(batch))  # a second backward in one step
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        self.losses.append(float(adapter(self).values.grad.norm()))
        optimizer.step()


HOOKS = [CustomClipping, ReadsGradients, OwnOptimizerStep, OwnBackward, ReplacesGradients, SkipsSomeSteps, UserManual]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(
    ("make", "placement", "recompute"),
    mostly_slow(
        [
            (make, placement, recompute)
            for make, placement in [(meft, "device"), (shuffled_meft, "host"), (shuffled_meft, "keys")]
            for recompute in ("no", "reentrant")
        ],
        lambda at, row: at in (0, 3, 4),
    ),
)
def test_overridden_hooks_behave_as_under_plain_lightning(kind: Any, recompute: str, make: Any, placement: str) -> None:
    plain, ours = kind(attached={}, recompute=recompute), kind(recompute=recompute)
    window = {} if kind is UserManual else {"accumulate_grad_batches": 2}
    fit(plain, **window)
    fit(ours, make(placement=placement), **window)
    assert_equal_modules(plain, ours)


class ManualReader(MManual):
    on_before_optimizer_step = ReplacesGradients.on_before_optimizer_step
    on_after_backward = ReadsGradients.on_after_backward


class OwnReader(MOwn):
    on_before_optimizer_step = ReplacesGradients.on_before_optimizer_step
    on_after_backward = ReadsGradients.on_after_backward


@pytest.mark.parametrize("strategy", ["meft_offload", "auto"])
def test_hooks_of_mixins_see_the_same(strategy: str) -> None:
    step = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    plain, ours = ManualReader(attached={}), OwnReader(step)
    plain.offload = step
    fit(plain)
    fit(ours, strategy)
    assert_equal_modules(plain, ours)


def test_that_gradients_are_shown_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(ReadsGradients(), meft(), max_steps=1)
    assert "may look at gradients, so each backward waits until those of rows are summed up" in caplog.text


# Weights


class ReadsWeights(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.losses.append(float(adapter(pl_module).values.double().sum()))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.losses.append(float(adapter(pl_module, 1).router.double().sum()))


class WritesWeights(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        with torch.no_grad():
            adapter(pl_module).values[:9] *= 0.5
            adapter(pl_module).keys.data.copy_(adapter(pl_module).keys.data.clamp(max=0.01))
            pl_module.net.head.weight[0] *= 0.9  # frozen, but not to hooks


class SwapsForValidation(L.Callback):
    """As weight averaging does it, through ``.data``."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.kept = [p.data.clone() for p in adapter(pl_module).parameters()]
        for p in adapter(pl_module).parameters():
            p.data.zero_()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for p, kept in zip(adapter(pl_module).parameters(), self.kept, strict=True):
            p.data.copy_(kept * 0.9)


class LooksEarly(L.Callback):
    """In hooks that run before the strategy hears of the validation, or of the end."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.losses.append(float(adapter(pl_module).values.double().sum()))
        with torch.no_grad():
            adapter(pl_module).values[1] += 0.5

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.losses.append(float(adapter(pl_module).keys.double().sum()))
        with torch.no_grad():
            adapter(pl_module).keys[1] *= 0.5


class LoadsWeights(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        state = pl_module.state_dict()
        pl_module.load_state_dict({name: v * 0.5 if "values" in name else v for name, v in state.items()})


class Ema(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(device="cpu", avg_fn=lambda average, current, count: average * 0.5 + current * 0.5)


CALLBACKS: dict[str, Any] = {
    "reads": ReadsWeights,
    "writes": WritesWeights,
    "swaps": SwapsForValidation,
    "early": LooksEarly,
    "loads": LoadsWeights,
    "ema": Ema,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
    "stops": lambda: EarlyStopping("val/loss", patience=1, mode="max"),
    "accumulation": lambda: GradientAccumulationScheduler({0: 3, 1: 2}),
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize(("make", "placement"), [(meft, "device"), (shuffled_meft, "host"), (shuffled_meft, "keys")])
def test_callbacks_behave_as_under_plain_lightning(name: str, make: Any, placement: str) -> None:
    plain, ours = MLit(attached={}), MLit()
    run = {"max_epochs": 3, "limit_val_batches": 2, "val_check_interval": 4}
    fit(plain, callbacks=[CALLBACKS[name]()], **run)
    fit(ours, make(placement=placement), callbacks=[CALLBACKS[name]()], **run)
    assert_equal_modules(plain, ours)


class BuiltLate(MLit):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = FFNNet()


@pytest.mark.parametrize("name", ["ema", "swa"])
@pytest.mark.filterwarnings("ignore:.*overrides the `configure_model`")
def test_averages_of_a_module_that_is_built_late(name: str) -> None:
    plain, ours = MLit(attached={}), BuiltLate()
    fit(plain, callbacks=[CALLBACKS[name]()], max_epochs=3)
    fit(ours, meft(), callbacks=[CALLBACKS[name]()], max_epochs=3)
    assert_equal_modules(plain, ours)


@pytest.mark.parametrize("name", [name for name in CALLBACKS if name != "accumulation"])  # the mixin's own
def test_callbacks_see_the_same_under_the_mixin(name: str) -> None:
    modules = MOwn(), MOwn()
    run: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 2, "val_check_interval": 4}
    for module, strategy in zip(modules, ("meft_offload", "auto"), strict=True):
        fit(module, strategy, callbacks=[CALLBACKS[name]()], **run)
    assert_equal_modules(*modules)


@pytest.mark.parametrize("name", ["writes", "ema", "loads", "swaps"])
def test_callbacks_see_the_same_under_bf16_in_any_order(name: str) -> None:
    modules = MLit(), MLit()
    run: dict[str, Any] = {"limit_val_batches": 1, "precision": "bf16-true"}
    fit(modules[0], meft(placement="keys"), callbacks=[CALLBACKS[name]()], **run)
    fit(modules[1], shuffled_meft(placement="host"), callbacks=[CALLBACKS[name]()], **run)
    assert_equal_modules(*modules)


# Tuners


class TunedLit(MLit):
    """Attributes of the names that the tuner's callbacks look for; runs out of memory above four samples."""

    lr, batch_size = 3e-2, 2

    def configure_optimizers(self) -> Any:
        return adamw(self, lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(super().train_dataloader().dataset, batch_size=self.batch_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if len(batch) > 4:
            loss.register_hook(lambda _: _run_out())
        return loss


def _run_out() -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")


@pytest.mark.parametrize("make", [meft, shuffled_meft])
def test_learning_rate_finder(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    modules = TunedLit(attached={}), TunedLit()
    for module, strategy in zip(modules, ("auto", make()), strict=True):
        finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        fit(module, strategy, callbacks=[finder], max_epochs=3)
        assert finder.optimal_lr is not None
    assert modules[0].lr == modules[1].lr
    assert_equal_modules(*modules)


@pytest.mark.parametrize("make", [pytest.param(meft, marks=pytest.mark.slow), shuffled_meft])
def test_batch_size_finder_leaves_no_gradient_behind(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    modules = TunedLit(attached={}), TunedLit()
    for module, strategy in zip(modules, ("auto", make()), strict=True):
        finder = BatchSizeFinder(init_val=2, steps_per_trial=1, max_trials=3)
        fit(module, strategy, callbacks=[finder], max_epochs=1)
        assert module.batch_size == 4
    for name, value in modules[0].state_dict().items():
        if name != "seen":
            assert torch.equal(value, modules[1].state_dict()[name]), name
