from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lightning_offload import FullOffloadStrategy
from lightning_offload.checkpoint import OffloadCheckpointIO
from lightning_offload.errors import CheckpointError
from lightning_offload.resuming import EXTRAS
from tests import plain as plain_script
from tests.plain import BATCHES, Lit, fit, loader, new, trainer

ROOT = Path(__file__).parents[1]
OPTIMIZERS = ("adamw", "adam", "momentum")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours(**settings: Any) -> FullOffloadStrategy:
    return FullOffloadStrategy(**{"min_numel": 0, **settings})


NUMBERS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
"""What decides how training goes on; Lightning counts a stop inside an epoch as its end, so not the epoch."""


def content(run: L.Trainer) -> dict[str, Any]:
    """What a checkpoint of `run` would hold."""
    whole = run._checkpoint_connector.dump_checkpoint(weights_only=False)
    return {key: whole[key] for key in NUMBERS}


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, read as safely as torch can."""
    whole = torch.load(path, weights_only=True)
    return {key: whole[key] for key in NUMBERS}


def assert_equal(one: Any, other: Any, where: str = "", *, extras: bool = True) -> None:
    """Equality of nested content, bit for bit where there are tensors."""
    if isinstance(one, dict):
        keys = [key for key in one if extras or key != EXTRAS]
        assert keys == [key for key in other if extras or key != EXTRAS], where
        for key in keys:
            assert_equal(one[key], other[key], f"{where}.{key}", extras=extras)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{where}[{index}]", extras=extras)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def pending_in(path: Path) -> dict[str, Tensor]:
    """Gradients of an unfinished window; checks too that weights serve those who know nothing of masters."""
    saved = read(path)
    extras = saved["optimizer_states"][0][EXTRAS]
    for name, master in extras["masters"].items():
        assert torch.equal(saved["state_dict"][name], master.bfloat16()), name
    return extras["gradients"]


class SaveEachBatch(L.Callback):
    """Inside accumulation windows too. Not on the safe list: every step is flushed before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.epoch_loop.total_batch_idx}.ckpt")


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, **options)


# Exchange with the plain Trainer.

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the bits of a forward depend on it


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our checkpoints of step 4, continued to step 8 by a process that cannot import the package."""
    folder = tmp_path_factory.mktemp("elsewhere")
    arguments = []
    for optimizer in OPTIMIZERS:
        fit(new(optimizer), ours(), steps=4).save_checkpoint(folder / f"{optimizer}.ckpt")
        arguments += [folder / f"{optimizer}.ckpt", folder / f"{optimizer}.continued"]
    command = [sys.executable, plain_script.__file__, "8", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=folder, timeout=300, env={**os.environ, **ONE_THREAD, "PYTHONPATH": ""})
    return folder


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ours_continues_in_a_plain_trainer_without_the_package(elsewhere: Path, optimizer: str) -> None:
    never_left = fit(new(optimizer), steps=8)
    assert_equal(content(never_left), read(elsewhere / f"{optimizer}.continued"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ours_has_the_layout_and_bits_of_a_plain_checkpoint(elsewhere: Path, optimizer: str) -> None:
    assert_equal(content(fit(new(optimizer), steps=4)), read(elsewhere / f"{optimizer}.ckpt"), extras=False)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "sgd"])
@pytest.mark.parametrize("min_numel", [0, 100])
def test_plain_continues_in_ours(tmp_path: Path, optimizer: str, min_numel: int) -> None:
    fit(new(optimizer), steps=4).save_checkpoint(tmp_path / "plain.ckpt")
    never_left = fit(new(optimizer), steps=8)
    run = fit(new(optimizer), ours(min_numel=min_numel), steps=8, ckpt_path=tmp_path / "plain.ckpt")
    assert run.strategy.engine.lanes.ledger.moved("h2d", "weights") > 0
    if optimizer == "sgd":  # torch keeps a `momentum_buffer` of None
        assert_equal(content(never_left)["state_dict"], content(run)["state_dict"])
    else:
        assert_equal(content(never_left), content(run), extras=False)


def test_bf16_of_ours_continues_in_a_plain_trainer(tmp_path: Path) -> None:
    fit(new(), ours(), steps=4, precision="bf16-true").save_checkpoint(tmp_path / "ours.ckpt")
    saved = read(tmp_path / "ours.ckpt")
    restored = content(fit(new(), steps=4, precision="bf16-true", ckpt_path=tmp_path / "ours.ckpt"))
    assert_equal(saved["state_dict"], restored["state_dict"])
    module = new()
    fit(module, steps=6, precision="bf16-true", ckpt_path=tmp_path / "ours.ckpt")
    assert len(module.losses) == 2


def test_bf16_of_a_plain_trainer_continues_in_ours(tmp_path: Path) -> None:
    fit(new(), steps=4, precision="bf16-true").save_checkpoint(tmp_path / "plain.ckpt")
    saved = read(tmp_path / "plain.ckpt")
    run = fit(new(), ours(), steps=4, precision="bf16-true", ckpt_path=tmp_path / "plain.ckpt")
    assert_equal(saved["state_dict"], content(run)["state_dict"])
    for index, state in saved["optimizer_states"][0]["state"].items():
        restored = run.strategy.optimizer_state(run.optimizers[0])["state"][index]
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == torch.bfloat16
            assert torch.equal(restored[name], state[name].float())  # fp32: nothing rounds it again
    masters = content(run)["optimizer_states"][0][EXTRAS]["masters"]
    for name, master in masters.items():
        assert torch.equal(master, saved["state_dict"][name].float())
    assert len(masters) == len(list(new().parameters()))


# Resuming.


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(("accumulate", "where"), [(1, "device"), (3, "device"), (3, "host")])
@pytest.mark.parametrize("min_numel", [0, 100])
def test_resume_after_every_batch(tmp_path: Path, precision: str, accumulate: int, where: str, min_numel: int) -> None:
    options = {"steps": 5, "precision": precision, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    module = new()
    whole = content(
        fit(module, ours(accumulate=where, min_numel=min_numel), callbacks=[SaveEachBatch(tmp_path)], **options)
    )
    batches = len(module.losses)
    assert batches == {1: 5, 3: 13}[accumulate]  # two and a half epochs, the window at an epoch's end is ragged
    pending = 0
    for batch in range(batches - 1):
        path, resumed = tmp_path / f"{batch}.ckpt", new()
        pending += bool(pending_in(path))
        run = fit(resumed, ours(accumulate=where, min_numel=min_numel), ckpt_path=path, **options)
        assert resumed.losses == module.losses[batch + 1 :], batch
        assert_equal(whole, content(run), f"after batch {batch}")
    assert pending == {1: 0, 3: 8}[accumulate]


def test_bf16_masters_are_needed_to_resume(tmp_path: Path) -> None:
    whole = fit(new(), ours(), steps=8, precision="bf16-true")
    fit(new(), ours(), steps=4, precision="bf16-true").save_checkpoint(tmp_path / "4.ckpt")
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)
    extras = saved["optimizer_states"][0].pop(EXTRAS)
    assert all(master.dtype == torch.float32 for master in extras["masters"].values())
    torch.save(saved, tmp_path / "without.ckpt")
    run = fit(new(), ours(), steps=8, precision="bf16-true", ckpt_path=tmp_path / "4.ckpt")
    assert_equal(content(whole), content(run))
    run = fit(new(), ours(), steps=8, precision="bf16-true", ckpt_path=tmp_path / "without.ckpt")
    same = zip(content(whole)["state_dict"].values(), content(run)["state_dict"].values(), strict=True)
    assert not all(torch.equal(one, other) for one, other in same)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_model_checkpoint_every_step_and_last(tmp_path: Path, precision: str) -> None:
    saving = every_step(tmp_path, save_last=True)
    module = new()
    run = fit(module, ours(), precision=precision, callbacks=[saving])
    assert not run.strategy._window.weights  # nothing is flushed but by saving itself
    whole = content(run)
    assert_equal(whole, read(tmp_path / "last.ckpt"))
    for step in range(1, 8):
        resumed = new()
        ends = content(fit(resumed, ours(), precision=precision, ckpt_path=tmp_path / f"step={step}.ckpt"))
        assert resumed.losses == module.losses[step:]
        assert_equal(whole, ends, f"after step {step}")


def test_weights_only_checkpoint(tmp_path: Path) -> None:
    run = fit(new(), ours(), callbacks=[every_step(tmp_path, save_weights_only=True)])
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert "optimizer_states" not in saved
    assert_equal(content(run)["state_dict"], saved["state_dict"])
    with pytest.raises(KeyError, match="save_weights_only"):
        fit(new(), ours(), ckpt_path=tmp_path / "step=8.ckpt")


def test_saving_after_fit_equals_saving_in_it(tmp_path: Path) -> None:
    run = fit(new(), ours(), precision="bf16-true", callbacks=[every_step(tmp_path)])
    assert run.strategy.engine.closed
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert_equal(read(tmp_path / "step=8.ckpt"), read(tmp_path / "after.ckpt"))


def on_exception(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="exception", save_on_exception=True, every_n_train_steps=1000)


class BadData(Dataset[int]):
    """Fails at the given batch, before the module has heard of it."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the lights went out")
        return index


class FailInBackward(L.Callback):
    """Raises after some gradients of the batch have arrived."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_backward(self, trainer: L.Trainer, module: Lit, loss: Tensor) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            module.blocks[0][1].weight.register_hook(self.fail)

    @staticmethod
    def fail(_: Tensor) -> None:
        raise RuntimeError("the lights went out")


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("batch", [4, 7])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_exception_between_micro_batches_saves_their_gradients(
    tmp_path: Path, where: str, batch: int, precision: str
) -> None:
    options = {"accumulate_grad_batches": 3, "steps": 4, "precision": precision}
    module = new()
    whole = content(fit(module, ours(accumulate=where), **options))
    saving = on_exception(tmp_path)
    with pytest.raises(RuntimeError, match="lights"):
        trainer(ours(accumulate=where), callbacks=[saving], **options).fit(new(), DataLoader(BadData(batch)))
    assert pending_in(tmp_path / "exception.ckpt")
    resumed = new()
    run = fit(resumed, ours(accumulate=where), ckpt_path=tmp_path / "exception.ckpt", **options)
    assert resumed.losses == module.losses[batch:]
    assert_equal(whole, content(run))


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("batch", [6, 7])
def test_exception_in_backward_saves_no_part_of_a_micro_batch(tmp_path: Path, where: str, batch: int) -> None:
    options = {"accumulate_grad_batches": 3, "steps": 4}
    saving = on_exception(tmp_path)
    run = trainer(ours(accumulate=where), callbacks=[FailInBackward(batch), saving], **options)
    with pytest.raises(RuntimeError, match="lights"):
        run.fit(new(), loader())
    run.save_checkpoint(tmp_path / "later.ckpt")
    for name in ("exception.ckpt", "later.ckpt"):
        assert pending_in(tmp_path / name) == {}, name
    fit(new(), ours(accumulate=where), ckpt_path=tmp_path / "exception.ckpt", **options)


def test_several_fits_on_one_strategy(tmp_path: Path) -> None:
    plain = fit(new())
    strategy = ours()
    module = new()
    first = fit(module, strategy, steps=3)
    first.save_checkpoint(tmp_path / "3.ckpt")
    engine = strategy.engine
    # the first Trainer has told the strategy its accelerator
    options = {"accelerator": "auto"}
    fit(module, strategy, steps=5, ckpt_path=tmp_path / "3.ckpt", **options).save_checkpoint(tmp_path / "5.ckpt")
    assert strategy.engine is not engine
    again = fit(new(), strategy, ckpt_path=tmp_path / "5.ckpt", **options)
    assert_equal(content(plain), content(again), extras=False)
    for run in (plain, again):  # the same Trainer goes on, with a new optimizer
        run.fit_loop.epoch_loop.max_steps = 10
        run.fit(run.lightning_module, loader())
    assert_equal(content(plain), content(again), extras=False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_evaluation_from_a_checkpoint(tmp_path: Path, precision: str) -> None:
    fit(new(), ours(), precision=precision).save_checkpoint(tmp_path / "8.ckpt")
    results = []
    for strategy in ("auto", ours()):
        run = trainer(strategy, precision=precision, limit_val_batches=1.0)
        module = Lit()
        results.append(
            [
                run.validate(module, loader(), ckpt_path=tmp_path / "8.ckpt", verbose=False),
                run.test(module, loader(), ckpt_path=tmp_path / "8.ckpt", verbose=False),
                run.predict(module, loader(), ckpt_path=tmp_path / "8.ckpt"),
            ]
        )
    assert_equal(*results)


def test_load_from_checkpoint(tmp_path: Path) -> None:
    run = fit(new("momentum", width=7), ours())
    run.save_checkpoint(tmp_path / "8.ckpt")
    module = Lit.load_from_checkpoint(tmp_path / "8.ckpt", weights_only=True)
    assert module.hparams == {"optimizer": "momentum", "width": 7, "depth": 2}
    assert_equal(content(run)["state_dict"], module.state_dict())


# The file.


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_no_tensor_drags_its_arena_into_the_file(tmp_path: Path, precision: str) -> None:
    run = fit(new(width=64, depth=4), ours(), steps=2, precision=precision)
    path = tmp_path / "file.ckpt"
    run.save_checkpoint(path)
    tensors = [leaf for leaf in tree_leaves(torch.load(path, weights_only=True)) if isinstance(leaf, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    elements = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}
    assert storages == elements
    overhead = path.stat().st_size - sum(storages.values())
    assert 0 < overhead < 512 * len(storages) + 16_384  # a zip header each, aligned; the pickle
    assert sum(storages.values()) > 20 * overhead or precision == "bf16-true"
    # the tied weight is there once
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr()


def test_stale_temporary_files_are_removed_and_others_left(tmp_path: Path) -> None:
    stale, other = tmp_path / ".a[1].ckpt.0123.partial", tmp_path / ".b.ckpt.0123.partial"
    stale.write_bytes(b"half")
    other.write_bytes(b"another run may be writing it")
    OffloadCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "a[1].ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "a[1].ckpt"]


def test_a_save_that_fails_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    io, path = OffloadCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"a": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"big": torch.zeros(1000), "a": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_storage_options_are_refused(tmp_path: Path) -> None:
    run = fit(new(), ours(), steps=1)
    with pytest.raises(TypeError, match="storage_options"):
        run.save_checkpoint(tmp_path / "a.ckpt", storage_options={"a": 1})


def test_remote_paths_go_lightnings_way(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(new(), ours(), steps=4)
    monkeypatch.setattr(os, "replace", None)  # our way to a local file
    run.save_checkpoint("memory://folder/a.ckpt")
    resumed = fit(new(), ours(), ckpt_path="memory://folder/a.ckpt")
    assert_equal(content(fit(new())), content(resumed), extras=False)


@pytest.mark.parametrize("inner", [None, OffloadCheckpointIO()])
def test_async_checkpoint_io(tmp_path: Path, inner: OffloadCheckpointIO | None) -> None:
    """It copies the state before the next step changes it: every step's file is of that step."""
    names = {True: every_step(tmp_path / "async"), False: every_step(tmp_path / "sync")}
    run = fit(new(), ours(), callbacks=[names[True]], plugins=[AsyncCheckpointIO(inner)])
    assert isinstance(run.strategy.checkpoint_io.checkpoint_io, OffloadCheckpointIO)
    fit(new(), ours(), callbacks=[names[False]])
    for step in range(1, 9):
        assert_equal(*(read(tmp_path / kind / f"step={step}.ckpt") for kind in ("async", "sync")))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: a process per kill would take minutes to import torch")
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Fifty times; each next run resumes from what it finds, and the last ends as a run that was never killed."""
    command = [sys.executable, "-m", "tests.killed", str(tmp_path), "50", "0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=400, cwd=ROOT)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["inside"] >= 15  # kills that left a temporary file: the others came before it or after
    assert seen["step"] >= 10
    assert seen["same"]
    assert seen["files"] == ["run.ckpt"]  # each save removes what a killed one left


# What does not fit.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "4.ckpt"
    torch.set_num_threads(1)
    fit(new(), ours(), steps=4).save_checkpoint(path)
    return path


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 3}, r"`blocks.2.0.weight` is absent in the checkpoint and \(19,\) in the model"),
        ({"depth": 1}, r"`blocks.1.0.weight` is \(19,\) in the checkpoint and absent in the model"),
        ({"width": 18}, r"`embed.weight` is \(41, 19\) in the checkpoint and \(41, 18\) in the model"),
    ],
)
def test_another_model(checkpoint: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        fit(new(**sizes), ours(), ckpt_path=checkpoint)
    with pytest.raises(CheckpointError, match=message):
        trainer(ours(), limit_val_batches=1.0).validate(new(**sizes), loader(), ckpt_path=checkpoint, verbose=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sgd": True}, "has no `betas`: the checkpoint is of another optimizer than this run's `AdamW`"),
        ({"amsgrad": True}, "`amsgrad=True`: the checkpoint is of another optimizer"),
        ({"shape": (7, 3)}, r"`exp_avg` of `embed.weight` has shape \(7, 3\) .* the parameter has \(41, 19\)"),
        ({"groups": 1}, "does not fit this optimizer"),
    ],
)
def test_another_optimizer_state(tmp_path: Path, checkpoint: Path, change: dict[str, Any], message: str) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    (state,) = saved["optimizer_states"]
    if "sgd" in change:
        saved["optimizer_states"] = content(fit(new("momentum"), steps=1))["optimizer_states"]
    elif "shape" in change:
        state["state"][0]["exp_avg"] = torch.zeros(change["shape"])
    elif "groups" in change:
        del state["param_groups"][1]
    else:
        state["param_groups"][0].update(change)
    torch.save(saved, tmp_path / "changed.ckpt")
    with pytest.raises(CheckpointError, match=message):
        fit(new(), ours(), ckpt_path=tmp_path / "changed.ckpt")


@pytest.mark.parametrize(
    ("saved", "run", "message"),
    [
        ("momentum", "sgd", r"`momentum=0.9`: the checkpoint is of another optimizer than this run's `SGD` \(0\)"),
        ("adamw", "adam", "`decoupled_weight_decay=True`"),
        ("adamw", "sgd", "no `momentum`"),
    ],
)
def test_another_optimizer(tmp_path: Path, saved: str, run: str, message: str) -> None:
    fit(new(saved), ours(), steps=2).save_checkpoint(tmp_path / "2.ckpt")
    with pytest.raises(CheckpointError, match=message):
        fit(new(run), ours(), ckpt_path=tmp_path / "2.ckpt")


@pytest.mark.parametrize("kept", [0, 1, 2, 4, 30, 1000, 0.5, 0.99, -1])
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_truncated_file(tmp_path: Path, checkpoint: Path, kept: float, weights_only: bool | None) -> None:
    whole, path = checkpoint.read_bytes(), tmp_path / "short.ckpt"
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=f"`{path}` cannot be read"):
        OffloadCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    with pytest.raises(CheckpointError, match=f"`{path}` cannot be read"):
        fit(new(), ours(), ckpt_path=path)


@pytest.mark.parametrize("text", ["a text file\n" * 10, "{'a': 1}", "\0" * 5000])
def test_no_checkpoint_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "text.ckpt").write_text(text)
    for path in (tmp_path / "text.ckpt", tmp_path):
        with pytest.raises(CheckpointError, match=f"`{path}` cannot be read"):
            fit(new(), ours(), ckpt_path=path)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        fit(new(), ours(), ckpt_path=tmp_path / "none.ckpt")


class Custom:
    """Not a primitive."""


def test_what_torch_refuses_for_safety_is_not_called_damaged(tmp_path: Path) -> None:
    torch.save({"a": Custom()}, tmp_path / "custom.ckpt")
    with pytest.raises(Exception, match="Custom") as caught:
        OffloadCheckpointIO().load_checkpoint(tmp_path / "custom.ckpt", weights_only=True)
    assert not isinstance(caught.value, CheckpointError)
