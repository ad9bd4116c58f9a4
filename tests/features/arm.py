"""What a feature is tried with: a strategy of tiny settings, modules that suit it, and Trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_offload.strategies import STRATEGIES, OneDevice
from tests.lit import LSP, Lit, LSPManual, trainer
from tests.meft_lit import MEFT, MLit, MOwn, trained_alone
from tests.zo2 import ZO2, ZLit, ZOwn


class _Whole:
    """Every entry point of a LightningModule."""

    net: Any

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/loss", self.net.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)


class WholeLit(_Whole, Lit):
    """Exact AdamW; also of LSP."""


class WholeZLit(_Whole, ZLit):
    """SGD."""


class WholeMLit(_Whole, MLit):
    """With feed-forward networks for adapters."""


class ByIndex:
    """Sees the same batch at the same place of an epoch, also in a run that begins in its middle.

    Lightning begins a plain DataLoader anew there.
    """

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batches = list(self.train_dataloader())  # type: ignore[attr-defined]
        loss: Tensor = super().training_step(batches[batch_idx], batch_idx)  # type: ignore[misc]
        return loss


BASES: dict[str, type[L.LightningModule]] = {"zo2_offload": WholeZLit, "meft_offload": WholeMLit}
SETTINGS: dict[str, Mapping[str, Any]] = {"lsp_offload": LSP, "zo2_offload": ZO2, "meft_offload": MEFT}
IN_MEMORY: dict[str, Callable[..., Lit]] = {
    "lsp_offload": LSPManual,
    "zo2_offload": ZOwn,
    "meft_offload": lambda step, **build: MOwn(step, make_optimizer=trained_alone, **build),
}


DEPTH = 2
"""Blocks of a module."""


@dataclass(frozen=True)
class Arm:
    """One strategy, and a folder for what its runs leave.

    Calling it makes the strategy with tiny settings, under which everything that can be offloaded is.
    """

    name: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    """For every Trainer."""

    @property
    def kind(self) -> type[OneDevice[Any]]:
        return next(kind for kind in STRATEGIES if kind.strategy_name == self.name)

    @property
    def settings(self) -> Mapping[str, Any]:
        return SETTINGS.get(self.name, {"min_numel": 0})

    @property
    def base(self) -> type[L.LightningModule]:
        return BASES.get(self.name, WholeLit)

    def __call__(self, **settings: Any) -> Any:
        return self.kind(**{**self.settings, **settings})

    def lit(self, *kinds: type, samples: int = 10, **build: Any) -> Any:
        """A module of this method's with the hooks of ``kinds``; five batches an epoch.

        An optimizer of the parameters that are trained, as most people write it.
        """
        build = {"depth": DEPTH, **build}
        if self.name == "meft_offload":
            build = {"make_optimizer": trained_alone, **build}
        made: Any = type("Lit", (*kinds, self.base), {})(**build)
        made.samples = samples
        return made

    def trainer(self, strategy: Any = None, **options: Any) -> L.Trainer:
        given = {"default_root_dir": self.folder, **self.options, **options}
        return trainer(self() if strategy is None else strategy, **given)

    def fit(self, module: Any, strategy: Any = None, *, ckpt_path: Any = None, **options: Any) -> L.Trainer:
        """Train from the same random state every time."""
        run = self.trainer(strategy, **options)
        seeded()
        run.fit(module, ckpt_path=ckpt_path)
        return run

    def trained(self, *kinds: type, **options: Any) -> Any:
        """A module after a fit by numbers and strings alone; not to be changed, since it is made once."""
        return _trained(self.name, kinds, tuple(options.items()))

    def in_memory(self, step: dict[str, Any], **build: Any) -> Any:
        """A module that trains by the same update under a plain Trainer, its step described by ``step``."""
        make = IN_MEMORY.get(self.name, lambda _, **build: WholeLit(**build))
        return make(step, depth=DEPTH, **build)

    def same(self, one: nn.Module, other: nn.Module) -> bool:
        """Whether two modules have the same weights, bit for bit."""
        left, right = weights(one), weights(other)
        return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

    def moved(self, module: nn.Module) -> bool:
        """Whether training has changed a weight, or filled an adapter's values, which begin as zeros."""
        fresh = weights(self.base(depth=DEPTH).net)
        now = weights(module.net)  # type: ignore[arg-type]
        return any(
            not torch.equal(value, fresh[n]) if n in fresh else n.endswith("values") and bool(value.any())
            for n, value in now.items()
        )


@cache
def _trained(name: str, kinds: tuple[type, ...], options: tuple[tuple[str, Any], ...]) -> Any:
    arm = Arm(name, Path())
    module = arm.lit(*kinds)
    arm.fit(module, **dict(options))
    return module


def seeded() -> None:
    """The random state in which every run begins."""
    torch.manual_seed(3)
    np.random.seed(6)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}
