"""Evaluation of weights that a hook has just written: what a plain Trainer finds, whoever kept copies of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor, nn

from tests.lit import trainer
from tests.zo2 import ZLit, ZManual, ZOwn, zfit, zo2


def write(module: nn.Module, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.3)


def writer(hook: str) -> L.Callback:
    """Other weights every time."""

    def go(self: L.Callback, run: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        write(pl_module.net, next((at for at in args if isinstance(at, int)), 9))

    return type("Writes", (L.Callback,), {hook: go})()


class Found(L.Callback):
    """The loss of every batch of an evaluation in fit."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_batch_end(self, run: L.Trainer, pl_module: Any, outputs: Tensor, *_: Any) -> None:
        self.found.append(outputs.item())


class All(ZLit):
    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net.loss(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/loss", self.net.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)


class Manual(ZManual):
    validation_step = All.validation_step


class Own(ZOwn):
    validation_step = All.validation_step


IN_FIT: dict[str, Any] = {
    "strategy": lambda: (All(), zo2()),
    "rarely written back": lambda: (All(), zo2(write_back_every=3)),
    "mixin": lambda: (Manual(), zo2()),
    "plain strategy": lambda: (Own(), "auto"),
}


@pytest.mark.parametrize("how", IN_FIT)
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_start", "on_validation_batch_start"])
def test_validation_in_fit_is_of_the_weights_that_a_callback_wrote(how: str, hook: str) -> None:
    found = []
    for make in (lambda: (All(), "auto"), IN_FIT[how]):
        module, strategy = make()
        seen = Found()
        zfit(module, strategy, callbacks=[writer(hook), seen], val_check_interval=3, limit_val_batches=3, max_epochs=1)
        found.append(seen.found)
    assert len(found[0]) == 3 * 3 + 2
    assert found[0] == found[1]


class Ema(WeightAveraging):
    """Of the last weights and those before; keeps the loss that plain PyTorch finds with them."""

    def __init__(self) -> None:
        super().__init__(avg_fn=lambda averaged, current, count: averaged + (current - averaged) / (count + 1))
        self.expected: list[float] = []

    def on_validation_batch_start(self, run: L.Trainer, pl_module: Any, batch: Tensor, *_: Any, **__: Any) -> None:
        net = type(pl_module)().net
        net.load_state_dict({name: value.clone() for name, value in pl_module.net.state_dict().items()})
        with torch.no_grad():
            self.expected.append(net.eval().loss(batch).item())


@pytest.mark.parametrize("how", IN_FIT)
def test_validation_is_of_the_averaged_weights(how: str) -> None:
    module, strategy = IN_FIT[how]()
    average, seen = Ema(), Found()
    zfit(module, strategy, callbacks=[average, seen], limit_val_batches=2, max_epochs=3, num_sanity_val_steps=0)
    assert len(seen.found) == 6
    assert seen.found == average.expected


@pytest.mark.parametrize("hook", ["batch_start", "batch_end"])
def test_evaluation_outside_of_fit_is_of_the_weights_that_a_callback_wrote(hook: str) -> None:
    found = []
    for strategy in ("auto", zo2()):
        seen = Found()
        callbacks = [*(writer(f"on_{stage}_{hook}") for stage in ("validation", "test", "predict")), seen]
        module, run = All(depth=2), trainer(strategy, callbacks=callbacks, limit_val_batches=3)
        data = module.train_dataloader()
        run.validate(module, data, verbose=False)
        results = run.test(module, data, verbose=False)
        found.append((seen.found, results, torch.cat(run.predict(module, data)).tolist()))
    assert len(found[0][0]) == 3
    assert found[0] == found[1]


class WritesItself(All):
    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        write(self.net, int(batch.sum()))
        return batch


def test_a_module_may_write_its_weights_before_a_batch() -> None:
    found = []
    for strategy in ("auto", zo2()):
        module, run = WritesItself(depth=2), trainer(strategy)
        found.append(run.test(module, module.train_dataloader(), verbose=False))
    assert found[0] == found[1]
