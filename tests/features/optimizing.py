"""Which optimizers, how many, and of which parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_offload.errors import OffloadError
from tests.features.arm import Arm, weights
from tests.features.hooking import Manual
from tests.features.registry import Refusal, feature


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


GROUPS = Refusal(
    OffloadError,
    "`optimizer.add_param_group` was called after setup.*Create all groups in `configure_optimizers`",
    "host memory is laid out per group: create all groups in `configure_optimizers`, with `lr=0` for what comes later",
)


@feature("`optimizer.add_param_group` while training", GROUPS)
def new_groups(strategy: Arm) -> None:
    class Grows:
        def on_train_epoch_start(self) -> None:
            self.trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})

    strategy.fit(strategy.lit(Grows))
