"""Stochastic rounding by dither: all 65,536 lower halves of a weight are tried, so expectations are exact."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_offload.numerics.rounding import dithered
from tests.numerics.projectors import seeded

EVERY = torch.arange(-(2**15), 2**15).to(torch.int16)
GRID = 2**-15
"""Of an ulp: what fp32 itself rounds away."""
normal = st.tuples(st.integers(128, 255), st.integers(-30, 30), st.sampled_from([-1, 1]))


def value_of(parts: tuple[int, int, int]) -> float:
    mantissa, exponent, sign = parts
    return sign * mantissa * 2.0 ** (exponent - 7)


def ulp(value: float) -> float:
    return 2.0 ** (math.frexp(value)[1] - 8)


def outcomes(weight: float, update: float, decay: float = 1.0) -> Tensor:
    """What the weight becomes, once for each noise that there is; fp64."""
    wide, upper = dithered(torch.full((2**16,), weight, dtype=torch.bfloat16), seeded())
    wide.view(torch.int16)[::2] = EVERY
    wide.mul_(decay).add_(update)
    return upper.double()


def bias(results: Tensor, expected: float) -> float:
    """Of the expectation, positive away from zero."""
    return math.copysign(1, expected) * (float(results.mean()) - expected)


@settings(max_examples=150, deadline=None)
@given(parts=normal, position=st.floats(0, 1))
def test_the_expectation_is_exact_in_the_binade_of_the_weight(parts: tuple[int, int, int], position: float) -> None:
    weight = value_of(parts)
    step, least = ulp(weight), 2.0 ** parts[1]
    size = least + round(position * 127 * 2**16) / 2**16 * step  # so that W + U + nu < 2 least, on the grid of fp32
    expected = math.copysign(size, weight)
    results = outcomes(weight, expected - weight)
    assert float(results.mean()) == expected
    assert float(results.max() - results.min()) in (0.0, step)


@settings(max_examples=300, deadline=None)
@given(parts=normal, share=st.floats(2**-12, 2**12), sign=st.sampled_from([-1, 1]))
def test_beyond_the_binade_the_bias_is_bounded(parts: tuple[int, int, int], share: float, sign: int) -> None:
    weight = value_of(parts)
    update = float(torch.tensor(sign * share * ulp(weight)))
    results = outcomes(weight, update)
    step, far, found = ulp(weight), float(results.abs().max()), bias(results, weight + update)
    error = GRID * max(step, ulp(far))
    if float((results * weight).min()) < 0:
        assert abs(found) < 2**-7 * abs(update)
    elif update * weight > 0:
        assert -(ulp(far) - step) - error <= found <= error
        assert abs(update) > step or abs(found) <= error
    else:
        assert -error <= found <= step / 2 + error


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5])
def test_a_power_of_two_moves_towards_zero_half_as_fast(share: float, sign: int) -> None:
    results = outcomes(sign * 4.0, -sign * share * ulp(4.0))
    assert bias(results, sign * (4.0 - share * ulp(4.0))) == pytest.approx(share * ulp(4.0) / 2, rel=1e-2)


@pytest.mark.parametrize("update", [1.0, -3.1415927, 1e-30, 1.9999999])
def test_from_zero_less_than_an_ulp_is_lost(update: float) -> None:
    for zero in (0.0, -0.0):
        results = outcomes(zero, update)
        assert -(2**-7) * abs(update) < bias(results, update) <= 0


@settings(max_examples=100, deadline=None)
@given(parts=normal, share=st.floats(-3, 3), rate=st.floats(1e-7, 0.02))
def test_decay_counts_for_little_more_than_it_should(parts: tuple[int, int, int], share: float, rate: float) -> None:
    weight, decay = value_of((180, *parts[1:])), float(torch.tensor(1 - rate))
    update = float(torch.tensor(share * ulp(weight)))
    found = bias(outcomes(weight, update, decay), decay * weight + update)
    error = GRID * ulp(weight)
    assert -(2**-7) * (1 - decay) * abs(weight) / decay - error <= found <= error


@pytest.mark.parametrize("value", [1.0078125, -3.140625, 1e-30, 65536.5])
def test_ten_thousand_draws_are_within_four_sigma(value: float) -> None:
    weight = torch.full((10_000,), value * 1.1, dtype=torch.bfloat16)
    expected = float(weight[0]) + 0.3 * ulp(value)
    wide, upper = dithered(weight, seeded())
    wide.add_(0.3 * ulp(value))
    results = upper.double()
    assert float(results.std()) > 0
    assert abs(float(results.mean()) - expected) <= 4 * float(results.std()) / 100


def test_every_lower_half_comes_as_often() -> None:
    wide, _ = dithered(torch.ones(2**18, dtype=torch.bfloat16), seeded())
    counts = torch.bincount((wide.view(torch.int16)[::2].int() + 2**15) >> 8, minlength=256)
    assert (counts - 1024).abs().max() < 5 * 32
    low = wide.view(torch.int32) & 1
    assert abs(float(low.double().mean()) - 0.5) < 5 * 0.5 / 2**9


def test_without_an_update_nothing_changes() -> None:
    weight = EVERY.view(torch.bfloat16)
    weight = weight[weight.isfinite()]
    assert len(weight) > 65_000
    for seed in range(20):
        wide, upper = dithered(weight, seeded(seed))
        assert torch.equal(upper.view(torch.int16), weight.view(torch.int16))
        wide.mul_(1.0).add_(0.0)
        assert torch.equal(upper, weight)


def test_infinities_and_nan_of_the_update_reach_the_weight() -> None:
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)  # CUDA's, x86's
    update = torch.cat([nan, torch.tensor([math.inf, -math.inf])])
    for seed in range(20):
        wide, upper = dithered(torch.full((5,), 1.5, dtype=torch.bfloat16), seeded(seed))
        wide.add_(update)
        assert upper[:3].isnan().all()
        assert upper[3:].tolist() == [math.inf, -math.inf]
        wide.copy_(update)  # as it would be written by CUDA
        assert upper[:3].isnan().all()


def test_beyond_the_largest_bf16_it_becomes_that_and_beyond_fp32_infinity() -> None:
    largest = torch.finfo(torch.bfloat16).max
    assert set(outcomes(largest, ulp(largest) / 4).tolist()) == {largest, math.inf}
    assert set(outcomes(largest / 2, largest).tolist()) == {math.inf}
    assert set(outcomes(0.0, torch.finfo(torch.float32).max).tolist()) == {largest}


def test_a_seed_decides_every_bit_and_strides_do_not_matter() -> None:
    weight = torch.randn(33, 17, generator=seeded()).to(torch.bfloat16)
    first = dithered(weight, seeded())[0]
    assert torch.equal(first, dithered(weight, seeded())[0])
    assert not torch.equal(first, dithered(weight, seeded(1))[0])
    wide = torch.zeros(33, 40, dtype=torch.bfloat16)
    wide[:, 5:22] = weight
    assert torch.equal(dithered(wide[:, 5:22], seeded())[0], first)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(AssertionError, match="float16"):
        dithered(torch.zeros(3, dtype=torch.float16), seeded())
