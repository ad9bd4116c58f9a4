"""Checkpoints of adapters alone, and adapter folders that are written and read around a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from lightning_offload import load_meft_adapter, save_meft_adapter
from lightning_offload.adapters import WEIGHTS
from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.export import load_weights
from lightning_offload.methods.sparse_adapter import ADAPTER
from tests.lit import assert_equal_modules, fit, offload
from tests.meft import PLACEMENTS
from tests.meft_lit import MLit, MOwn, attach, meft, shuffled_meft

STEPS: dict[str, Any] = {"max_steps": 6, "max_epochs": -1}


class Save(L.Callback):
    """A checkpoint after some batch."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.after:
            trainer.save_checkpoint(self.path)


def stored(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A checkpoint of adapters alone."""
    fit(MLit(), meft(adapter_only=True), callbacks=[Save(tmp_path / "a.ckpt", 3)], **STEPS)
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize("rows", ["dense", "deferred"])
@pytest.mark.parametrize(("placement", "after", "parts"), [("host", 3, 1), ("keys", 4, 2), ("device", 3, 2)])
def test_they_resume_exactly(tmp_path: Path, rows: str, placement: str, after: int, parts: int) -> None:
    if (rows, placement) == ("deferred", "device"):
        rows = "auto"
    settings = {"placement": placement, "row_optimizer": rows}
    steps = {**STEPS, "accumulate_grad_batches": parts}
    files = {only: tmp_path / f"{only}.ckpt" for only in (False, True)}
    resumed = {}
    for only, file in files.items():
        fit(MLit(), shuffled_meft(adapter_only=only, **settings), callbacks=[Save(file, after)], **steps)
        resumed[only] = MLit()
        fit(resumed[only], shuffled_meft(adapter_only=only, **settings), ckpt_path=file, **steps)
    assert_equal_modules(resumed[False], resumed[True])
    assert len(resumed[True].losses) > 0


def test_they_hold_no_backbone(alone: Path, tmp_path: Path) -> None:
    fit(MLit(), meft(), callbacks=[Save(tmp_path / "whole.ckpt", 3)], **STEPS)
    whole, part = stored(tmp_path / "whole.ckpt"), stored(alone)
    frozen = {n: p for n, p in MLit().named_parameters() if ADAPTER not in n}
    assert whole.keys() - part.keys() == frozen.keys()
    assert all(torch.equal(value, whole[name]) for name, value in part.items())
    saved_bytes = (tmp_path / "whole.ckpt").stat().st_size - alone.stat().st_size
    assert saved_bytes >= sum(p.nbytes for p in frozen.values())


def test_they_are_evaluated_with_the_weights_of_the_module(alone: Path, tmp_path: Path) -> None:
    trained = MLit()
    fit(trained, meft(), callbacks=[Save(tmp_path / "whole.ckpt", 3)], **STEPS)
    losses = [
        fit_nothing(MLit()).test(MLit(), MLit().val_dataloader(), ckpt_path=path, verbose=False)[0]["test/loss"]
        for path in (alone, tmp_path / "whole.ckpt")
    ]
    assert losses[0] == losses[1]
    other = MLit()
    with torch.no_grad():
        other.net.head.weight.mul_(2)
    again = fit_nothing(other).test(other, other.val_dataloader(), ckpt_path=alone, verbose=False)[0]["test/loss"]
    assert again != losses[0]


def fit_nothing(module: Any) -> L.Trainer:
    from tests.lit import trainer

    return trainer(meft())


@pytest.mark.parametrize("changes", [{"top_k": 4}, {"width": 96, "experts": 24}])
def test_weights_are_loaded_into_adapters_that_compute_the_same(alone: Path, changes: dict[str, Any]) -> None:
    """As the command line does it."""
    module = MLit()
    attach(module, **changes)
    said = ", ".join(f"{name}={value}" for name, value in changes.items())
    with pytest.raises(CheckpointError, match=rf"^{said}, but '.*a.ckpt' has adapters with (top_k=6|width=48, exp)"):
        load_weights(module, alone)
    attach(other := MLit(), seed=9)
    load_weights(other, alone)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in stored(alone).items())


@pytest.mark.parametrize("part", ["keys", "router"])
def test_a_missing_row_is_an_error_that_names_it(alone: Path, part: str) -> None:
    content = torch.load(alone, weights_only=True)
    del content["state_dict"][f"net.blocks.1.mlp.meft.{part}"]
    torch.save(content, alone)
    with pytest.raises(CheckpointError, match=rf"`net.blocks.1.mlp.meft.{part}` is absent in the checkpoint"):
        fit(MLit(), meft(), ckpt_path=alone, **STEPS)


def test_another_strategy_says_what_is_missing(alone: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    fit(MLit(), meft(), callbacks=[Save(whole, 3)], **STEPS)
    with pytest.raises(
        CheckpointError, match=r"`net.*.meft.* is \(48, \d+\) in the .* absent in the model \(adapters of `meft`: load"
    ):
        fit(MLit(), offload(), ckpt_path=whole, **STEPS)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*net.blocks.0.mlp.meft.keys"):
        fit(MLit(), ckpt_path=whole, **STEPS)
    with pytest.raises(CheckpointError, match=r"`net.embed.weight` is absent in the checkpoint"):
        fit(MLit(), offload(), ckpt_path=alone, **STEPS)
    module = MLit()
    attach(module)
    module.load_state_dict(stored(whole))
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    assert all(torch.equal(value, kept[name]) for name, value in stored(whole).items())


class Export(L.Callback):
    """The adapter's folder after each batch, beside what the trainer saves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.differ: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        written = load_file(save_meft_adapter(module, self.folder) / WEIGHTS)
        for name, value in trainer.strategy.lightning_module_state_dict().items():
            if ADAPTER in name and not torch.equal(written[f"base_model.model.{name}"], value):
                self.differ.append(name)


@pytest.mark.parametrize("rows", ["dense", "deferred"])
@pytest.mark.parametrize("placement", PLACEMENTS[:2])
def test_a_folder_written_during_fit_has_every_update(tmp_path: Path, placement: str, rows: str) -> None:
    module, callback = MLit(), Export(tmp_path / "adapter")
    settings = {"placement": placement, "row_optimizer": rows}
    fit(module, shuffled_meft(**settings), callbacks=[callback], accumulate_grad_batches=2, **STEPS)
    assert not callback.differ
    if rows == "dense":
        plain = MLit()
        fit(plain, shuffled_meft(**settings), accumulate_grad_batches=2, **STEPS)
        assert_equal_modules(plain, module)
    loaded = load_meft_adapter(MLit(), tmp_path / "adapter")
    batch = next(iter(module.train_dataloader()))
    assert torch.equal(loaded.net(batch), module.net(batch))


@pytest.mark.parametrize("kind", ["strategy", "own", "plain"])
def test_training_goes_on_from_a_folder(tmp_path: Path, kind: str) -> None:
    first = MLit()
    fit(first, meft(), **STEPS)
    written = save_meft_adapter(first, tmp_path / "adapter")
    made = {"strategy": (MLit, meft()), "own": (MOwn, "auto"), "plain": (MLit, "auto")}
    modules = []
    for again in (first, load_meft_adapter(made[kind][0](), written)):
        again.losses.clear()
        again.seen.zero_()
        fit(again, made[kind][1] if again is not first else meft(), **STEPS)
        modules.append(again)
    assert_equal_modules(*modules)


class Load(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        load_meft_adapter(module, self.folder)


def test_no_adapter_is_loaded_while_an_engine_has_the_rows(tmp_path: Path) -> None:
    module = MLit()
    fit(module, meft(), **STEPS)
    written = save_meft_adapter(module, tmp_path / "adapter")
    with pytest.raises(OffloadError, match="in the hands of a Trainer; load them before it fits or after"):
        fit(MLit(), meft(), callbacks=[Load(written)], **STEPS)
