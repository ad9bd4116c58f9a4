"""Norms and clipping with torch's bits; masters that follow their weights."""

from __future__ import annotations

import pytest
import torch

from lightning_offload.numerics.norms import adopt_, clip_coefficient, gradient_norm, total_norm


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e9])
def test_clipping_has_torchs_bits(max_norm: float) -> None:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (1001,), (64, 64), ())]
    for p in parameters:
        p.grad = torch.randn_like(p) * 3
    grads = [p.grad.clone() for p in parameters]
    total = total_norm([gradient_norm(g) for g in grads])
    coefficient = clip_coefficient(total, max_norm)
    assert torch.equal(torch.nn.utils.clip_grad_norm_(parameters, max_norm), total)
    for p, g in zip(parameters, grads, strict=True):
        assert torch.equal(p.grad, g * coefficient)


def test_norms_of_16_bit_gradients_are_fp32() -> None:
    gradient = torch.randn(10_000).to(torch.bfloat16)
    norm = gradient_norm(gradient)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, gradient.double().norm().float(), rtol=1e-5, atol=0)


def test_adoption_keeps_the_finer_master_where_nothing_was_written() -> None:
    master = torch.randn(1000)
    fine = master.clone()
    weight = master.to(torch.bfloat16)
    weight[:3] = torch.tensor([1.0, -0.0, float("nan")])
    adopt_(master, weight)
    assert torch.equal(master[3:], fine[3:])
    assert master[0] == 1.0
    assert master[2].isnan()
    same = torch.randn(10)
    adopt_(same, torch.ones(10))
    assert torch.equal(same, torch.ones(10))
