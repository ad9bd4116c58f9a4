"""Sparse parallel adapters (MEFT, arXiv 2406.04984): routing, selection, and ``ReLU(u) W_B`` of the rows in use.

Neuron j has a key a_j and a value b_j and belongs to expert ``e(j) = j // n``, n = r / N. With z_tj = a_j x_t:

    gate "logit":  u_tj = c_te(j) z_tj; c_te is the router's logit if token t chose expert e, else 0
    gate "none":   u_tj = z_tj
    y_t = sum of ReLU(u_tj) b_j; j in t's own picks (scope "token"), or in the union of all picks (scope "union")

"logit" with "token" is the authors' code, "none" with "union" Algorithm 1 of the paper. With top_k = r, one expert and
gate "none" both scopes are the dense parallel adapter. 16-bit operands accumulate in fp32, scores are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gate = Literal["logit", "none"]
Scope = Literal["token", "union"]


@dataclass(frozen=True, eq=False)
class Route:
    """The experts of T tokens.

    Attributes:
        experts: (T, E) int64, best first.
        logits: (T, E), at least fp32: what the router gives them.
    """

    experts: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False)
class Picks:
    """The rows that T tokens use.

    Attributes:
        rows: (U,) int64, sorted, unique: the union over tokens, among all r.
        places: (T, K') int64: each token's picks, all of its own experts, as places in ``rows``.
        experts: (T, E) int64.
    """

    rows: Tensor
    places: Tensor
    experts: Tensor


@torch.no_grad()
def route(x: Tensor, router: Tensor, active: int) -> Route:
    """The ``active`` best of N experts for each token; of equal ones the first.

    Args:
        x: (T, d).
        router: (N, d), no bias, no softmax.
        active: E, at most N.
    """
    logits = _mm(x, router.t())
    experts = _largest(logits, active)
    return Route(experts, logits.gather(1, experts))


@torch.no_grad()
def select(
    x: Tensor,
    keys: Tensor,
    experts: Tensor,
    logits: Tensor | None,
    *,
    group: int,
    top_k: int,
    by_expert: bool = False,
) -> Tensor:
    """The rows of each token's experts with the largest u, by sign; of equal ones that of the better expert.

    Args:
        x: (T, d).
        keys: (r, d); read only where ``top_k`` leaves something out.
        experts: (T, E) int64.
        logits: (T, E), of these experts; None with gate "none".
        group: n, rows per expert.
        top_k: K.
        by_expert: one product per expert over the tokens that chose it, as a host wants it; False: one over all rows.

    Returns:
        (T, K') int64, K' = min(K, E n): row numbers among r, without order where nothing is left out.
    """
    rows = (experts.unsqueeze(2) * group + torch.arange(group, device=experts.device)).flatten(1)
    if top_k >= rows.shape[1]:
        return rows
    z = (_scores_by_expert if by_expert else _scores)(x, keys, experts, group)
    u = z if logits is None else z * logits.unsqueeze(2)
    return rows.gather(1, _largest(u.flatten(1), top_k))


def union(picks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``Picks.rows`` and ``Picks.places`` of what ``select`` gave; on a GPU it waits for the number of rows.

    Args:
        picks: (T, K') int64.
        width: r.
    """
    used, places = places_of(picks, width)
    return used.nonzero().flatten(), places


def places_of(picks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which of all rows are used, (r,) bool, and ``Picks.places``; waits for nothing.

    Args:
        picks: (T, K') int64.
        width: r.
    """
    used = torch.zeros(width, dtype=torch.bool, device=picks.device).index_fill_(0, picks.flatten(), True)
    return used, (used.cumsum(0) - 1)[picks]


def adapter(
    x: Tensor, keys: Tensor, values: Tensor, router: Tensor, picks: Picks, *, width: int, gate: Gate, scope: Scope
) -> Tensor:
    """``y`` above, of the rows in use; differentiable once, the same under autocast.

    Backward keeps (T, K') numbers in scope "token" and one T x U in "union". A row that no token activates gets a
    gradient of exactly zero; gate "none" gives the router none.

    Args:
        x: (T, d).
        keys: (U, d), the rows ``picks.rows``, in x's dtype.
        values: (U, d), likewise.
        router: (N, d).
        picks: which token uses which of them.
        width: r, a multiple of N.
        gate: see above.
        scope: see above.

    Returns:
        (T, d) in x's dtype.
    """
    group = width // router.shape[0]
    args = picks.rows // group, picks.places if scope == "token" else None, picks.experts if gate == "logit" else None
    y: Tensor = _Adapter.apply(x, keys, values, router, *args)
    return y


class _Adapter(torch.autograd.Function):
    """Without ``places`` every token uses all rows, without ``experts`` there is no gate."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        router: Tensor,
        owners: Tensor,
        places: Tensor | None,
        experts: Tensor | None,
    ) -> Tensor:
        z = _mm(x, keys.t())
        z = z if places is None else z.gather(1, places)
        logits = None if experts is None else _mm(x, router.t()).gather(1, experts)
        gates = _gates(logits, experts, owners, places, len(router))
        h = (z if gates is None else z * gates).relu_()
        ctx.save_for_backward(x, keys, values, router, owners, places, experts, z, logits)
        return _mm(_spread(h, places, keys).to(values.dtype), values).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, keys, values, router, owners, places, experts, z, logits = ctx.saved_tensors
        gates = _gates(logits, experts, owners, places, len(router))
        h = z if gates is None else (z * gates).relu_()
        g = _mm(grad_outputs[0], values.t())
        g = (g if places is None else g.gather(1, places)).masked_fill_(h <= 0, 0.0)
        grad_values = _mm(_spread(h, places, keys).to(values.dtype).t(), grad_outputs[0]).to(values.dtype)
        grad_z = _spread(g if gates is None else g * gates, places, keys).to(keys.dtype)
        grad_x, grad_router = _mm(grad_z, keys), None
        if gates is not None:
            of_expert = torch.nn.functional.one_hot(owners, len(router)).to(g.dtype)
            grad_logits = _mm(_spread(g.mul_(z), places, keys), of_expert)
            grad_x += _mm(grad_logits, router)
            grad_router = _mm(grad_logits.t(), x).to(router.dtype)
        grad_keys = _mm(grad_z.t(), x).to(keys.dtype)
        return grad_x.to(x.dtype), grad_keys, grad_values, grad_router, None, None, None


_imitates_gpu = False


@contextmanager
def imitating_gpu(yes: bool) -> Iterator[None]:
    """Inside, fake tensors on the CPU are multiplied as a GPU would."""
    global _imitates_gpu
    before, _imitates_gpu = _imitates_gpu, yes
    try:
        yield
    finally:
        _imitates_gpu = before


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Their product in at least fp32; written to a given output, which autocast leaves alone."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    out = a.new_empty(a.shape[0], b.shape[1], dtype=wide)
    if (a.is_cuda or _imitates_gpu) and a.dtype == b.dtype != wide:
        return torch.mm(a, b, out_dtype=wide, out=out)
    return torch.mm(a.to(wide), b.to(wide), out=out)


def _largest(scores: Tensor, count: int) -> Tensor:
    """(T, count): where the largest are, in order; of equal ones the first, on every device."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _scores(x: Tensor, keys: Tensor, experts: Tensor, group: int) -> Tensor:
    """What z is at the candidates, (T, E, n)."""
    z: Tensor = _mm(x, keys.t()).unflatten(1, (-1, group))
    return z.take_along_dim(experts.unsqueeze(2), 1)


def _scores_by_expert(x: Tensor, keys: Tensor, experts: Tensor, group: int) -> Tensor:
    """The same, never forming T x r."""
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=len(keys) // group).tolist()
    z = torch.empty(len(chosen), group, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for of_expert, places in zip(keys.split(group), order.split(counts), strict=True):
        z.index_copy_(0, places, _mm(x[places // experts.shape[1]], of_expert.t()))
    return z.view(*experts.shape, group)


def _gates(
    logits: Tensor | None, experts: Tensor | None, owners: Tensor, places: Tensor | None, count: int
) -> Tensor | None:
    """What c is at every row, (T, U), or at the picks, (T, K')."""
    if logits is None or experts is None:
        return None
    c = logits.new_zeros(len(logits), count).scatter_(1, experts, logits)
    return c.index_select(1, owners) if places is None else c.gather(1, owners[places])


def _spread(picked: Tensor, places: Tensor | None, keys: Tensor) -> Tensor:
    """(T, K') numbers among zeros, (T, U)."""
    if places is None:
        return picked
    return picked.new_zeros(len(picked), len(keys)).scatter_(1, places, picked)
