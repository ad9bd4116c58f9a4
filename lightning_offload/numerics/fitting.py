"""How well projectors hold a gradient, and projectors that hold it better: fitted values, or principal directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_offload.numerics.adam import adam_
from lightning_offload.numerics.projector import Projector, block_spans, columns_of, compress, lift, project

CHECK_EVERY = 10
"""Steps of a fit between two looks at its error."""


@dataclass(frozen=True, eq=False)
class Bias:
    """What projectors miss of a gradient G, with G^ = P P^T G Q Q^T; 0-dim fp32 each.

    Attributes:
        relative: ||G^ - G|| / ||G||, the paper's measure (Definition 2); 0 for G = 0.
        cosine: between G^ and G; 1 for G = 0.
        scaled: what is left of ``relative`` after the best scalar, sqrt(1 - cosine^2).
    """

    relative: Tensor
    cosine: Tensor
    scaled: Tensor


def bias(left: Projector, right: Projector, gradient: Tensor) -> Bias:
    """``Bias`` without forming G^: ``<G^, G> = ||S||^2`` and ``||G^||^2 = <S, P^T P S Q^T Q>``.

    Three terms that cancel: a ``relative`` below about 1e-3 (fp32; 5e-3 in 16 bits) is round-off, and never below 0.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    s = compress(left, right, gradient).to(wide)
    energy = torch.linalg.vector_norm(gradient, dtype=wide).square()
    inner, kept = s.square().sum(), (s * _round_trip(left, right, s)).sum()
    return Bias(*(figure.float() for figure in _figures(energy, inner, kept)))


def fit(
    left: Projector,
    right: Projector,
    gradient: Tensor,
    *,
    steps: int = 100,
    lr: float = 0.06,
    weight_decay: float = 0.01,
    reached: Callable[[Tensor], bool] | None = None,
) -> tuple[Projector, Projector]:
    """Values that lower the relative error of one gradient; positions stay (the paper's section on learning).

    AdamW with ``lr`` falling to 0 along a cosine, in fp32, as in the authors' simulation; its weight decay is the
    paper's regulariser beta, which has no published value. Differs from theirs in its gradient: closed form, nothing
    dense, and G is read twice a step.

    Args:
        left: P, where to start.
        right: Q.
        gradient: G (m, n).
        steps: at most so many.
        lr: at the start.
        weight_decay: decoupled.
        reached: asked every 10 steps with the relative error so far (0-dim, on the device); True stops.

    Returns:
        Projectors like ``left`` and ``right``, their values in the dtypes given.
    """
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    values = [side.values.to(wide.dtype, copy=True) for side in (left, right)]
    p, q = replace(left, values=values[0]).expanded(), replace(right, values=values[1]).expanded()
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(v) for v in values] for _ in range(2))
    counts = [torch.zeros((), dtype=torch.float32, device=wide.device) for _ in values]
    for step in range(steps):
        relative, gradients = error_and_gradients(p, q, wide)
        if reached is not None and step % CHECK_EVERY == 0 and reached(relative):
            break
        now = lr * (1 + math.cos(math.pi * step / steps)) / 2
        adam_(
            values,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            counts,
            lr=now,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=weight_decay,
            decoupled=True,
        )
    fitted_left, fitted_right = values[0].to(left.values.dtype), values[1].to(right.values.dtype)
    return replace(left, values=fitted_left), replace(right, values=fitted_right)


def error_and_gradients(left: Projector, right: Projector, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The relative error f = ||R|| / ||G||, R = P P^T G Q Q^T - G, and df/dP, df/dQ at their nonzeros.

    With S = P^T G Q and T = P^T R Q: ``df/dP ~ (R Q) S^T + (G Q) T^T`` and ``df/dQ ~ (R^T P) S + (G^T P) T``, where
    ``R Q = P S Q^T Q - G Q`` and ``R^T P = Q S^T P^T P - G^T P`` need no R.
    """
    gq, gp = project(right, gradient.t()).t().contiguous(), project(left, gradient).t().contiguous()
    s = project(left, gq)
    s_right, s_left = _gram(right, s.t()).t(), _gram(left, s)
    t = _gram(left, s_right) - s
    relative, _, _ = _figures(gradient.square().sum(), s.square().sum(), (s * (t + s)).sum())
    rq, rp = lift(left, s_right) - gq, lift(right, s_left.t()) - gp
    scale = 1 / (relative * gradient.square().sum()).clamp(min=torch.finfo(s.dtype).tiny)
    return relative, [
        (_sampled(left, rq, s) + _sampled(left, gq, t)).mul_(scale),
        (_sampled(right, rp, s.t()) + _sampled(right, gp, t.t())).mul_(scale),
    ]


def pca(gradient: Tensor, dim: int, nnz: int) -> tuple[Projector, Projector]:
    """Block-diagonal P and Q from the top left singular vectors of each group of rows; P^T P = Q^T Q = I.

    Q from G, P from G Q, Q again from P^T G, by eigenvectors of the groups' Gram matrices in fp32. Ranks that a group
    lacks are filled with some orthonormal directions. On CUDA the eigenvalue solver waits for the device.

    Args:
        gradient: G (m, n).
        dim: d, a multiple of ``nnz``, at most min(m, n).
        nnz: r.
    """
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    right = _principal(wide.t(), dim, nnz)
    left = _principal(project(right, wide.t()).t(), dim, nnz)
    return left, _principal(project(left, wide).t(), dim, nnz)


def _principal(x: Tensor, dim: int, nnz: int) -> Projector:
    """From x (rows, k): of each group of rows the ``nnz`` directions with most energy."""
    values = x.new_empty(x.shape[0], nnz)
    for rows, _, groups in block_spans(x.shape[0], dim, nnz):
        group = x[rows].unflatten(0, (groups, -1))
        gram = torch.bmm(group, group.transpose(1, 2), out=x.new_empty(groups, group.shape[1], group.shape[1]))
        top = torch.linalg.eigh(gram.nan_to_num_(0.0, 0.0, 0.0))[1][..., -nnz:].flip(-1)
        peak = top.gather(1, top.abs().argmax(1, keepdim=True))
        values[rows] = (top * torch.where(peak < 0, -1.0, 1.0)).flatten(0, 1)
    return Projector(values, dim)


def _figures(energy: Tensor, inner: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relative error, cosine and scaled error from ||G||^2, <G^, G> and ||G^||^2."""
    empty, tiny = energy == 0, torch.finfo(energy.dtype).tiny
    relative = ((energy - 2 * inner + kept).clamp(min=0) / energy.clamp(min=tiny)).sqrt()
    cosine = (inner / (kept.clamp(min=tiny).sqrt() * energy.clamp(min=tiny).sqrt())).clamp(max=1)
    cosine = torch.where(empty, 1.0, cosine)
    return torch.where(empty, 0.0, relative), cosine, (1 - cosine.square()).sqrt()


def _gram(p: Projector, x: Tensor) -> Tensor:
    """P^T P x."""
    return project(p, lift(p, x))


def _round_trip(left: Projector, right: Projector, s: Tensor) -> Tensor:
    """P^T P S Q^T Q."""
    return _gram(left, _gram(right, s.t()).t())


def _sampled(p: Projector, x: Tensor, y: Tensor) -> Tensor:
    """Of x y^T what stands at the nonzeros of P: x (rows, k), y (dim, k) -> (rows, nnz)."""
    if p.order is not None:
        bags = torch.arange(p.rows, device=x.device)
        of_nonzero = bags.unsqueeze(1).expand(-1, p.nnz).flatten()
        sampled: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x.contiguous(), y.contiguous(), columns_of(p).flatten(), bags * p.nnz, of_nonzero, 0
        )
        return sampled.view(p.rows, p.nnz)
    out = x.new_empty(p.rows, p.nnz)
    for rows, span, groups in block_spans(p.rows, p.dim, p.nnz):
        blocks = y[span].unflatten(0, (groups, p.nnz)).transpose(1, 2)
        torch.bmm(x[rows].unflatten(0, (groups, -1)), blocks, out=out[rows].view(groups, -1, p.nnz))
    return out
