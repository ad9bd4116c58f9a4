"""Evaluation of rows that a hook has just written: what a plain Trainer finds, whoever kept copies of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from tests.lit import fit, trainer
from tests.meft import PLACEMENTS
from tests.meft_lit import MLit, MManual, MOwn, meft
from tests.test_zo2_evaluating import Found


def write(module: nn.Module, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".meft." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.1)


def writer(hook: str) -> L.Callback:
    """Other rows every time."""

    def go(self: L.Callback, run: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        write(pl_module, next((at for at in args if isinstance(at, int)), 9))

    return type("Writes", (L.Callback,), {hook: go})()


class All(MLit):
    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net.loss(batch)


class Manual(MManual):
    validation_step = All.validation_step


class Own(MOwn):
    validation_step = All.validation_step


IN_FIT: dict[str, Any] = {
    "strategy": lambda placement: (All(), meft(placement=placement)),
    "mixin": lambda placement: (Manual(), meft(placement=placement)),
    "plain strategy": lambda placement: (Own({"placement": placement}), "auto"),
}


@pytest.mark.parametrize("how", IN_FIT)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_start", "on_validation_batch_start"])
def test_validation_in_fit_is_of_the_rows_that_a_callback_wrote(how: str, placement: str, hook: str) -> None:
    found = []
    for make in (lambda _: (All(attached={}), "auto"), IN_FIT[how]):
        module, strategy = make(placement)
        seen = Found()
        fit(module, strategy, callbacks=[writer(hook), seen], val_check_interval=3, limit_val_batches=3, max_epochs=1)
        found.append(seen.found)
    assert len(found[0]) == 3 * 3 + 2
    assert found[0] == found[1]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("hook", ["batch_start", "batch_end"])
@pytest.mark.parametrize("how", ["strategy", "plain strategy"])
def test_evaluation_outside_of_fit_is_of_the_rows_that_a_callback_wrote(placement: str, hook: str, how: str) -> None:
    found = []
    for make in (lambda _: (All(attached={}), "auto"), IN_FIT[how]):
        seen = Found()
        module, strategy = make(placement)
        fit(module, strategy, max_steps=2)
        _, strategy = make(placement)
        callbacks = [*(writer(f"on_{stage}_{hook}") for stage in ("validation", "test", "predict")), seen]
        run = trainer(strategy, callbacks=callbacks, limit_val_batches=3)
        data = module.train_dataloader()
        run.validate(module, data, verbose=False)
        results = run.test(module, data, verbose=False)
        found.append((seen.found, results, torch.cat(run.predict(module, data)).tolist()))
    assert len(found[0][0]) == 3
    assert found[0] == found[1]


class WritesItself(All):
    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        write(self, int(batch.sum()))
        return batch


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_module_may_write_its_rows_before_a_batch(placement: str) -> None:
    found = []
    for module, strategy in ((WritesItself(attached={}), "auto"), (WritesItself(), meft(placement=placement))):
        run = fit(module, strategy, max_steps=3)
        found.append((module.losses, run.test(module, module.train_dataloader(), verbose=False)))
    assert found[0] == found[1]
