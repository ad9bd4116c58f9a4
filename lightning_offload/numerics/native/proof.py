"""Compares what was compiled with torch before it is used: a compiler may be broken, a torch may fuse otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_offload.numerics.adam import adam_
from lightning_offload.numerics.noise import Draw
from lightning_offload.numerics.zeroth import Copy, Update, advance_

if TYPE_CHECKING:
    from lightning_offload.numerics.native.kernels import Kernels

SIZES = (1, 8, 1021, 4096 + 7)
"""With what fills no vector of torch's, and more than a block."""


def first_difference(kernels: Kernels) -> str | None:
    """What differs in bits, or nothing: steps of Adam and AdamW, noise, and roundings to 16 bits."""
    generator = torch.Generator("cpu").manual_seed(0)
    for decoupled in (True, False):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            ours, theirs = _weights(generator), []
            theirs = [[tensor.clone() for tensor in kind] for kind in ours]
            for step in range(2):
                grads = [(_normal(size, generator) * 0.1).to(dtype) for size in SIZES]
                shown = [torch.empty(size, dtype=dtype, device="cpu") for size in SIZES]
                hyper: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
                kernels.adam_(
                    ours[0],
                    grads,
                    ours[1],
                    ours[2],
                    [_number(step) for _ in SIZES],
                    shown,
                    coefficient=0.7,
                    decoupled=decoupled,
                    **hyper,
                )
                clipped = [(grad * 0.7).float() for grad in grads]
                counts = [_number(step) for _ in SIZES]
                adam_(theirs[0], clipped, theirs[1], theirs[2], counts, decoupled=decoupled, **hyper)
                pairs = zip((*ours, shown), (*theirs, [w.to(dtype) for w in theirs[0]]), strict=True)
                if not all(torch.equal(a, b) for mine, yours in pairs for a, b in zip(mine, yours, strict=True)):
                    return f"{'AdamW' if decoupled else 'Adam'} with {str(dtype).removeprefix('torch.')} gradients"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weights = [_normal(SIZES[-1], generator).to(dtype)]
        weights.append(weights[0].clone())
        copies = [torch.empty(SIZES[-1], dtype=torch.float32, device="cpu") for _ in weights]
        for weight, out, chosen in zip(weights, copies, (kernels, None), strict=True):
            updates, shown_to = [Update(Draw(1, 2, 3), 0.3, 0.1, 0.1)], [Copy(0.1, out)]
            advance_(weight, updates, Draw(1, 3, 3), shown_to, "popcount", "stochastic", chosen)
        if not (torch.equal(*weights) and torch.equal(*copies)):
            return f"noise on {str(dtype).removeprefix('torch.')} weights"
    return None


def _normal(size: int, generator: torch.Generator) -> Tensor:
    """Whatever the defaults are."""
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


def _number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def _weights(generator: torch.Generator) -> list[list[Tensor]]:
    """Weights and two moments."""
    kinds = [[_normal(size, generator) for size in SIZES] for _ in range(3)]
    kinds[1] = [m * 0.01 for m in kinds[1]]
    kinds[2] = [(v * 0.01).square() for v in kinds[2]]
    return kinds
