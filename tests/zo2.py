"""`zo2` under a Trainer: the strategies, the modules and the oracle of its tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_offload import ZO2Mixin, ZO2OffloadStrategy
from lightning_offload.numerics.noise import Draw, noise
from tests.lit import Lit, Manual, ShuffledStrategy, fit
from tests.mezo import Mezo

SEED = 4
ZO2 = {"min_numel": 0, "seed": SEED}
"""Every block of the test net streamed."""


def sgd(module: nn.Module, lr: float = 1e-3, weight_decay: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)


def zo2(**settings: Any) -> ZO2OffloadStrategy:
    return ZO2OffloadStrategy(**{**ZO2, **settings})


class ShuffledZO2Strategy(ZO2OffloadStrategy):
    _make_lanes = ShuffledStrategy._make_lanes


def shuffled_zo2(**settings: Any) -> ZO2OffloadStrategy:
    """Copies in flight for as long as the dependencies allow, in random order."""
    return ShuffledZO2Strategy(**{**ZO2, **settings})


class ZLit(Lit):
    """Automatic optimization; `losses` has every forward's."""

    def __init__(self, **build: Any) -> None:
        super().__init__(**{"make_optimizer": sgd, **build})


class ZManual(Manual):
    """Through `OffloadMixin`."""

    def __init__(self, **build: Any) -> None:
        super().__init__(**{"make_optimizer": sgd, **build})


class ZOwn(ZO2Mixin, Manual):
    """Brings its method along."""

    def __init__(self, offload: dict[str, Any] | None = None, **build: Any) -> None:
        super().__init__(**{"make_optimizer": sgd, **build})
        self.offload = {**ZO2, **(offload or {})}


def zfit(module: L.LightningModule, strategy: Any = "auto", **kwargs: Any) -> L.Trainer:
    """`fit`, with NumPy's generator as it is at the start of every run."""
    np.random.seed(6)
    return fit(module, strategy, **kwargs)


def oracle(
    net: nn.Module,
    batches: list[list[Tensor]],
    *,
    kind: str = "philox",
    lr: Callable[[int], float] = lambda step: 1e-3,
    weight_decay: float = 0.1,
    eps: float = 1e-3,
    autocast: bool = False,
) -> list[tuple[float, float]]:
    """MeZO on `net`, one step for each of `batches` (the micro-batches of a step); (l+, g) of each."""
    places = {id(p): place for place, p in enumerate(net.parameters())}

    def z(step: int, _: int, p: Tensor) -> Tensor:
        return noise(Draw(SEED, step, places[id(p)]), 0, p.numel(), "popcount", device="cpu").view(p.shape)

    mezo = Mezo(net, 0.0, eps, weight_decay, noise=z if kind == "philox" else None)
    np.random.seed(6)
    done = []
    for step, parts in enumerate(batches):
        mezo.lr = lr(step)

        def mean(model: Any, parts: list[Tensor] = parts) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = [model.loss(part).float().item() * len(part) for part in parts]
            return torch.tensor(sum(losses) / sum(map(len, parts)))

        done.append(mezo.step(mean))
    return done


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether every parameter and buffer has the same dtype and bits."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype and torch.equal(value, right[name]) for name, value in left.items()
    )
