"""`meft` under a Trainer: the strategies and the modules of its tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_offload import MEFTMixin, MEFTOffloadStrategy
from lightning_offload.methods.meft import MEFTSettings
from lightning_offload.methods.sparse_adapter import attach_parameters
from tests.lit import Lit, Manual, ShuffledStrategy
from tests.meft import SIZES, FFNNet

MEFT: dict[str, Any] = {**SIZES, "seed": 5, "row_optimizer": "dense", "router_init": "normal"}
"""Every row stepped in every step, as torch does it; routers as small as the test net's activations."""


def attach(module: nn.Module, **settings: Any) -> None:
    """The adapters that the strategies of the tests make."""
    attach_parameters(module, **MEFTSettings(**{**MEFT, **settings}).of_adapters())


def meft(**settings: Any) -> MEFTOffloadStrategy:
    return MEFTOffloadStrategy(**{**MEFT, **settings})


class ShuffledMEFTStrategy(MEFTOffloadStrategy):
    _make_lanes = ShuffledStrategy._make_lanes


def shuffled_meft(**settings: Any) -> MEFTOffloadStrategy:
    """Rows and gradients in flight for as long as the dependencies allow, in random order."""
    return ShuffledMEFTStrategy(**{**MEFT, **settings})


class _OnFFNs(Lit):
    """A net with feed-forward networks; ``attached``: its adapters are made at once, for plain Lightning."""

    def __init__(
        self,
        *,
        attached: dict[str, Any] | None = None,
        make_optimizer: Callable[[nn.Module], Any] | None = None,
        schedule: str | None = None,
        **net: Any,
    ) -> None:
        super().__init__(**({"make_optimizer": make_optimizer} if make_optimizer else {}), schedule=schedule)
        self.net: Any = FFNNet(**net)
        if attached is not None:
            attach(self, **attached)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/loss", self.net.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits: Tensor = self.net(batch)
        return logits


class MLit(_OnFFNs):
    """Automatic optimization."""


class MManual(_OnFFNs, Manual):
    """Through `OffloadMixin`."""


class MOwn(MEFTMixin, MManual):
    """Brings its method along."""

    def __init__(self, offload: dict[str, Any] | None = None, **build: Any) -> None:
        super().__init__(**build)
        self.offload = {**MEFT, **(offload or {})}


def by_part(module: nn.Module) -> torch.optim.Optimizer:
    """Keys, values and routers by their names, each with an lr of its own."""
    groups = [
        {"params": [p for name, p in module.named_parameters() if name.endswith(f".meft.{part}")], **options}
        for part, options in (
            ("router", {"lr": 1e-3, "weight_decay": 0.0}),
            ("values", {"weight_decay": 0.3}),
            ("keys", {"lr": 1e-2, "betas": (0.8, 0.99)}),
        )
    ]
    return torch.optim.AdamW(groups, lr=3e-2, fused=True)


def trained_alone(module: nn.Module) -> torch.optim.Optimizer:
    """As most people write it."""
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-2, fused=True)


def rows_moved(strategy: MEFTOffloadStrategy | L.LightningModule) -> int:
    """Bytes of gradient rows that went down."""
    engine: Any = strategy.engine
    moved: int = engine.lanes.ledger.moved("d2h", "row gradients")
    return moved
