"""Zeroth-order steps with counter-based noise: perturbed copies and updates of one weight, tile by tile.

All in fp32, each multiplication and addition rounded by itself, in the order of the equations: torch's and the CUDA
form give the same bits (but for Gaussian noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_offload.numerics.noise import Distribution, Draw, noise, random_bits, tiles
from lightning_offload.numerics.rounding import stochastic

if TYPE_CHECKING:
    from lightning_offload.numerics.native.kernels import Kernels

Rounding = Literal["nearest", "stochastic"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Update:
    """One update of one parameter: ``w <- w - lr (coefficient z + weight_decay w)``.

    Attributes:
        draw: Which ``z``.
        coefficient: The projected gradient, divided by the number of directions.
        lr: Of the step that measured it.
        weight_decay: 0 leaves the term out.
    """

    draw: Draw
    coefficient: float
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Copy:
    """A perturbed copy: ``out = round(weight + scale z)``, of the weight's numel and any of `DTYPES`."""

    scale: float
    out: Tensor


def perturb(
    weight: Tensor,
    draw: Draw,
    scale: float,
    out: Tensor,
    distribution: Distribution,
    kernels: Kernels | None = None,
) -> None:
    """``out = round(weight + scale z)``; ``weight`` stays.

    Args:
        weight: contiguous, any shape, one of `DTYPES`.
        draw: which ``z``.
        scale: sign times eps.
        out: contiguous, of the weight's numel; rounded once, from fp32, to its own dtype.
        distribution: of ``z``.
        kernels: see `advance_`.
    """
    advance_(weight, (), draw, (Copy(scale, out),), distribution, "nearest", kernels)


def update_(
    weight: Tensor,
    updates: Sequence[Update],
    distribution: Distribution,
    rounding: Rounding,
    kernels: Kernels | None = None,
) -> None:
    """Applies ``updates`` one after the other, in place; rounded to the weight's dtype after each.

    Args:
        weight: contiguous, any shape, one of `DTYPES`.
        updates: in the order they were measured.
        distribution: of ``z``.
        rounding: ``"stochastic"`` rounds bf16 and fp16 by the bits that belong to the update's draw and the element:
            how many updates one call applies, and to which weight first, changes nothing.
        kernels: see `advance_`.
    """
    advance_(weight, updates, None, (), distribution, rounding, kernels)


def advance_(
    weight: Tensor,
    updates: Sequence[Update],
    draw: Draw | None,
    copies: Sequence[Copy],
    distribution: Distribution,
    rounding: Rounding,
    kernels: Kernels | None = None,
) -> None:
    """`update_`, then `perturb` into each of at most two ``copies``, with one pass over the weight.

    Beside the results it takes the memory of a few tiles. On CUDA, where Triton is installed, it takes none, and a pass
    for every eight updates.

    Args:
        weight: contiguous, any shape, one of `DTYPES`; written only if there are updates.
        updates: see `update_`.
        draw: which ``z`` the copies are perturbed by; None without copies.
        copies: see `perturb`.
        distribution: of every ``z``.
        rounding: of the updates.
        kernels: do it in one pass, on the CPU; Gaussian noise is then within 1e-6 of torch's.
    """
    for tensor in (weight, *(copy.out for copy in copies)):
        assert tensor.dtype in DTYPES, f"perturbed and updated in float32: {tensor.dtype} would be cut short"
        assert tensor.is_contiguous(), f"elements are counted in memory order: strides {tensor.stride()}"
        assert tensor.numel() == weight.numel(), f"a copy of {tensor.numel()} elements for {weight.numel()}"
    assert draw is not None or not copies, "copies need a draw"
    if weight.is_cuda and has_triton():
        from lightning_offload.numerics.noise_kernel import launch

        launch(weight, updates, draw, copies, distribution, rounding)
        return
    if kernels is not None and type(weight.detach()) is Tensor and weight.device.type == "cpu":
        kernels.advance_(weight.detach(), updates, draw, copies, distribution, rounding)
        return
    flat, outs = weight.detach().view(-1), [copy.out.detach().view(-1) for copy in copies]
    for first, end in tiles(0, flat.numel()):
        part = flat[first:end]
        if updates:
            part.copy_(_updated(part, updates, first, distribution, rounding))
        if draw is not None:
            z = noise(draw, first, end - first, distribution, device=flat.device)
            for copy, out in zip(copies, outs, strict=True):
                out[first:end] = (z * copy.scale).add_(part)


@cache
def has_triton() -> bool:
    """Whether the fused kernel can be used."""
    return find_spec("triton") is not None


def _updated(
    part: Tensor, updates: Sequence[Update], first: int, distribution: Distribution, rounding: Rounding
) -> Tensor:
    """Elements from ``first``, in the weight's dtype."""
    for update in updates:
        wide, numel = part.float(), part.numel()
        change = noise(update.draw, first, numel, distribution, device=part.device).mul_(update.coefficient)
        if update.weight_decay:
            change += wide * update.weight_decay
        wide = wide - change.mul_(update.lr)
        if rounding == "stochastic" and part.dtype != torch.float32:
            part = stochastic(wide, random_bits(update.draw, first, numel, device=part.device), part.dtype)
        else:
            part = wide.to(part.dtype)
    return part
