"""What ends a run early, and what can be done after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from tests.features.arm import Arm, ByIndex, weights
from tests.features.registry import feature

AT = 3
"""The steps that are whole."""


class Interrupted:
    """Raises in the middle of the fourth step."""

    error: type[BaseException] | None = KeyError

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        if self.error is not None and self.trainer.global_step == AT:
            raise self.error("mine")
        return loss


class InterruptedInBackward(Interrupted):
    """After some gradients have arrived; zo2, which has none, in the second forward."""

    calls = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.error is None or self.trainer.global_step != AT:
            return super(Interrupted, self).training_step(batch, batch_idx)  # type: ignore[misc]
        self.calls += 1
        handle = self.net.blocks[1].register_forward_hook(lambda _, __, out: self._later(out))
        try:
            return super(Interrupted, self).training_step(batch, batch_idx)  # type: ignore[misc]
        finally:
            handle.remove()

    def _later(self, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(self._fail)
        elif self.calls == 2:
            self._fail(out)

    def _fail(self, _: Tensor) -> None:
        assert self.error is not None
        raise self.error("mine")


class InterruptedInAHook(Interrupted):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super(Interrupted, self).training_step(batch, batch_idx)  # type: ignore[misc]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.error is not None and self.trainer.global_step == AT:
            raise self.error("mine")


@contextmanager
def keyboard_back() -> Iterator[None]:
    """Lightning ignores Ctrl+C from the first one on."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def hooks(module: nn.Module) -> int:
    """How many hang on it; adapters keep theirs."""
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules())


def goes_on(strategy: Arm, module: Any, run: L.Trainer, **options: Any) -> None:
    """Its weights are those of the last whole step, can be saved, and a new fit trains on, on the same strategy too."""
    whole = strategy.trained(ByIndex, **options)
    assert strategy.same(module, strategy.trained(ByIndex, max_steps=AT, **options))
    assert hooks(module) == hooks(whole)
    run.save_checkpoint(strategy.folder / "after.ckpt")
    resumed = strategy.lit(ByIndex)
    strategy.fit(resumed, ckpt_path=strategy.folder / "after.ckpt", **options)
    assert strategy.same(resumed, whole)
    module.error, before = None, weights(module)
    run.fit(module)
    assert run.state.finished
    assert any(not torch.equal(value, before[name]) for name, value in weights(module).items())
    again = strategy.lit(ByIndex)
    strategy.fit(again, run.strategy, accelerator="auto", **options)
    assert strategy.same(again, whole)


@feature("KeyboardInterrupt: whole weights, a checkpoint and a new fit after it")
def keyboard(strategy: Arm) -> None:
    module, run = strategy.lit(Interrupted, ByIndex), strategy.trainer()
    module.error = KeyboardInterrupt
    with keyboard_back(), pytest.raises(SystemExit):
        run.fit(module)
    assert run.interrupted
    goes_on(strategy, module, run)


@feature("SIGTERM: the running step is finished, then the same")
def sigterm(strategy: Arm) -> None:
    class Terminated:
        error: type[BaseException] | None = SIGTERMException

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.error is not None and self.trainer.global_step == AT - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    module, run = strategy.lit(Terminated, ByIndex), strategy.trainer()
    with pytest.raises(SIGTERMException):
        run.fit(module)
    goes_on(strategy, module, run)


@feature("an exception in `training_step`, and a new fit after it")
def in_step(strategy: Arm) -> None:
    module, run = strategy.lit(Interrupted, ByIndex), strategy.trainer()
    with pytest.raises(KeyError, match="mine"):
        run.fit(module)
    goes_on(strategy, module, run)


@feature("an exception inside backward (of zo2: in the second forward), and a new fit after it")
def in_backward(strategy: Arm) -> None:
    clip = {"gradient_clip_val": 1.0}  # else the layers of lsp do not wait for each other
    module, run = strategy.lit(InterruptedInBackward, ByIndex), strategy.trainer(**clip)
    with pytest.raises(KeyError, match="mine"):
        run.fit(module)
    goes_on(strategy, module, run, **clip)


@feature("an exception in a hook, and a new fit after it")
def in_hook(strategy: Arm) -> None:
    module, run = strategy.lit(InterruptedInAHook, ByIndex), strategy.trainer()
    with pytest.raises(KeyError, match="mine"):
        run.fit(module)
    goes_on(strategy, module, run)


@feature("an exception in `validation_step` or `configure_optimizers`, and a new run after it")
def elsewhere(strategy: Arm) -> None:
    class Evaluates(Interrupted):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super(Interrupted, self).training_step(batch, batch_idx)  # type: ignore[misc]

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)  # type: ignore[misc]
            if self.error is not None and batch_idx:
                raise self.error("mine")

        def configure_optimizers(self) -> Any:
            if self.error is not None:
                raise self.error("mine")
            return super().configure_optimizers()  # type: ignore[misc]

    module, run = strategy.lit(Evaluates), strategy.trainer(limit_val_batches=2)
    for begin in (run.validate, run.fit):
        with pytest.raises(KeyError, match="mine"):
            begin(module)
    module.error = None
    (found,) = run.validate(module, verbose=False)
    assert found == strategy.trainer("auto", limit_val_batches=2).validate(module, verbose=False)[0]
    again = strategy.lit(Evaluates)
    again.error = None
    strategy.fit(again, run.strategy, accelerator="auto")
    assert strategy.same(again, strategy.trained())
