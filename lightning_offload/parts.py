"""A batch in parts, and how much each of them counts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

IGNORED = -100
"""Label of what is not learned, as everywhere in Hugging Face."""


def parts_of(batch: Any, count: int) -> list[Any]:
    """``batch`` cut along the samples into at most ``count`` parts of nearly equal size.

    Tensors whose first dimension is the number of samples are cut; everything else is in every part.
    """
    size = samples(batch)
    count = min(count, size)
    if count <= 1:
        return [batch]
    bounds = [size * at // count for at in range(count + 1)]

    def cut(first: int, end: int) -> Any:
        return tree_map(lambda x: x[first:end] if isinstance(x, Tensor) and x.dim() and len(x) == size else x, batch)

    return [cut(first, end) for first, end in pairwise(bounds)]


def weight_of(batch: Any) -> int:
    """What its mean loss is the mean of: the tokens that have a label, else the samples."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.dim() > 1:
        return max(int((labels != IGNORED).sum()), 1)
    return max(samples(batch), 1)


def samples(batch: Any) -> int:
    """Of a batch: the first dimension of its first tensor."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)
