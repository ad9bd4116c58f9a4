"""Streams in lock-step on a CUDA device: its generator and its current stream go with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.memory.blocks import partition
from lightning_offload.methods.lockstep import Lockstep
from tests.methods.test_lockstep import Recording, installed

pytestmark = pytest.mark.gpu


def test_dropout_and_stream_of_the_caller() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.Linear(64, 64), nn.Dropout()).cuda().train()
    x = torch.rand(8, 64, device="cuda")
    seen: list[torch.cuda.Stream] = []

    def forward(stream: int) -> Tensor:
        seen.append(torch.cuda.current_stream())
        return module(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with installed(Lockstep(module, partition(module, blocks=["Linear"]), Recording())) as lockstep:
        with torch.cuda.stream(side), torch.no_grad():
            torch.cuda.manual_seed(1)
            expected, after = module(x), torch.cuda.get_rng_state()
            torch.cuda.manual_seed(1)
            made = lockstep.run(forward, 3)
        side.synchronize()
    assert all(torch.equal(output, expected) for output in made)
    assert torch.equal(torch.cuda.get_rng_state(), after)
    assert seen == [side] * 3
