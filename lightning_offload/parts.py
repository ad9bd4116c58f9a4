"""A batch in parts, and how much each of them counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

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
        return _map(lambda x: x[first:end] if isinstance(x, Tensor) and x.dim() and len(x) == size else x, batch)

    return [cut(first, end) for first, end in pairwise(bounds)]


def weight_of(batch: Any) -> int:
    """What its mean loss is the mean of: the tokens with a label where labels are (samples, tokens), else the samples.

    The first label of every row does not count: a causal model (``CausalLM``, Hugging Face's ``...ForCausalLM``)
    predicts each token from those before it, and shifts labels inside. A model that shifts nothing has one label more
    in every row.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] > 1:
        return max(int((labels[:, 1:] != IGNORED).sum()), 1)
    return max(samples(batch), 1)


def samples(batch: Any) -> int:
    """Of a batch: the first dimension of its first tensor; 0 where no tensor is found in it."""
    sizes: list[int] = []
    _map(lambda x: sizes.append(len(x)) if isinstance(x, Tensor) and x.dim() else None, batch)
    return sizes[0] if sizes else 0


def _map(change: Callable[[Any], Any], batch: Any) -> Any:
    """Of every leaf; of mappings pytree knows those of the standard library, not Hugging Face's ``BatchEncoding``."""

    def enter(leaf: Any) -> Any:
        if not isinstance(leaf, MutableMapping):
            return change(leaf)
        changed = copy.copy(leaf)
        for key, value in leaf.items():
            changed[key] = _map(change, value)
        return changed

    return tree_map(enter, batch)
