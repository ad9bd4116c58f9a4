"""What is saved when, and what goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from tests.features.arm import DEPTH, Arm, ByIndex, weights
from tests.features.registry import Refusal, feature
from tests.meft_lit import attach


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def saves(strategy: Arm, **options: Any) -> tuple[list[str], ModelCheckpoint, L.Trainer]:
    """The files that a ModelCheckpoint leaves in a fit of twice five steps, validated after each epoch."""
    saving = ModelCheckpoint(strategy.folder / "saved", **{"filename": "{step}", "save_top_k": -1, **options})
    module = strategy.lit(ByIndex)
    run = strategy.fit(module, callbacks=[saving], enable_checkpointing=True, limit_val_batches=1)
    assert strategy.same(module, strategy.trained(ByIndex))  # saving changes nothing
    return sorted(path.stem for path in (strategy.folder / "saved").glob("*.ckpt")), saving, run


def resumes(strategy: Arm, path: Path) -> None:
    """A run that begins from `path` ends with the weights of one that was never stopped."""
    module = strategy.lit(ByIndex)
    run = strategy.fit(module, ckpt_path=path)
    assert run.global_step == 10
    assert strategy.same(module, strategy.trained(ByIndex))


@feature("`fit(ckpt_path=)` after an epoch")
def resumed(strategy: Arm) -> None:
    strategy.fit(strategy.lit(), max_epochs=1).save_checkpoint(strategy.folder / "a.ckpt")
    resumes(strategy, strategy.folder / "a.ckpt")


@feature("`fit(ckpt_path=)` in the middle of an epoch, and of an accumulation window")
def resumed_inside(strategy: Arm) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(strategy.folder / f"{trainer.fit_loop.epoch_loop.total_batch_idx}.ckpt")

    whole, window = strategy.lit(ByIndex), {"accumulate_grad_batches": 3}
    strategy.fit(whole, callbacks=[Saves()], **window)
    for batch in (1, 2, 6):
        module = strategy.lit(ByIndex)
        strategy.fit(module, ckpt_path=strategy.folder / f"{batch}.ckpt", **window)
        assert strategy.same(module, whole), batch


@feature("`validate`, `test`, `predict` with `ckpt_path=`")
def evaluated(strategy: Arm) -> None:
    module = strategy.lit()
    strategy.fit(module).save_checkpoint(strategy.folder / "a.ckpt")
    data, other, run = module.train_dataloader(), strategy.lit(), strategy.trainer(limit_val_batches=2)
    path = strategy.folder / "a.ckpt"
    (found,) = run.validate(other, ckpt_path=path, verbose=False)
    assert found == strategy.trainer("auto", limit_val_batches=2).validate(module, verbose=False)[0]
    assert strategy.same(other, module)
    assert run.test(other, data, ckpt_path=path, verbose=False)
    assert len(run.predict(other, data, ckpt_path=path)) == 5


@feature("`trainer.save_checkpoint` after `fit`, and `ModelCheckpoint(save_weights_only=True)`")
def weights_alone(strategy: Arm) -> None:
    names, _, run = saves(strategy, every_n_epochs=1, save_weights_only=True)
    assert names == ["step=10", "step=5"]
    run.save_checkpoint(strategy.folder / "a.ckpt", weights_only=True)
    path = strategy.folder / "saved" / "step=10.ckpt"
    assert "optimizer_states" not in read(path)
    assert read(path)["state_dict"].keys() == read(strategy.folder / "a.ckpt")["state_dict"].keys()
    other = strategy.lit()
    strategy.trainer(limit_val_batches=1).validate(other, ckpt_path=path, verbose=False)
    assert strategy.same(other, strategy.trained(ByIndex))
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        strategy.fit(strategy.lit(), ckpt_path=path)


@feature("`ModelCheckpoint(every_n_train_steps=)`, resumed from there")
def every_n_train_steps(strategy: Arm) -> None:
    names, saving, _ = saves(strategy, every_n_train_steps=4)
    assert names == ["step=4", "step=8"]
    for name in names:
        resumes(strategy, strategy.folder / "saved" / f"{name}.ckpt")
    assert saving.best_model_path


@feature("`ModelCheckpoint(every_n_epochs=)`, `save_on_train_epoch_end`")
def every_n_epochs(strategy: Arm) -> None:
    assert saves(strategy, every_n_epochs=2, save_on_train_epoch_end=True)[0] == ["step=10"]
    resumes(strategy, strategy.folder / "saved" / "step=10.ckpt")


@feature("`ModelCheckpoint(train_time_interval=)`")
def train_time_interval(strategy: Arm) -> None:
    from datetime import timedelta

    names = saves(strategy, train_time_interval=timedelta(seconds=0))[0]
    assert names == sorted(f"step={step}" for step in range(1, 11))
    resumes(strategy, strategy.folder / "saved" / "step=4.ckpt")


@feature("`ModelCheckpoint(monitor=, save_top_k=)`")
def monitor(strategy: Arm) -> None:
    names, saving, run = saves(strategy, monitor="val/loss", save_top_k=1)
    assert len(names) == 1
    assert saving.best_model_score is not None
    assert float(saving.best_model_score) <= float(run.callback_metrics["val/loss"])


@feature('`ModelCheckpoint(save_last=True)` and `"link"`')
def save_last(strategy: Arm) -> None:
    assert saves(strategy, save_last=True, every_n_epochs=1)[0] == ["last", "step=10", "step=5"]
    one, other = (read(strategy.folder / "saved" / f"{name}.ckpt") for name in ("last", "step=10"))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    (strategy.folder / "saved" / "last.ckpt").unlink()
    assert "last" in saves(strategy, save_last="link", every_n_epochs=1)[0]
    assert (strategy.folder / "saved" / "last.ckpt").is_symlink()


class Fails:
    fails = True

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 4:
            raise RuntimeError("the lights went out")


@feature("`ModelCheckpoint(save_on_exception=True)`, `OnExceptionCheckpoint`")
def save_on_exception(strategy: Arm) -> None:
    for saving in (
        ModelCheckpoint(strategy.folder, save_on_exception=True, filename="a"),
        OnExceptionCheckpoint(strategy.folder, "exception"),
    ):
        with pytest.raises(RuntimeError, match="lights"):
            strategy.fit(strategy.lit(Fails, ByIndex), callbacks=[saving], enable_checkpointing=True)
    found = list(strategy.folder.glob("*.ckpt"))
    assert len(found) == 2
    for path in found:
        resumes(strategy, path)


@feature("`AsyncCheckpointIO`")
def asynchronous(strategy: Arm) -> None:
    saving = ModelCheckpoint(strategy.folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = strategy.lit(ByIndex)
    strategy.fit(module, callbacks=[saving], enable_checkpointing=True, plugins=[AsyncCheckpointIO()])
    assert strategy.same(module, strategy.trained(ByIndex))
    assert len(list(strategy.folder.glob("*.ckpt"))) == 10
    resumes(strategy, strategy.folder / "step=3.ckpt")


STORAGE = Refusal(
    TypeError,
    "`storage_options`.*not supported.*`OffloadCheckpointIO`.*implement your custom `CheckpointIO`",
    "as under Lightning's own `TorchCheckpointIO`: pass a `CheckpointIO` of your own among `plugins=`",
)


@feature("`save_checkpoint(storage_options=)`", STORAGE)
def storage_options(strategy: Arm) -> None:
    strategy.fit(strategy.lit()).save_checkpoint(strategy.folder / "a.ckpt", storage_options={"a": 1})


class Sized:
    def __init__(self, size: int = 3, **build: Any) -> None:
        super().__init__(**build)
        self.save_hyperparameters("size")


@feature("`save_hyperparameters`, `load_from_checkpoint`: on the CPU, under any strategy")
def load_from_checkpoint(strategy: Arm) -> None:
    class OnDisk(Sized):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if strategy.name == "meft_offload":
                attach(self)  # as the README has it: before weights are loaded into them

    module = strategy.lit(OnDisk)
    module.hparams["size"] = 7
    strategy.fit(module).save_checkpoint(strategy.folder / "a.ckpt")
    loaded = type(module).load_from_checkpoint(strategy.folder / "a.ckpt", weights_only=True, depth=DEPTH)
    assert loaded.hparams["size"] == 7
    assert strategy.same(loaded, module)
    assert all(p.device.type == "cpu" for p in loaded.parameters())


@feature("a checkpoint goes on in a plain Trainer, and a plain one here (zo2, lsp, meft: weights and schedulers)")
def plain(strategy: Arm) -> None:
    path = strategy.folder / "a.ckpt"
    strategy.fit(strategy.lit(), max_epochs=1).save_checkpoint(path)
    module = strategy.lit()
    if strategy.name == "meft_offload":
        attach(module)
    assert strategy.fit(module, "auto", ckpt_path=path).global_step == 10
    strategy.fit(strategy.lit(), "auto", max_epochs=1).save_checkpoint(path)
    ours = strategy.lit()
    assert strategy.fit(ours, ckpt_path=path).global_step == 10
    assert strategy.moved(ours)
    if strategy.name == "full_offload":
        assert strategy.same(module, strategy.trained())
        assert strategy.same(ours, strategy.trained())


@feature("`on_save_checkpoint`, `on_load_checkpoint`, `strict_loading=False`")
def hooks(strategy: Arm) -> None:
    class Partial:
        strict_loading = False
        found: Any = None

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = 5
            checkpoint["state_dict"].pop("net.head.weight")

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.found = checkpoint["mine"]

    path, first, other = strategy.folder / "a.ckpt", strategy.lit(Partial), strategy.lit(Partial)
    strategy.fit(first, max_epochs=1).save_checkpoint(path)
    head = other.net.head.weight.detach().clone()
    strategy.trainer(limit_val_batches=1).validate(other, ckpt_path=path, verbose=False)
    assert other.found == 5
    assert torch.equal(other.net.head.weight, head)
    assert strategy.moved(other)
    assert weights(other).keys() == weights(first).keys()


@feature("state of callbacks and of data modules in checkpoints")
def own_state(strategy: Arm) -> None:
    class Counts(L.Callback):
        steps = 0

        def on_train_batch_start(self, *_: Any) -> None:
            self.steps += 1

        def state_dict(self) -> dict[str, Any]:
            return {"steps": self.steps}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.steps = state["steps"]

    class Data(L.LightningDataModule):
        seen = 0

        def train_dataloader(self) -> Any:
            return strategy.lit().train_dataloader()

        def state_dict(self) -> dict[str, Any]:
            return {"seen": 7}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["seen"]

    path, counts, data = strategy.folder / "a.ckpt", Counts(), Data()
    run = strategy.trainer(callbacks=[Counts()], max_epochs=1)
    run.fit(strategy.lit(), datamodule=Data())
    run.save_checkpoint(path)
    strategy.trainer(callbacks=[counts]).fit(strategy.lit(), datamodule=data, ckpt_path=path)
    assert counts.steps == 10
    assert data.seen == 7
