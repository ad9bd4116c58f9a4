"""`lsp_offload` under a Trainer: families of models, callbacks, boundaries, several fits, exceptions, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_offload import export_to_hf
from lightning_offload.methods.engine import Engine
from lightning_offload.text import TINY_PATH, CausalLM
from tests.helpers import mostly_slow, pairwise, row_id
from tests.lit import Lit, assert_equal_modules, fit, lsp, shuffled_lsp, trainer
from tests.zoo import ZOO, first_tensor


class Family(L.LightningModule):
    """A model of the zoo on its own example, over and over."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network, self.inputs = ZOO[name]()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = first_tensor(self.network(**self.inputs)).float().square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", first_tensor(self.network(**self.inputs)).float().square().mean(), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, fused=True)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(6))  # type: ignore[arg-type]

    val_dataloader = train_dataloader


@pytest.mark.parametrize("name", mostly_slow(ZOO, lambda at, row: at % 2 == 1))  # zo2 has the others
@pytest.mark.filterwarnings("ignore:.*no repeated blocks", "ignore:Detected call of")
def test_families_train_evaluate_save_and_resume(name: str, tmp_path: Path) -> None:
    settings = {"min_numel": 256, "dim": 0.5, "nnz": 4, "projector": "pca"}
    whole, first, rest = Family(name), Family(name), Family(name)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    strategy = lsp(**settings)
    fit(whole, strategy, max_epochs=2, limit_val_batches=1)
    assert isinstance(strategy.engine, Engine)
    assert strategy.engine.own is not None
    for trained in strategy.engine.own.trained:
        assert not torch.equal(before[trained.name], trained.parameter), trained.name
    assert whole.losses[-1] < whole.losses[0]
    fit(first, lsp(**settings), max_epochs=1, limit_val_batches=1).save_checkpoint(tmp_path / "a.ckpt")
    fit(rest, lsp(**settings), max_epochs=2, limit_val_batches=1, ckpt_path=tmp_path / "a.ckpt")
    assert first.losses + rest.losses == whole.losses
    for key, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[key]), key


# Nothing is lost, whoever looks and whenever

FACTORS: dict[str, list[Any]] = {
    "precision": ["32-true", "bf16-true", "bf16-mixed"],
    "window": [1, 2],
    "clip": [None, 0.05],
    "projector": ["block", "pca", "learned"],
    "form": ["gradient", "activations"],
    "others": ["adamw", "frozen"],
    "model": [{}, {"tied": True}, {"frozen": True}, {"sometimes_unused": True}, {"recompute": "non-reentrant"}],
    "accumulate": ["device", "host"],
}


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=3), ids=row_id)
def test_in_any_order_and_with_boundaries_everywhere_the_bits_are_the_same(row: dict[str, Any], tmp_path: Path) -> None:
    row = dict(row)
    run = {"precision": row.pop("precision"), "accumulate_grad_batches": row.pop("window")}
    run |= {"gradient_clip_val": row.pop("clip")}
    model = row.pop("model")
    modules = Lit(**model), Lit(**model), Lit(**model)
    fit(modules[0], lsp(**row), **run)
    fit(modules[1], shuffled_lsp(**row), **run)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fit(
        modules[2],
        shuffled_lsp(**row),
        **run,
        callbacks=[saving],
        enable_checkpointing=True,
        limit_val_batches=2,  # even: the net that uses a block every other time counts them too
        val_check_interval=2,
    )
    assert_equal_modules(modules[0], modules[1])
    assert_equal_modules(modules[0], modules[2])


class ReadsWeights(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.losses.append(float(pl_module.net.blocks[0].up.weight.detach().double().sum()))


class WritesWeights(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.net.parameters():
                parameter.mul_(0.9)


class SwapsForValidation(L.Callback):
    """As averages are evaluated: other weights for the time of a validation."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.kept = [p.detach().clone() for p in pl_module.net.parameters()]
        with torch.no_grad():
            for parameter in pl_module.net.parameters():
                parameter.zero_()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            for parameter, kept in zip(pl_module.net.parameters(), self.kept, strict=True):
                parameter.copy_(kept)


class Ema(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(avg_fn=lambda averaged, current, count: averaged + (current - averaged) / (count + 1))


CALLBACKS: dict[str, Any] = {
    "reads": ReadsWeights,
    "writes": WritesWeights,
    "swaps": SwapsForValidation,
    "ema": Ema,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1),
    "stops": lambda: EarlyStopping("val/loss", patience=1, mode="max"),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_see_and_write_the_same_in_any_order(name: str, precision: Any) -> None:
    """Weights are in flight for as long as they may be, or never: nobody can tell."""
    modules = Lit(), Lit()
    for module, make in zip(modules, (lsp, shuffled_lsp), strict=True):
        fit(module, make(), callbacks=[CALLBACKS[name]()], precision=precision, max_epochs=3, limit_val_batches=1)
    assert_equal_modules(*modules)


def test_what_a_callback_writes_is_trained_on() -> None:
    written, plain = Lit(), Lit()
    fit(written, lsp(), callbacks=[WritesWeights()], max_epochs=1)
    fit(plain, lsp(), max_epochs=1)
    for (name, one), other in zip(written.net.named_parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(one, other * 0.9), name


# Life cycle


def test_every_entry_point_in_any_order_on_one_strategy() -> None:
    """A second fit starts optimizer and projectors anew, as two strategies would."""
    one, two = Lit(), Lit()
    run = trainer(lsp(), limit_val_batches=2, max_epochs=1)
    results = [run.validate(one, verbose=False)]
    torch.manual_seed(3)
    run.fit(one)
    results.append(run.validate(one, verbose=False))
    run.fit_loop.max_epochs = 2
    torch.manual_seed(3)
    run.fit(one)
    results.append(run.validate(one, verbose=False))
    for expected in results[1:]:
        other = trainer(lsp(), limit_val_batches=2, max_epochs=1)
        torch.manual_seed(3)
        other.fit(two)
        assert other.validate(two, verbose=False) == expected
    assert_equal_modules(one, two)


class Breaks(Lit):
    at = 3

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.trainer.global_step == self.at and batch_idx:
            raise KeyError("mine")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("others", ["adamw", "frozen"])
@pytest.mark.parametrize("make", [lsp, shuffled_lsp])
def test_after_an_exception_the_module_is_whole_and_fits_again(make: Any, others: str) -> None:
    broken, whole = Breaks(), Lit()
    run = trainer(make(others=others))
    torch.manual_seed(3)
    with pytest.raises(KeyError, match="mine"):
        run.fit(broken)
    fit(whole, lsp(others=others), max_steps=3)
    assert broken.losses == whole.losses
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, broken.net.state_dict()[name]), name
    broken.at = 10**9
    run.fit(broken)
    assert all(not part._forward_pre_hooks and not part._forward_hooks for part in broken.modules())
    assert all(parameter.requires_grad for parameter in broken.parameters())


class NanLit(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step in (2, 3, 7) else loss


def test_nan_losses_are_skipped_and_counted() -> None:
    module, strategy = NanLit(schedule="step"), lsp()
    done = fit(module, strategy)
    assert done.global_step == 18
    assert strategy.engine is not None
    assert strategy.engine.report.skipped_total == 3
    assert all(p.isfinite().all() for p in module.parameters())


def test_an_exported_run_loads_in_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = CausalLM(path=TINY_PATH, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True))
    ids = torch.randint(0, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
    batches = DataLoader([{"input_ids": ids, "labels": ids}] * 4, batch_size=None)
    strategy = lsp(dim=0.5, nnz=8, min_numel=4096)
    run = trainer(strategy, max_epochs=1)
    run.fit(model, batches)
    assert strategy.engine is not None
    assert strategy.engine.own is not None
    assert len(strategy.engine.own.trained) == 35
    folder = export_to_hf(model, tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.network.eval()(input_ids=ids).logits)
    original = AutoModelForCausalLM.from_pretrained(TINY_PATH)
    moved = {name for name, p in loaded.named_parameters() if not torch.equal(p, original.get_parameter(name))}
    assert moved >= {t.name.removeprefix("network.") for t in strategy.engine.own.trained}
    assert isinstance(loaded, nn.Module)
