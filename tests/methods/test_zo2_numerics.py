"""zo2 in 16 bits: what drifts and what does not, roundings that are unbiased, masters, wires."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.methods.base import DTypes
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from tests.helpers import Net, mostly_slow
from tests.zeroth import (
    SEED,
    assert_equal,
    built,
    by_engine,
    by_oracle,
    make_engine,
    model_loss,
    net_loss,
    philox_noise,
    sgd,
    token_batches,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("rounding", "dtype"),
    mostly_slow(itertools.product(["nearest", "stochastic"], DTYPES), lambda at, row: at in (2, 3, 4)),
    ids=str,
)
def test_without_lr_no_bit_of_a_weight_moves(rounding: Any, dtype: torch.dtype) -> None:
    net = Net(depth=3).to(dtype)
    ours = by_engine(
        net,
        token_batches(1) * 100,
        make_optimizer=lambda module: sgd(module, lr=0.0),
        dtypes=DTypes(rounding=rounding),
    )
    assert len({slope for _, slope in ours.steps}) > 2
    for name, p in net.named_parameters():
        assert torch.equal(ours.weights[name], p), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_lr_mezo_drifts_as_mezo_does(dtype: torch.dtype) -> None:
    net, batches = Net(depth=3).to(dtype), token_batches(1) * 100
    ours = by_engine(net, batches, noise="mezo", make_optimizer=lambda module: sgd(module, lr=0.0))
    assert_equal(ours, by_oracle(net, batches, lr=0.0))
    assert any(not torch.equal(ours.weights[name], p) for name, p in net.named_parameters())


class Wide(nn.Module):
    """3,000 classes: a loss near 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 3000)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: Tensor = self.head(x)
        return out


def cross_entropy(module: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = module(x)
    return nn.functional.cross_entropy(logits.float(), torch.arange(len(x)))


def test_slopes_are_as_fine_as_the_loss() -> None:
    data = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 16, generator=data).bfloat16() for _ in range(200)]
    ours = by_engine(Wide().bfloat16(), batches, cross_entropy, dtypes=DTypes(rounding="stochastic"))
    assert all(7 < loss < 9 for loss, _ in ours.steps)
    assert len({slope for _, slope in ours.steps}) > 100


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """One step far below half a place of most weights: nearest loses most of it, on average nothing is lost."""
    net = Net(depth=2, width=64, inner=512).to(dtype)
    engine = make_engine(net, sgd(net, lr=1e-3, weight_decay=0.1), dtypes=DTypes(rounding="stochastic"))
    before = copy.deepcopy(net)
    engine.micro_batch(net.loss, token_batches(1))
    engine.step()
    engine.detach()
    (entry,) = engine.log
    noise, moved = philox_noise(before), 0
    for place, ((name, p), q) in enumerate(zip(before.named_parameters(), net.parameters(), strict=True)):
        z = noise(entry.step, place, p).double()
        exact = p.double() - 1e-3 * (entry.coefficient * z + 0.1 * p.double())
        error = (q.double() - exact).flatten()
        assert error.mean().abs() <= 4 * error.std() / len(error) ** 0.5 + 1e-9, name
        moved += int((q != p).sum())
    assert moved > 1000


def test_rounding_of_the_method_where_the_user_says_nothing() -> None:
    assert ZO2(ZO2Settings()).rounding == "stochastic"
    assert ZO2(ZO2Settings(noise="mezo")).rounding == "nearest"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_an_fp32_master_is_the_oracle_in_fp32_seen_through_16_bits(dtype: torch.dtype) -> None:
    batches = token_batches(12)
    shown = Net(depth=4).to(dtype)

    def narrow_loss(module: nn.Module, batch: Tensor) -> Tensor:
        for mine, theirs in zip(shown.parameters(), module.parameters(), strict=True):
            mine.data = theirs.data.to(dtype)
        return net_loss(shown, batch)

    wanted = by_oracle(Net(depth=4), batches, narrow_loss, distribution="popcount")
    ours = by_engine(Net(depth=4), batches, dtypes=DTypes(compute=dtype, wire=torch.float32), write_back_every=2)
    assert_equal(ours, wanted)
    assert all(weight.dtype == torch.float32 for weight in ours.weights.values())


def test_a_wire_of_16_bits_halves_the_bytes_of_fp32() -> None:
    batches = token_batches(12)
    wide = by_engine(Net(depth=4), batches)
    narrow = by_engine(
        Net(depth=4), batches, dtypes=DTypes(compute=torch.float32, wire=torch.float16, rounding="stochastic")
    )
    for lane, tag in (("h2d", "weights"), ("d2h", "weights back")):
        assert 2 * narrow.zeroth.lanes.ledger.moved(lane, tag) == wide.zeroth.lanes.ledger.moved(lane, tag) > 0
    assert 2 * narrow.zeroth.streaming.host_bytes == wide.zeroth.streaming.host_bytes
    for (loss, _), (other, _) in zip(narrow.steps, wide.steps, strict=True):
        assert loss == pytest.approx(other, rel=2e-3)
    for name, weight in narrow.weights.items():
        assert weight.dtype == torch.float16
        assert (weight.float() - wide.weights[name]).abs().max() < 0.02 * wide.weights[name].abs().max(), name


def test_forwards_see_the_dtype_of_compute() -> None:
    net = Net(depth=3)
    seen: set[torch.dtype] = set()
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, output: seen.add(module.up.weight.dtype))
    engine = make_engine(net, dtypes=DTypes(compute=torch.float32, wire=torch.float16, rounding="stochastic"))
    engine.micro_batch(net.loss, token_batches(1))
    engine.step()
    net.loss(token_batches(1)[0])
    engine.detach()
    assert seen == {torch.float32}


@pytest.mark.parametrize("distribution", ["popcount", "gaussian", "rademacher"])
def test_the_slope_is_the_derivative_along_z(distribution: Any) -> None:
    """Its error is of the order of eps squared."""
    (batch,) = token_batches(1)
    plain = Net(depth=3)
    plain.loss(batch).backward()
    noise = philox_noise(plain, distribution)
    slope = sum(
        float((p.grad * noise(1, at, p)).sum()) for at, p in enumerate(plain.parameters()) if p.grad is not None
    )
    errors = []
    for eps in (3e-2, 3e-3):
        ours = by_engine(Net(depth=3), [batch], eps=eps, distribution=distribution)
        errors.append(abs(ours.steps[0][1] - slope) / abs(slope))
    assert errors[1] < errors[0] / 20
    assert errors[1] < 5e-3


def test_a_run_has_the_same_noise_from_one_seed_alone() -> None:
    model, batches = built("llama", torch.float32, 3)
    ours = by_engine(model, batches, model_loss)
    other = by_engine(model, batches, model_loss, seed=SEED + 1)
    assert ours.steps != other.steps
    assert_equal(ours, by_engine(model, batches, model_loss, resident=1.0))
