"""`zo2_offload` under a Trainer: MeZO's trajectory, its boundaries, and what users hang on it."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SumMetric

from lightning_offload import OffloadPrecision, ZO2OffloadStrategy, replay
from tests.helpers import VOCAB, Net, mostly_slow, pairwise, row_id
from tests.lit import trainer
from tests.zo2 import ZO2, ZLit, oracle, same_weights, sgd, shuffled_zo2, zfit, zo2

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16, "bf16-mixed": torch.float32}


def batches(module: ZLit) -> list[Tensor]:
    return list(module.train_dataloader())


def nearest(precision: str, **settings: Any) -> ZO2OffloadStrategy:
    """The oracle rounds to nearest."""
    return zo2(precision_plugin=OffloadPrecision(precision, rounding="nearest"), **settings)


FACTORS: dict[str, list[Any]] = {
    "noise": ["philox", "mezo"],
    "precision": list(DTYPES),
    "accumulate": [1, 2],
    "schedule": [None, "step", "epoch"],
    "net": [{}, {"tied": True}, {"frozen": True}, {"functional_head": True}],
    "settings": [{}, {"write_back_every": 3}, {"slots": 4, "prefetch": 2}, {"resident": 1.0}],
}


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=1), ids=row_id)
def test_a_fit_is_mezo(row: dict[str, Any]) -> None:
    precision, accumulate, schedule = row["precision"], row["accumulate"], row["schedule"]
    module = ZLit(schedule=schedule, **row["net"])
    net = copy.deepcopy(module.net).to(DTYPES[precision])
    steps = [batches(module)[at : at + accumulate] for at in range(0, 9, accumulate)]
    per_epoch = len(steps)

    def lr(step: int) -> float:
        count = {"step": step, "epoch": step // per_epoch, None: 3}[schedule]
        return 1e-3 * min(1.0, (count + 1) / 4)

    run = zfit(module, nearest(precision, noise=row["noise"], **row["settings"]), accumulate_grad_batches=accumulate)
    expected = oracle(net, steps * 2, kind=row["noise"], lr=lr, autocast=precision == "bf16-mixed")
    got = [(entry.step, entry.coefficient) for entry in run.strategy.log]
    assert got == [(at + 1, g) for at, (_, g) in enumerate(expected)]
    assert len({g for _, g in got}) > 2
    for (name, wanted), (_, have) in zip(net.named_parameters(), module.net.named_parameters(), strict=True):
        assert torch.equal(have, wanted), name
    assert module.net.head.weight.dtype == DTYPES[precision]


def test_a_wire_of_16_bits_under_autocast_is_half_the_bytes_and_nearly_the_same_losses() -> None:
    """The paper's AMP mode.

    Autocast rounds every weight and activation to 8 significant bits, by up to 2**-8 of itself; a wire of 11 bits moves
    weights by an eighth of that at first, and by up to 2**-10 in an update. So a loss is no further from that of an
    fp32 wire than autocast's rounding of one number of its size. Losses of batches are far further apart.
    """
    full, half = ZLit(), ZLit()
    moved = []
    for module, wire in ((full, {}), (half, {"wire": "float16"})):
        run = zfit(module, zo2(precision_plugin=OffloadPrecision("bf16-mixed", **wire)))
        ledger = run.strategy.engine.lanes.ledger
        moved.append((ledger.moved("h2d", "weights"), ledger.moved("d2h", "weights back")))
        assert len(run.strategy.log) == 18
    assert moved[0] == (2 * moved[1][0], 2 * moved[1][1])
    assert min(moved[1]) > 0
    assert full.losses != half.losses
    assert half.losses == pytest.approx(full.losses, rel=2**-8)
    assert max(full.losses) > (1 + 16 * 2**-8) * min(full.losses)


# Orders and boundaries


@pytest.mark.parametrize(
    ("precision", "net"),
    mostly_slow(
        itertools.product(["32-true", "bf16-true", "16-true"], [{}, {"tied": True}, {"frozen": True}]),
        lambda at, row: at in (0, 4, 8),
    ),
    ids=str,
)
def test_in_any_order_and_with_boundaries_everywhere_the_bits_are_the_same(
    tmp_path: Path, precision: Any, net: dict[str, Any]
) -> None:
    plain, shuffled, bounded = ZLit(**net), ZLit(**net), ZLit(**net)
    zfit(plain, zo2(), precision=precision)
    zfit(shuffled, shuffled_zo2(slots=4, prefetch=2), precision=precision)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    zfit(
        bounded,
        shuffled_zo2(write_back_every=3),
        precision=precision,
        callbacks=[saving],
        enable_checkpointing=True,
        limit_val_batches=2,
        val_check_interval=2,
    )
    assert plain.losses == shuffled.losses == bounded.losses
    assert same_weights(plain, shuffled)
    assert same_weights(plain, bounded)


class Validates(L.Callback):
    """What a validation in the middle of a fit finds."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.found.append(float(trainer.callback_metrics["val/loss"]))


@pytest.mark.parametrize("noise", ["philox", "mezo"])
def test_validation_is_of_weights_that_are_never_a_step_behind(noise: Any) -> None:
    module, seen = ZLit(), Validates()
    net, parts = copy.deepcopy(module.net), [[batch] for batch in batches(module)]
    zfit(
        module,
        nearest("32-true", noise=noise),
        callbacks=[seen],
        max_epochs=1,
        limit_val_batches=1,
        val_check_interval=3,
    )
    expected = []
    for steps in (3, 6, 9):
        after = copy.deepcopy(net)
        oracle(after, parts[:steps], kind=noise)
        with torch.no_grad():
            expected.append(after.eval().loss(parts[0][0]).item())
    assert seen.found == expected


def test_parts_of_a_batch_are_the_same_as_the_batch_but_for_rounding() -> None:
    whole, parted = ZLit(), ZLit()
    run = zfit(whole, zo2()).strategy.log
    other = zfit(parted, zo2(micro_batches=2)).strategy.log
    assert len(parted.losses) - 1 == 2 * (len(whole.losses) - 1)  # but for the rehearsal
    for one, two in zip(run, other, strict=True):
        assert one.coefficient == pytest.approx(two.coefficient, abs=2e-3)


def shifted(net: Net, ids: Tensor, labels: Tensor) -> Tensor:
    """As causal models have it."""
    return nn.functional.cross_entropy(net(ids)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


class Tokens(ZLit):
    """Labels of unequal number."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return shifted(self.net, batch["input_ids"], batch["labels"])

    def train_dataloader(self) -> Any:
        ids = torch.randint(0, VOCAB, (4, 6), generator=torch.Generator().manual_seed(5))
        labels = ids.clone()
        labels[0, 2:] = labels[1, 2:] = -100
        return DataLoader([{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)], batch_size=2)


def test_losses_of_a_window_count_by_their_tokens() -> None:
    """Two micro-batches of 2 and 10 labels give the loss of the batch that they make together."""
    module = Tokens()
    net, rows = copy.deepcopy(module.net), [row for batch in module.train_dataloader() for row in [batch]]
    run = zfit(module, nearest("32-true"), accumulate_grad_batches=2, max_epochs=1)
    ids, labels = (torch.cat([row[key] for row in rows]) for key in ("input_ids", "labels"))
    assert run.global_step == 1
    loss = shifted(net, ids, labels).item()
    assert run.strategy.engine.report.loss == pytest.approx(loss, abs=1e-3)
    mean = sum(shifted(net, row["input_ids"], row["labels"]).item() for row in rows) / 2
    assert abs(mean - loss) > 1e-2


# What forwards leave behind


class Metered(ZLit):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.count = MeanMetric(), SumMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean(loss)
        self.count(len(batch))
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("count", self.count, on_step=False, on_epoch=True)
        return loss


def test_logs_and_metrics_are_those_of_the_first_forward() -> None:
    module = Metered()
    run = zfit(module, zo2(directions=2), max_epochs=1)
    losses = module.losses[1:]  # but for the rehearsal
    assert len(losses) == 4 * 9
    assert run.callback_metrics["count"] == 18
    assert run.callback_metrics["mean"] == pytest.approx(sum(losses[::4]) / 9, rel=1e-6)
    assert run.callback_metrics["train/loss"] == pytest.approx(losses[-4])
    assert run.strategy.engine.report.loss_plus == pytest.approx((losses[-4] + losses[-2]) / 2)


class Modes(ZLit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.net.training is self.trains
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("train_mode", [False, True])
def test_dropout_is_off_unless_asked_for(train_mode: bool) -> None:
    module = Modes(dropout=0.5)
    module.trains = train_mode
    zfit(module, zo2(train_mode=train_mode, eps=1e-9), max_epochs=1)
    assert module.net.training
    assert module.losses[1::2] == pytest.approx(module.losses[2::2], abs=1e-5)  # one mask in both forwards
    other = Modes(dropout=0.0)
    other.trains = train_mode
    zfit(other, zo2(train_mode=train_mode, eps=1e-9), max_epochs=1)
    assert (module.losses[0] == other.losses[0]) is not train_mode


# Callbacks


class ReadsWeights(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.losses.append(float(pl_module.net.blocks[0].up.weight.detach().double().sum()))


class WritesWeights(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.net.parameters():
                parameter.mul_(0.9)


class Ema(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(avg_fn=lambda averaged, current, count: averaged + (current - averaged) / (count + 1))


CALLBACKS: dict[str, Any] = {
    "reads": ReadsWeights,
    "writes": WritesWeights,
    "ema": Ema,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-4, swa_epoch_start=1, annealing_epochs=1),
    "stops": lambda: EarlyStopping("val/loss", patience=1, mode="max"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_see_and_write_the_same_in_any_order(name: str) -> None:
    modules = ZLit(), ZLit(), ZLit()
    for module, strategy in zip(modules, (zo2(), shuffled_zo2(), zo2(write_back_every=3)), strict=True):
        zfit(module, strategy, callbacks=[CALLBACKS[name]()], max_epochs=3, limit_val_batches=1)
    assert modules[0].losses == modules[1].losses == modules[2].losses
    assert same_weights(modules[0], modules[1])
    assert same_weights(modules[0], modules[2])


def test_what_a_callback_writes_is_trained_on() -> None:
    written, plain = ZLit(), ZLit()
    zfit(written, zo2(), callbacks=[WritesWeights()], max_epochs=1)
    zfit(plain, zo2(), max_epochs=1)
    for (name, one), other in zip(written.net.named_parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(one, other * 0.9), name


class LrLit(ZLit):
    lr = 1e-3

    def configure_optimizers(self) -> Any:
        return sgd(self, lr=self.lr)


def test_the_learning_rate_finder_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    class Looks(LearningRateFinder):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            before = copy.deepcopy(pl_module.state_dict())
            super().on_fit_start(trainer, pl_module)
            pl_module.kept = all(torch.equal(v, before[k]) for k, v in pl_module.state_dict().items() if k != "seen")

    module, found = LrLit(samples=40), Looks(num_training_steps=15, min_lr=1e-6, max_lr=1e-1, update_attr=False)
    strategy = zo2(log_file=tmp_path / "a.log")
    run = zfit(module, strategy, callbacks=[found], max_epochs=1, default_root_dir=tmp_path)
    assert module.kept
    assert same_weights(replay(LrLit().net, tmp_path / "a.log"), module.net)  # no step of the trial is in the log
    assert len(found.optimal_lr.results["lr"]) >= 14
    assert run.global_step == 20
    assert [entry.step for entry in run.strategy.log] == list(range(1, 21))
    assert {entry.lr for entry in run.strategy.log} == {(1e-3,)}


class SizedLit(ZLit):
    batch_size = 2

    def train_dataloader(self) -> Any:
        tokens = torch.randint(0, VOCAB, (self.samples, 6), generator=torch.Generator().manual_seed(5))
        return DataLoader(tokens, batch_size=self.batch_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if len(batch) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return super().training_step(batch, batch_idx)


def test_the_batch_size_finder_finds_what_fits(tmp_path: Path) -> None:
    module = SizedLit()
    run = zfit(module, zo2(), callbacks=[BatchSizeFinder(steps_per_trial=2)], max_epochs=1, default_root_dir=tmp_path)
    assert module.batch_size == 4
    other = SizedLit()
    other.batch_size = 4
    zfit(other, zo2(), max_epochs=1)
    assert run.global_step == 5
    assert same_weights(module.net, other.net)


# Life cycle


def test_every_entry_point_in_any_order_on_one_strategy() -> None:
    one, two = ZLit(), ZLit()
    run = trainer(zo2(), limit_val_batches=2, max_epochs=1)
    results = [run.validate(one, verbose=False)]
    assert results == [trainer(limit_val_batches=2).validate(ZLit(), verbose=False)]
    run.fit(one)
    results.append(run.validate(one, verbose=False))
    run.fit_loop.max_epochs = 2
    run.fit(one)
    results.append(run.validate(one, verbose=False))
    for expected in results[1:]:
        other = trainer(zo2(), limit_val_batches=2, max_epochs=1)
        other.fit(two)
        assert other.validate(two, verbose=False) == expected
    assert same_weights(one, two)
    assert all(not part._forward_pre_hooks and not part._forward_hooks for part in one.modules())


@pytest.mark.parametrize("precision", list(DTYPES))
def test_evaluation_outside_of_fit_is_that_of_a_plain_trainer(precision: Any) -> None:
    class All(ZLit):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("test/loss", self.net.loss(batch))

        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch)

    found = []
    for strategy in ("auto", zo2(), shuffled_zo2()):
        module, run = All(), trainer(strategy, precision=precision, limit_val_batches=2)
        data = module.train_dataloader()
        results = [run.validate(module, verbose=False), run.test(module, data, verbose=False)]
        found.append((results, run.predict(module, data)))
        if strategy != "auto":
            assert run.strategy.engine is None
    for results, scores in found[1:]:
        assert results == found[0][0]
        assert all(torch.equal(one, two) for one, two in zip(scores, found[0][1], strict=True))


class Breaks(ZLit):
    at = 3
    forwards = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.forwards += 1
        if self.forwards == self.at:
            raise KeyError("mine")
        return loss


@pytest.mark.parametrize("at", [8, 9], ids=["first forward", "second forward"])
@pytest.mark.parametrize("make", [zo2, shuffled_zo2])
def test_after_an_exception_the_module_is_whole_and_fits_again(make: Any, at: int) -> None:
    broken, whole = Breaks(), ZLit()
    broken.at = at
    run = trainer(make())
    with pytest.raises(KeyError, match="mine"):
        run.fit(broken)
    zfit(whole, zo2(), max_steps=3)
    assert same_weights(broken.net, whole.net)
    assert broken.net.training
    run.fit(broken)
    assert all(not part._forward_pre_hooks and not part._forward_hooks for part in broken.modules())
    assert [entry.step for entry in run.strategy.log] == list(range(1, 19))


def test_nan_losses_are_skipped_and_counted() -> None:
    class NanLit(ZLit):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.global_step in (2, 3, 7) else loss

    module = NanLit(schedule="step")
    run = zfit(module, zo2())
    assert run.global_step == 18
    assert run.strategy.engine.report.skipped_total == 3
    assert [entry.step for entry in run.strategy.log] == [1, 2, 5, 6, 7, *range(9, 19)]
    assert all(p.isfinite().all() for p in module.parameters())


def test_clipping_bounds_the_projected_gradient() -> None:
    free, held = zfit(ZLit(), zo2(), max_epochs=1), zfit(ZLit(), zo2(), max_epochs=1, gradient_clip_val=0.3)
    one, two = free.strategy.log[0].coefficient, held.strategy.log[0].coefficient
    assert abs(one) > 0.3
    assert two == pytest.approx(0.3 if one > 0 else -0.3)
    assert max(abs(entry.coefficient) for entry in held.strategy.log) <= 0.3


def test_strategies_and_modules_are_pickled_without_what_runs() -> None:
    module = ZLit()
    run = zfit(module, zo2(), max_epochs=1)
    strategy = pickle.loads(pickle.dumps(ZO2OffloadStrategy(**ZO2)))
    assert strategy.settings == zo2().settings
    assert run.strategy.__getstate__()["engine"] is None
    state = pickle.loads(pickle.dumps(module.net.state_dict()))
    assert all(torch.equal(value, state[name]) for name, value in module.net.state_dict().items())
    assert isinstance(copy.deepcopy(module.net), Net)


def test_several_devices_are_refused() -> None:
    with pytest.raises(Exception, match="one device"):
        zfit(ZLit(), zo2(), devices=2)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_hooks_are_handed_what_a_step_returns_beside_the_loss(micro_batches: int) -> None:
    class Returns(ZLit):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "own": loss + 1, "tokens": batch}

    class Looks(L.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_end(
            self, trainer: L.Trainer, module: Any, outputs: Any, batch: Tensor, batch_idx: int
        ) -> None:
            self.seen.append((outputs, batch))

    looks, module, plain = Looks(), Returns(), ZLit()
    zfit(module, zo2(micro_batches=micro_batches), callbacks=[looks], max_steps=3)
    zfit(plain, zo2(micro_batches=micro_batches), max_steps=3)
    assert same_weights(module, plain)
    for outputs, batch in looks.seen:
        assert outputs.keys() == {"loss", "own", "tokens"}
        assert torch.equal(outputs["tokens"], batch[: len(batch) // micro_batches])
        if micro_batches == 1:
            assert torch.equal(outputs["own"], outputs["loss"] + 1)
