"""`torch.compile`, of blocks and of whole modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.features.arm import Arm
from tests.features.registry import feature


@feature("`torch.compile` of each block")
def compiled_blocks(strategy: Arm) -> None:
    module = strategy.lit()
    for block in module.net.blocks:
        block.compile(backend="eager")
    strategy.fit(module, max_epochs=1)
    assert strategy.same(module, strategy.trained(max_epochs=1))


class Silent:
    """Whole-module compilation fails in Lightning itself where `self.log` is in it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net.loss(batch)


@feature("`torch.compile` of the whole module")
def compiled_module(strategy: Arm) -> None:
    module = strategy.lit(Silent)
    compiled: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    strategy.fit(compiled, max_epochs=1)
    assert strategy.same(module, strategy.trained(max_epochs=1))
