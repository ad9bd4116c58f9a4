"""The update rules against torch's optimizers, and what makes slicing them safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_offload.numerics.adam import adam_, sgd_
from tests.helpers import threads

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True}


def state(numel: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w, g, m = (torch.randn(numel, generator=generator) for _ in range(3))
    return [w, g, m, torch.rand(numel, generator=generator)]


def step(tensors: list[Tensor], count: float = 3.0, **hyper: Any) -> Tensor:
    w, g, m, v = tensors
    steps = torch.tensor(count)
    adam_([w], [g], [m], [v], [steps], **{**HYPER, **hyper})
    return steps


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_equals_torch_over_many_steps(decoupled: bool) -> None:
    weights = [torch.randn(numel) for numel in (1, 7, 64, 1001)]
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    moments = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    steps = [torch.zeros(()) for _ in weights]
    for _ in range(10):
        grads = [torch.randn_like(w) for w in weights]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        adam_(weights, grads, *moments, steps, **{**HYPER, "decoupled": decoupled})
    for w, p, count in zip(weights, theirs, steps, strict=True):
        assert torch.equal(w, p)
        assert count == optimizer.state[p]["step"] == 10


def test_adam_against_the_formula_in_float64() -> None:
    w, g, m, v = (t.double() for t in state(500))
    t, beta1, beta2, lr = 4, HYPER["beta1"], HYPER["beta2"], HYPER["lr"]
    m2, v2 = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    expected = w * (1 - lr * 0.1) - lr * (m2 / (1 - beta1**t)) / ((v2 / (1 - beta2**t)).sqrt() + 1e-8)
    step([w, g, m, v])
    torch.testing.assert_close(w, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(numel=st.integers(1, 3000), offset=st.integers(0, 40), unit=st.sampled_from([64, 128, 1024]))
def test_a_chunk_or_a_view_gives_the_bits_of_the_whole(numel: int, offset: int, unit: int) -> None:
    whole = state(numel)
    pieces = [t.clone() for t in whole]
    shifted = [torch.cat([torch.zeros(offset), t])[offset:] for t in whole]
    step(whole)
    step(shifted)
    for start in range(0, numel, unit):
        step([t[start : start + unit] for t in pieces])
    for a, b, c in zip(whole, pieces, shifted, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_threads_change_no_bit() -> None:
    results = []
    for count in (1, 2, 3):
        tensors = state(1_000_003)
        with threads(count):
            step(tensors)
        results.append(tensors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_found_inf_changes_nothing_and_takes_the_step_back() -> None:
    tensors = state(100)
    before = [t.clone() for t in tensors]
    assert step(tensors, found_inf=torch.ones(())) == 3
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert step(tensors, found_inf=torch.zeros(())) == 4
    assert not torch.equal(tensors[0], before[0])


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_torch_from_the_first_step(momentum: float, nesterov: bool) -> None:
    w = torch.randn(1001)
    p, buffer = torch.nn.Parameter(w.clone()), torch.zeros_like(w)
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01, fused=True)
    for _ in range(5):
        g = torch.randn_like(w)
        p.grad = g.clone()
        optimizer.step()
        buffers = [buffer] if momentum else []
        sgd_([w], [g], buffers, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01)
        assert torch.equal(w, p)
