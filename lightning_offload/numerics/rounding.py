"""Stochastic rounding: by dither, where the noise is under the weight before anything is added; and by given bits."""

from __future__ import annotations

import torch
from torch import Tensor


def dithered(weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``W + nu`` in fp32, nu uniform in [0, ulp(W)) away from zero, and what its truncation to bf16 will be.

    Nothing is rounded: W is the upper half of the bits, the generator gives the lower. Once U is added, the truncation
    is W' with E[W'] = W + U as fp32 holds it, if no W + nu + U leaves W's binade; without U it is W, always. Else, u
    and u' being the ulps of W and W', the expectation misses W + U

    - by at most u' - u towards zero where W grows into a higher binade, but by nothing for abs(U) <= u;
    - by at most u/2 away from zero where W shrinks into a lower one: a power of two moves half as fast for
      abs(U) <= u/2;
    - by less than 2^-7 abs(U) where the sign changes or W is zero, for U is then truncated.

    What overflows fp32 is infinite, what only bf16 cannot hold its largest number. An infinite W becomes NaN.
    Little-endian hosts only.

    Args:
        weight: bf16, any strides.
        generator: on the same device.

    Returns:
        fp32, contiguous; and a strided bf16 view of its upper halves.
    """
    assert weight.dtype == torch.bfloat16, f"stochastic rounding is for bfloat16, not {weight.dtype}"
    wide = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    lower, upper = wide.view(torch.bfloat16).unflatten(-1, (-1, 2)).unbind(-1)
    upper.copy_(weight)
    lower.view(torch.int16).random_(-(2**15), 2**15, generator=generator)
    return wide, upper


def stochastic(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` rounded to ``dtype``: up with the probability of their distance from the lower neighbour.

    What ``dtype`` holds stays. The expectation is the value itself, but for bf16 and fp16 subnormals whose distance is
    no multiple of 2^-16 of an ulp: there it misses by at most 2^-17 ulp. Infinity counts as the number that would
    follow the largest one; NaN stays NaN.

    Args:
        values: fp32.
        bits: int32, uniform in 0 to 65,535, as ``values``.
        dtype: bf16 or fp16; fp32 leaves the values as they are.

    Returns:
        ``dtype``, as ``values``.
    """
    if dtype == torch.float32:
        return values
    whole = values.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((whole + bits) & -(2**16)).view(torch.float32)
    else:
        assert dtype == torch.float16, f"stochastic rounding is for bfloat16 and float16, not {dtype}"
        rounded = ((whole + (bits >> 3)) & -(2**13)).view(torch.float32)
        rounded = torch.where(values.abs() < 2**-14, _half_subnormal(values, bits), rounded)
    return torch.where(values.isnan(), values, rounded).to(dtype)


def _half_subnormal(values: Tensor, bits: Tensor) -> Tensor:
    """Multiples of 2^-24, fp16's step below 2^-14."""
    size = values.abs() * 2**24
    lower = size.floor()
    up = (bits + 0.5) < (size - lower) * 2**16
    return ((lower + up) * 2**-24).copysign(values)
