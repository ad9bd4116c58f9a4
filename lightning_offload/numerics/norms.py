"""Norms, the clip coefficient, and masters that follow their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_norm(gradient: Tensor) -> Tensor:
    """2-norm of one gradient (any shape) as an fp32 scalar, accumulated in fp32.

    Differs from ``torch.nn.utils.clip_grad_norm_`` for 16-bit gradients, whose norms torch rounds to 16 bits.
    """
    dtype = torch.float32 if gradient.dtype in (torch.bfloat16, torch.float16) else None
    norm: Tensor = torch.linalg.vector_norm(gradient, 2, dtype=dtype)
    return norm


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """2-norm of all gradients from their norms, in this order, as torch combines them.

    The root of summed squares would give other bits.
    """
    total: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), 2)
    return total


def clip_coefficient(total: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / (total + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` has it."""
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)


def adopt_(master: Tensor, weight: Tensor) -> None:
    """Take over what somebody else wrote into a rounded weight; in place.

    Where ``round(master)`` equals ``weight`` the master keeps its finer value; elsewhere it becomes the weight.

    Args:
        master: fp32, any shape.
        weight: same shape, any floating dtype.
    """
    if master.dtype == weight.dtype:
        master.copy_(weight)
    else:
        torch.where(master.to(weight.dtype) == weight, master, weight.to(master.dtype), out=master)
