"""Stochastic rounding of fp32 to bf16."""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic_round_(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """``target <- source`` up or down at random, so that the expectation is ``source`` exactly.

    The upper half of the bits is kept, one more where the lower half exceeds 16 random bits: 20 B of memory traffic
    per element. Little-endian hosts only.

    Args:
        target: bf16, any strides.
        source: fp32, contiguous, same shape; destroyed.
        generator: on the same device.
    """
    assert target.dtype == torch.bfloat16, f"stochastic rounding is for bfloat16, not {target.dtype}"
    assert source.dtype == torch.float32, f"stochastic rounding is from float32, not {source.dtype}"
    halves = source.view(torch.int16).unflatten(-1, (-1, 2))
    lower, upper = halves.unbind(-1)
    # CUDA writes NaN as 0x7fffffff, which would carry over into -0.0; infinities have a zero lower half. A finite value
    # beyond the largest bf16 becomes that or infinity, as likely as its place between them says.
    upper.clamp_(max=0x7FFE)
    lower.bitwise_xor_(-0x8000)  # unsigned order, in signed numbers
    words = torch.empty((source.numel() + 1) // 2, dtype=torch.int32, device=source.device)
    noise = words.random_(-(2**31), 2**31, generator=generator).view(torch.int16)[: source.numel()].view(source.shape)
    torch.add(upper, lower > noise, out=target.view(torch.int16))
