"""How modules are made and compiled, in which precision, with which plugins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_offload import OffloadPrecision
from tests.features.arm import DEPTH, Arm, ByIndex
from tests.features.registry import Refusal, feature


class BuiltLate:
    def __init__(self, **build: Any) -> None:
        super().__init__(**build)
        self.kept = self.net
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net, made = type(self.kept)(depth=DEPTH), self.kept
            del self.kept
            self.net.load_state_dict(made.state_dict())


@feature("`configure_model`")
def configure_model(strategy: Arm) -> None:
    module = strategy.lit(BuiltLate)
    run = strategy.fit(module)
    assert strategy.same(module, strategy.trained())
    run.save_checkpoint(strategy.folder / "a.ckpt")
    other = strategy.lit(BuiltLate)
    strategy.trainer(limit_val_batches=1).validate(other, ckpt_path=strategy.folder / "a.ckpt", verbose=False)
    assert strategy.same(other, module)


@feature("`trainer.init_module()`: host memory, the precision's dtype")
def init_module(strategy: Arm) -> None:
    for precision, dtype in (("32-true", torch.float32), ("bf16-true", torch.bfloat16)):
        run = strategy.trainer(precision=precision)
        with run.init_module():
            module = strategy.lit()
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert {p.device.type for p in module.parameters()} == {"cpu"}
        run.fit(module)
        assert run.global_step == 10


@feature('`precision="32-true"`, `"bf16-true"`, `"bf16-mixed"`')
def precisions(strategy: Arm) -> None:
    for precision, dtype in (
        ("32-true", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("bf16-mixed", torch.float32),
    ):
        module = strategy.lit()
        run = strategy.fit(module, precision=precision)
        assert run.precision == precision
        assert isinstance(run.precision_plugin, OffloadPrecision)
        assert module.net.head.weight.dtype == dtype
        assert all(bool(p.isfinite().all()) for p in module.parameters())


HALF = Refusal(
    ValueError,
    r"precision='16-true'\)` is not supported.*gradients in float16|precision='16-true'\)` is not supported.*must be",
    "gradients in float16 overflow without a scaler: `bf16-true`, or zo2, which has none",
)


@feature('`precision="16-true"`', full_offload=HALF, lsp_offload=HALF, meft_offload=HALF)
def half(strategy: Arm) -> None:
    module = strategy.lit()
    strategy.fit(module, precision="16-true")
    assert module.net.head.weight.dtype == torch.float16
    assert all(bool(p.isfinite().all()) for p in module.parameters())


OTHERS = Refusal(
    ValueError,
    "is not supported. `precision` must be one of",
    "not among the supported: `32-true`, `bf16-true`, `bf16-mixed`, and `16-true` for zo2",
)


@feature('`precision="64-true"`, `"16-mixed"`', OTHERS)
def other_precisions(strategy: Arm) -> None:
    scaled = MixedPrecision("bf16-mixed", "cpu")
    scaled.precision = "16-mixed"  # on the CPU a Trainer takes bf16 in its place
    with pytest.raises(ValueError, match=r"'16-mixed'\)` is not supported. `precision` must be one of"):
        strategy.trainer(plugins=[scaled])
    strategy.trainer(precision="64-true")


@feature("`plugins=`: precision, checkpoint IO")
def plugins(strategy: Arm) -> None:
    run = strategy.trainer(plugins=[HalfPrecision("bf16-true"), TorchCheckpointIO()])
    assert isinstance(run.precision_plugin, OffloadPrecision)
    module = strategy.lit()
    run.fit(module)
    assert module.net.head.weight.dtype == torch.bfloat16
    run.save_checkpoint(strategy.folder / "a.ckpt")
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO
    other = strategy.lit()
    run = strategy.trainer(precision="bf16-true", limit_val_batches=1)
    run.validate(other, ckpt_path=strategy.folder / "a.ckpt", verbose=False)
    assert strategy.same(other, module)


class Tied:
    def __init__(self, **build: Any) -> None:
        super().__init__(**build)
        self.net.head.weight = self.net.embed.weight


@feature("tied weights")
def tied(strategy: Arm) -> None:
    module = strategy.lit(Tied)
    strategy.fit(module)
    assert module.net.head.weight is module.net.embed.weight
    assert torch.equal(module.net.head.weight, module.net.embed.weight)
    assert strategy.moved(module)


@feature("`trainer.init_module(empty_init=True)`, weights from a checkpoint")
def empty_init(strategy: Arm) -> None:
    path, run = strategy.folder / "a.ckpt", strategy.trainer(limit_val_batches=1)
    strategy.fit(strategy.lit(ByIndex), max_epochs=1).save_checkpoint(path)
    with run.init_module(empty_init=True):
        module = strategy.lit(ByIndex)
    run.fit(module, ckpt_path=path)
    assert strategy.same(module, strategy.trained(ByIndex))


ONE_DEVICE = Refusal(
    MisconfigurationException,
    "runs on exactly one device, found 2. Pass `Trainer\\(.*_ddp'",
    "one device: `Trainer(devices=1)`; several under the name with `_ddp` behind it",
)


@feature("`Trainer(devices=2)`, `num_nodes=2`", ONE_DEVICE)
def devices(strategy: Arm) -> None:
    with pytest.raises(MisconfigurationException, match="runs on exactly one device, found `num_nodes=2`"):
        strategy.trainer(num_nodes=2)
    strategy.fit(strategy.lit(), devices=2)


@feature("`Trainer(inference_mode=False)`")
def inference_mode(strategy: Arm) -> None:
    class Looks:
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.found = torch.is_inference_mode_enabled()

    module, run = strategy.lit(Looks), strategy.trainer(inference_mode=False, limit_val_batches=1)
    run.validate(module, verbose=False)
    assert module.found is False
    run.fit(module)
    assert strategy.same(module, strategy.trained())
