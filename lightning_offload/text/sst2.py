"""SST-2 (Socher et al., 2013): sentences of film reviews, negative or positive, from local files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.text.batches import Example
from lightning_offload.text.data import TextData
from lightning_offload.text.lines import Line, needed, read_split
from lightning_offload.text.verbalizers import Choices, choices, collate_choices

LABELS = 2


class Sst2(TextData):
    """Sentences in a prompt with a word for each label, for `PromptClassifier`; MeZO's protocol by default.

    Args:
        path: folder with .jsonl, .csv, .tsv or .parquet files with the fields sentence and label (0 negative, 1
            positive): train, dev (or validation), and test. Where the test split has no labels, as GLUE's, the
            validation split is the test, and training sentences that are not trained on validate.
        train_examples, val_examples, test_examples: at most so many, drawn by `seed`; None for all.
        prompt: with ``{sentence}`` in it.
        label_words: what follows the prompt for labels 0 and 1, the space included.
        **common: see `TextData`. A longer sentence is cut on the left, which is counted and said once.

    Raises:
        ValueError: for a prompt without a sentence or label words that are not two different ones.
        DataError: for missing files or a bad line, naming file, line number and reason.
    """

    def __init__(
        self,
        *,
        path: str,
        train_examples: int | None = 1000,
        val_examples: int | None = 500,
        test_examples: int | None = 1000,
        prompt: str = "{sentence} It was",
        label_words: Sequence[str] = (" terrible", " great"),
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if prompt.count("{sentence}") != 1:
            raise ValueError(f"prompt={prompt!r}: say where the text goes with one {{sentence}}.")
        if len(set(label_words)) != LABELS or len(label_words) != LABELS:
            raise ValueError(f"label_words={list(label_words)}: give two different ones, for negative and positive.")
        self.path = path
        self.limits = train_examples, val_examples, test_examples
        self.prompt = prompt
        self.label_words = list(label_words)

    @override
    def read(self) -> tuple[Dataset[Choices], ...]:
        rng = random.Random(self.seed)
        train, val, test = self._splits()
        for lines in (train, val, test):
            rng.shuffle(lines)
        if not val:
            kept = len(train) - (self.limits[1] or len(train) // 10)
            train, val = train[:kept], train[max(kept, 0) :]
        parts = zip((train, val, test), self.limits, strict=True)
        return tuple(self._examples(lines[:limit]) for lines, limit in parts)

    def _splits(self) -> tuple[list[Line], list[Line], list[Line]]:
        """Training, validation and test lines; those of validation are none where they have to be the test."""
        train, val, test = (read_split(self.path, *names) for names in (("train",), ("dev", "validation"), ("test",)))
        needed(train, self.path, "train")
        if not any("label" in line.row and line.row["label"] not in (-1, "-1") for line in test):
            val, test = [], needed(val, self.path, "dev")
        return train, val, test

    def _examples(self, lines: list[Line]) -> Any:
        examples = [self._example(line) for line in lines]
        cut = sum(example.cut for example in examples)
        if cut:
            rank_zero_warn(
                f"{self.path}: {cut} of {len(examples)} sentences are cut on the left. Raise data.sequence_length"
                f" (now {self.sequence_length})."
            )
        return examples

    def _example(self, line: Line) -> Choices:
        prompt = self.prompt.replace("{sentence}", line.text("sentence").strip())
        ids, *continued = self.encode([prompt, *(prompt + word for word in self.label_words)])
        return choices(ids, continued, target=_label(line), start=self.start, length=self.sequence_length)

    @override
    def weight_of(self, example: Any) -> int:
        """Every example counts alike."""
        return 1

    @property
    @override
    def _collate(self) -> partial[Example]:
        return partial(collate_choices, pad=self.pad)

    @override
    def preview(self, batch: dict[str, Tensor], max_chars: int = 800) -> str:
        """The first example with its right word, between ⟦ and ⟧."""
        right = int(batch["target"][0])
        return super().preview(
            {name: value[0, right][None] for name, value in batch.items() if name != "target"}, max_chars
        )


def _label(line: Line) -> int:
    value = line.field("label")
    if str(value) not in ("0", "1"):
        raise line.error(f"'label' is {value!r}; needs 0 (negative) or 1 (positive).")
    return int(value)
