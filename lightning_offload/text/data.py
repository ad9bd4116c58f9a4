"""The common base of the data modules: tokens in, batches out.

A batch is a dict of int64 tensors (batch, sequence): ``input_ids``; ``labels``, -100 where nothing is learned;
``attention_mask``, only when there is padding; and instead of it ``position_ids``, when examples share sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_offload.errors import DataError
from lightning_offload.text.batches import Example, Packed, ResumableLoader, ResumableSampler, collate
from lightning_offload.text.loss import IGNORED
from lightning_offload.text.packing import parts_of
from lightning_offload.text.pretrained import check_positions

#: between the examples of a packed sequence, where one is shown
NEXT = "\n--- next in the same sequence ---\n"


class TextData(L.LightningDataModule):
    """Base of the data modules; a subclass says what to `read`.

    Args:
        sequence_length: tokens per sequence, at most.
        batch_size: sequences per batch and device.
        val_batch_size: the same for validation and test; None for `batch_size`.
        num_workers: processes that collate; 0 for none.
        seed: of the shuffling, which also depends on the epoch.
        tokenizer: usually the model's: ``data.tokenizer = model.tokenizer``.

    Raises:
        ValueError: for sizes below what makes sense, or a tokenizer that is missing or too short.
        DataError: when there is nothing to train on or to validate with.
    """

    #: ends an answer, beside the end-of-text token; None where answers have several lines
    answer_end: str | None = "\n"

    def __init__(
        self,
        *,
        sequence_length: int = 256,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size, "num_workers": num_workers}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"data.{name}={size!r}: give a whole number.")
        if sequence_length < 2 or batch_size < 1 or (val_batch_size is not None and val_batch_size < 1):
            raise ValueError(
                "data needs sequence_length >= 2 and batch sizes >= 1; got"
                f" sequence_length={sequence_length}, batch_size={batch_size}, val_batch_size={val_batch_size}."
            )
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer = tokenizer
        self._sets: tuple[Dataset[Any], ...] | None = None
        self._resume: dict[str, int] | None = None

    def read(self) -> tuple[Dataset[Any], ...]:
        """Training, validation and maybe test examples, tokenized; called once, when `tokenizer` is there.

        Without examples of its own the test takes those of the validation.
        """
        raise NotImplementedError

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            check_positions(getattr(self.trainer.lightning_module, "network", None), self.sequence_length)
        if self._sets is not None:
            return
        self._check_tokenizer()
        sets = self.read()
        for name, examples in zip(("train on", "validate with", "test with"), sets, strict=False):
            if not len(examples):  # type: ignore[arg-type]
                path = getattr(self, "path", None)
                source = f" in {path!r}" if path else ""
                raise DataError(
                    f"{type(self).__name__}: nothing to {name}{source}. Give more text, or a smaller"
                    f" data.sequence_length (now {self.sequence_length})."
                )
        self._sets = sets

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} has no tokenizer: set data.tokenizer = model.tokenizer before the Trainer"
                " starts, or give the model a tokenizer_path (model.tokenizer_path=<folder or hub id>)."
            )
        longest = getattr(self.tokenizer, "model_max_length", None)
        if longest is not None and longest < self.sequence_length:
            raise ValueError(
                f"sequence_length={self.sequence_length} is more than the {longest} tokens this model takes:"
                f" pass data.sequence_length={longest} or less."
            )

    def final_answer(self, text: str) -> str:
        """What of an answer has to be right."""
        return text.strip()

    def check_answers(self) -> None:
        """Find out, before anything runs, whether every held-out answer has something that has to be right.

        Raises:
            DataError: for one that has nothing, as what counts in it was cut.
        """
        for name, examples in (("validation", self._set(1)), ("test", self._set(-1))):
            for index in range(len(examples)):  # type: ignore[arg-type]
                labels = examples[index]["labels"]
                answer = self.tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)
                if not self.final_answer(answer):
                    raise DataError(
                        f"Nothing counts in the answer {answer[-80:]!r} of the {name}: if it is cut, raise"
                        f" data.sequence_length (now {self.sequence_length})."
                    )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added."""
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return encoded

    @property
    def end(self) -> int:
        """The token after each document or answer."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f'The tokenizer {self.tokenizer.name_or_path!r} has no end-of-text token: put "eos_token" into its'
                " tokenizer_config.json, or set tokenizer.eos_token."
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def start(self) -> list[int]:
        """The token that this tokenizer puts before a text, if it does."""
        alone = self.tokenizer("")["input_ids"]
        return list(alone[:1]) if alone[:1] == [self.tokenizer.bos_token_id] else []  # an end may follow

    def _set(self, index: int) -> Dataset[Any]:
        if self._sets is None:
            raise RuntimeError(f"Call {type(self).__name__}.setup() first.")
        return self._sets[index]

    @property
    def pad(self) -> int:
        """The token that fills shorter sequences up."""
        pad = self.tokenizer.pad_token_id
        return self.end if pad is None else int(pad)

    @property
    def _collate(self) -> partial[Example]:
        return partial(collate, pad=self.pad)

    @override
    def train_dataloader(self) -> ResumableLoader:
        examples = self._set(0)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        loader = ResumableLoader(
            examples,
            batch_size=self.batch_size,
            sampler=ResumableSampler(examples, num_replicas=world, rank=rank, shuffle=True, seed=self.seed),
            collate_fn=self._collate,
            num_workers=self.num_workers,
        )
        if self._resume is not None:
            loader.load_state_dict(self._resume)
            self._resume = None
        return loader

    def loss_weight(self, batch_idx: int, accumulate_grad_batches: int | None = None) -> float:
        """What to multiply a batch's mean loss by, so that an accumulation window has the mean over all that it learns.

        Lightning divides every loss by the number of batches in a window, and averages over devices; with losses of
        different numbers of tokens, or a shorter window at the end of an epoch, that is not the mean over tokens. The
        order of the data is known, so nothing is read ahead. The models of this package do it by themselves under
        automatic optimization; who steps by hand (``OffloadMixin``) calls this in ``loss``.

        Args:
            batch_idx: as ``training_step`` has it; of the batch that is being trained on.
            accumulate_grad_batches: batches in a window; default the Trainer's.
        """
        trainer: Any = self.trainer
        window = accumulate_grad_batches or trainer.accumulate_grad_batches
        loader = trainer.train_dataloader
        if (window == 1 and trainer.world_size == 1) or not isinstance(loader, ResumableLoader):
            return 1.0
        before = batch_idx % window
        count = min(window, trainer.num_training_batches - (batch_idx - before))
        own, whole = loader.weigh(self._weights, before=before, count=count)
        return float(own * window * trainer.world_size / max(whole, 1))

    def weight_of(self, example: Any) -> int:
        """What the mean loss of an example is the mean of: its learned tokens; the first is not predicted."""
        return int((example["labels"][1:] != IGNORED).sum())

    @cached_property
    def _weights(self) -> Tensor:
        examples: Any = self._set(0)
        if isinstance(examples, Packed):
            return torch.full((len(examples),), examples.sequences.shape[1] - 1)
        return torch.tensor([self.weight_of(examples[index]) for index in range(len(examples))])

    @override
    def state_dict(self) -> dict[str, Any]:
        loader = self.trainer.train_dataloader if self.trainer else None
        return loader.state_dict() if isinstance(loader, ResumableLoader) else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning also restores the loader itself, but not one that a schedule's `total_steps` had it make earlier
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING or not state_dict:
            return
        if isinstance(self.trainer.train_dataloader, ResumableLoader):
            self.trainer.train_dataloader.load_state_dict(state_dict)
        else:
            self._resume = state_dict

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._in_order(1)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._in_order(-1)

    def _in_order(self, index: int) -> DataLoader[Any]:
        return DataLoader(
            self._set(index), batch_size=self.val_batch_size, collate_fn=self._collate, num_workers=self.num_workers
        )

    @cached_property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the validation set's learned text, per token that is scored."""
        return self._bytes_per_token(self._set(1))

    @cached_property
    def test_bytes_per_token(self) -> float:
        """The same of the test's."""
        return self._bytes_per_token(self._set(-1))

    def _bytes_per_token(self, examples: Dataset[Example]) -> float:
        texts, tokens = [], 0
        for index in range(len(examples)):  # type: ignore[arg-type]
            labels = examples[index]["labels"][1:]  # the first token is not predicted
            scored = labels[labels != IGNORED]
            texts.append(scored.tolist())
            tokens += len(scored)
        decoded = self.tokenizer.batch_decode(texts, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return sum(len(text.encode()) for text in decoded) / max(1, tokens)

    def preview(self, batch: dict[str, Tensor], max_chars: int = 800) -> str:
        """The first sequence of a batch as text, what is learned between ⟦ and ⟧."""
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        if "attention_mask" in batch:
            kept = batch["attention_mask"][0].bool()
            ids, labels = ids[kept], labels[kept]
        examples = [(ids, labels)]
        if "position_ids" in batch:
            examples = parts_of(ids, labels, batch["position_ids"][0], pad=self.pad)
        text = NEXT.join(self._marked(*example, max_chars) for example in examples)
        count = sum(len(tokens) for tokens, _ in examples)
        share = (batch["labels"] != IGNORED).float().mean().item()
        return f"{text}\n({count} tokens; {share:.0%} of the batch is learned, between ⟦ and ⟧)"

    def _marked(self, ids: Tensor, labels: Tensor, max_chars: int) -> str:
        runs = groupby(zip(ids.tolist(), labels.tolist(), strict=True), key=lambda pair: pair[1] != IGNORED)
        parts = []
        for learned, run in runs:
            text = self.tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
            parts.append(f"⟦{_shorten(text, max_chars)}⟧" if learned else _shorten(text, max_chars))
        return "".join(parts)


def _shorten(text: str, max_chars: int) -> str:
    half = max_chars // 2
    return text if len(text) <= max_chars else f"{text[:half]} … {text[-half:]}"
