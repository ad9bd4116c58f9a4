"""Stochastic rounding to bf16 by dither: the noise is under the weight before anything is added to it."""

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
