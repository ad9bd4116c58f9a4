"""Several examples in one sequence, none of which sees another.

What keeps them apart is ``position_ids`` (batch, sequence) that begin anew with each example, without any
``attention_mask``: transformers then masks attention across examples, whichever implementation of it is in use (those
in `loss.MASKED` are handed a mask). The first token of an example is never learned, as nothing stands before it.
Padding at the end is an example of its own, of which nothing is learned.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_offload.errors import OffloadError
from lightning_offload.text.batches import Example
from lightning_offload.text.loss import IGNORED

#: architectures that take each example as if it were alone; each is in the equality test
APART = frozenset(
    {
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_neox",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)


def check_packing(network: Any) -> None:
    """Refuse an architecture of which it is not known that examples are kept apart.

    Raises:
        OffloadError: naming it.
    """
    kind = getattr(getattr(network, "config", None), "model_type", type(network).__name__)
    if kind not in APART:
        raise OffloadError(
            f"`data.packing=true`: it is not known whether a {kind} model keeps the examples of a sequence apart; those"
            f" that do are {', '.join(sorted(APART))}. Leave it out: one example in each sequence."
        )


def pack_examples(examples: Sequence[Example], length: int) -> list[Example]:
    """Sequences of at most `length` tokens; each example goes to the fullest one that has room, the longest first.

    Args:
        examples: ``input_ids`` and ``labels``, (tokens,), of at most `length`.
        length: tokens of a sequence.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, (tokens,) int64, see the module docstring.
    """
    order = sorted(range(len(examples)), key=lambda at: -len(examples[at]["input_ids"]))  # stable
    members: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of each sequence, and which; sorted
    for at in order:
        size = len(examples[at]["input_ids"])
        place = bisect_left(room, (size, -1))
        left, number = room.pop(place) if place < len(room) else (length, len(members))
        if number == len(members):
            members.append([])
        members[number].append(at)
        insort(room, (left - size, number))
    return [_joined([examples[at] for at in sorted(inside)]) for inside in members]


def _joined(examples: Sequence[Example]) -> Example:
    labels = [example["labels"].clone() for example in examples]
    for part in labels:
        part[0] = IGNORED
    return {
        "input_ids": torch.cat([example["input_ids"] for example in examples]),
        "labels": torch.cat(labels),
        "position_ids": torch.cat([torch.arange(len(part)) for part in labels]),
    }


def collate_packed(sequences: Sequence[Example], *, pad: int) -> Example:
    """A batch (n, s) of what `pack_examples` gives, padded on the right; never an ``attention_mask``."""
    size = max(len(sequence["input_ids"]) for sequence in sequences)

    def filled(sequence: Example) -> dict[str, Tensor]:
        short = size - len(sequence["input_ids"])
        fill = {"input_ids": torch.full((short,), pad), "labels": torch.full((short,), IGNORED)}
        fill["position_ids"] = torch.arange(short)
        return {name: torch.cat([values, fill[name]]) for name, values in sequence.items()}

    rows = [filled(sequence) for sequence in sequences]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def parts_of(ids: Tensor, labels: Tensor, positions: Tensor, *, pad: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of each example in a packed sequence, (tokens,) each; without the padding."""
    starts = (positions == 0).nonzero().flatten()[1:].tolist()
    parts = list(zip(ids.tensor_split(starts), labels.tensor_split(starts), strict=True))
    last, learned = parts[-1]
    return parts[:-1] if len(parts) > 1 and bool(((last == pad) & (learned == IGNORED)).all()) else parts
