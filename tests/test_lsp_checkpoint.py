"""Checkpoints of `lsp_offload`: exact resume, and what other methods and a plain Trainer make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_offload import resuming
from lightning_offload.errors import CheckpointError
from lightning_offload.methods.engine import GRADIENTS
from lightning_offload.resuming import EXTRAS
from tests.helpers import pairwise, row_id
from tests.lit import lsp
from tests.plain import fit, loader, new, trainer
from tests.test_checkpoint import SaveEachBatch, assert_equal, content, every_step, ours, read

pytestmark = pytest.mark.filterwarnings("ignore:.*num_training_batches")


FACTORS: dict[str, list[Any]] = {
    "precision": ["32-true", "bf16-true"],
    "window": [1, 3],
    "clip": [None, 0.1],
    "projector": ["block", "pca", "learned"],
    "accumulate": ["device", "host"],
    "share": ["matrix", "type"],
    "others": ["adamw", "frozen"],
    "moments": ["transfer", "paper", "reset"],
    "form": ["gradient", "activations"],
}


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=4), ids=row_id)
def test_resume_after_every_batch_is_exact(tmp_path: Path, row: dict[str, Any]) -> None:
    """Inside windows too; with refits every three steps, all of them replaced."""
    row = dict(row)
    run = {
        "precision": row.pop("precision"),
        "accumulate_grad_batches": row.pop("window"),
        "gradient_clip_val": row.pop("clip"),
    }
    fit(new(), lsp(**row), steps=5, callbacks=[SaveEachBatch(tmp_path)], **run)
    stops = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt"))
    final = read(tmp_path / f"{stops[-1]}.ckpt")
    for stop in (*stops[2:-1:3], stops[-2]):
        resumed = fit(new(), lsp(**row), steps=5, ckpt_path=tmp_path / f"{stop}.ckpt", **run)
        assert_equal(final, content(resumed), f"after batch {stop}")


def test_a_second_resume_continues_refits_where_they_were(tmp_path: Path) -> None:
    whole = fit(new(), lsp(projector="learned", seed=None), steps=8)
    fit(new(), lsp(projector="learned", seed=None), steps=3).save_checkpoint(tmp_path / "3.ckpt")
    second = fit(new(), lsp(projector="learned", seed=None), steps=6, ckpt_path=tmp_path / "3.ckpt")
    second.save_checkpoint(tmp_path / "6.ckpt")
    third = fit(new(), lsp(projector="learned", seed=None), steps=8, ckpt_path=tmp_path / "6.ckpt")
    assert_equal(content(whole), content(third))
    draws = [state["draws"] for state in content(third)["optimizer_states"][0][EXTRAS]["state"].values()]
    assert min(draws) >= 3


def test_auto_and_seed_are_those_of_the_run_that_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_offload.methods import lsp as method

    monkeypatch.setattr(method, "largest_hidden_dim", lambda *_, **__: (0.25, "measured"))
    torch.manual_seed(1)
    fit(new(), lsp(dim="auto", seed=None), steps=2).save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setattr(method, "largest_hidden_dim", lambda *_, **__: (0.5, "measured"))
    module, strategy = new(), lsp(dim="auto", seed=None)
    torch.manual_seed(2)
    fit(module, strategy, steps=4, ckpt_path=tmp_path / "a.ckpt")
    assert (strategy.engine.method.settings.dim, strategy.engine.method.settings.seed) == (0.25, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 6}, r"projected `blocks\.0\.1\.weight` to dim=9 with nnz=3, this run to dim=6.*settings of the check"),
        ({"nnz": 1}, r"to dim=9 with nnz=3, this run to dim=9 with nnz=1"),
    ],
)
def test_other_subspaces_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    fit(new(), lsp(), steps=2).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message):
        fit(new(), lsp(**changes), steps=4, ckpt_path=tmp_path / "a.ckpt")


# Other methods


STRATEGIES: dict[str, Any] = {"plain": lambda: "auto", "full": ours, "lsp": lsp}


@pytest.mark.parametrize(("first", "second"), [("plain", "lsp"), ("full", "lsp"), ("lsp", "full"), ("lsp", "plain")])
def test_weights_pass_between_methods_and_moments_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    fit(new(), STRATEGIES[first](), steps=4).save_checkpoint(tmp_path / "a.ckpt")
    saved = read(tmp_path / "a.ckpt")
    module, said = new(), []
    monkeypatch.setattr(resuming, "rank_zero_warn", said.append)
    run = fit(module, STRATEGIES[second](), steps=4, ckpt_path=tmp_path / "a.ckpt")
    assert_equal(saved["state_dict"], content(run)["state_dict"])
    if second != "plain":  # which knows nothing of methods
        source = "a plain Trainer" if first == "plain" else f"method `{first}`"
        assert len(said) == 1
        assert f"was made by {source}, this run trains by method `{second}`" in said[0]
        assert "moments of 4 linear weights" in said[0]
    run = fit(module, STRATEGIES[second](), steps=7, ckpt_path=tmp_path / "a.ckpt")
    assert run.global_step == 7
    assert all(torch.isfinite(torch.tensor(module.losses)))
    counts = {float(state["step"]) for state in content(run)["optimizer_states"][0]["state"].values()}
    assert counts == ({7.0} if second == "lsp" else {3.0, 7.0})  # the common path went on counting


@pytest.mark.parametrize(("first", "second"), [("full", "lsp"), ("lsp", "full")])
def test_a_window_of_another_method_cannot_be_finished(tmp_path: Path, first: str, second: str) -> None:
    settings = {"accumulate_grad_batches": 3}
    fit(new(), STRATEGIES[first](), steps=2, callbacks=[SaveEachBatch(tmp_path)], **settings)
    path = tmp_path / "1.ckpt"
    assert read(path)["optimizer_states"][0][EXTRAS][GRADIENTS]
    with pytest.raises(
        CheckpointError, match=rf"by method `{first}` in the middle of an acc.*`{second}` cannot finish"
    ):
        fit(new(), STRATEGIES[second](), steps=2, ckpt_path=path, **settings)
    fit(new(), STRATEGIES[second](), steps=2, ckpt_path=tmp_path / "2.ckpt", **settings)


def test_a_window_that_adds_up_elsewhere_cannot_be_finished(tmp_path: Path) -> None:
    fit(new(), lsp(accumulate="host"), steps=2, callbacks=[SaveEachBatch(tmp_path)], accumulate_grad_batches=3)
    with pytest.raises(CheckpointError, match=r"with `accumulate='host'`, this run has `accumulate='device'`"):
        fit(new(), lsp(accumulate="device"), steps=2, ckpt_path=tmp_path / "1.ckpt", accumulate_grad_batches=3)
    fit(new(), lsp(), steps=2, ckpt_path=tmp_path / "1.ckpt", accumulate_grad_batches=3)  # auto follows it


# Saving


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_saving_changes_nothing(tmp_path: Path, precision: Any) -> None:
    plain, saving = new(), new()
    fit(plain, lsp(), steps=8, precision=precision)
    fit(saving, lsp(), steps=8, precision=precision, callbacks=[every_step(tmp_path)])
    assert plain.losses == saving.losses
    assert_equal(dict(plain.state_dict()), dict(saving.state_dict()))


def test_saving_after_fit_equals_saving_in_it(tmp_path: Path) -> None:
    run = fit(new(), lsp(), steps=4, callbacks=[every_step(tmp_path)])
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert_equal(read(tmp_path / "step=4.ckpt"), read(tmp_path / "after.ckpt"))


def test_evaluation_from_a_checkpoint(tmp_path: Path) -> None:
    module = new()
    run = fit(module, lsp(), steps=4, limit_val_batches=2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    expected = run.validate(module, loader(), verbose=False)
    run = trainer(lsp(), limit_val_batches=2)
    assert run.validate(new(), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False) == expected != []


def test_the_net_of_the_other_tests_is_projected() -> None:
    strategy = lsp()
    fit(new(), strategy, steps=1)
    assert len(strategy.engine.own.trained) == 4
