"""The engine on every family of the zoo: hooks change nothing, training equals torch, detaching leaves nothing."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import Lanes
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.full import Full, FullSettings
from tests.helpers import lanes_of
from tests.methods.test_full import snapshot
from tests.zoo import ZOO, first_tensor


def attach(module: nn.Module, lanes: Lanes, optimizer: torch.optim.Optimizer) -> Engine:
    return Engine(module, optimizer, Full(FullSettings(min_numel=0)), lanes, DTypes(), expects_clip=True)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)


@pytest.mark.parametrize("name", ZOO)
def test_forward_with_hooks_equals_forward_without(name: str) -> None:
    module, inputs = ZOO[name]()
    for p in module.parameters():
        p._post_accumulate_grad_hooks  # noqa: B018  # made on first access
    before, weights = snapshot(module), copy.deepcopy(module.state_dict())
    expected = first_tensor(module(**inputs))
    engine = attach(module, lanes_of("inline"), adamw(module))
    with engine.micro_batch():
        assert torch.equal(first_tensor(module(**inputs)), expected)
    engine.detach()
    assert snapshot(module) == before
    for key, value in module.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert torch.equal(first_tensor(module(**inputs)), expected)


def steps(name: str, kind: str | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    module, inputs = ZOO[name]()
    module.train()
    optimizer = adamw(module)
    lanes = lanes_of(kind) if kind is not None else None
    engine = attach(module, lanes, optimizer) if lanes is not None else None
    torch.manual_seed(1)
    losses = []
    with lanes.checking() if isinstance(lanes, CheckedLanes) else nullcontext():
        for _ in range(3):
            with engine.micro_batch() if engine is not None else nullcontext():
                loss = first_tensor(module(**inputs)).float().square().mean()
            optimizer.zero_grad()
            if engine is not None:
                engine.stepping = True
            loss.backward()
            if engine is not None:
                engine.step(Clip(0.5))
            else:
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                optimizer.step()
            losses.append(loss.item())
        if engine is not None:
            assert engine.lanes.ledger.moved("h2d", "weights") > 0
            engine.detach()
    return losses, module.state_dict()


@pytest.mark.parametrize("kind", ["checked", "shuffled"])
@pytest.mark.parametrize("name", ZOO)
def test_training_equals_torch(name: str, kind: str) -> None:
    losses, weights = steps(name, None)
    ours, offloaded = steps(name, kind)
    assert ours == losses
    for key, value in weights.items():
        assert torch.equal(offloaded[key], value), key
