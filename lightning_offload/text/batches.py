"""From token ids to batches: packing, padding, and a loader that can stop and go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_offload.text.loading import check_flags
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


def pack(documents: Sequence[Sequence[int]], *, end: int, length: int, start: Sequence[int] = ()) -> Tensor:
    """Documents joined, `start` before and `end` after each, cut into sequences; what does not fill one is left.

    Returns:
        (count, length), int64.
    """
    stream = torch.tensor([token for document in documents for token in (*start, *document, end)], dtype=torch.int64)
    return stream[: len(stream) // length * length].view(-1, length)


def spread(sequences: Tensor, limit_tokens: int | None) -> Tensor:
    """At most `limit_tokens` tokens: sequences taken at even distances, so that all documents keep their share."""
    count, length = sequences.shape
    if limit_tokens is None or limit_tokens >= count * length:
        return sequences
    return sequences[torch.linspace(0, count - 1, limit_tokens // length).round().long()]


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """A sequence of which the answer alone is learned."""
    ids = torch.tensor([*prompt, *answer], dtype=torch.int64)
    labels = ids.clone()
    labels[: len(prompt)] = IGNORED
    return {"input_ids": ids, "labels": labels}


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


def batch_by_shape(
    batch_size: int,
    sequence_length: int,
    vocab_size: int,
    choices: int | None = None,
    num_labels: int | None = None,
    packing: bool = False,
) -> Example:
    """A batch of random tokens, all of them learned, as a data module gives it when nothing is padded.

    Returns:
        ``input_ids`` and ``labels`` (`batch_size`, `sequence_length`), int64, on the current default device; with
        `choices` those of so many label words and a ``target``, as `PromptClassifier` takes them; with `num_labels` a
        label for each sequence, as `SequenceClassifier` takes them; with `packing` ``position_ids``, as examples that
        share a sequence have them.

    Raises:
        ValueError: for a size that leaves nothing to predict, or `packing` that is neither true nor false.
    """
    if batch_size < 1 or sequence_length < 2 or vocab_size < 1:
        raise ValueError(
            "a batch needs batch_size >= 1, sequence_length >= 2 and vocab_size >= 1; got"
            f" batch_size={batch_size}, sequence_length={sequence_length}, vocab_size={vocab_size}."
        )
    check_flags(packing=packing)
    size = (batch_size, sequence_length) if choices is None else (batch_size, choices, sequence_length)
    tokens = torch.randint(vocab_size, size)
    if num_labels is not None:
        return {"input_ids": tokens, "labels": torch.zeros(batch_size, dtype=torch.int64 if num_labels > 1 else None)}
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if packing:
        batch["position_ids"] = torch.arange(sequence_length).expand(size).clone()
    return batch if choices is None else {**batch, "target": torch.zeros(batch_size, dtype=torch.int64)}


class ResumableSampler(DistributedSampler[Any]):
    """Shuffles by seed and epoch; can start an epoch in its middle.

    A `DistributedSampler` also on one device, so that Lightning keeps it as it is on several.
    """

    start: int = 0  # samples of this epoch, over all devices, that were already used
    _known: tuple[int, Tensor] | None = None

    @override
    def __iter__(self) -> Iterator[Any]:
        return iter(self.order(self.epoch)[self.rank :: self.num_replicas][self.start // self.num_replicas :].tolist())

    def order(self, epoch: int) -> Tensor:
        """Samples of an epoch in their order over all devices, (total_size,): device r takes those at r, r + n, ..."""
        known, order = self._known or (None, torch.empty(0))
        if known != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
            order = order.repeat(-(-self.total_size // max(1, len(order))))[: self.total_size]
            self._known = epoch, order
        return order


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over a `ResumableSampler` that knows how far it is; Lightning keeps its state in checkpoints.

    The shuffled epochs form one stream. Each iteration goes on where the last one stopped, for as many batches as an
    epoch has: a checkpoint taken anywhere continues with the next sample, also where Lightning counts the epoch as
    over (the end of ``max_steps``). What counts is samples: with another batch size or number of devices it goes on
    from there too, but up to a batch at the seam may come again, and the window there counts tokens of other batches.
    """

    position: tuple[int, int] | None = None  # epoch, and samples of it used over all devices; None before the first
    _last = (0, 0)  # where the batch that was given last begins

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if not isinstance(self.sampler, ResumableSampler):  # `overfit_batches` takes the same batches every epoch
            for number, batch in enumerate(super().__iter__()):
                self._last = 0, number * self._batch_samples
                yield batch
            return
        sampler, left = self._sampler, len(self)
        epoch, used = self.position or (sampler.epoch, 0)
        while left:
            if used >= sampler.total_size:
                epoch, used = epoch + 1, 0
            sampler.set_epoch(epoch)
            sampler.start = used
            for batch in islice(super().__iter__(), left):
                self._last = epoch, used
                used = min(used + self._batch_samples, sampler.total_size)
                self.position = epoch, used
                left -= 1
                yield batch

    @property
    def _sampler(self) -> ResumableSampler:
        assert isinstance(self.sampler, ResumableSampler)
        return self.sampler

    @property
    def _batch_samples(self) -> int:
        """Samples of one batch, over all devices."""
        assert self.batch_size is not None
        return self.batch_size * int(getattr(self.sampler, "num_replicas", 1))

    def weigh(self, weights: Tensor, *, before: int, count: int) -> tuple[int, int]:
        """What the batch that was given last weighs, and what the window that it is in does over all devices.

        Args:
            weights: of each sample of the data set, (samples,), int64.
            before: batches of the window before this one.
            count: of all its batches.
        """
        at, step = self._last, self._batch_samples
        rank, ranks = int(getattr(self.sampler, "rank", 0)), int(getattr(self.sampler, "num_replicas", 1))
        own = int(weights[self._samples(at)[rank::ranks]].sum())
        for _ in range(before):
            at = self._before(at)
        whole = 0
        for _ in range(count):
            whole += int(weights[self._samples(at)].sum())
            at = (at[0], at[1] + step) if at[1] + step < self._total else (at[0] + 1, 0)
        return own, whole

    def _before(self, at: tuple[int, int]) -> tuple[int, int]:
        """Where the batch begins that comes before the one that begins at `at`."""
        epoch, start = at
        if start:
            return epoch, max(0, start - self._batch_samples)
        return epoch - 1, (self._total - 1) // self._batch_samples * self._batch_samples

    @property
    def _total(self) -> int:
        return int(getattr(self.sampler, "total_size", len(self.dataset)))  # type: ignore[arg-type]

    def _samples(self, at: tuple[int, int]) -> Tensor:
        """Those of the batch that begins at `at`, over all devices."""
        epoch, start = at
        end = min(start + self._batch_samples, self._total)
        if isinstance(self.sampler, ResumableSampler):
            return self.sampler.order(epoch)[start:end]
        count: int = len(self.dataset)  # type: ignore[arg-type]
        return torch.arange(start, end) % count

    def state_dict(self) -> dict[str, int]:
        """The position, and what fixes the order."""
        if not isinstance(self.sampler, ResumableSampler):
            return {}
        epoch, used = self.position or (self._sampler.epoch, 0)
        return {"epoch": epoch, "used": used, "seed": self._sampler.seed, "samples": len(self.dataset)}  # type: ignore[arg-type]

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last sample used; raises ValueError when data or seed are others."""
        own = self.state_dict()
        if not own:
            return
        for name in ("seed", "samples"):
            if own[name] != state[name]:
                raise ValueError(
                    f"Cannot go on with the data: the checkpoint's has {name}={state[name]}, this run's {own[name]}."
                    " Use the same data and data.seed, or start anew without ckpt_path."
                )
        self.position = state["epoch"], state["used"]
