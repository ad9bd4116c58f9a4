"""`meft_offload` in the life of a module: what is attached when, several fits, generation, compiled blocks."""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_offload.methods.meft import adapters_of
from lightning_offload.text import TINY_PATH, CausalLM
from tests.helpers import adamw, mostly_slow
from tests.lit import assert_equal_modules, fit, trainer
from tests.meft import FFNNet
from tests.meft_lit import MLit, MOwn, attach, meft, shuffled_meft

# What is attached when


class LooksAtParameters(MLit):
    def configure_optimizers(self) -> Any:
        self.names = [name for name, p in self.named_parameters() if p.requires_grad]
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-2, fused=True)


@pytest.mark.parametrize("late", ["no", "setup", "configure_model"])
def test_adapters_are_there_before_optimizers_are(late: str) -> None:
    class Late(LooksAtParameters):
        def __init__(self) -> None:
            super().__init__()
            if late != "no":
                del self.net

        def make(self) -> None:
            if not hasattr(self, "net"):
                self.net = FFNNet()

        def setup(self, stage: str) -> None:
            if late == "setup":
                self.make()

        def configure_model(self) -> None:
            self.make()

    plain, ours = LooksAtParameters(attached={}), Late()
    fit(plain)
    fit(ours, meft())
    parts = ("keys", "values", "router")
    assert ours.names == [f"net.blocks.{block}.mlp.meft.{part}" for block in range(3) for part in parts]
    assert_equal_modules(plain, ours)


def of_backbone(module: nn.Module) -> torch.optim.Optimizer:
    """Groups by names that know nothing of adapters."""
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in module.named_parameters() if name.startswith("net.head")], "lr": 1e-2},
            {"params": [p for name, p in module.named_parameters() if name.startswith("net.embed")]},
        ],
        fused=True,
    )


def of_routers(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [(name, p) for name, p in module.named_parameters() if name.endswith("router")], lr=1e-2, fused=True
    )


@pytest.mark.parametrize(("make", "count"), [(of_backbone, 9), (of_routers, 6)])
def test_adapters_that_were_left_out_join_the_first_group(
    caplog: pytest.LogCaptureFixture, make: Any, count: int, tmp_path: Any
) -> None:
    module, plain = MLit(make_optimizer=make), MLit(attached={}, make_optimizer=lambda m: adamw_of(trained(m)))
    with caplog.at_level("INFO"):
        done = fit(module, meft())
    said = [r.getMessage() for r in caplog.records if "left" in r.getMessage()]
    assert len(said) == 1
    assert f"left {count} parameters of adapters out (net.blocks.0.mlp.meft.keys, ...): they join its first" in said[0]
    fit(plain)
    assert_equal_modules(plain, module)
    done.save_checkpoint(tmp_path / "a.ckpt")
    resumed = MLit(make_optimizer=make)
    fit(resumed, meft(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def adamw_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


class Thaws(MLit):
    """Makes a weight of the backbone trainable: before optimizers, or in the middle of training."""

    when = "optimizers"

    def configure_optimizers(self) -> Any:
        if self.when == "optimizers":
            self.net.head.weight.requires_grad_(True)
        return super().configure_optimizers()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.when == "training" and batch_idx == 3:
            self.net.head.weight.requires_grad_(True)
        return super().training_step(batch, batch_idx)


def test_a_weight_of_the_backbone_that_is_to_be_trained_is_named() -> None:
    with pytest.raises(ValueError, match=r"`net\.head\.weight` is to be trained.*adapters alone.*`full_offload`"):
        fit(Thaws(), meft())
    module = Thaws()
    module.when = "training"
    with pytest.raises(ValueError, match=r"`net\.head\.weight` is to be trained.*adapters alone.*`full_offload`"):
        fit(module, meft())
    assert len(module.losses) == 4


class TwoOptimizers(MLit):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [adamw(self.net.blocks[0]), adamw(self.net.blocks[1])]


class NoFFN(MLit):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(41, 8), nn.LayerNorm(8))


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (TwoOptimizers, {}, MisconfigurationException, r"supports a single optimizer.*returned 2"),
        (NoFFN, {}, ValueError, r"No feed-forward network was found.*targets="),
        (MLit, {"targets": "up"}, ValueError, r"output of 'net\.blocks\.0\.mlp\.up'.*38.*19.*targets="),
        (MLit, {"targets": r".*\.(mlp|mix)"}, ValueError, r"2 feed-forward networks.*net\.blocks\.0.*targets="),
        (MLit, {"targets": "nothing"}, ValueError, r"No feed-forward network was found by targets='nothing'"),
        (MLit, {"layers": [0, 7]}, ValueError, r"layers=\[0, 7\]: \[7\] are not among the 3 blocks"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no repeated blocks")
def test_what_cannot_work_is_said_before_the_first_batch(
    make: Any, settings: dict[str, Any], error: Any, message: str
) -> None:
    module = make()
    with pytest.raises(error, match=message):
        fit(module, meft(**settings), num_sanity_val_steps=0)
    assert module.losses == []


def test_targets_are_adapted_instead_of_what_is_found() -> None:
    module = MLit()
    fit(module, meft(targets=r".*blocks\.[02]\.mlp", layers=[0, 2]), max_steps=2)
    assert [adapter.path for adapter in adapters_of(module)] == ["net.blocks.0.mlp", "net.blocks.2.mlp"]


# Life cycle


def test_every_entry_point_in_any_order_on_one_strategy() -> None:
    """A second fit starts the optimizer anew, as two strategies would."""
    one, two = MLit(), MLit()
    data = one.train_dataloader()
    run = trainer(meft(), limit_val_batches=2, max_epochs=1)
    before = [run.validate(one, verbose=False), run.test(one, data, verbose=False)]
    assert not adapters_of(one)
    run.fit(one)
    results: list[Any] = [run.test(one, data, verbose=False), run.predict(one, data)]
    run.fit_loop.max_epochs = 2
    run.fit(one)
    results += [run.validate(one, verbose=False), run.predict(one, data)]
    again = []
    for _ in range(2):
        other = trainer(meft(), limit_val_batches=2, max_epochs=1)
        other.fit(two)
        again += [other.validate(two, verbose=False) if again else other.test(two, data, verbose=False)]
        again += [trainer("auto").predict(two, data)]  # adapters take their own rows where no engine is
    assert str(results) == str(again)
    assert before[0] != results[2]
    assert_equal_modules(one, two)


class Breaks(MLit):
    at = 3

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.trainer.global_step == self.at and batch_idx:
            raise KeyError("mine")
        return super().training_step(batch, batch_idx)


class BreaksInBackward(Breaks):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = MLit.training_step(self, batch, batch_idx)
        if self.trainer.global_step == self.at:
            self.net.blocks[0].mlp.meft.router.register_hook(lambda _: (_ for _ in ()).throw(KeyError("mine")))
        return loss


@pytest.mark.parametrize("kind", [Breaks, BreaksInBackward])
@pytest.mark.parametrize("make", [meft, shuffled_meft])
def test_after_an_exception_the_module_is_whole_and_fits_again(make: Any, kind: Any) -> None:
    broken, whole = kind(), MLit()
    run = trainer(make())
    torch.manual_seed(3)
    with pytest.raises(KeyError, match="mine"):
        run.fit(broken)
    fit(whole, meft(), max_steps=3)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, broken.net.state_dict()[name]), name
    assert all(adapter.source is None for adapter in adapters_of(broken))
    assert all(p.grad is None for p in broken.parameters() if p.ndim == 2 and len(p) == 48)
    broken.at = 10**9
    broken.net.blocks[0].mlp.meft.router._backward_hooks = None
    run.fit(broken)


class NanLit(MLit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step in (2, 3, 7) else loss


@pytest.mark.parametrize("kind", [NanLit, type("NanReader", (NanLit,), {"on_after_backward": lambda self: None})])
def test_nan_losses_are_skipped_and_counted(kind: Any) -> None:
    module, strategy = kind(), meft()
    done = fit(module, strategy)
    assert done.global_step == 18
    assert strategy.engine is not None
    assert strategy.engine.report.skipped_total == 3
    assert all(p.isfinite().all() for p in module.parameters())


def test_overfitting_on_a_few_batches_lowers_the_loss() -> None:
    plain, ours = MLit(attached={}), MLit()
    fit(plain, overfit_batches=2, max_epochs=8, limit_val_batches=1)
    fit(ours, meft(), overfit_batches=2, max_epochs=8, limit_val_batches=1)
    assert_equal_modules(plain, ours)
    assert ours.losses[-1] < 0.8 * ours.losses[0]


@pytest.mark.parametrize("wraps", [True, False])
def test_compiled_blocks_train_to_the_same_bits(wraps: bool) -> None:
    modules = []
    for strategy in ("auto", shuffled_meft(placement="host")):
        module = MLit(depth=2)
        for block in range(2):
            if wraps:
                module.net.blocks[block] = torch.compile(module.net.blocks[block], backend="eager")
            else:
                module.net.blocks[block].compile(backend="eager")
        if strategy == "auto":
            attach(module)
        fit(module, strategy, max_steps=3)
        modules.append(module)
    assert_equal_modules(*modules)


# A Hugging Face model


def tiny(**settings: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(
        path=TINY_PATH, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True), **settings
    )


def batches(count: int = 4) -> DataLoader[Any]:
    drawn = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 2048, (2, 16), generator=drawn) for _ in range(count)]
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[0, 11:] = 0
    padded = [{"input_ids": i, "labels": i.masked_fill(mask == 0, -100), "attention_mask": mask} for i in ids]
    return DataLoader(padded, batch_size=None)  # type: ignore[arg-type]


WIDE: dict[str, Any] = {"width": 64, "experts": 16, "active_experts": 4, "top_k": 8}


class Generates(L.Callback):
    """In the middle of training, with a cache of keys and values."""

    def __init__(self) -> None:
        self.found: list[list[int]] = []

    def on_validation_batch_end(self, run: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        ids = batch["input_ids"][1:, :5]
        made = pl_module.network.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        self.found.append(made[0].tolist())


@pytest.mark.parametrize(
    ("placement", "checkpointing"),
    mostly_slow(itertools.product(["host", "keys", "device"], [False, True]), lambda at, row: at in (0, 3, 5)),
)
def test_a_hugging_face_model_trains_and_generates_as_with_resident_adapters(
    placement: str, checkpointing: bool
) -> None:
    found = []
    for strategy in ("auto", shuffled_meft(placement=placement, **WIDE)):
        module, seen = tiny(), Generates()
        if checkpointing:
            module.network.gradient_checkpointing_enable({"use_reentrant": False})
        if strategy == "auto":
            attach(module, **WIDE)
        torch.manual_seed(3)
        run = trainer(strategy, max_epochs=2, limit_val_batches=2, callbacks=[seen])
        run.fit(module, batches(), batches())
        found.append((seen.found, {name: p.clone() for name, p in module.state_dict().items()}))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 2 + 2 * 2  # the sanity check too
    assert found[0][1].keys() == found[1][1].keys()
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name


@pytest.mark.parametrize("strategy", ["meft_offload", "auto"])
def test_the_mixin_is_whole_after_fit_and_fits_again(strategy: str) -> None:
    module, whole = MOwn(), MLit(attached={})
    run = trainer(strategy, max_epochs=1, limit_val_batches=2)
    run.fit(module)
    run.validate(module, verbose=False)
    assert "step" not in vars(run.optimizers[0])
    assert all(adapter.source is None for adapter in adapters_of(module))
    run.fit_loop.max_epochs = 2
    run.fit(module)
    for epochs in (1, 1):
        fit(whole, max_epochs=epochs)
    assert_equal_modules(whole, module)
