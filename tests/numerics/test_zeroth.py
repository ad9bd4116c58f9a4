"""Perturbing and updating: the equations, rounding, order, slices; estimates of derivatives; memory of a tile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_offload.numerics import noise as noise_module
from lightning_offload.numerics import zeroth
from lightning_offload.numerics.noise import Distribution, Draw, noise, random_bits
from lightning_offload.numerics.rounding import stochastic
from lightning_offload.numerics.zeroth import DTYPES, Copy, Update, advance_, perturb, update_

DISTRIBUTIONS: tuple[Distribution, ...] = ("popcount", "gaussian", "rademacher")
N = 5003
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_module, "TILE", 2048)


def weights(dtype: torch.dtype, numel: int = N) -> Tensor:
    return (torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def updates(count: int = 3) -> list[Update]:
    signs, steps = (-1, 1), range(count)
    return [Update(Draw(9, k, 4, k % 2), 7.3 * signs[k % 2], 1e-3 * k, 0.1 * (k % 2)) for k in steps]


@every_dtype
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@every_distribution
def test_perturb_rounds_once_from_fp32(dtype: torch.dtype, out_dtype: torch.dtype, distribution: Distribution) -> None:
    weight, draw = weights(dtype).view(-1, 1), Draw(1, 2, 3)
    before, out = weight.clone(), torch.empty(N, dtype=out_dtype)
    z = noise(draw, 0, N, distribution, device="cpu")
    for scale in (1e-3, -1e-3):
        perturb(weight, draw, scale, out, distribution)
        assert torch.equal(out, (weight.view(-1).float() + z * scale).to(out_dtype))
    assert torch.equal(weight, before)


@every_dtype
@every_distribution
def test_updates_are_rounded_one_after_the_other(dtype: torch.dtype, distribution: Distribution) -> None:
    weight = expected = weights(dtype)
    weight = weight.clone()
    for u in updates():
        wide = expected.float()
        change = noise(u.draw, 0, N, distribution, device="cpu") * u.coefficient + wide * u.weight_decay
        expected = (wide - change * u.lr).to(dtype)
    update_(weight, updates(), distribution, "nearest")
    assert torch.equal(weight, expected)


@every_dtype
def test_stochastic_updates_follow_from_the_bits_of_their_draw(dtype: torch.dtype) -> None:
    weight = weights(dtype)
    (u,) = updates(1)
    u = Update(u.draw, 7.3, 1e-5, 0.0)
    wide = weight.float() - noise(u.draw, 0, N, "popcount", device="cpu") * u.coefficient * u.lr
    expected = stochastic(wide, random_bits(u.draw, 0, N, device="cpu"), dtype)
    update_(weight, [u], "popcount", "stochastic")
    assert torch.equal(weight, expected)
    assert dtype == torch.float32 or not torch.equal(weight, wide.to(dtype))


@every_dtype
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_how_many_entries_a_call_applies_does_not_matter(dtype: torch.dtype, rounding: zeroth.Rounding) -> None:
    together, apart, at_once = (weights(dtype) for _ in range(3))
    update_(together, updates(5), "popcount", rounding)
    for u in updates(5):
        update_(apart, [u], "popcount", rounding)
    assert torch.equal(together, apart)
    plus, minus = torch.empty_like(together), torch.empty_like(together)
    draw = Draw(9, 6, 4)
    advance_(at_once, updates(5), draw, (Copy(1e-3, plus), Copy(-1e-3, minus)), "popcount", rounding)
    assert torch.equal(at_once, together)
    for scale, copy in ((1e-3, plus), (-1e-3, minus)):
        perturb(together, draw, scale, expected := torch.empty_like(copy), "popcount")
        assert torch.equal(copy, expected)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tiles_do_not_matter(rounding: zeroth.Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = weights(torch.bfloat16), weights(torch.bfloat16)
    update_(small, updates(), "gaussian", rounding)
    monkeypatch.setattr(noise_module, "TILE", 2**17)
    update_(large, updates(), "gaussian", rounding)
    assert torch.equal(small, large)


def test_no_gradient_still_decays_and_no_rate_changes_nothing() -> None:
    weight = weights(torch.float32)
    before = weight.clone()
    update_(weight, [Update(Draw(0, 1, 0), 0.0, 0.5, 0.1)], "popcount", "nearest")
    assert torch.equal(weight, before - before * 0.1 * 0.5)
    for dtype in DTYPES:
        weight, before = weights(dtype), weights(dtype)
        for rounding in ("nearest", "stochastic"):
            update_(weight, [Update(Draw(0, step, 0), 5.0, 0.0, 0.1) for step in range(100)], "popcount", rounding)  # type: ignore[arg-type]
        assert torch.equal(weight, before)


def test_parameters_that_require_gradients_and_scalars() -> None:
    parameter = torch.nn.Parameter(torch.ones(()))
    update_(parameter, [Update(Draw(0, 1, 0), 1.0, 0.5, 0.0)], "rademacher", "nearest")
    assert parameter.item() in (0.5, 1.5)
    assert parameter.grad_fn is None


def test_what_the_kernel_would_misread_is_refused() -> None:
    with pytest.raises(AssertionError, match="float64"):
        update_(torch.zeros(3, dtype=torch.float64), [], "popcount", "nearest")
    with pytest.raises(AssertionError, match="strides"):
        update_(torch.zeros(3, 2).T, [], "popcount", "nearest")
    with pytest.raises(AssertionError, match="4 elements for 3"):
        perturb(torch.zeros(3), Draw(0, 1, 0), 1e-3, torch.zeros(4), "popcount")
    with pytest.raises(AssertionError, match="draw"):
        advance_(torch.zeros(3), [], None, [Copy(1e-3, torch.zeros(3))], "popcount", "nearest")


@every_distribution
def test_the_mean_over_draws_is_the_gradient(distribution: Distribution) -> None:
    """z (z . a) has the mean a and the second moment (d + kurtosis) a^2 at most: a linear loss."""
    d, draws = 64, 4000
    a = torch.randn(d, generator=torch.Generator().manual_seed(1))
    zs = torch.stack([noise(Draw(5, 1, 0, k), 0, d, distribution, device="cpu") for k in range(draws)])
    estimate = (zs * (zs @ a)[:, None]).mean(0)
    assert (estimate - a).norm() < 5 * a.norm() * ((d + 2) / draws) ** 0.5 / math.sqrt(2)


def test_the_projected_gradient_is_that_of_autograd() -> None:
    weight = torch.nn.Parameter(weights(torch.float32, 64))
    draw, plus, minus = Draw(5, 1, 0), torch.empty(64), torch.empty(64)

    def loss(w: Tensor) -> Tensor:
        return (w.double() * torch.arange(64)).sin().sum()

    loss(weight).backward()
    perturb(weight, draw, 1e-3, plus, "popcount")
    perturb(weight, draw, -1e-3, minus, "popcount")
    g = (loss(plus) - loss(minus)) / 2e-3
    assert weight.grad is not None
    expected = (weight.grad * noise(draw, 0, 64, "popcount", device="cpu")).sum()
    assert abs(g - expected) < 1e-2 * abs(expected)  # O(eps^2), and fp32 weights


class Allocations(TorchDispatchMode):
    """The largest storage that any operation makes, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


@every_distribution
def test_temporaries_are_those_of_a_tile(distribution: Distribution) -> None:
    weight, copies = weights(torch.bfloat16, 2**16), [Copy(s, torch.empty(2**16)) for s in (1e-3, -1e-3)]
    with Allocations() as made:
        advance_(weight, updates(), Draw(0, 1, 0), copies, distribution, "stochastic")
    assert made.largest <= 8 * 2048  # int64 of a tile, while the weight has 32 tiles


def every_half() -> Iterator[Tensor]:
    """All values of bf16 and fp16."""
    for dtype in (torch.bfloat16, torch.float16):
        yield torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def test_what_the_dtype_holds_stays() -> None:
    for values in every_half():
        for bits in (0, 1, 2**15, 2**16 - 1):
            rounded = stochastic(values.float(), torch.full((2**16,), bits, dtype=torch.int32), values.dtype)
            assert torch.equal(rounded.isnan(), values.isnan())
            kept = ~values.isnan()
            assert torch.equal(rounded.view(torch.int16)[kept], values.view(torch.int16)[kept])


EVERY = torch.arange(2**16, dtype=torch.int32)


@pytest.mark.parametrize(
    ("dtype", "lower", "step"),
    [
        (torch.bfloat16, 1.0, 2**-7),
        (torch.bfloat16, 255.0, 1.0),
        (torch.bfloat16, 0.0, 2.0**-133),
        (torch.bfloat16, 3.3e-39, 2.0**-133),
        (torch.float16, 1.0, 2**-10),
        (torch.float16, 65472.0, 32.0),
        (torch.float16, 2**-14, 2**-24),
        (torch.float16, 1023 * 2**-24, 2**-24),
        (torch.float16, 5 * 2**-24, 2**-24),
        (torch.float16, 0.0, 2**-24),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.875])
def test_the_expectation_over_all_bits_is_the_value(
    dtype: torch.dtype, lower: float, step: float, sign: int, share: float
) -> None:
    lower = float(torch.tensor(lower, dtype=dtype))
    value = torch.tensor(sign * (lower + share * step))
    rounded = stochastic(value.expand(2**16).contiguous(), EVERY, dtype).double()
    assert set((rounded * sign).tolist()) == {lower, lower + step}
    assert float(rounded.mean()) == float(value)


def test_below_the_grid_of_the_bits_the_expectation_misses_by_half_of_it() -> None:
    for share in (2**-18, 0.3, 1 - 2**-18):
        value = torch.tensor(share * 2**-24)
        rounded = stochastic(value.expand(2**16).contiguous(), EVERY, torch.float16).double()
        assert abs(float(rounded.mean() - value.double())) <= 2**-17 * 2**-24


def test_infinities_nan_and_beyond_the_largest() -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, -math.nan])
    special[3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN whose bits would wrap to zero
    for dtype, bits in itertools.product((torch.bfloat16, torch.float16), (0, 2**16 - 1)):
        rounded = stochastic(special, torch.full((4,), bits, dtype=torch.int32), dtype)
        assert rounded[:2].tolist() == [math.inf, -math.inf]
        assert rounded[2:].isnan().all()
    between = torch.full((2**16,), 65512.0)
    outcome = stochastic(between, EVERY, torch.float16)
    assert set(outcome.tolist()) == {65504.0, math.inf}
    assert int(outcome.isinf().sum()) == 2**14
    assert stochastic(between * 2, EVERY, torch.float16).isinf().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [1.2345678, -0.013, 3.21e-6, 1e-7])
def test_many_draws_are_within_four_sigma(dtype: torch.dtype, value: float) -> None:
    values = torch.full((100_000,), value)
    rounded = stochastic(values, random_bits(Draw(3, 1, 0), 0, 100_000, device="cpu"), dtype).double()
    assert float(rounded.std()) > 0
    assert abs(float(rounded.mean() - values[0].double())) < 4 * float(rounded.std()) / 100_000**0.5
