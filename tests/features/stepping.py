"""What decides a step: windows, clipping, schedules, hooks around it, what `training_step` returns."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import SumMetric

from lightning_offload import OffloadMixin
from lightning_offload.errors import OffloadError
from tests.features.arm import Arm, weights
from tests.features.registry import Refusal, feature


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


class TwoGroups:
    """The second stands still."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        trained = optimizer.param_groups[0]["params"]
        half = len(trained) // 2
        rest = {"lr": 0.0, "weight_decay": 0.0}
        kept = {k: v for k, v in optimizer.param_groups[0].items() if k in ("lr", "weight_decay", "fused")}
        return type(optimizer)([{"params": trained[:half]}, {"params": trained[half:], **rest}], **kept)


@feature("parameter groups, each with its learning rate and decay")
def groups(strategy: Arm) -> None:
    module = strategy.lit(TwoGroups)
    run = strategy.fit(module)
    moves, stands = run.optimizers[0].param_groups
    fresh = weights(strategy.trained(max_steps=0, max_epochs=-1))
    names = {id(p): name for name, p in module.named_parameters()}
    assert all(torch.equal(p, fresh[names[id(p)]]) for p in stands["params"])
    assert any(not torch.equal(p, fresh[names[id(p)]]) for p in moves["params"])


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
            if name.endswith(("norm.weight", "router")) and p.requires_grad:
                p.register_hook(self._fired)

    def _fired(self, gradient: Tensor) -> Tensor:
        self.fired += 1
        return torch.zeros_like(gradient)


NO_GRADIENT_HOOKS = Refusal(
    UserWarning,
    "hooks on gradients .*never run: zo2 has none. Remove them",
    "zo2 has no gradients: hooks on parameters never run, which is said; remove them",
)


@feature("gradient hooks on parameters (`register_hook`)", zo2_offload=NO_GRADIENT_HOOKS)
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


ONE_OPTIMIZER = Refusal(
    MisconfigurationException,
    "supports a single optimizer, but `configure_optimizers` returned 2. Use one optimizer with several parameter",
    "a single optimizer; use one with several parameter groups",
)


@feature("several optimizers", ONE_OPTIMIZER)
def several_optimizers(strategy: Arm) -> None:
    class Two(Manual):
        def configure_optimizers(self) -> Any:
            return [self.make_optimizer(self), self.make_optimizer(self)]

    strategy.fit(strategy.lit(Two))


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


class Frozen:
    def __init__(self, **build: Any) -> None:
        super().__init__(**build)
        self.net.embed.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return type(self.make_optimizer(self))([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@feature("frozen parameters")
def frozen(strategy: Arm) -> None:
    module = strategy.lit(Frozen)
    before = module.net.embed.weight.detach().clone()
    strategy.fit(module)
    assert torch.equal(module.net.embed.weight, before)
    assert strategy.moved(module)


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


class WithAdam:
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


NO_MOMENTS = Refusal(
    ValueError,
    "`AdamW` cannot be used with method `zo2`.*Return `torch.optim.SGD",
    "zo2 has no gradients to keep moments of: `torch.optim.SGD` without momentum",
)
MOMENTS = Refusal(
    ValueError,
    "method `lsp` cannot project `SGD`.*Return AdamW.*`full_offload`",
    "lsp keeps moments in a subspace: `torch.optim.AdamW`, or `full_offload`",
)
OTHERS = Refusal(
    ValueError,
    "Adagrad` cannot be (offloaded|used with method).*torch.optim",
    "`optimizer.step` is not called, its update is written anew: for `torch.optim.AdamW`, `Adam` and `SGD` themselves "
    "(lsp: `AdamW`; zo2: `SGD`). In the place of a hook on it, `on_before_optimizer_step`",
)
NO_OPTIMIZER = Refusal(
    ValueError,
    "`configure_optimizers` returned no optimizer.*Return `torch.optim.SGD",
    "zo2 takes its learning rate from the optimizer: return `torch.optim.SGD`, or `validate` instead of `fit`",
)
LAID_OUT = Refusal(
    (OffloadError, ValueError),
    "`net.blocks.1.*(`requires_grad=True` before `fit`|Set it before `fit`|set `requires_grad=False` on it)",
    "what is trained is laid out when `fit` begins: set `requires_grad` before it, one `fit` for each phase",
)


class WithSGD:
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class WithAdagrad:
    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@feature("`torch.optim.AdamW`", zo2_offload=NO_MOMENTS)
def with_adamw(strategy: Arm) -> None:
    assert strategy.moved(strategy.trained(WithAdam))


@feature("`torch.optim.SGD`", lsp_offload=MOMENTS)
def with_sgd(strategy: Arm) -> None:
    assert strategy.moved(strategy.trained(WithSGD))


@feature("other optimizers, subclasses, hooks on `optimizer.step`", OTHERS)
def with_others(strategy: Arm) -> None:
    class Subclass:
        def configure_optimizers(self) -> Any:
            made = self.make_optimizer(self)
            return type("Mine", (type(made),), {})(made.param_groups)

    class Hooked:
        def configure_optimizers(self) -> Any:
            made = self.make_optimizer(self)
            made.register_step_post_hook(lambda *_: None)
            return made

    with pytest.raises(ValueError, match=r"Mine` cannot be|cannot project .*Mine`"):
        strategy.fit(strategy.lit(Subclass))
    with pytest.raises(ValueError, match=r"register_step_post_hook`\) would never run.*on_before_optimizer_step"):
        strategy.fit(strategy.lit(Hooked))
    strategy.trained(WithAdagrad)


class WithNone:
    def configure_optimizers(self) -> None:
        return None


@feature("`configure_optimizers` returns None: nothing is trained", zo2_offload=NO_OPTIMIZER)
def with_none(strategy: Arm) -> None:
    module = strategy.lit(WithNone)
    strategy.fit(module)
    assert not strategy.moved(module)


class Unfreezes:
    def __init__(self, **build: Any) -> None:
        super().__init__(**build)
        self.net.blocks[1].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return type(self.make_optimizer(self))(self.parameters(), lr=1e-3)

    def on_train_epoch_start(self) -> None:
        self.net.blocks[1].requires_grad_(self.current_epoch == 1)


@feature("`requires_grad` changed while training", LAID_OUT)
def unfreezes(strategy: Arm) -> None:
    strategy.fit(strategy.lit(Unfreezes))
