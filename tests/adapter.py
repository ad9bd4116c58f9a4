"""The sparse adapter evaluated densely: masks over all r rows, plain autograd, as its authors simulate it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_offload.numerics.adapter import Gate, Picks, Scope, adapter, route, select, union


def dense(
    x: Tensor, keys: Tensor, values: Tensor, router: Tensor, *, active: int, top_k: int, gate: Gate, scope: Scope
) -> Tensor:
    """(T, d) from all r rows of keys and values."""
    owner = torch.arange(len(keys)) // (len(keys) // len(router))
    logits = x @ router.t()
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(active).indices, 1.0)
    u = x @ keys.t()
    if gate == "logit":
        u = u * (logits * chosen)[:, owner]
    candidate = chosen[:, owner] > 0
    best = u.masked_fill(~candidate, -torch.inf).topk(min(top_k, active * len(keys) // len(router))).indices
    used = torch.zeros_like(candidate).scatter(1, best, True)
    if scope == "union":
        used = used.any(0).expand_as(used)
    return torch.where(used, u.relu(), 0.0) @ values


def picked(
    x: Tensor, keys: Tensor, router: Tensor, *, active: int, top_k: int, gate: Gate, by_expert: bool = False
) -> Picks:
    chosen = route(x, router, active)
    logits = chosen.logits if gate == "logit" else None
    group = len(keys) // len(router)
    picks = select(x, keys, chosen.experts, logits, group=group, top_k=top_k, by_expert=by_expert)
    return Picks(*union(picks, len(keys)), chosen.experts)


def gathered(
    x: Tensor, keys: Tensor, values: Tensor, router: Tensor, *, active: int, top_k: int, gate: Gate, scope: Scope
) -> Tensor:
    """What ``dense`` gives, from the rows in use."""
    picks = picked(x, keys, router, active=active, top_k=top_k, gate=gate)
    rows = keys[picks.rows], values[picks.rows]
    return adapter(x, *rows, router, picks, width=len(keys), gate=gate, scope=scope)
