"""`ZO2Mixin` under a plain strategy, and mixins under `zo2_offload`: bit for bit automatic optimization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_offload import OffloadStats, OffloadSummary
from tests.helpers import VOCAB, every, pairwise, row_id
from tests.lit import LSPManual, lsp, trainer
from tests.test_zo2_trainer import CALLBACKS
from tests.zo2 import ZLit, ZManual, ZOwn, same_weights, zfit, zo2

FACTORS: dict[str, list[Any]] = {
    "accumulate_grad_batches": [1, 2, 4],
    "gradient_clip_val": [None, 0.3],
    "settings": [{}, {"noise": "mezo"}, {"directions": 2}, {"micro_batches": 2}, {"write_back_every": 3}],
    "precision": ["32-true", "bf16-mixed", "bf16-true", "16-true"],
    "schedule": ["step", "epoch"],
    "net": [{}, {"frozen": True}, {"tied": True}],
}


@pytest.mark.parametrize("row", every(2, pairwise(FACTORS, seed=2)), ids=row_id)
def test_strategy_and_mixins_have_the_same_bits(row: dict[str, Any]) -> None:
    settings, precision, build = row["settings"], row["precision"], {"schedule": row["schedule"], **row["net"]}
    step = {"accumulate_grad_batches": row["accumulate_grad_batches"], "gradient_clip_val": row["gradient_clip_val"]}
    automatic, manual = ZLit(**build), ZManual(**build)
    manual.offload = step
    own, plain = (ZOwn({**settings, **step}, **build) for _ in range(2))
    if precision.endswith("true"):  # a plain strategy has rounded them already, buffers too
        plain.net.to({"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[precision.split("-")[0]])
    done = zfit(automatic, zo2(**settings), precision=precision, **step)
    assert done.global_step > 3
    for module, strategy in ((manual, zo2(**settings)), (own, "zo2_offload"), (plain, "auto")):
        assert zfit(module, strategy, precision=precision).global_step == done.global_step
        assert automatic.losses == module.losses
        assert same_weights(automatic.net, module.net)


class OwnStep(ZOwn):
    """Writes its own `training_step` around `offload_step`."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.offload_step(lambda: self.one(batch))


@pytest.mark.parametrize("strategy", ["zo2_offload", "auto"])
def test_an_own_training_step(strategy: str) -> None:
    ours, own = ZOwn(), OwnStep()
    zfit(ours, strategy)
    zfit(own, strategy)
    assert ours.losses == own.losses
    assert same_weights(ours, own)


def test_it_is_whole_after_fit_and_fits_again() -> None:
    modules = ZOwn(), ZOwn()
    for module, kind in zip(modules, (zo2(), "auto"), strict=True):
        run = trainer(kind, max_epochs=1, limit_val_batches=2)
        run.fit(module)
        run.validate(module, verbose=False)
        run.fit_loop.max_epochs = 2
        run.fit(module)
        assert "step" not in vars(run.optimizers[0])
        assert all(not part._forward_pre_hooks and not part._forward_hooks for part in module.modules())
    assert modules[0].losses == modules[1].losses
    assert same_weights(*modules)


class Breaks(ZOwn):
    at = 7

    def one(self, batch: Tensor) -> Tensor:
        loss = super().one(batch)
        if len(self.losses) == self.at:
            raise KeyError("mine")
        return loss


@pytest.mark.parametrize("at", [7, 8])
def test_after_an_exception_the_module_is_whole_and_fits_again(at: int) -> None:
    modules = Breaks(), Breaks()
    for module, strategy in zip(modules, ("zo2_offload", "auto"), strict=True):
        run, module.at = trainer(strategy), at
        with pytest.raises(KeyError, match="mine"):
            run.fit(module)
        assert all(not part._forward_pre_hooks for part in module.modules())
        assert "step" not in vars(run.optimizers[0])
        run.fit(module)
    assert modules[0].losses == modules[1].losses
    assert same_weights(*modules)


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_see_and_write_what_they_do_under_the_strategy(name: str) -> None:
    modules = ZOwn(), ZOwn()
    for module, strategy in zip(modules, ("zo2_offload", "auto"), strict=True):
        zfit(module, strategy, callbacks=[CALLBACKS[name]()], max_epochs=3, limit_val_batches=1)
    assert modules[0].losses == modules[1].losses
    assert same_weights(*modules)


class Numbered(ZOwn):
    """Batches follow from their number: Lightning does not restore the loader's place."""

    def loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return self.one(torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(number)))


@pytest.mark.parametrize("noise", ["philox", "mezo"])
@pytest.mark.parametrize(("first", "second"), [("zo2_offload", "auto"), ("auto", "zo2_offload"), ("auto", "auto")])
def test_checkpoints_of_one_continue_in_the_other(tmp_path: Path, first: str, second: str, noise: str) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == 9:  # in the middle of a window of the second epoch
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    settings = {"accumulate_grad_batches": 2, "noise": noise, "seed": 4 if noise == "philox" else None}
    whole, rest = Numbered(settings, schedule="step"), Numbered({**settings, "seed": None}, schedule="step")
    zfit(whole, first, callbacks=[Saves()])
    zfit(rest, second, ckpt_path=tmp_path / "a.ckpt")
    losses = rest.losses[1:]  # but for the rehearsal
    assert losses == whole.losses[-len(losses) :]
    assert len(losses) == 2 * 8
    assert same_weights(whole.net, rest.net)


def test_what_the_stats_and_the_summary_say() -> None:
    class Keeps(L.pytorch.loggers.logger.DummyLogger):
        rows: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append(metrics)

    for strategy in ("zo2_offload", "auto"):
        Keeps.rows = []
        run = zfit(ZOwn(), strategy, callbacks=[OffloadStats(2), OffloadSummary()], max_epochs=1, logger=Keeps())
        rows = [row for row in Keeps.rows if "offload/loss" in row]
        assert len(rows) == 4
        assert rows[0]["offload/samples/s"] > 0
        assert rows[-1]["offload/projected_gradient"] != 0
        assert rows[-1]["offload/skipped_steps"] == 0
        assert 3.0 < rows[-1]["offload/loss"] < 5.0
        net = ZLit().net
        streamed = 4 * sum(p.numel() for p in net.blocks.parameters())
        assert rows[-1]["offload/streamed_gib"] == streamed / 2**30
        assert (
            rows[-1]["offload/resident_gib"] == 4 * sum(p.numel() for p in net.parameters()) / 2**30 - streamed / 2**30
        )
        assert "grad_norm" not in str(rows)
        assert run.callback_metrics["loss +-"] == pytest.approx(rows[-1]["offload/loss"])


def test_the_summary_of_zo2(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_offload import callbacks

    said: list[str] = []
    monkeypatch.setattr(callbacks, "rank_zero_info", said.append)
    zfit(ZLit(frozen=True), zo2(directions=2), callbacks=[OffloadSummary()], max_epochs=1)
    (table,) = said
    lines = table.splitlines()
    assert lines[0].split() == ["unit", "parameters", "dtype", "weights", "are", "host", "MiB", "device", "MiB"]
    assert any("net.embed" in line and "resident, 779 frozen" in line for line in lines)
    assert any("net.blocks.0" in line and "streamed" in line for line in lines)
    assert any("net.blocks.1" in line and "streamed, 1,520 frozen" in line for line in lines)
    assert lines[-1].startswith("method zo2, philox noise, 4 forwards per micro-batch; host 0.000 GiB")


# What is refused


def test_module_and_strategy_must_agree() -> None:
    with pytest.raises(MisconfigurationException, match=r"trains by method `zo2`, but .* `lsp_offload`"):
        zfit(ZOwn(), lsp())
    with pytest.raises(MisconfigurationException, match=r"trains by method `lsp`, but .* `zo2_offload`"):
        zfit(LSPManual(), zo2())
    with pytest.raises(ValueError, match=r"says eps=0\.01, `ZO2OffloadStrategy` was given eps=0\.002"):
        zfit(ZOwn({"eps": 1e-2}), zo2(eps=2e-3))
    with pytest.raises(ValueError, match=r"unknown setting .*; known: accumulate_grad_batches.*distribution.*eps"):
        zfit(ZOwn({"epz": 1e-2}), "auto")
    with pytest.raises(ValueError, match="`directions`"):
        zfit(ZOwn({"directions": 0}), "auto")


def test_manual_optimization_without_a_mixin_is_refused() -> None:
    class Manual(ZLit):
        automatic_optimization = False

    with pytest.raises(MisconfigurationException, match=r"steps by itself .* Derive it from `ZO2Mixin`"):
        zfit(Manual(), zo2())


def test_callbacks_that_leave_out_the_mixins_are_refused() -> None:
    class Forgets(ZOwn):
        def configure_callbacks(self) -> Any:
            return []

    with pytest.raises(MisconfigurationException, match="left out what its mixin steps with"):
        zfit(Forgets(), "auto")


def test_several_processes_are_refused() -> None:
    from lightning.pytorch.strategies import DDPStrategy

    with pytest.raises(MisconfigurationException, match="trains by a method of its own, on one CUDA GPU or the CPU"):
        zfit(ZOwn(), DDPStrategy(), devices=1)
