"""From token ids to batches: packing, padding, and a loader that can stop and go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_offload.text.loss import IGNORED

Example = dict[str, Tensor]


class Packed(Dataset[Example]):
    """Contiguous sequences of equal length; every token is learned.

    Args:
        sequences: (count, length), int64.
    """

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Example:
        return {"input_ids": self.sequences[index], "labels": self.sequences[index]}


def pack(documents: Sequence[Sequence[int]], *, end: int, length: int) -> Tensor:
    """Documents joined with `end` after each, cut into sequences; what does not fill the last one is left.

    Returns:
        (count, length), int64.
    """
    stream = torch.tensor([token for document in documents for token in (*document, end)], dtype=torch.int64)
    return stream[: len(stream) // length * length].view(-1, length)


def spread(sequences: Tensor, limit_tokens: int | None) -> Tensor:
    """At most `limit_tokens` tokens: sequences taken at even distances, so that all documents keep their share."""
    count, length = sequences.shape
    if limit_tokens is None or limit_tokens >= count * length:
        return sequences
    return sequences[torch.linspace(0, count - 1, limit_tokens // length).round().long()]


def collate(examples: Sequence[Example], *, pad: int) -> Example:
    """Stack; where lengths differ pad on the right and say so with an ``attention_mask``."""
    lengths = [len(example["input_ids"]) for example in examples]
    if min(lengths) == max(lengths):
        return {name: torch.stack([example[name] for example in examples]) for name in ("input_ids", "labels")}
    batch = {
        "input_ids": torch.full((len(examples), max(lengths)), pad, dtype=torch.int64),
        "labels": torch.full((len(examples), max(lengths)), IGNORED, dtype=torch.int64),
        "attention_mask": torch.zeros((len(examples), max(lengths)), dtype=torch.int64),
    }
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        batch["input_ids"][row, :length] = example["input_ids"]
        batch["labels"][row, :length] = example["labels"]
        batch["attention_mask"][row, :length] = 1
    return batch


class ResumableSampler(DistributedSampler[Any]):
    """Shuffles by seed and epoch; can start an epoch in its middle.

    A `DistributedSampler` also on one device, so that Lightning keeps it as it is on several.
    """

    start: int = 0  # samples of this epoch, over all devices, that were already used

    @override
    def __iter__(self) -> Iterator[Any]:
        order = list(super().__iter__())
        first, self.start = self.start // self.num_replicas, 0
        return iter(order[first:])


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over a `ResumableSampler` that knows how far it is; Lightning keeps its state in checkpoints.

    What counts is samples, not batches: another batch size or number of devices goes on at the same sample.
    """

    used: int = 0  # samples of the current epoch that were handed out, over all devices
    resume_at: tuple[int, int] | None = None  # epoch, samples used

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        assert isinstance(sampler, ResumableSampler)
        assert self.batch_size is not None
        self.used = 0
        # a state from the very end of an epoch, or from another one, leaves the coming epoch whole
        if self.resume_at is not None and self.resume_at[0] == sampler.epoch and self.resume_at[1] < sampler.total_size:
            self.used = sampler.start = self.resume_at[1]
        self.resume_at = None
        for batch in super().__iter__():
            self.used = min(self.used + self.batch_size * sampler.num_replicas, sampler.total_size)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, samples used in it, and what fixes the order."""
        sampler = self.sampler
        assert isinstance(sampler, ResumableSampler)
        return {"epoch": sampler.epoch, "used": self.used, "seed": sampler.seed, "samples": len(self.dataset)}  # type: ignore[arg-type]

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last sample used; raises ValueError when data or seed are others."""
        own = self.state_dict()
        for name in ("seed", "samples"):
            if own[name] != state[name]:
                raise ValueError(
                    f"Cannot resume in the middle of an epoch: the checkpoint's data has {name}={state[name]},"
                    f" this run's {own[name]}. Use the same data and data.seed, or start anew without ckpt_path."
                )
        self.resume_at = (state["epoch"], state["used"])
        self.sampler.set_epoch(state["epoch"])  # type: ignore[attr-defined]
