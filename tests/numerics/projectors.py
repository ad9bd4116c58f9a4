"""What the tests of projectors share: both layouts, odd sizes, and the dense matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_offload.numerics.projector import Projector, columns_of, draw_block, draw_sparse

Draw = Callable[..., Projector]
DRAWS: list[Draw] = [draw_sparse, draw_block]
SHAPES = [(19, 38), (38, 19), (160, 448), (448, 160)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(draw: Draw, m: int, n: int, nnz: int, *, seed: int = 0, dim: int | None = None) -> tuple[Projector, Projector]:
    """Left and right projectors to (about) half the smaller side."""
    generator = seeded(seed)
    dim = dim or max(1, min(m, n) // 2 // nnz) * nnz
    return draw(m, dim, nnz, generator=generator), draw(n, dim, nnz, generator=generator)


def dense(p: Projector) -> Tensor:
    """P, fp64."""
    return torch.zeros(p.rows, p.dim, dtype=torch.float64).scatter(1, columns_of(p), p.values.double())
