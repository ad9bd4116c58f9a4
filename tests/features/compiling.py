"""`torch.compile`, of blocks and of whole modules."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.features.arm import Arm
from tests.features.registry import Refusal, feature

BLOCKS = Refusal(
    ValueError,
    "passes each unit with several forwards at once.*Leave `torch.compile` out, or use `full_offload` or `lsp_offload`",
    "zo2 changes the weights of a block between the forwards that pass it: leave `torch.compile` out, or use full, lsp",
)


@feature("`torch.compile` of each block", zo2_offload=BLOCKS)
def compiled_blocks(strategy: Arm) -> None:
    module = strategy.lit()
    for block in module.net.blocks:
        block.compile(backend="eager")
    strategy.fit(module, max_epochs=1)
    assert strategy.same(module, strategy.trained(max_epochs=1))


class Silent:
    """Lightning's `self.log` cannot be traced."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net.loss(batch)  # type: ignore[attr-defined]
        return loss


@feature("`torch.compile` of the whole module, where its step does not log", zo2_offload=BLOCKS)
def compiled_module(strategy: Arm) -> None:
    module, plain = strategy.lit(Silent), strategy.lit(Silent)
    strategy.fit(torch.compile(module, backend="eager"), max_epochs=1)
    strategy.fit(plain, max_epochs=1)
    assert strategy.same(module, plain)
