"""Compares what was compiled with torch before it is used: a compiler may be broken, a torch may fuse otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_offload.numerics.adam import adam_

if TYPE_CHECKING:
    from lightning_offload.numerics.native.kernels import Kernels

SIZES = (1, 8, 1021, 4096 + 7)
"""With what fills no vector of torch's, and more than a block."""


def first_difference(kernels: Kernels) -> str | None:
    """What differs in bits, or nothing: two steps of Adam and AdamW, and roundings to 16 bits."""
    generator = torch.Generator().manual_seed(0)
    for decoupled in (True, False):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            ours, theirs = _weights(generator), []
            theirs = [[tensor.clone() for tensor in kind] for kind in ours]
            for step in range(2):
                grads = [(torch.randn(size, generator=generator) * 0.1).to(dtype) for size in SIZES]
                shown = [torch.empty(size, dtype=dtype, device="cpu") for size in SIZES]
                hyper: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
                kernels.adam_(
                    ours[0],
                    grads,
                    ours[1],
                    ours[2],
                    [torch.tensor(float(step)) for _ in SIZES],
                    shown,
                    coefficient=0.7,
                    decoupled=decoupled,
                    **hyper,
                )
                clipped = [(grad * 0.7).float() for grad in grads]
                counts = [torch.tensor(float(step)) for _ in SIZES]
                adam_(theirs[0], clipped, theirs[1], theirs[2], counts, decoupled=decoupled, **hyper)
                pairs = zip((*ours, shown), (*theirs, [w.to(dtype) for w in theirs[0]]), strict=True)
                if not all(torch.equal(a, b) for mine, yours in pairs for a, b in zip(mine, yours, strict=True)):
                    return f"{'AdamW' if decoupled else 'Adam'} with {str(dtype).removeprefix('torch.')} gradients"
    return None


def _weights(generator: torch.Generator) -> list[list[Tensor]]:
    """Weights and two moments."""
    kinds = [[torch.randn(size, generator=generator, device="cpu") for size in SIZES] for _ in range(3)]
    kinds[1] = [m * 0.01 for m in kinds[1]]
    kinds[2] = [(v * 0.01).square() for v in kinds[2]]
    return kinds
