"""Hooks around a step, what `training_step` takes and returns, manual optimization."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import SumMetric

from lightning_offload.errors import OffloadError
from tests.features.arm import Arm
from tests.features.registry import Refusal, feature
from tests.features.stepping import OwnClipping


class ReadsGradients:
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norm = sum(float(p.grad.square().sum()) for p in self.parameters() if p.grad is not None)
        self.norms = [*getattr(self, "norms", []), norm]

    def on_after_backward(self) -> None:
        self.backwards = getattr(self, "backwards", 0) + 1


NO_GRADIENTS = Refusal(
    UserWarning,
    "on_before_optimizer_step`.* will find no gradients: zo2 has none",
    "zo2 has no backward: `on_before_optimizer_step` runs, and finds no gradients, which is said once; "
    "`on_before_backward` and `on_after_backward` do not run. What the step was made of is in `strategy.log`",
)


@feature("`on_after_backward`, `on_before_optimizer_step`: gradients to read", zo2_offload=NO_GRADIENTS)
def reads_gradients(strategy: Arm) -> None:
    module = strategy.lit(ReadsGradients)
    strategy.fit(module, accumulate_grad_batches=2)
    assert len(module.norms) == 6
    assert all(norm > 0 for norm in module.norms)
    assert module.backwards == 10


class Hooked:
    """A hook on a parameter, as torch has them."""

    def on_fit_start(self) -> None:
        self.fired = 0
        for name, p in self.named_parameters():
            if name.endswith(("norm.weight", "keys")) and p.requires_grad:
                p.register_hook(self._fired)

    def _fired(self, gradient: Tensor) -> Tensor:
        self.fired += 1
        return torch.zeros_like(gradient)


NO_GRADIENT_HOOKS = Refusal(
    UserWarning,
    "hooks on the gradients of .*never run: zo2 has none. Remove them",
    "zo2 has no gradients: hooks on parameters never run, which is said; remove them",
)
HOOKED_ROWS = Refusal(
    UserWarning,
    "hooks on the gradients of `.*keys`.*never run: rows are fetched.*`on_before_optimizer_step`",
    "rows of adapters are fetched one by one: hooks on `keys` and `values` never run, which is said (those on routers "
    'do); read `.grad` in `on_before_optimizer_step`. The same of weights under lsp with `form="activations"`',
)


@feature("gradient hooks on parameters (`register_hook`)", zo2_offload=NO_GRADIENT_HOOKS, meft_offload=HOOKED_ROWS)
def gradient_hooks(strategy: Arm) -> None:
    module = strategy.lit(Hooked)
    strategy.fit(module)
    assert module.fired > 0


class OwnStep:
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + batch_idx)
        optimizer.step(closure=optimizer_closure)


@feature("`optimizer_step` overridden: warm-up by hand")
def own_step(strategy: Arm) -> None:
    module = strategy.lit(OwnStep)
    run = strategy.fit(module)
    assert run.global_step == 10
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-3 / 5
    assert strategy.moved(module)
    assert not strategy.same(module, strategy.trained())


class ReturnsNone:
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


LOSS_OF_EVERY_BATCH = Refusal(
    OffloadError,
    "`training_step` returned NoneType; method `zo2` needs the loss of every batch.*Leave",
    "zo2 asks for the loss of every batch before its forwards are over: leave batches out in the dataloader, or "
    "return a loss of NaN, which skips the step",
)


@feature("`training_step` returns None: the step is left out", zo2_offload=LOSS_OF_EVERY_BATCH)
def returns_none(strategy: Arm) -> None:
    module, fewer = strategy.lit(ReturnsNone), strategy.lit()
    strategy.fit(module)
    tokens = torch.cat([batch for at, batch in enumerate(fewer.train_dataloader()) if at != 1])
    fewer.train_dataloader = lambda: torch.utils.data.DataLoader(tokens, batch_size=2)
    strategy.fit(fewer)
    assert strategy.same(module, fewer)


class ReturnsDict:
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        return {"loss": super().training_step(batch, batch_idx), "mine": batch_idx}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs = [*getattr(self, "outputs", []), outputs["loss"]]


@feature("`training_step` returns a dictionary")
def returns_dict(strategy: Arm) -> None:
    module = strategy.lit(ReturnsDict)
    strategy.fit(module)
    assert len(module.outputs) == 10
    assert strategy.same(module, strategy.trained())


class Iterates:
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.one(batch)


SAME_BATCH = Refusal(
    MisconfigurationException,
    "takes `dataloader_iter`, but method `zo2` runs each batch several times. Take `batch` instead",
    "zo2 runs each batch several times: take `batch` in the place of `dataloader_iter`",
)


@feature("`training_step(self, dataloader_iter)`", zo2_offload=SAME_BATCH)
def dataloader_iter(strategy: Arm) -> None:
    module = strategy.lit(Iterates)
    strategy.fit(module)
    assert strategy.same(module, strategy.trained())


class Manual:
    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.one(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()


BY_ITSELF = Refusal(
    MisconfigurationException,
    "steps by itself.*no gradients that a `manual_backward` could make. Derive it from `ZO2Mixin`",
    "zo2 has no gradients for `manual_backward`: derive the module from `ZO2Mixin` and write `loss`, or use automatic "
    "optimization",
)


@feature("manual optimization, as users write it", zo2_offload=BY_ITSELF)
def manual(strategy: Arm) -> None:
    module = strategy.lit(Manual)
    assert strategy.fit(module).global_step == 10
    assert strategy.same(module, strategy.trained(OwnClipping))


class Counts:
    def __init__(self, **build: Any) -> None:
        super().__init__(**build)
        self.count = SumMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count(len(batch))
        self.log("count", self.count, on_step=False, on_epoch=True)
        self.log("sum", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return super().training_step(batch, batch_idx)


@feature('torchmetrics in the module, `self.log(reduce_fx="sum")`: each batch counts once')
def torchmetrics(strategy: Arm) -> None:
    module = strategy.lit(Counts)
    run = strategy.fit(module)
    assert run.callback_metrics["count"] == 10
    assert run.callback_metrics["sum"] == 5
