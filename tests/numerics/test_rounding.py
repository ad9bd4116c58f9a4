"""Stochastic rounding: unbiased, exact where bf16 is, and safe at the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_offload.numerics.rounding import stochastic_round_
from tests.numerics.projectors import seeded


def rounded(source: Tensor, seed: int = 0) -> Tensor:
    target = torch.empty(source.shape, dtype=torch.bfloat16)
    stochastic_round_(target, source.clone(), seeded(seed))
    return target


@settings(max_examples=60, deadline=None)
@given(value=st.floats(2**-100, 2**100, width=32), negative=st.booleans(), seed=st.integers(0, 2**31))
def test_the_mean_of_many_is_the_value(value: float, negative: bool, seed: int) -> None:
    value = -value if negative else value
    count = 10_000
    results = rounded(torch.full((count,), value), seed).double()
    below, above = float(results.min()), float(results.max())
    step = 2.0 ** (math.frexp(value)[1] - 8)
    assert above - below in (0.0, step)
    share = (value / step) % 1
    sigma = step * math.sqrt(share * (1 - share) / count)
    assert abs(float(results.mean()) - value) <= 5 * sigma + 1e-12 * step  # 60 draws: five sigma, not four


@pytest.mark.parametrize("value", [1.00390625 + 2**-9, -3.1415927, 1e-30, 65536.5])
def test_ten_thousand_roundings_are_within_four_sigma(value: float) -> None:
    results = rounded(torch.full((10_000,), value)).double()
    fp32 = float(torch.tensor(value))
    sigma = float(results.std()) / 100
    assert abs(float(results.mean()) - fp32) <= 4 * sigma


def test_what_bf16_holds_stays_as_it_is() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()]
    assert len(finite) > 65_000
    for seed in range(3):
        assert torch.equal(rounded(finite.float(), seed).view(torch.int16), finite.view(torch.int16))


def test_every_lower_half_rounds_up_as_often_as_it_should() -> None:
    lower = torch.arange(2**16, dtype=torch.int32)
    source = (lower + 0x3F800000).view(torch.float32)
    ups = sum((rounded(source, seed).view(torch.int16) == 0x3F81).double() for seed in range(200)) / 200
    buckets = ups.view(256, 256).mean(1) - lower.double().view(256, 256).mean(1) / 2**16
    assert buckets.abs().max() < 5 * 0.5 / math.sqrt(256 * 200)


def test_infinities_and_nan_stay() -> None:
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)  # CUDA's, x86's
    for seed in range(20):
        assert rounded(nan, seed).isnan().all()
        infinities = torch.tensor([math.inf, -math.inf])
        assert torch.equal(rounded(infinities, seed).float(), infinities)


def test_beyond_the_largest_bf16_it_becomes_that_or_infinity() -> None:
    largest = torch.finfo(torch.bfloat16).max
    results = rounded(torch.full((1000,), torch.finfo(torch.float32).max))
    assert set(results.tolist()) <= {largest, math.inf}


def test_a_seed_decides_every_bit_and_strides_do_not_matter() -> None:
    source = torch.randn(33, 17, generator=seeded())
    first = rounded(source)
    assert torch.equal(first, rounded(source))
    assert not torch.equal(first, rounded(source, seed=1))
    wide = torch.zeros(33, 40, dtype=torch.bfloat16)
    stochastic_round_(wide[:, 5:22], source.clone(), seeded())
    assert torch.equal(wide[:, 5:22], first)
    assert wide[:, :5].count_nonzero() == wide[:, 22:].count_nonzero() == 0


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(AssertionError, match="float16"):
        stochastic_round_(torch.zeros(3, dtype=torch.float16), torch.zeros(3), seeded())
    with pytest.raises(AssertionError, match="float64"):
        stochastic_round_(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.float64), seeded())
