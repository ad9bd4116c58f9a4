"""Checkpoints of `meft_offload`: exact resume, from the mixin's too, and what has no adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_offload import meft_behaviour
from lightning_offload.checkpoint import ADAPTERS, OffloadCheckpointIO
from lightning_offload.errors import CheckpointError
from lightning_offload.methods.engine import GRADIENTS
from lightning_offload.resuming import EXTRAS
from tests.helpers import VOCAB, adamw, pairwise, row_id
from tests.meft_lit import MLit, MManual, MOwn, attach, by_part, meft, shuffled_meft
from tests.plain import loader, trainer
from tests.test_checkpoint import ROOT, SaveEachBatch, assert_equal, content, every_step, ours, read

pytestmark = pytest.mark.filterwarnings("ignore:.*num_training_batches")

SPARSE: dict[str, Any] = {"width": 192, "experts": 24, "active_experts": 2, "top_k": 4}
"""Most rows are left alone by a step."""


class _Numbered(MLit):
    """Batches follow from their number: Lightning does not restore the loader's place."""

    def one(self, batch: Tensor) -> Tensor:
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return super().one(torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(number)))

    def val_dataloader(self) -> Any:
        return type(self).train_dataloader(self)  # a Trainer puts the one that it is given over the module's


class Numbered(_Numbered):
    def __init__(self, **build: Any) -> None:
        super().__init__(**{"schedule": "step", **build})


class NumberedManual(MManual, _Numbered):
    """Through `OffloadMixin`."""


class NumberedOwn(MOwn, _Numbered):
    def __init__(self, offload: dict[str, Any] | None = None, **build: Any) -> None:
        super().__init__(offload, **{"schedule": "step", **build})


def fit(module: L.LightningModule, strategy: Any = "auto", *, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    torch.manual_seed(3)
    run = trainer(strategy, **options)
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return run


FACTORS: dict[str, list[Any]] = {
    "precision": ["32-true", "bf16-true"],
    "window": [1, 3],
    "clip": [None, 0.05],
    "rows": [
        {"placement": "host", "row_optimizer": "dense"},
        {"placement": "keys", "row_optimizer": "dense"},
        {"placement": "device", "row_optimizer": "dense"},
        {"placement": "host", "row_optimizer": "deferred", **SPARSE},
        {"placement": "keys", "row_optimizer": "deferred", **SPARSE},
        {"placement": "host", "row_optimizer": "auto", **SPARSE},
        {"placement": "host", "row_optimizer": "lazy", **SPARSE},
    ],
    "make": [meft, shuffled_meft],
    "accumulate": ["device", "host"],
}


def groups_for(rows: dict[str, Any]) -> Any:
    """`lazy` knows no decay of weights."""
    return (lambda module: adamw(module, weight_decay=0.0)) if rows["row_optimizer"] == "lazy" else by_part


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=4), ids=row_id)
def test_resume_after_every_batch_is_exact(tmp_path: Path, row: dict[str, Any]) -> None:
    """Inside windows too. Saving brings rows that are behind up to date, so both runs save as often."""
    run = {
        "precision": row["precision"],
        "accumulate_grad_batches": row["window"],
        "gradient_clip_val": row["clip"],
        "steps": 5,
    }
    build, settings = {"make_optimizer": groups_for(row["rows"])}, {"accumulate": row["accumulate"], **row["rows"]}
    fit(Numbered(**build), row["make"](**settings), callbacks=[SaveEachBatch(tmp_path)], **run)
    stops = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt"))
    final = read(tmp_path / f"{stops[-1]}.ckpt")
    for stop in (*stops[1:-1:3], stops[-2]):
        saving = SaveEachBatch(tmp_path / "again")
        path = tmp_path / f"{stop}.ckpt"
        resumed = fit(Numbered(**build), row["make"](**settings), callbacks=[saving], ckpt_path=path, **run)
        assert_equal(final, content(resumed), f"after batch {stop}")


@pytest.mark.parametrize("placement", ["host", "keys"])
@pytest.mark.parametrize("rows", ["deferred", "auto"])
def test_rows_that_were_behind_resume_exactly(tmp_path: Path, placement: str, rows: str) -> None:
    """Saved at the end of every third step; steps between leave rows behind."""
    settings = {"placement": placement, "row_optimizer": rows, **SPARSE}

    def go(folder: str, **options: Any) -> dict[str, Any]:
        module = Numbered(make_optimizer=by_part)
        saving = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        return content(fit(module, meft(**settings), steps=9, callbacks=[saving], **options))

    whole = go("whole")
    assert_equal(whole, go("again", ckpt_path=tmp_path / "whole" / "step=3.ckpt"))
    assert_equal(whole, go("later", ckpt_path=tmp_path / "whole" / "step=6.ckpt"))


@pytest.mark.parametrize("placement", ["host", "keys"])
def test_saving_often_moves_deferred_rows_by_rounding_alone(tmp_path: Path, placement: str) -> None:
    settings = {"placement": placement, "row_optimizer": "deferred", **SPARSE}
    never, often, dense = Numbered(), Numbered(), Numbered()
    fit(never, meft(**settings), steps=8)
    fit(often, meft(**settings), steps=8, callbacks=[every_step(tmp_path)])
    fit(dense, meft(**{**settings, "row_optimizer": "dense"}), steps=8)
    for name, value in dense.state_dict().items():
        for module in (never, often):
            assert torch.allclose(module.state_dict()[name], value, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(("first", "second"), [("host", "keys"), ("keys", "device"), ("device", "host")])
@pytest.mark.parametrize("stop", [1, 2])
def test_placement_may_change_on_resume(tmp_path: Path, first: str, second: str, stop: int) -> None:
    """It decides no bits; also inside a window."""
    run: dict[str, Any] = {"steps": 4, "accumulate_grad_batches": 3, "gradient_clip_val": 0.05}
    whole = fit(Numbered(), meft(placement=first), callbacks=[SaveEachBatch(tmp_path)], **run)
    path = tmp_path / f"{stop}.ckpt"
    assert bool(read(path)["optimizer_states"][0][EXTRAS][GRADIENTS]) == (stop == 1)
    strategy = meft(placement=second)
    resumed = fit(Numbered(), strategy, ckpt_path=path, **run)
    assert strategy.engine.method.settings.placement == second
    for key in ("state_dict", "lr_schedulers", "global_step"):
        assert_equal(content(whole)[key], content(resumed)[key])


@pytest.mark.parametrize(("first", "second"), [("meft_offload", "auto"), ("auto", "meft_offload"), ("auto", "auto")])
@pytest.mark.parametrize("rows", [{}, {"row_optimizer": "deferred", **SPARSE}])
def test_checkpoints_of_the_mixin_continue_in_each_other(
    tmp_path: Path, first: str, second: str, rows: dict[str, Any]
) -> None:
    step = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, **rows}
    whole = fit(NumberedOwn(step), first, steps=5, callbacks=[SaveEachBatch(tmp_path)])
    for stop in (3, 4):
        saving = SaveEachBatch(tmp_path / "again")  # under a plain strategy every step waits for all rows
        resumed = fit(NumberedOwn(step), second, steps=5, callbacks=[saving], ckpt_path=tmp_path / f"{stop}.ckpt")
        assert_equal(content(whole), content(resumed))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("first", "second"), [("meft_offload", "auto"), ("auto", "meft_offload"), ("auto", "auto")])
def test_rows_resume_in_full_where_parameters_are_in_16_bits(
    tmp_path: Path, first: str, second: str, rounded: bool
) -> None:
    """A plain strategy rounds all parameters between loading them and the start of fit."""

    def new(narrow: bool) -> NumberedOwn:
        module = NumberedOwn({"accumulate_grad_batches": 2})
        attach(module)
        if narrow:
            module.net.bfloat16()
        return module

    run: dict[str, Any] = {"steps": 5, "precision": "bf16-true"}
    whole = fit(new(True), first, callbacks=[SaveEachBatch(tmp_path / "whole")], **run)
    saving, path = SaveEachBatch(tmp_path / "again"), tmp_path / "whole" / "3.ckpt"
    assert_equal(content(whole), content(fit(new(rounded), second, callbacks=[saving], ckpt_path=path, **run)))


def test_plain_lightning_with_adapters_and_ours_continue_in_each_other(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    whole = fit(Numbered(attached={}), steps=6)
    fit(Numbered(attached={}), steps=3).save_checkpoint(tmp_path / "plain.ckpt")
    fit(Numbered(), meft(), steps=3).save_checkpoint(tmp_path / "ours.ckpt")
    for module, strategy, path in ((Numbered(), meft(), "plain"), (Numbered(attached={}), "auto", "ours")):
        resumed = fit(module, strategy, steps=6, ckpt_path=tmp_path / f"{path}.ckpt")
        assert_equal(content(whole), content(resumed), extras=False)
    assert not [w for w in recwarn if "start anew" in str(w.message)], "moments go on"


def test_saving_changes_nothing_and_after_fit_equals_in_it(tmp_path: Path) -> None:
    plain, saving = Numbered(), Numbered()
    fit(plain, meft(), steps=6)
    run = fit(saving, meft(), steps=6, callbacks=[every_step(tmp_path)])
    assert plain.losses == saving.losses
    assert_equal(dict(plain.state_dict()), dict(saving.state_dict()))
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert_equal(read(tmp_path / "step=6.ckpt"), read(tmp_path / "after.ckpt"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_evaluation_from_a_checkpoint(tmp_path: Path, precision: Any) -> None:
    module = Numbered()
    run = fit(module, meft(), steps=4, limit_val_batches=2, precision=precision)
    run.save_checkpoint(tmp_path / "a.ckpt")
    data = module.val_dataloader()
    expected = run.test(module, data, verbose=False)
    for placement in ("host", "keys", "device"):
        other = trainer(meft(placement=placement, seed=None), precision=precision)
        assert other.test(Numbered(), data, ckpt_path=tmp_path / "a.ckpt", verbose=False) == expected != []


# Without a Trainer


@pytest.mark.parametrize("strategy", ["meft_offload", "auto"])
def test_a_module_of_the_mixin_loads_from_a_checkpoint(tmp_path: Path, strategy: str) -> None:
    module = NumberedOwn()
    fit(module, strategy, steps=3).save_checkpoint(tmp_path / "a.ckpt")
    loaded = NumberedOwn.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_equal(dict(module.state_dict()), dict(loaded.state_dict()))
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(module.net(tokens), loaded.net(tokens))


def test_another_module_attaches_them_itself(tmp_path: Path) -> None:
    module = Numbered()
    fit(module, meft(), steps=3).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*meft\.keys"):
        Numbered.load_from_checkpoint(tmp_path / "a.ckpt")
    loaded = Numbered.load_from_checkpoint(tmp_path / "a.ckpt", attached={})
    assert_equal(dict(module.state_dict()), dict(loaded.state_dict()))


# What has no adapters, or others


@pytest.mark.parametrize("source", ["plain", "full"])
@pytest.mark.parametrize("target", ["strategy", "mixin", "mixin alone"])
def test_a_checkpoint_without_adapters_gives_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str
) -> None:
    kind = Numbered if target == "strategy" else NumberedManual  # Lightning counts their steps apart
    first = kind(schedule="step", make_optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-2))
    fit(first, "auto" if source == "plain" else ours(), steps=2).save_checkpoint(tmp_path / "a.ckpt")
    module = Numbered() if target == "strategy" else NumberedOwn(schedule="step")
    strategy: Any = {"strategy": meft(), "mixin": "meft_offload", "mixin alone": "auto"}[target]
    said: list[str] = []
    monkeypatch.setattr(meft_behaviour, "rank_zero_warn", said.append)
    run = fit(module, strategy, steps=5, ckpt_path=tmp_path / "a.ckpt")
    assert len(said) == 1
    assert "the checkpoint has no adapters. The backbone, the step count" in said[0]
    assert (run.global_step, len(module.losses)) == (5, 3)
    saved = read(tmp_path / "a.ckpt")["state_dict"]
    after = dict(module.state_dict())
    for name, value in saved.items():
        assert name == "seen" or torch.equal(value, after[name]), name
    attach(fresh := MLit())
    state = dict(fresh.state_dict())
    assert all(not torch.equal(after[name], state[name]) for name in after if name.endswith("meft.values"))
    counts = {float(s["step"]) for s in content(run)["optimizer_states"][0]["state"].values()}
    assert counts == {3.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 96}, r"^width=96, but the checkpoint has adapters with width=48; pass the same, or start without"),
        ({"experts": 24}, r"^experts=24, but the checkpoint has adapters with experts=12"),
        ({"width": 96, "experts": 24}, r"^width=96, experts=24, but .* with width=48, experts=12"),
        ({"top_k": 4}, r"^top_k=4, but .* with top_k=6"),
        ({"active_experts": 4}, r"^active_experts=4, but .* with active_experts=3"),
        ({"gate": "none"}, r"^gate='none', but .* with gate='logit'"),
        ({"scope": "union"}, r"^scope='union', but .* with scope='token'"),
        ({"variant": "paper"}, r"^gate='none', scope='union', but .* with gate='logit', scope='token'"),
        ({"layers": [0]}, r"net\.blocks\.1\.mlp\.meft"),
    ],
)
@pytest.mark.parametrize("target", ["fit", "test", "mixin", "without a Trainer"])
def test_other_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], message: str, target: str) -> None:
    """In every place that a checkpoint is loaded."""
    path = tmp_path / "a.ckpt"
    if target in ("fit", "test"):
        fit(Numbered(), meft(), steps=1).save_checkpoint(path, weights_only=target == "test")
    else:
        fit(NumberedOwn(), "auto", steps=1).save_checkpoint(path, weights_only=target != "mixin")
    load: Callable[[], object] = {
        "fit": lambda: fit(Numbered(), meft(**changes), steps=2, ckpt_path=path),
        "test": lambda: trainer(meft(**changes)).test(Numbered(), loader(), ckpt_path=path),
        "mixin": lambda: fit(NumberedOwn(changes), "auto", steps=2, ckpt_path=path),
        "without a Trainer": lambda: NumberedOwn.load_from_checkpoint(path, offload=changes),
    }[target]
    with pytest.raises(RuntimeError, match=message):  # torch says itself what is missing
        load()


@pytest.mark.parametrize("target", ["meft_offload", "auto"])
def test_what_decides_no_forward_may_be_another_on_resume(tmp_path: Path, target: str) -> None:
    fit(NumberedOwn(), target, steps=1).save_checkpoint(tmp_path / "a.ckpt")
    others = {"seed": 6, "key_std": 0.5, "router_init": "keys", "row_optimizer": "deferred", "placement": "host"}
    whole, resumed = NumberedOwn(), NumberedOwn(others)
    fit(whole, target, steps=3)
    fit(resumed, target, steps=3, ckpt_path=tmp_path / "a.ckpt")
    assert whole.losses[1:] == pytest.approx(resumed.losses, rel=1e-5)


def test_of_an_older_checkpoint_shapes_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(Numbered(), meft(), steps=1).save_checkpoint(path)
    content: dict[str, Any] = torch.load(path, weights_only=True)
    del content[ADAPTERS]
    torch.save(content, path)
    fit(Numbered(), meft(top_k=4), steps=2, ckpt_path=path)
    with pytest.raises(CheckpointError, match=r"^width=96, experts=24, but .* with width=48, experts=12"):
        fit(Numbered(), meft(width=96, experts=24), steps=2, ckpt_path=path)


# Whole files


class FailsLate(OffloadCheckpointIO):
    """The disk is full once half of the file has been written."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint({**checkpoint, "late": _Breaks()}, path, storage_options)


class _Breaks:
    def __reduce__(self) -> Any:
        raise OSError("No space left on device")


def test_a_save_that_fails_leaves_the_previous_one_and_training_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    module = Numbered()
    run = fit(module, meft(), steps=2)
    run.save_checkpoint(path)
    before = read(path)
    run.strategy.checkpoint_io = FailsLate()
    with pytest.raises(OSError, match="No space left"):
        run.save_checkpoint(path)
    assert_equal(before, read(path))
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: a process per kill would take minutes to import torch")
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.killed", str(tmp_path), "10", "0", "meft"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=400, cwd=ROOT)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["inside"] >= 2
    assert seen["step"] >= 2
    assert seen["same"]
    assert seen["files"] == ["run.ckpt"]
