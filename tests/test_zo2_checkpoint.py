"""Checkpoints and logs of `zo2_offload`: exact resume, `replay`, and what other methods make of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_offload import replay, resuming, zeroth_behaviour
from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.methods.steplog import hash_weights, pack_header, read_log
from lightning_offload.numerics.native import NotBuiltError
from lightning_offload.numerics.noise import Draw, noise
from tests.helpers import every, pairwise, row_id
from tests.lit import lsp
from tests.plain import Lit, fit, new
from tests.test_checkpoint import SaveEachBatch, assert_equal, content, every_step, ours, read
from tests.zo2 import ZLit, same_weights, zfit, zo2

pytestmark = pytest.mark.filterwarnings("ignore:.*num_training_batches")


class Diverges(Lit):
    """Steps 2 and 5 have a loss that is no number."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step in (1, 4) else loss


def diverging() -> Lit:
    torch.manual_seed(3)
    return Diverges("sgd")


def sgd() -> Lit:
    return new("sgd")


FACTORS: dict[str, list[Any]] = {
    "precision": ["32-true", "bf16-true", "16-true"],
    "window": [1, 3],
    "noise": ["philox", "mezo"],
    "write_back_every": [1, 3],
    "module": [sgd, diverging],
    "save": [SaveEachBatch, every_step],  # with a look at the weights after each batch, and without one
}


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=4), ids=row_id)
def test_resume_after_every_batch_is_exact(tmp_path: Path, row: dict[str, Any]) -> None:
    """Inside windows too, and after steps that were skipped."""
    row = dict(row)
    make, save = row.pop("module"), row.pop("save")
    run = {"precision": row.pop("precision"), "accumulate_grad_batches": row.pop("window")}
    np.random.seed(1)
    fit(make(), zo2(**row), steps=6, callbacks=[save(tmp_path)], **run)
    stops = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    final = read(stops[-1])
    assert len(stops) > 5
    for stop in (*stops[:-1:3], stops[-2]):
        np.random.seed(99)  # MeZO's seeds are those of the checkpoint
        resumed = fit(make(), zo2(**{**row, "seed": None}), steps=6, ckpt_path=stop, **run)
        assert_equal(final, content(resumed), f"after {stop.name}")


def test_settings_that_decide_the_bits_must_stay(tmp_path: Path) -> None:
    fit(sgd(), zo2(), steps=2).save_checkpoint(tmp_path / "a.ckpt")
    for changes, message in (
        ({"eps": 1e-2}, "made with eps=0.001, this run has eps=0.01: continue with the setting of the checkpoint"),
        ({"directions": 2}, "directions=1, this run has directions=2"),
        ({"seed": 5}, "seed=4, this run has seed=5"),
        ({"noise": "mezo"}, "noise='philox', this run has noise='mezo'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fit(sgd(), zo2(**changes), steps=4, ckpt_path=tmp_path / "a.ckpt")


# Other methods


STRATEGIES: dict[str, Any] = {"plain": lambda: "auto", "full": ours, "lsp": lsp, "zo2": zo2}


@pytest.mark.parametrize("first", ["plain", "full", "lsp"])
def test_weights_of_another_method_are_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    fit(new(), STRATEGIES[first](), steps=4).save_checkpoint(tmp_path / "a.ckpt")
    saved, said = read(tmp_path / "a.ckpt"), []
    monkeypatch.setattr(resuming, "rank_zero_warn", said.append)
    module = sgd()
    run = fit(module, zo2(), steps=4, ckpt_path=tmp_path / "a.ckpt")
    assert_equal(saved["state_dict"], content(run)["state_dict"])
    source = "a plain Trainer" if first == "plain" else f"method `{first}`"
    (told,) = [line for line in said if "was made by" in line]
    assert f"was made by {source}, this run trains by method `zo2`: weights" in told
    assert "lr stays 0.1, 0.01" in told
    assert "betas" not in run.optimizers[0].param_groups[0]
    run = fit(module, zo2(), steps=7, ckpt_path=tmp_path / "a.ckpt")
    assert run.global_step == 7
    assert [entry.step for entry in run.strategy.log] == [1, 2, 3]


@pytest.mark.parametrize("second", ["full", "lsp"])
def test_weights_of_zo2_go_on_by_another_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    fit(sgd(), zo2(), steps=4).save_checkpoint(tmp_path / "a.ckpt")
    saved, said = read(tmp_path / "a.ckpt"), []
    monkeypatch.setattr(resuming, "rank_zero_warn", said.append)
    module = new()
    run = fit(module, STRATEGIES[second](), steps=4, ckpt_path=tmp_path / "a.ckpt")
    assert_equal(saved["state_dict"], content(run)["state_dict"])
    assert f"was made by method `zo2`, this run trains by method `{second}`: weights" in said[0]
    assert fit(module, STRATEGIES[second](), steps=7, ckpt_path=tmp_path / "a.ckpt").global_step == 7
    assert all(p.isfinite().all() for p in module.parameters())


# The log


def test_the_log_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    log, other = tmp_path / "runs" / "a.log", tmp_path / "b.log"
    whole = fit(sgd(), zo2(log_file=other), steps=6)
    fit(sgd(), zo2(log_file=log), steps=5, callbacks=[every_step(tmp_path)])
    fit(sgd(), zo2(log_file=log), steps=6, ckpt_path=tmp_path / "step=3.ckpt")
    assert log.read_bytes() == other.read_bytes()
    header, entries, size = read_log(log.read_bytes(), "log")
    assert entries == whole.strategy.log
    assert size == log.stat().st_size
    assert header.base == hash_weights(sgd().parameters())


def test_the_log_of_another_run_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    fit(sgd(), zo2(log_file=log), steps=3)
    before = log.read_bytes()
    fit(sgd(), zo2(seed=9, log_file=tmp_path / "b.log"), steps=3, callbacks=[every_step(tmp_path)])
    with pytest.raises(CheckpointError, match="log of another run"):
        fit(sgd(), zo2(seed=9, log_file=log), steps=6, ckpt_path=tmp_path / "step=3.ckpt")
    assert log.read_bytes() == before


@pytest.mark.parametrize("seed", [4, 9])
def test_a_run_that_begins_writes_over_no_log(tmp_path: Path, seed: int) -> None:
    log = tmp_path / "a.log"
    fit(sgd(), zo2(log_file=log), steps=3).save_checkpoint(tmp_path / "a.ckpt")
    before = log.read_bytes()
    message = (
        r"`log_file='.*a\.log'` is there already, the log of a run up to step 3, .* another path, remove it, or .*ckpt"
    )
    with pytest.raises(CheckpointError, match=message):
        fit(sgd(), zo2(seed=seed, log_file=log), steps=6)
    assert log.read_bytes() == before
    fit(sgd(), zo2(log_file=log), steps=6, ckpt_path=tmp_path / "a.ckpt")  # the ways out
    assert len(read_log(log.read_bytes(), "log")[1]) > len(read_log(before, "log")[1])
    log.unlink()
    fit(sgd(), zo2(seed=seed, log_file=log), steps=6)


def test_a_run_that_begins_writes_over_no_other_file(tmp_path: Path) -> None:
    for held in (b"my notes", hashed(tmp_path)[:-1]):
        (tmp_path / "a.log").write_bytes(held)
        with pytest.raises(CheckpointError, match=r"no log of a zo2 run|damaged header"):
            fit(sgd(), zo2(log_file=tmp_path / "a.log"), steps=3)
        assert (tmp_path / "a.log").read_bytes() == held
    for held in (b"", hashed(tmp_path)):  # nothing is lost: the run stopped before its first step
        (tmp_path / "a.log").write_bytes(held)
        done = fit(sgd(), zo2(log_file=tmp_path / "a.log"), steps=3)
        assert read_log((tmp_path / "a.log").read_bytes(), "log")[1] == done.strategy.log


def hashed(tmp_path: Path) -> bytes:
    """A log without updates."""
    (tmp_path / "b.log").unlink(missing_ok=True)
    run = fit(sgd(), zo2(log_file=tmp_path / "b.log"), steps=3)
    return pack_header(run.strategy.engine.header())


def test_a_run_resumed_before_its_first_update_writes_over_no_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    fit(sgd(), zo2(), steps=0).save_checkpoint(tmp_path / "a.ckpt")
    fit(sgd(), zo2(log_file=log), steps=3)
    before = log.read_bytes()
    with pytest.raises(CheckpointError, match="is there already"):
        fit(sgd(), zo2(log_file=log), steps=3, ckpt_path=tmp_path / "a.ckpt")
    assert log.read_bytes() == before


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`log_file='.*'` is a folder: name a file in it"):
        fit(sgd(), zo2(log_file=tmp_path), steps=3)
    fit(sgd(), zo2(log_file=tmp_path / "a.log"), steps=3).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="is a folder"):
        fit(sgd(), zo2(log_file=tmp_path), steps=6, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="is a folder: name the log in it"):
        replay(sgd(), tmp_path)


def test_a_log_that_the_run_never_had_is_not_begun_later(tmp_path: Path) -> None:
    fit(sgd(), zo2(), steps=3).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(OffloadError, match=r"not hashed then.*without one this run can go on"):
        fit(sgd(), zo2(log_file=tmp_path / "a.log"), steps=6, ckpt_path=tmp_path / "a.ckpt")


def test_a_long_hash_is_announced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(zeroth_behaviour, "rank_zero_info", said.append)
    fit(sgd(), zo2(log_file=tmp_path / "small.log"), steps=3)
    assert said == []
    monkeypatch.setattr(zeroth_behaviour, "HASHED_SILENTLY_BYTES", 2**10)
    fit(sgd(), zo2(), steps=3)
    assert said == []
    fit(sgd(), zo2(log_file=tmp_path / "a.log"), steps=3).save_checkpoint(tmp_path / "a.ckpt")
    fit(sgd(), zo2(log_file=tmp_path / "a.log"), steps=6, ckpt_path=tmp_path / "a.ckpt")
    (line,) = said
    assert re.search(r"zo2_offload: hashes 0\.0 GiB of weights, once, .*`log_file=None`", line)


def test_a_log_that_nobody_asked_for_at_the_start_has_no_base(tmp_path: Path) -> None:
    run = fit(sgd(), zo2(), steps=3)
    with pytest.raises(Exception, match="were not hashed then"):
        replay(sgd(), run.strategy)


class Head(nn.Module):
    """Another prefix, the same parameters."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.base = net


REPLAYS: dict[str, list[Any]] = {
    "precision": ["32-true", "bf16-true", "16-true", "bf16-mixed"],
    "noise": [{}, {"noise": "mezo"}, {"distribution": "gaussian"}, {"distribution": "rademacher"}, {"directions": 3}],
    "net": [{}, {"tied": True}, {"frozen": True}],
    "groups": [1, 2],
    "write_back_every": [1, 3],
    "log": ["path", "strategy", "entries"],
}


def two_groups(module: nn.Module) -> torch.optim.SGD:
    wide = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    rest = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    return torch.optim.SGD([{"params": wide, "weight_decay": 0.1}, {"params": rest, "lr": 1e-2}], lr=1e-3)


@pytest.mark.parametrize("row", every(2, pairwise(REPLAYS, seed=2)), ids=row_id)
def test_replay_rebuilds_the_weights_bit_for_bit(tmp_path: Path, row: dict[str, Any]) -> None:
    build = {"make_optimizer": two_groups} if row["groups"] == 2 else {}
    module, path = ZLit(schedule="step", **build, **row["net"]), tmp_path / "a.log"
    strategy = zo2(log_file=path, write_back_every=row["write_back_every"], **row["noise"])
    zfit(module, strategy, precision=row["precision"])
    log = {"path": path, "strategy": strategy, "entries": read_log(path.read_bytes(), "log")[:2]}[row["log"]]
    base = ZLit(**row["net"]).net
    assert not same_weights(module.net, base)
    torch.set_default_dtype(torch.float16)  # whatever it is
    try:
        assert replay(base, log) is base
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_weights(module.net, base)
    assert same_weights(module.net, replay(Head(ZLit(**row["net"]).net), log).base)


def test_the_base_may_be_rounded_already_as_the_run_rounded_it(tmp_path: Path) -> None:
    module = ZLit()
    zfit(module, zo2(log_file=tmp_path / "a.log"), precision="bf16-true")
    assert same_weights(module.net, replay(ZLit().net.bfloat16(), tmp_path / "a.log"))
    with pytest.raises(CheckpointError, match="other weights"):
        replay(ZLit().net.half(), tmp_path / "a.log")  # what fp16 has lost, bf16 cannot bring back


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("native", ["on", "off"])
def test_gaussian_noise_is_replayed_as_it_was_drawn(
    tmp_path: Path, native: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled or not, whatever `native="auto"` is here; where no kernels are, that of kernels cannot be drawn."""
    module, log = ZLit(), tmp_path / "a.log"
    zfit(module, zo2(log_file=log, distribution="gaussian", native=native))
    assert same_weights(module.net, replay(ZLit().net, log))

    def missing() -> Any:
        raise NotBuiltError("there is no C++ compiler")

    monkeypatch.setattr("lightning_offload.numerics.native.load", missing)
    if native == "off":
        assert same_weights(module.net, replay(ZLit().net, log))
    else:
        with pytest.raises(CheckpointError, match=r"written with compiled kernels.*there is no C\+\+ compiler"):
            replay(ZLit().net, log)


def test_replay_across_a_resume(tmp_path: Path) -> None:
    fit(sgd(), zo2(log_file=tmp_path / "a.log"), steps=3).save_checkpoint(tmp_path / "a.ckpt")
    done = sgd()
    fit(done, zo2(log_file=tmp_path / "a.log"), steps=6, ckpt_path=tmp_path / "a.ckpt")
    base = replay(sgd(), tmp_path / "a.log")
    assert all(torch.equal(one, two) for one, two in zip(done.parameters(), base.parameters(), strict=True))


def test_a_replay_by_hand(tmp_path: Path) -> None:
    """What `strategy.log` says is the whole algorithm."""
    module = ZLit()
    run = zfit(module, zo2())
    weights = [p.detach().clone() for p in ZLit().net.parameters()]
    for entry in run.strategy.log:
        for place, weight in enumerate(weights):
            z = noise(Draw(entry.seed, entry.step, place), 0, weight.numel(), "popcount", device="cpu").view_as(weight)
            weight -= (z * entry.coefficient + weight * entry.weight_decay[0]) * entry.lr[0]
    assert all(torch.equal(w, p) for w, p in zip(weights, module.net.parameters(), strict=True))


def test_what_replay_refuses(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    zfit(ZLit(), zo2(log_file=log), max_epochs=1)
    header, entries, size = read_log(log.read_bytes(), "log")
    other = ZLit().net
    other.norm.weight.data[0] = 2.0
    before = {name: value.clone() for name, value in other.state_dict().items()}
    found = hash_weights(other.parameters())
    with pytest.raises(CheckpointError, match=f"began with those of hash {header.base}, `base` has {found}"):
        replay(other, log)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(CheckpointError, match=r"has 19 parameters, `base` has 14"):
        replay(ZLit(depth=2).net, log)
    with pytest.raises(CheckpointError, match=r"its `net\.embed\.weight` is \(41, 19\), in `base` .* is \(41, 8\)"):
        replay(ZLit(width=8).net, log)
    with pytest.raises(CheckpointError, match="no log at"):
        replay(ZLit().net, tmp_path / "none.log")
    with pytest.raises(CheckpointError, match="`log` is a path"):
        replay(ZLit().net, 3)
    damaged, start = bytearray(log.read_bytes()), len(pack_header(header))
    damaged[start + 3 * (size - start) // len(entries) + 7] ^= 1
    log.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"entry 4: 3 entries before it, up to step 3, are good"):
        replay(ZLit().net, log)
