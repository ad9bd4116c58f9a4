"""Where tensors are made when nobody says where is the user's business, not the engines'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.methods.method import Method
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from tests.helpers import Net, adamw, assert_same, lanes_of, train
from tests.meft import FFNNet, adapted, meft
from tests.meft import adamw as of_adapters
from tests.projected import lsp

METHODS: dict[str, Callable[[Any], Method]] = {
    "full": lambda native: Full(FullSettings(min_numel=0, accumulate="host", native=native)),
    "lsp": lambda native: lsp(accumulate="host", native=native),
    "dense": lambda native: meft("host", native=native),
    "deferred": lambda native: meft("host", row_optimizer="deferred", native=native),
}


@pytest.mark.parametrize("native", ["auto", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_engines_that_send_gradients(method: str, native: str) -> None:
    rows = method in ("dense", "deferred")
    net = adapted(FFNNet(width=24)) if rows else Net()
    how: dict[str, Any] = {"make_optimizer": of_adapters if rows else adamw, "clip": Clip("norm", 0.1)}
    runs = []
    for device in (None, "meta"):
        torch.set_default_device(device)
        try:
            runs.append(train(net, lanes_of("inline"), method=METHODS[method](native), **how))
        finally:
            torch.set_default_device(None)
    assert_same(*runs)


@pytest.mark.parametrize("native", ["auto", "off"])
@pytest.mark.parametrize("distribution", ["popcount", "gaussian", "rademacher"])
def test_the_engine_that_draws(distribution: Any, native: Any) -> None:
    nets: list[nn.Module] = []
    tokens = torch.arange(12).view(2, 6)
    for device in (None, "meta"):
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        torch.set_default_device(device)
        try:
            settings = ZO2Settings(seed=3, min_numel=0, distribution=distribution, native=native)
            engine = ZerothEngine(net, optimizer, ZO2(settings), lanes_of("inline"), DTypes(rounding="stochastic"))
            for _ in range(3):
                engine.micro_batch(net.loss, [tokens])
                engine.step()
            engine.flush()
            engine.detach()
        finally:
            torch.set_default_device(None)
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
