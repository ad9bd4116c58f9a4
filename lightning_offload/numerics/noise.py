"""Counter-based noise: any element of any ``z`` on its own, with the same bits in any order, slice and tile.

Philox4x32-10 (Salmon et al., SC 2011) keyed by (seed, step), its counter (call low, call high, parameter, direction).
One call gives four 32-bit words, that is `LANES` consecutive elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["popcount", "gaussian", "rademacher"]
Word = Tensor | int

LANES: dict[str, int] = {"popcount": 2, "gaussian": 4, "rademacher": 128, "bits": 8}
"""Elements of one call."""
TILE = 2**17
"""Elements computed at once, at absolute multiples: smaller tiles cost dispatch, larger ones leave the cache."""
ROUNDING_DOMAIN = 2**31
"""Added to the direction for the bits of stochastic rounding, so that they are no part of any ``z``."""
_LOW = 2**32 - 1
_ALIGNED = 16  # calls: vectorised logarithms see the same lanes whatever the slice


@dataclass(frozen=True)
class Draw:
    """Which ``z``.

    Attributes:
        seed: Of the run, 64 bits.
        step: Optimizer step, from 1.
        parameter: Its place in canonical order, 32 bits.
        direction: 31 bits.
    """

    seed: int
    step: int
    parameter: int
    direction: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.parameter <= _LOW, f"parameter {self.parameter} is no 32-bit word"
        assert 0 <= self.direction < ROUNDING_DOMAIN, f"direction {self.direction} is no 31-bit word"

    @property
    def key(self) -> tuple[int, int]:
        """The two words, low and high, of ``splitmix64(splitmix64(seed) ^ step)``."""
        key = splitmix64(splitmix64(self.seed) ^ self.step)
        return key & _LOW, key >> 32


def splitmix64(x: int) -> int:
    """One output of SplitMix64 (Steele et al., OOPSLA 2014) from the state ``x`` modulo 2^64."""
    full = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & full
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & full
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & full
    return x ^ x >> 31


def philox(c0: Word, c1: Word, c2: Word, c3: Word, k0: int, k1: int) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10.

    Args:
        c0: first word of the counter: an int, or int64 tensor of values below 2^32; all tensors have one shape.
        c1: second word.
        c2: third word.
        c3: fourth word.
        k0: first word of the key.
        k1: second word.

    Returns:
        Four words, as the counter's.
    """
    c0, c1, c2, c3 = (c.clone() if isinstance(c, Tensor) else c for c in (c0, c1, c2, c3))
    for turn in range(10):
        c1 ^= (k0 + turn * 0x9E3779B9) & _LOW
        c3 ^= (k1 + turn * 0xBB67AE85) & _LOW
        c0 *= 0xD2511F53
        c2 *= 0xCD9E8D57
        high0, high2 = c2 >> 32, c0 >> 32
        high0 ^= c1
        high2 ^= c3
        high0 &= _LOW
        high2 &= _LOW
        c0, c1, c2, c3 = high0, _word(c2), high2, _word(c0)
    return c0, c1 & _LOW, c2, c3 & _LOW


def _word(product: Word) -> Word:
    """Of a tensor the upper half may stay: what it touches is masked before it is multiplied."""
    return product if isinstance(product, Tensor) else product & _LOW


def noise(
    draw: Draw,
    start: int,
    numel: int,
    distribution: Distribution,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``z[start : start + numel]``, mean 0 and variance 1.

    popcount: ``(popcount of 64 bits - 32) / 4``, exact in bf16 and fp16, the same bits on every device; rademacher: -1
    or 1, likewise; gaussian: Box-Muller in fp32, within ulps between devices.

    Args:
        draw: which ``z``.
        start: first element.
        numel: how many.
        distribution: see above.
        device: where to.
        dtype: floating; rounded to it.

    Returns:
        (numel,).
    """
    out = torch.empty(numel, dtype=dtype, device=device)
    for first, end in tiles(start, numel):
        out[first - start : end - start] = _SAMPLERS[distribution](draw, first, end, out.device)
    return out


def random_bits(draw: Draw, start: int, numel: int, *, device: torch.device | str) -> Tensor:
    """16 random bits for each element of ``draw``'s ``z``, independent of it.

    Args:
        draw: whose elements are rounded.
        start: first element.
        numel: how many.
        device: where to.

    Returns:
        (numel,) int32, 0 to 65,535.
    """
    out = torch.empty(numel, dtype=torch.int32, device=device)
    for first, end in tiles(start, numel):
        words, skip = _words(draw, first, end, "bits", out.device)
        halves = torch.stack(words, -1).to(torch.int32).view(torch.int16).flatten()
        out[first - start : end - start] = halves[skip : skip + end - first]
    return out.bitwise_and_(0xFFFF)


def tiles(start: int, numel: int) -> Iterator[tuple[int, int]]:
    """``start`` to ``start + numel`` cut at the multiples of `TILE`."""
    first, end = start, start + numel
    while first < end:
        cut = min(end, (first // TILE + 1) * TILE)
        yield first, cut
        first = cut


def _words(draw: Draw, first: int, end: int, lanes: str, device: torch.device) -> tuple[tuple[Tensor, ...], int]:
    """The words of all calls that elements ``first`` to ``end`` of one tile need, and how many elements to skip."""
    span = LANES[lanes] * _ALIGNED
    call, calls = first // span * _ALIGNED, (-(-end // span) - first // span) * _ALIGNED
    low = torch.arange(call & _LOW, (call & _LOW) + calls, device=device)
    direction = draw.direction + (ROUNDING_DOMAIN if lanes == "bits" else 0)
    words = philox(low, call >> 32, draw.parameter, direction, *draw.key)
    return tuple(torch.as_tensor(word, device=device) for word in words), first % span


def _popcount(draw: Draw, first: int, end: int, device: torch.device) -> Tensor:
    (a, b, c, d), skip = _words(draw, first, end, "popcount", device)
    z = torch.empty(len(a), 2, dtype=torch.float32, device=device)
    for lane, (high, low) in enumerate(((a, b), (c, d))):
        z[:, lane] = _bits_set(high.bitwise_left_shift_(32).bitwise_or_(low))
    return z.sub_(32).mul_(0.25).flatten()[skip : skip + end - first]


def _bits_set(x: Tensor) -> Tensor:
    """How many of the 64 bits of each element are set; ``x`` is overwritten."""
    x -= (x >> 1).bitwise_and_(0x5555555555555555)
    pairs = (x >> 2).bitwise_and_(0x3333333333333333)
    x.bitwise_and_(0x3333333333333333).add_(pairs)
    x += x >> 4
    return x.bitwise_and_(0x0F0F0F0F0F0F0F0F).mul_(0x0101010101010101).bitwise_right_shift_(56)


def _gaussian(draw: Draw, first: int, end: int, device: torch.device) -> Tensor:
    words, skip = _words(draw, first, end, "gaussian", device)
    z = torch.empty(len(words[0]), 4, dtype=torch.float32, device=device)
    for lane in (0, 2):
        radius = words[lane].float().add_(1).mul_(2**-32).log_().mul_(-2).sqrt_()
        angle = words[lane + 1].float().mul_(2 * math.pi * 2**-32)
        torch.mul(radius, angle.cos(), out=z[:, lane])
        torch.mul(radius, angle.sin_(), out=z[:, lane + 1])
    return z.flatten()[skip : skip + end - first]


def _rademacher(draw: Draw, first: int, end: int, device: torch.device) -> Tensor:
    words, skip = _words(draw, first, end, "rademacher", device)
    bits = torch.stack(words, -1).to(torch.int32).unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=device)
    return bits.bitwise_and_(1).flatten()[skip : skip + end - first].float().mul_(2).sub_(1)


_SAMPLERS = {"popcount": _popcount, "gaussian": _gaussian, "rademacher": _rademacher}
