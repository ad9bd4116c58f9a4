"""Known answers of Philox and SplitMix64; slices, tiles and dtypes of one z; its moments and correlations."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_offload.numerics import noise as module
from lightning_offload.numerics.noise import LANES, TILE, Draw, noise, philox, random_bits, splitmix64

DISTRIBUTIONS = ("popcount", "gaussian", "rademacher")
DRAW = Draw(seed=42, step=3, parameter=7, direction=1)
N = 200_000
KURTOSIS = {"popcount": 3 - 2 / 64, "gaussian": 3.0, "rademacher": 1.0}
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
@pytest.mark.parametrize("mixed", range(16))
def test_philox_known_answers(counter: str, key: str, answer: str, mixed: int) -> None:
    """Each word as an int or as a tensor."""
    words = [int(word, 16) for word in counter.split()]
    given_words = [torch.tensor([w, w]) if mixed >> i & 1 else w for i, w in enumerate(words)]
    found = philox(*given_words, *(int(word, 16) for word in key.split()))
    for word, expected in zip(found, answer.split(), strict=True):
        assert torch.as_tensor(word).unique().tolist() == [int(expected, 16)]
    for word, w in zip(given_words, words, strict=True):
        assert torch.as_tensor(word).unique().tolist() == [w]


def test_splitmix64_known_answer_and_keys_that_do_not_collide() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(2**64) == splitmix64(0)
    keys = {Draw(seed, step, 0).key for seed in range(64) for step in range(64)}
    assert len(keys) == 64 * 64


def reference(draw: Draw, element: int, distribution: str) -> float:
    """Popcount and Rademacher by hand, one element at a time."""
    call, lane = divmod(element, LANES[distribution])
    words = philox(call & 0xFFFFFFFF, call >> 32, draw.parameter, draw.direction, *draw.key)
    if distribution == "popcount":
        return (sum(int(word).bit_count() for word in words[2 * lane : 2 * lane + 2]) - 32) / 4
    return 2 * (int(words[lane // 32]) >> lane % 32 & 1) - 1


@pytest.mark.parametrize("distribution", ["popcount", "rademacher"])
@pytest.mark.parametrize("start", [0, 5, TILE - 3, 2**33 - 300, 2**39 + 11])
def test_elements_by_hand(distribution: module.Distribution, start: int) -> None:
    found = noise(DRAW, start, 600, distribution, device="cpu")
    assert found.tolist() == [reference(DRAW, start + i, distribution) for i in range(600)]


def whole(kind: str) -> Tensor:
    if kind == "bits":
        return random_bits(DRAW, 0, TILE + 5000, device="cpu")
    return noise(DRAW, 0, TILE + 5000, kind, device="cpu")  # type: ignore[arg-type]


def part(kind: str, start: int, numel: int) -> Tensor:
    if kind == "bits":
        return random_bits(DRAW, start, numel, device="cpu")
    return noise(DRAW, start, numel, kind, device="cpu")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wholes() -> dict[str, Tensor]:
    return {kind: whole(kind) for kind in LANES}


@pytest.mark.parametrize("kind", LANES)
@settings(max_examples=40, deadline=None)
@given(start=st.one_of(st.integers(0, 700), st.integers(TILE - 700, TILE + 700)), numel=st.integers(0, 4000))
def test_any_slice_has_the_bits_of_the_whole(kind: str, wholes: dict[str, Tensor], start: int, numel: int) -> None:
    assert torch.equal(part(kind, start, numel), wholes[kind][start : start + numel])


@pytest.mark.parametrize("kind", LANES)
def test_tiles_and_threads_do_not_matter(kind: str, wholes: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    for tile in (2**12, 2**18):
        monkeypatch.setattr(module, "TILE", tile)
        assert torch.equal(whole(kind), wholes[kind])
    torch.set_num_threads(2)
    try:
        assert torch.equal(whole(kind), wholes[kind])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("distribution", list(LANES)[:3])
def test_the_default_dtype_does_not_matter(distribution: module.Distribution) -> None:
    wanted = noise(Draw(3, 1, 2), 0, 1000, distribution, device="cpu")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(noise(Draw(3, 1, 2), 0, 1000, distribution, device="cpu"), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@every_distribution
def test_a_dtype_is_the_rounding_of_fp32(distribution: module.Distribution) -> None:
    wide = noise(DRAW, 3, 9000, distribution, device="cpu")
    for dtype in (torch.bfloat16, torch.float16):
        narrow = noise(DRAW, 3, 9000, distribution, device="cpu", dtype=dtype)
        assert torch.equal(narrow, wide.to(dtype))
        assert distribution == "gaussian" or torch.equal(narrow.float(), wide)


@every_distribution
def test_moments_are_within_five_sigma(distribution: module.Distribution) -> None:
    z = noise(DRAW, 0, N, distribution, device="cpu").double()
    kurtosis = KURTOSIS[distribution]
    assert abs(z.mean()) < 5 / N**0.5
    assert abs(z.square().mean() - 1) <= 5 * ((kurtosis - 1) / N) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / N) ** 0.5
    assert abs((z**4).mean() - kurtosis) <= 5 * (96 / N) ** 0.5


@every_distribution
def test_what_differs_in_anything_is_not_correlated(distribution: module.Distribution) -> None:
    draws = [DRAW, Draw(43, 3, 7, 1), Draw(42, 4, 7, 1), Draw(42, 3, 8, 1), Draw(42, 3, 7, 0), Draw(3, 42, 7, 1)]
    zs = torch.stack([noise(draw, 0, N, distribution, device="cpu") for draw in draws]).double()
    products = zs @ zs.T / N
    assert (products - torch.diag(products.diag())).abs().max() < 5 / N**0.5
    for lag in (1, 2, 3, 4, 32, 64, 128):
        assert abs((zs[0, lag:] * zs[0, :-lag]).mean()) < 5 / (N - lag) ** 0.5


@pytest.mark.parametrize("distribution", ["popcount", "gaussian"])
def test_energies_are_not_correlated_either(distribution: module.Distribution) -> None:
    square = noise(DRAW, 0, N, distribution, device="cpu").double().square() - 1
    for lag in (1, 2, 3, 4):
        assert abs((square[lag:] * square[:-lag]).mean()) < 5 * 2 / (N - lag) ** 0.5


def test_gaussian_follows_its_law() -> None:
    z = noise(DRAW, 0, N, "gaussian", device="cpu").double().sort().values
    expected = torch.special.ndtr(z)
    distance = (expected - (torch.arange(N) + 0.5) / N).abs().max()
    assert distance < 1.95 / N**0.5  # Kolmogorov: one in a thousand
    assert z.isfinite().all()


def test_bits_of_rounding_are_uniform_and_no_part_of_any_noise() -> None:
    bits = random_bits(DRAW, 0, 2**18, device="cpu")
    assert bits.min() >= 0
    assert bits.max() < 2**16
    counts = torch.bincount(bits >> 8, minlength=256)
    assert (counts - 1024).abs().max() < 5 * 32
    assert abs((bits & 1).double().mean() - 0.5) < 5 * 0.5 / 2**9
    for distribution in DISTRIBUTIONS:
        z = noise(DRAW, 0, 2**18, distribution, device="cpu")  # type: ignore[arg-type]
        uniform = (bits.double() + 0.5) / 2**15 - 1
        assert abs((uniform * z).mean()) < 5 / 3**0.5 / 2**9


@pytest.mark.parametrize("words", [{"parameter": 2**32}, {"parameter": -1}, {"direction": 2**31}])
def test_words_that_would_wrap_are_refused(words: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match="word"):
        Draw(**{"seed": 0, "step": 1, "parameter": 0, **words})


@given(start=st.integers(0, 5 * TILE), numel=st.integers(0, 5 * TILE))
def test_tiles_cover_and_end_at_multiples(start: int, numel: int) -> None:
    found = list(module.tiles(start, numel))
    assert sum(end - first for first, end in found) == numel
    assert all(before[1] == after[0] and after[0] % TILE == 0 for before, after in pairwise(found))
    assert not found or (found[0][0] == start and max(end - first for first, end in found) <= TILE)
