"""(d, r)-sparse projectors (LSP-Offload, arXiv 2406.10181): compress a gradient, decompress an update.

Neither layout is ever made dense. Positions at random are gathers of fixed width both ways, positions in blocks are
batched matrix products over views. Factors are cast to the dtype of what they meet; 16 bits accumulate in fp32.
Products are written to given outputs, which autocast leaves alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_offload.numerics.rounding import dithered

CHUNK_NUMEL = 1 << 22
"""Most elements of a weight that ``apply_`` works on at once (at least one column, in blocks one group of them)."""

_OVERLAP = 1e-12
"""Squared overlap below which a new direction counts as unseen."""


@dataclass(frozen=True, eq=False)
class Projector:
    """One side of a (d, r)-sparse projection: P (rows x dim), exactly ``nnz`` nonzeros per row.

    Attributes:
        values: (rows, nnz), the nonzeros of each row; any floating dtype.
        dim: d, a multiple of nnz.
        order: (nnz, rows) int16 (int32 above 32,767 rows): in band k (columns k d/r .. (k+1) d/r) the row
            ``order[k, i]`` sits in column ``k d/r + i mod d/r``. None: block-diagonal over adjacent rows, where the
            first ``rows mod (d/r)`` of the d/r groups have one row more.
        columns: what ``columns_of`` gives, if it is at hand; never part of a state.
    """

    values: Tensor
    dim: int
    order: Tensor | None = None
    columns: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of P: the large dimension."""
        return self.values.shape[0]

    @property
    def nnz(self) -> int:
        """Nonzeros per row, r."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of values and order: what is kept."""
        return self.values.nbytes + (0 if self.order is None else self.order.nbytes)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Projector:
        """A copy elsewhere; ``dtype`` is that of the values, the order keeps its own."""
        order = None if self.order is None else self.order.to(device=device)
        return Projector(self.values.to(device=device, dtype=dtype), self.dim, order)

    def expanded(self) -> Projector:
        """The same with indices as gathers want them, for many uses in a row."""
        return self if self.order is None else replace(self, order=self.order.long(), columns=columns_of(self))


def draw_sparse(
    rows: int,
    dim: int,
    nnz: int,
    *,
    generator: torch.Generator,
    values: Literal["signs", "gaussian"] = "signs",
    dtype: torch.dtype = torch.float32,
) -> Projector:
    """Random positions, distinct in each row and balanced over columns; E[P P^T] = I.

    Differs from the authors' code, which draws positions with replacement and loses up to 21 % of them.

    Args:
        rows: rows of P, at least ``dim``.
        dim: d, a multiple of ``nnz``.
        nnz: r.
        generator: of the CPU.
        values: +-1/sqrt(r), or N(0, 1/r) as in the paper.
        dtype: of the values.
    """
    _check(rows, dim, nnz)
    index = torch.int16 if rows <= torch.iinfo(torch.int16).max else torch.int32
    order = torch.stack([torch.randperm(rows, generator=generator, device="cpu").to(index) for _ in range(nnz)])
    if values == "signs":
        drawn = torch.randint(0, 2, (rows, nnz), generator=generator, device="cpu").mul_(2).sub_(1).to(torch.float32)
    else:
        drawn = torch.randn(rows, nnz, generator=generator, dtype=torch.float32, device="cpu")
    return Projector((drawn / math.sqrt(nnz)).to(dtype), dim, order)


def draw_block(
    rows: int, dim: int, nnz: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Projector:
    """Random orthonormal block-diagonal P: QR of Gaussian blocks, signs fixed; P^T P = I.

    Arguments as for ``draw_sparse``.
    """
    _check(rows, dim, nnz)
    drawn = torch.randn(rows, nnz, generator=generator, dtype=torch.float32, device="cpu")
    for span, _, groups in block_spans(rows, dim, nnz):
        q, r = torch.linalg.qr(drawn[span].view(groups, -1, nnz))
        signs = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
        drawn[span] = (q * signs.unsqueeze(1)).flatten(0, 1)
    return Projector(drawn.to(dtype), dim)


def project(p: Projector, x: Tensor) -> Tensor:
    """P^T x: (rows, n) -> (dim, n), contiguous."""
    if p.order is not None:
        return _gather(*_by_column(p), x)
    values = p.values.to(x.dtype)
    out = x.new_empty(p.dim, x.shape[1])
    for rows, columns, groups in block_spans(p.rows, p.dim, p.nnz):
        blocks = values[rows].view(groups, -1, p.nnz).transpose(1, 2)
        torch.bmm(blocks, x[rows].unflatten(0, (groups, -1)), out=out[columns].view(groups, p.nnz, -1))
    return out


def lift(p: Projector, y: Tensor) -> Tensor:
    """P y: (dim, n) -> (rows, n), contiguous."""
    return _lift(p.values, columns_of(p) if p.order is not None else None, y)


def compress(left: Projector, right: Projector, gradient: Tensor) -> Tensor:
    """S = P^T G Q: (m, n) -> (d, d), contiguous, in the gradient's dtype; the larger side goes first."""
    if left.rows >= right.rows:
        return project(right, project(left, gradient).t()).t().contiguous()
    return project(left, project(right, gradient.t()).t())


def compress_activations(left: Projector, right: Projector, grad_output: Tensor, inputs: Tensor) -> Tensor:
    """S = (dY P)^T (X Q) from (tokens, m) and (tokens, n): the same as from G = dY^T X, which is never formed."""
    down, up = project(left, grad_output.t()), project(right, inputs.t())
    return torch.mm(down, up.t(), out=down.new_empty(left.dim, right.dim))


def decompress(left: Projector, right: Projector, delta: Tensor) -> Tensor:
    """P D Q^T: (d, d) -> (m, n), contiguous."""
    return lift(left, lift(right, delta.t()).t())


def apply_(
    weight: Tensor,
    left: Projector,
    right: Projector,
    delta: Tensor,
    *,
    decay: float,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """``W <- decay W + scale P D Q^T`` in place, in fp32 until it is rounded once.

    Args:
        weight: (m, n), rows may be strided, elements of a row are adjacent.
        left: P.
        right: Q.
        delta: D (d, d), any floating dtype; holds -lr already.
        decay: 1 - lr * weight decay, positive.
        skip: 0-dim bool, on the weight's device: where true, nothing changes, whatever D holds.
        scale: 0-dim, on the weight's device.
        generator: on the weight's device; a bf16 weight is then rounded stochastically, see ``dithered``; decay shrinks
            the noise too and so takes up to 2^-7 more than it should. None: to nearest.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    turned = delta.new_empty(delta.t().shape, dtype=work).copy_(delta.t())
    if scale is not None:
        turned.mul_(scale)
    factor: float | Tensor = decay
    if skip is not None and work == weight.dtype:
        turned.masked_fill_(skip, 0.0)
        factor = torch.full((), decay, dtype=work, device=weight.device).masked_fill_(skip, 1.0)
    rows = columns_of(left) if left.order is not None else None
    columns = columns_of(right) if right.order is not None else None
    for span, inner in _chunks(right, max(1, CHUNK_NUMEL // left.rows)):
        half = _lift(right.values[span], None if columns is None else columns[span], turned[inner]).t()
        target = weight[:, span]
        if work == weight.dtype:  # rounded twice, as AdamW's kernel does
            target.mul_(factor).add_(_lift(left.values, rows, half))
            continue
        if generator is None:
            wide = narrow = target.to(work, memory_format=torch.contiguous_format)
        else:
            wide, narrow = dithered(target, generator)
        _add_lifted_(wide, left.values, rows, half, decay)
        if skip is None:
            target.copy_(narrow)
        else:
            torch.where(skip, target, narrow.to(target.dtype), out=target)


def matching_scale(left: Projector, right: Projector) -> Tensor:
    """``sqrt(m n) / (||P|| ||Q||)``, 0-dim fp32: with it RMS(P D Q^T) = RMS(D) in expectation.

    Differs from the paper, which has no scale: there the size of a step changes with every fit.
    """
    norms = [torch.linalg.vector_norm(p.values, dtype=torch.float32) for p in (left, right)]
    scale: Tensor = math.sqrt(left.rows * right.rows) / (norms[0] * norms[1])
    return scale


def transition(new: Projector, old: Projector) -> Tensor:
    """P_new^T P_old, fp32, on the projectors' device; reproducible on the CPU.

    Returns:
        (d_new, d_old), or of block-diagonal projectors with the same groups its blocks alone, (d / r, r, r).
    """
    if new.order is None and old.order is None and (new.dim, new.nnz) == (old.dim, old.nnz):
        return project(new, old.values.float()).view(-1, new.nnz, new.nnz)
    index = columns_of(new).unsqueeze(2) * old.dim + columns_of(old).unsqueeze(1)
    products = new.values.float().unsqueeze(2) * old.values.float().unsqueeze(1)
    out = products.new_zeros(new.dim * old.dim)
    return out.index_add_(0, index.flatten(), products.flatten()).view(new.dim, old.dim)


def transfer(
    exp_avg: Tensor, exp_avg_sq: Tensor, left: Tensor, right: Tensor, *, rule: Literal["transfer", "paper"]
) -> tuple[Tensor, Tensor]:
    """Moments of the old subspace in the new one: ``M' = A M C``, ``V' = A^2 V C^2``, squares element-wise.

    Rule ``transfer`` differs from the paper (Algorithm 1, lines 8-9): rows of A^2 and columns of C^2 are normalised to
    sum 1, so that sqrt(V') keeps the scale of sqrt(V); a direction that the old ones miss gets their mean.

    Args:
        exp_avg: M (d_old, d_old), fp32.
        exp_avg_sq: V, same shape, not negative.
        left: A = P_new^T P_old, as ``transition`` gives it: blocks are never made dense.
        right: C = Q_old^T Q_new, likewise.
        rule: see above.
    """
    times = _average if rule == "transfer" else _times
    right = right.mT
    mean, square = _times(left, exp_avg), times(left.square(), exp_avg_sq)
    return _times(right, mean.t()).t(), times(right.square(), square.t()).t()


def columns_of(p: Projector) -> Tensor:
    """(rows, nnz) int64: the column of each nonzero."""
    device = p.values.device
    if p.columns is not None:
        return p.columns
    if p.order is None:
        columns = torch.empty(p.rows, p.nnz, dtype=torch.int64, device=device)
        for rows, span, groups in block_spans(p.rows, p.dim, p.nnz):
            of_group = torch.arange(span.start, span.stop, device=device).view(groups, 1, p.nnz)
            columns[rows].view(groups, -1, p.nnz).copy_(of_group)
        return columns
    band = p.dim // p.nnz
    dealt = torch.arange(p.rows, device=device).remainder_(band)
    columns = dealt + torch.arange(0, p.dim, band, device=device).unsqueeze(1)
    return torch.empty_like(columns).scatter_(1, p.order.long(), columns).t().contiguous()


def block_spans(rows: int, dim: int, nnz: int) -> Iterator[tuple[slice, slice, int]]:
    """Rows, columns and number of the groups that are one row longer, then of the others."""
    groups = dim // nnz
    size, longer = divmod(rows, groups)
    split = longer * (size + 1)
    if longer:
        yield slice(0, split), slice(0, longer * nnz), longer
    yield slice(split, rows), slice(longer * nnz, dim), groups - longer


def _check(rows: int, dim: int, nnz: int) -> None:
    assert nnz <= dim <= rows, f"a projector of {rows} rows needs nnz <= dim <= rows, not {nnz=}, {dim=}"
    assert dim % nnz == 0, f"{dim=} is no multiple of {nnz=}"


def _by_column(p: Projector) -> tuple[Tensor, Tensor]:
    """Rows and values of each column, (dim, ceil(rows nnz / dim)); short columns end in row 0 times zero."""
    assert p.order is not None
    order, band = p.order.long(), p.dim // p.nnz
    shape = p.nnz, -(-p.rows // band), band

    def turned(dealt: Tensor) -> Tensor:
        padded = F.pad(dealt, (0, shape[1] * band - p.rows))
        return padded.view(shape).transpose(1, 2).reshape(p.dim, -1)

    return turned(order), turned(p.values.t().gather(1, order))


def _gather(index: Tensor, values: Tensor, source: Tensor) -> Tensor:
    """Row i: the sum of ``values[i, k] * source[index[i, k]]`` over k."""
    return F.embedding_bag(index, source.contiguous(), per_sample_weights=values.to(source.dtype), mode="sum")


def _lift(values: Tensor, columns: Tensor | None, y: Tensor) -> Tensor:
    if columns is not None:
        return _gather(columns, values, y)
    out = y.new_empty(len(values), y.shape[1])
    for rows, blocks, inner in _batches(values, y):
        torch.bmm(blocks, inner, out=out[rows].view(len(blocks), -1, y.shape[1]))
    return out


def _add_lifted_(wide: Tensor, values: Tensor, columns: Tensor | None, y: Tensor, decay: float) -> None:
    """``wide <- decay wide + P y``; blocks need no tensor for the product."""
    if columns is not None:
        torch.add(_gather(columns, values, y), wide, alpha=decay, out=wide)
        return
    for rows, blocks, inner in _batches(values, y):
        wide[rows].view(len(blocks), -1, y.shape[1]).baddbmm_(blocks, inner, beta=decay)


def _batches(values: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of P y, and the batched factors that give them."""
    count, nnz = values.shape
    values = values.to(y.dtype)
    for rows, span, groups in block_spans(count, len(y), nnz):
        yield rows, values[rows].view(groups, -1, nnz), y[span].unflatten(0, (groups, nnz))


def _chunks(p: Projector, most: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of at most ``most`` rows, and the columns they need; in blocks they are whole groups, or parts of one."""
    if p.order is not None:
        for start in range(0, p.rows, most):
            yield slice(start, min(start + most, p.rows)), slice(None)
        return
    for rows, columns, groups in block_spans(p.rows, p.dim, p.nnz):
        size = (rows.stop - rows.start) // groups
        step = max(1, most // size)
        for first in range(0, groups, step):
            last = min(first + step, groups)
            inner = slice(columns.start + first * p.nnz, columns.start + last * p.nnz)
            stop = rows.start + last * size
            for start in range(rows.start + first * size, stop, most):
                yield slice(start, min(start + most, stop)), inner


def _times(a: Tensor, x: Tensor) -> Tensor:
    """A x, A dense or in blocks."""
    return a @ x if a.dim() == 2 else torch.bmm(a, x.unflatten(0, (len(a), -1))).flatten(0, 1)


def _average(weights: Tensor, x: Tensor) -> Tensor:
    """Averages of rows of x; weights of (almost) nothing give the mean of all."""
    total = weights.sum(-1, keepdim=True)
    averages = _times(weights / total.clamp(min=_OVERLAP), x)
    return torch.where(total.view(-1, 1) > _OVERLAP, averages, x.mean(0))
