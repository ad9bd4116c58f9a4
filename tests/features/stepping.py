"""What decides a step: windows, clipping, schedules, hooks around it, what `training_step` returns."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from lightning_offload import OffloadMixin
from tests.features.arm import Arm
from tests.features.registry import feature


def stepped(strategy: Arm, **step: Any) -> Any:
    """After steps as the Trainer's flags say: the bits of the same update in memory, under a plain Trainer."""
    return _stepped(strategy.name, **step)


@cache
def _stepped(name: str, *, schedule: str | None = None, max_epochs: int = 2, **step: Any) -> Any:
    strategy = Arm(name, Path())
    ours = strategy.lit(schedule=schedule)
    run = strategy.fit(ours, max_epochs=max_epochs, **step)
    in_memory = strategy.in_memory(dict(step), schedule=schedule)
    in_memory.samples = ours.samples
    flags = step if strategy.name == "full_offload" else {}
    other = strategy.fit(in_memory, "auto", max_epochs=max_epochs, **flags)
    assert run.global_step == other.global_step
    assert strategy.same(ours, in_memory)
    ours.steps = run.global_step
    return ours


@feature("the numbers of training in memory: accumulation, clipping, warm-up, twenty steps, bit for bit")
def in_memory(strategy: Arm) -> None:
    step = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "schedule": "step"}
    assert stepped(strategy, max_epochs=7, **step).steps == 21


@feature("`accumulate_grad_batches`")
def accumulate_grad_batches(strategy: Arm) -> None:
    one, three = stepped(strategy), stepped(strategy, accumulate_grad_batches=3)
    assert not strategy.same(one, three)
    assert strategy.fit(strategy.lit(), accumulate_grad_batches=3).global_step == 4  # the ragged last window steps


@feature("`GradientAccumulationScheduler`")
def accumulation_scheduler(strategy: Arm) -> None:
    module = strategy.lit()
    assert strategy.fit(module, callbacks=[GradientAccumulationScheduler({0: 5, 1: 2})]).global_step == 1 + 3
    assert strategy.moved(module)


@feature("`gradient_clip_val`, by norm")
def by_norm(strategy: Arm) -> None:
    assert not strategy.same(stepped(strategy, gradient_clip_val=0.05), stepped(strategy, gradient_clip_val=1e9))


@feature('`gradient_clip_algorithm="value"`')
def by_value(strategy: Arm) -> None:
    value = {"gradient_clip_algorithm": "value"}
    clipped = stepped(strategy, gradient_clip_val=0.01, **value)
    assert not strategy.same(clipped, stepped(strategy, gradient_clip_val=1e9, **value))


@feature("schedulers by step and by epoch")
def schedules(strategy: Arm) -> None:
    by_step, by_epoch, none = (stepped(strategy, schedule=each) for each in ("step", "epoch", None))
    assert not strategy.same(by_step, by_epoch)
    assert not strategy.same(by_epoch, none)


class Plateau:
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


@feature("`ReduceLROnPlateau`")
def plateau(strategy: Arm) -> None:
    module = strategy.lit(Plateau)
    run = strategy.fit(module, max_epochs=4, limit_val_batches=1)
    before = strategy.lit().make_optimizer(module).param_groups[0]["lr"]
    assert run.optimizers[0].param_groups[0]["lr"] < before
    assert not strategy.same(module, strategy.trained(max_epochs=4))


class OwnClipping:
    asked = 0

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.asked += 1
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


@feature("`configure_gradient_clipping`, `clip_gradients`")
def own_clipping(strategy: Arm) -> None:
    module = strategy.lit(OwnClipping)
    run = strategy.fit(module)
    assert module.asked == run.global_step == 10
    assert not strategy.same(module, stepped(strategy))
    if strategy.name != "lsp_offload":  # whose own way is to clip what crosses the link
        assert strategy.same(module, stepped(strategy, gradient_clip_val=0.05))


class ByMixin(OffloadMixin):
    """Manual optimization as the package has it."""

    training_step = OffloadMixin.training_step
    offload = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}

    def loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.one(batch)


@feature("`OffloadMixin`: the numbers of automatic optimization")
def mixin(strategy: Arm) -> None:
    module = strategy.lit(ByMixin)
    assert strategy.fit(module).global_step == 6
    assert strategy.same(module, stepped(strategy, accumulate_grad_batches=2, gradient_clip_val=0.05))
