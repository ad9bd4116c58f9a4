"""Engines with compiled kernels and without: the same bits, through every method and every way to send."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import InlineLanes
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.methods.method import Method
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from lightning_offload.numerics.native import Kernels
from tests.helpers import Net, Run, adamw, assert_same, lanes_of, train
from tests.meft import FFNNet, adapted, meft, undecayed
from tests.meft import adamw as of_adapters
from tests.projected import lsp

pytestmark = pytest.mark.usefixtures("kernels")


def full(**settings: Any) -> Method:
    return Full(FullSettings(**{"min_numel": 0, "accumulate": "device", **settings}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels by name, as they are called."""
    made: list[str] = []
    for name in ("adam_", "add_rows_", "step_rows_", "advance_", "norm"):
        plain = getattr(Kernels, name)

        def counted(*args: Any, _plain: Any = plain, _name: str = name, **how: Any) -> Any:
            made.append(_name)
            return _plain(*args, **how)

        monkeypatch.setattr(Kernels, name, counted)
    return made


def both(make: Any, net: nn.Module, calls: list[str], **how: Any) -> tuple[Run, Run, set[str]]:
    """Trained with kernels and without, and which were called."""
    runs = []
    for native in ("off", "on"):
        runs.append(train(net, lanes_of(how.pop("lanes", "inline")), method=make(native=native), **how))
        assert bool(calls) == (native == "on")
    assert_same(*runs)
    return runs[0], runs[1], set(calls)


@pytest.mark.parametrize("clip", [None, Clip("norm", 0.05), Clip("value", 1e-3)], ids=["plain", "norm", "value"])
@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float16], ids=str)
def test_full(compute: torch.dtype | None, accumulate: str, clip: Clip | None, calls: list[str]) -> None:
    *_, called = both(
        lambda **how: full(accumulate=accumulate, **how),
        Net(),
        calls,
        clip=clip,
        micro_batches=2,
        dtypes=DTypes(compute=compute),
    )
    assert "adam_" in called


@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
def test_lsp(compute: torch.dtype | None, accumulate: str, calls: list[str]) -> None:
    """Norms of 16-bit wires are another sum: they decide whether a step is finite, no more."""
    *_, called = both(
        lambda **how: lsp(accumulate=accumulate, **how),
        Net(),
        calls,
        micro_batches=2,
        dtypes=DTypes(compute=compute, rounding="stochastic"),
    )
    assert "adam_" in called
    assert ("norm" in called) == (compute is not None and accumulate == "device")


class Mixed(Net):
    """One layer is wider than the rest."""

    def __init__(self, wide: str) -> None:
        super().__init__()
        self.to(torch.bfloat16)
        self.blocks[1].up.to(getattr(torch, wide))
        self.blocks[1].up.register_forward_pre_hook(lambda layer, args: args[0].to(layer.weight.dtype))
        self.blocks[1].up.register_forward_hook(lambda layer, args, out: out.to(torch.bfloat16))


@pytest.mark.parametrize("wide", ["float32", "float16"])
@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("make", [full, lsp])
def test_layers_of_several_dtypes(make: Any, accumulate: str, wide: str, calls: list[str]) -> None:
    *_, called = both(
        lambda **how: make(accumulate=accumulate, **how), Mixed(wide), calls, micro_batches=2, dtypes=DTypes()
    )
    assert "adam_" in called


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_other_optimizers(kind: str, calls: list[str]) -> None:
    def make(net: nn.Module) -> torch.optim.Optimizer:
        if kind == "adam":
            return torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        return torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)

    runs = [
        train(Net(), lanes_of("inline"), method=full(native=native), make_optimizer=make, dtypes=DTypes())
        for native in ("off", "on")
    ]
    assert_same(*runs)
    assert bool(calls) == (kind == "adam")


@pytest.mark.parametrize("clip", [None, Clip("norm", 0.05)], ids=["plain", "clipped"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", ["host", "keys", "device"])
def test_meft(placement: str, compute: torch.dtype | None, clip: Clip | None, calls: list[str]) -> None:
    *_, called = both(
        lambda **how: meft(placement, **how),
        adapted(FFNNet(width=24)),
        calls,
        clip=clip,
        micro_batches=2,
        make_optimizer=of_adapters,
        dtypes=DTypes(compute=compute),
    )
    assert called >= {"add_rows_", "step_rows_"}


@pytest.mark.parametrize("way", ["deferred", "lazy"])
def test_rows_that_are_put_off(way: str, calls: list[str]) -> None:
    """An ulp of a square root: torch's of large tensors is not correctly rounded."""
    make = undecayed if way == "lazy" else of_adapters
    runs = [
        train(
            adapted(FFNNet(width=24)),
            lanes_of("inline"),
            steps=8,
            method=meft("host", row_optimizer=way, native=native),
            make_optimizer=make,
            dtypes=DTypes(),
        )
        for native in ("off", "on")
    ]
    assert "step_rows_" in calls
    for name, weight in runs[0].weights.items():
        torch.testing.assert_close(runs[1].weights[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distribution", ["popcount", "rademacher"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
def test_zo2(compute: torch.dtype | None, distribution: Any, calls: list[str]) -> None:
    weights = []
    for native in ("off", "on"):
        net = Net()
        settings = ZO2Settings(seed=3, min_numel=0, distribution=distribution, native=native)
        dtypes = DTypes(compute=compute, rounding="stochastic")
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, weight_decay=0.1)
        engine = ZerothEngine(net, optimizer, ZO2(settings), InlineLanes(HostMemory(pin=False)), dtypes)
        for _ in range(3):
            engine.micro_batch(net.loss, [torch.arange(12).view(2, 6)])
            engine.step()
        engine.flush()
        weights.append([p.detach().clone() for p in net.parameters()])
        engine.detach()
        assert bool(calls) == (native == "on")
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("kind", ["checked", "shuffled"])
@pytest.mark.parametrize("method", ["full", "lsp", "meft"])
def test_what_kernels_read_and_write_is_seen(method: str, kind: str, calls: list[str]) -> None:
    net = adapted(FFNNet(width=24)) if method == "meft" else Net()
    make: Any = {"full": full, "lsp": lsp, "meft": lambda **how: meft("host", **how)}[method]
    how: dict[str, Any] = {
        "micro_batches": 2,
        "make_optimizer": of_adapters if method == "meft" else adamw,
        "dtypes": DTypes(compute=torch.bfloat16, rounding="stochastic" if method == "lsp" else "nearest"),
    }
    expected = train(net, lanes_of("inline"), method=make(native="off"), **how)
    assert_same(expected, train(net, lanes_of(kind), method=make(native="on"), **how))
    assert calls
