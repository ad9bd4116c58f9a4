"""`LSPMixin`: the update rule under a plain strategy, bit for bit that of `lsp_offload`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_offload import LSPMixin, OffloadStats, OffloadSummary
from lightning_offload.attachment import Attachment
from tests.helpers import pairwise, row_id
from tests.lit import Lit, LSPManual, assert_equal_modules, fit, lsp, trainer

FACTORS: dict[str, list[Any]] = {
    "accumulate_grad_batches": [1, 2, 4],
    "clip": [{}, {"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}],
    "projector": ["block", "pca", "learned"],
    "form": ["gradient", "activations"],
    "others": ["adamw", "frozen"],
    "accumulate": ["device", "host"],
    "precision": ["32-true", "bf16-mixed"],
    "skip_nonfinite": [True, False],
}


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=2), ids=row_id)
def test_under_a_plain_strategy_it_has_the_bits_of_the_strategy(row: dict[str, Any]) -> None:
    row = dict(row)
    precision, step = row.pop("precision"), {"accumulate_grad_batches": row.pop("accumulate_grad_batches")}
    step |= row.pop("clip")
    automatic, offloaded, plain = (
        kind(dropout=0.1, schedule="step", **build)
        for kind, build in ((Lit, {}), (LSPManual, {"offload": row | step}), (LSPManual, {"offload": row | step}))
    )
    done = fit(automatic, lsp(**row), precision=precision, **step)
    assert fit(offloaded, "lsp_offload", precision=precision).global_step == done.global_step
    assert fit(plain, precision=precision).global_step == done.global_step > 3
    assert_equal_modules(automatic, offloaded)
    assert_equal_modules(automatic, plain)


def test_bf16_weights_have_the_bits_of_the_strategy() -> None:
    modules = LSPManual(), LSPManual()
    for module, strategy in zip(modules, ("lsp_offload", "auto"), strict=True):
        module.net.bfloat16()  # masters of what is not projected are then taken from the same weights
        fit(module, strategy, precision="bf16-true")
    assert modules[0].net.head.weight.dtype == torch.bfloat16
    assert_equal_modules(*modules)


class OwnStep(LSPManual):
    """Writes its own `training_step` around `offload_step`."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.offload_step(lambda: self.one(batch))


def test_an_own_training_step() -> None:
    ours, own = LSPManual(), OwnStep()
    fit(ours)
    fit(own)
    assert_equal_modules(ours, own)


def test_it_is_whole_after_fit_and_fits_again() -> None:
    strategy = lsp()
    modules = LSPManual(), LSPManual()
    for module, kind in zip(modules, (strategy, "auto"), strict=True):
        run = trainer(kind, max_epochs=1, limit_val_batches=2)
        torch.manual_seed(3)
        run.fit(module)
        run.validate(module, verbose=False)
        run.fit_loop.max_epochs = 2
        run.fit(module)
        assert "step" not in vars(run.optimizers[0])
        assert all(not part._forward_pre_hooks and not part._forward_hooks for part in module.modules())
        assert all(parameter.requires_grad for parameter in module.parameters())
    assert_equal_modules(*modules)


class Breaks(LSPManual):
    at = 3

    def one(self, batch: Tensor) -> Tensor:
        loss = super().one(batch)
        if self.trainer.global_step == self.at:
            raise KeyError("mine")
        return loss


def test_after_an_exception_the_module_is_whole_and_fits_again() -> None:
    modules = Breaks({"others": "frozen"}), Breaks({"others": "frozen"})
    for module, strategy in zip(modules, ("lsp_offload", "auto"), strict=True):
        run = trainer(strategy)
        torch.manual_seed(3)
        with pytest.raises(KeyError, match="mine"):
            run.fit(module)
        assert all(not part._forward_pre_hooks for part in module.modules())
        assert all(parameter.requires_grad for parameter in module.parameters())
        module.at = 10**9
        run.fit(module)
    assert_equal_modules(*modules)


class WritesWeights(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % 3 == 0:
            with torch.no_grad():
                for parameter in pl_module.net.parameters():
                    parameter.mul_(0.9)


class ReadsWeights(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.losses.append(float(pl_module.net.blocks[0].up.weight.detach().double().sum()))


class ClipsItself(LSPManual):
    def on_after_backward(self) -> None:
        for parameter in self.net.blocks.parameters():
            if parameter.grad is not None:
                parameter.grad.clamp_(-0.01, 0.01)


class Ema(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(avg_fn=lambda averaged, current, count: averaged + (current - averaged) / (count + 1))


@pytest.mark.parametrize("callback", [WritesWeights, ReadsWeights, Ema])
@pytest.mark.parametrize("kind", [LSPManual, ClipsItself])
def test_callbacks_and_hooks_see_the_same(kind: Any, callback: Any) -> None:
    modules = kind(), kind()
    for module, strategy in zip(modules, ("lsp_offload", "auto"), strict=True):
        fit(module, strategy, callbacks=[callback()])
    assert_equal_modules(*modules)


def test_the_package_own_callbacks_see_its_engine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(LSPManual(), callbacks=[OffloadSummary(), OffloadStats(every_n_steps=2)], max_epochs=1)
    assert "projected (dim 9)" in caplog.text
    assert "LSPManual: projects 6 linear weights" in caplog.text


# Checkpoints


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("first", "second"), [("auto", "auto"), ("auto", "lsp_offload"), ("lsp_offload", "auto")])
def test_a_run_continues_under_either_strategy(first: str, second: str, window: int, tmp_path: Path) -> None:
    def new() -> LSPManual:
        return LSPManual({"projector": "pca", "accumulate_grad_batches": window, "accumulate": "device"})

    never_stopped, begun, continued = new(), new(), new()
    fit(never_stopped, max_epochs=3)
    fit(begun, first, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    fit(continued, second, max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert begun.losses + continued.losses == never_stopped.losses
    for name, value in never_stopped.state_dict().items():
        assert torch.equal(value, continued.state_dict()[name]), name
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["optimizer_states"][0]["lightning_offload"]["state"]


# What is refused


def test_strategies_of_several_devices_are_refused() -> None:
    run = trainer("ddp", devices=1)
    with pytest.raises(MisconfigurationException, match=r"`LSPManual` trains by a method of its own.*`DDPStrategy`"):
        run.fit(LSPManual())


def test_mixed_fp16_is_refused() -> None:
    module = LSPManual()
    run = trainer("auto")
    run.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ValueError, match="precision='16-mixed'"):
        run.fit(module)


class ForgetsSuper(LSPManual):
    def configure_callbacks(self) -> list[L.Callback]:
        return []


def test_an_overridden_configure_callbacks_must_call_super() -> None:
    with pytest.raises(MisconfigurationException, match=r"ForgetsSuper\.configure_callbacks` left out"):
        fit(ForgetsSuper())


def test_what_hangs_on_the_trainer_can_be_copied() -> None:
    run = fit(LSPManual())
    attachment = Attachment.of(run)
    assert attachment is not None
    assert attachment.engine is not None
    assert copy.deepcopy(attachment).engine is None
    assert issubclass(LSPManual, LSPMixin)
