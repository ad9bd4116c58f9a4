"""Entry points of the Trainer, in what order, for how long."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from tests.features.arm import Arm, seeded
from tests.features.registry import feature


@feature("`fit`, `validate`, `test`, `predict` in any order on one Trainer")
def any_order(strategy: Arm) -> None:
    module, run = strategy.lit(), strategy.trainer(limit_val_batches=2, max_epochs=1)
    data = module.train_dataloader()

    def look(at: L.Trainer) -> list[Any]:
        scores: Any = at.predict(module, data)
        return [at.validate(module, verbose=False), at.test(module, data, verbose=False), torch.cat(scores).tolist()]

    plain = strategy.trainer("auto", limit_val_batches=2)
    before = look(run)
    assert before == look(plain)
    run.fit(module)
    after = look(run)
    assert after == look(plain)
    assert after != before
    run.fit_loop.max_epochs = 2
    run.fit(module)
    assert look(run) == look(plain) != after


@feature("several fits on one strategy, and one strategy over several Trainers")
def reused(strategy: Arm) -> None:
    made, one, other = strategy(), strategy.lit(), strategy.lit()
    run = strategy.fit(one, made)
    seeded()
    run.fit_loop.max_epochs, run.fit_loop.epoch_progress.current.processed = 2, 0
    again = strategy.lit()
    strategy.fit(again, made, accelerator="auto")
    strategy.fit(other)
    assert strategy.same(one, again)
    assert strategy.same(again, other)


@feature("`fast_dev_run`")
def fast_dev_run(strategy: Arm) -> None:
    module = strategy.lit()
    assert strategy.fit(module, fast_dev_run=2).global_step == 2
    assert strategy.moved(module)


@feature("`overfit_batches`")
def overfit_batches(strategy: Arm) -> None:
    one, other = strategy.lit(), strategy.lit(samples=4)
    assert strategy.fit(one, overfit_batches=2).global_step == 4
    strategy.fit(other)
    assert strategy.same(one, other)


@feature("`limit_train_batches`, `limit_val_batches`, `limit_test_batches`, `limit_predict_batches`")
def limits(strategy: Arm) -> None:
    module = strategy.lit()
    run = strategy.fit(
        module, limit_train_batches=3, limit_val_batches=2, limit_test_batches=0.4, limit_predict_batches=1
    )
    data = module.train_dataloader()
    assert run.global_step == 6
    run.validate(module, verbose=False)
    assert run.num_val_batches == [2]
    run.test(module, data, verbose=False)
    assert run.num_test_batches == [2]
    assert len(run.predict(module, data)) == 1


@feature("`max_steps`, `min_epochs`, `max_epochs`")
def lengths(strategy: Arm) -> None:
    assert strategy.fit(strategy.lit(), max_steps=7, max_epochs=-1).global_step == 7
    assert strategy.fit(strategy.lit(), min_epochs=1, max_epochs=3).global_step == 15


@feature("`max_time`")
def max_time(strategy: Arm) -> None:
    run = strategy.fit(strategy.lit(), max_time={"seconds": 0})
    assert run.global_step < 10
    assert run.state.finished


@feature("`Timer`")
def timer(strategy: Arm) -> None:
    timed, short = Timer(), Timer(timedelta(seconds=0), interval="epoch")
    assert strategy.fit(strategy.lit(), callbacks=[timed]).global_step == 10
    assert timed.time_elapsed("train") > 0
    assert strategy.fit(strategy.lit(), callbacks=[short], max_epochs=9).global_step < 45


class CountsValidations:
    """Steps at which a validation began."""

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.at = [*getattr(self, "at", []), self.trainer.global_step]


@feature("`val_check_interval`, `check_val_every_n_epoch`, `num_sanity_val_steps`")
def validations(strategy: Arm) -> None:
    module = strategy.lit(CountsValidations)
    strategy.fit(module, val_check_interval=2, limit_val_batches=1, num_sanity_val_steps=1)
    assert module.at == [2, 4, 7, 9]
    module = strategy.lit(CountsValidations)
    strategy.fit(module, check_val_every_n_epoch=2, limit_val_batches=1, max_epochs=4)
    assert module.at == [10, 20]
    assert strategy.same(module, strategy.trained(max_epochs=4))  # looking changes nothing


@feature("`barebones`")
def barebones(strategy: Arm) -> None:
    module, none = strategy.lit(), {"enable_checkpointing": None, "enable_model_summary": None}
    strategy.fit(module, barebones=True, logger=None, enable_progress_bar=None, limit_val_batches=None, **none)
    assert strategy.same(module, strategy.trained())


@feature("`deterministic`")
def deterministic(strategy: Arm) -> None:
    class Looks(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            self.was = torch.are_deterministic_algorithms_enabled()

    module, looks = strategy.lit(), Looks()
    try:
        strategy.fit(module, deterministic=True, callbacks=[looks])
    finally:
        torch.use_deterministic_algorithms(False)
    assert looks.was
    assert strategy.same(module, strategy.trained())


class TurnsNan:
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        return (loss - loss.detach()).sqrt() * 0 if self.trainer.global_step == 3 else loss  # 0 forward, NaN backward


class LosesNumbers:
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        return loss * float("nan") if self.trainer.global_step == 3 else loss


@feature("`detect_anomaly`: the first NaN is an error")
def detect_anomaly(strategy: Arm) -> None:
    whole = strategy.trained(max_steps=3)
    module = strategy.lit(LosesNumbers if strategy.name == "zo2_offload" else TurnsNan)
    with pytest.raises(RuntimeError, match=r"nan|not finite"):
        strategy.fit(module, detect_anomaly=True)
    assert strategy.same(module, whole)
    assert strategy.moved(module)


@feature("several dataloaders, `CombinedLoader`, `reload_dataloaders_every_n_epochs`")
def dataloaders(strategy: Arm) -> None:
    class Pairs:
        loaded = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net.loss(batch["one"]) + self.net.loss(batch["two"])

        def train_dataloader(self) -> Any:
            self.loaded += 1
            parts = {"one": super().train_dataloader(), "two": super().train_dataloader()}
            return CombinedLoader(parts, "max_size_cycle")

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val/loss", self.net.loss(batch))

        def val_dataloader(self) -> Any:
            return [DataLoader(torch.zeros(4, 6, dtype=torch.int64), batch_size=2) for _ in range(2)]

    module = strategy.lit(Pairs)
    run = strategy.fit(module, limit_val_batches=2, reload_dataloaders_every_n_epochs=1)
    assert run.global_step == 10
    assert module.loaded == 2
    assert {"val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1"} <= run.callback_metrics.keys()
    assert strategy.moved(module)


@feature("`LightningDataModule`")
def datamodule(strategy: Arm) -> None:
    module, whole = strategy.lit(), strategy.trained()

    class Data(L.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.stage = stage

        def train_dataloader(self) -> Any:
            return module.train_dataloader()

        val_dataloader = train_dataloader

    data, run = Data(), strategy.trainer()
    seeded()
    run.fit(module, datamodule=data)
    assert data.stage == "fit"
    assert strategy.same(module, whole)
    assert run.validate(module, datamodule=data, verbose=False) is not None
