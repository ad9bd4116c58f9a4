"""`torch.compile`, of blocks and of whole modules."""

from __future__ import annotations

import torch

from tests.features.arm import Arm
from tests.features.registry import Refusal, feature

BLOCKS = Refusal(
    ValueError,
    "passes each unit with several forwards at once.*Leave `torch.compile` out, or use `full_offload` or `lsp_offload`",
    "zo2 changes the weights of a block between the forwards that pass it: leave `torch.compile` out, or use full, lsp",
)
WHOLE = Refusal(
    RuntimeError,
    "Using a compiled model is incompatible with the current strategy.*compile the blocks of the model one by one",
    "what the engine does between units would be traced: compile block by block",
)


@feature("`torch.compile` of each block", zo2_offload=BLOCKS)
def compiled_blocks(strategy: Arm) -> None:
    module = strategy.lit()
    for block in module.net.blocks:
        block.compile(backend="eager")
    strategy.fit(module, max_epochs=1)
    assert strategy.same(module, strategy.trained(max_epochs=1))


@feature("`torch.compile` of the whole module", WHOLE)
def compiled_module(strategy: Arm) -> None:
    strategy.fit(torch.compile(strategy.lit(), backend="eager"), max_epochs=1)
