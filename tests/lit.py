"""A LightningModule around the test net, and one way to run a Trainer on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_offload import FullOffloadStrategy, LSPMixin, LSPOffloadStrategy, OffloadMixin
from lightning_offload.memory.lanes import Lanes
from tests.helpers import VOCAB, Net, adamw, lanes_of


class Lit(L.LightningModule):
    """Automatic optimization, unmodified."""

    def __init__(
        self,
        *,
        make_optimizer: Callable[[torch.nn.Module], Any] = adamw,
        schedule: str | None = None,
        samples: int = 18,
        **net: Any,
    ) -> None:
        super().__init__()
        self.net = Net(**net)
        self.make_optimizer, self.schedule, self.samples = make_optimizer, schedule, samples
        self.losses: list[float] = []
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def one(self, batch: Tensor) -> Tensor:
        loss = self.net.loss(batch)
        self.losses.append(loss.item())
        self.seen += 1
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.one(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.net.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule}}

    def train_dataloader(self) -> DataLoader[Tensor]:
        tokens = torch.randint(0, VOCAB, (self.samples, 6), generator=torch.Generator().manual_seed(5))
        return DataLoader(tokens, batch_size=2)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self.train_dataloader()


class Manual(OffloadMixin, Lit):
    """The same through the mixin."""

    training_step = OffloadMixin.training_step

    def loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.one(batch)


def offload(**settings: Any) -> FullOffloadStrategy:
    """Every parameter offloaded, however small."""
    return FullOffloadStrategy(**{"min_numel": 0, **settings})


class ShuffledStrategy(FullOffloadStrategy):
    """In flight for as long as the dependencies allow, in random order; NaN where a copy has not landed."""

    def _make_lanes(self, machine: Any, settings: Any) -> Lanes:
        return lanes_of("shuffled", seed=5)


def shuffled(**settings: Any) -> FullOffloadStrategy:
    """Every parameter offloaded, nothing on time unless it is waited for."""
    return ShuffledStrategy(**{"min_numel": 0, **settings})


LSP = {"min_numel": 0, "dim": 9, "nnz": 3, "refit_every": 3, "bias_threshold": 0.0, "seed": 5, "fit_steps": 4}
"""Every linear weight of the test net projected, with refits while it trains."""


def lsp(**settings: Any) -> LSPOffloadStrategy:
    return LSPOffloadStrategy(**{**LSP, **settings})


class ShuffledLSPStrategy(LSPOffloadStrategy):
    _make_lanes = ShuffledStrategy._make_lanes


def shuffled_lsp(**settings: Any) -> LSPOffloadStrategy:
    return ShuffledLSPStrategy(**{**LSP, **settings})


class LSPManual(LSPMixin, Manual):
    """Brings its method along."""

    def __init__(self, offload: dict[str, Any] | None = None, **build: Any) -> None:
        super().__init__(**build)
        self.offload = {**LSP, **(offload or {})}


def trainer(strategy: Any = "auto", *, callbacks: Sequence[L.Callback] = (), **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on one CPU, unless `accelerator` says otherwise."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    where = {"accelerator": "cpu", "devices": 1}
    return L.Trainer(strategy=strategy, callbacks=list(callbacks), **{**where, **defaults, **kwargs})


def fit(module: L.LightningModule, strategy: Any = "auto", *, ckpt_path: Any = None, **kwargs: Any) -> L.Trainer:
    """Train ``module`` from the same random state every time."""
    torch.manual_seed(3)
    made = trainer(strategy, **kwargs)
    made.fit(module, ckpt_path=ckpt_path)
    return made


def assert_equal_modules(one: L.LightningModule, other: L.LightningModule) -> None:
    """Losses of every step and all weights and buffers, bit for bit."""
    assert one.losses == other.losses
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
