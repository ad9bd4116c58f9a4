"""Yes-or-no questions about texts: fields of a line in a prompt, continued by a word for each label."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.errors import DataError
from lightning_offload.text.batches import Example
from lightning_offload.text.data import TextData
from lightning_offload.text.lines import Line, needed, read_split
from lightning_offload.text.verbalizers import Choices, choices, collate_choices

LABELS = {"0": 0, "1": 1, "False": 0, "True": 1, "false": 0, "true": 1}


class Prompted(TextData):
    """Lines with two labels, in a prompt with a word for each, for `PromptClassifier`.

    Args:
        path: folder with .jsonl, .csv, .tsv or .parquet files: train, dev (or validation), and test. Where the test
            split has no labels, as GLUE's, the validation split is the test, and training lines that are not trained
            on validate.
        train_examples, val_examples, test_examples: at most so many, drawn by `seed`; None for all.
        prompt: with each of `fields` in braces.
        label_words: what follows the prompt for labels 0 and 1, the space included.
        **common: see `TextData`. A longer prompt is cut on the left, which is counted and said once.

    Attributes:
        fields: of a line, in the prompt.
        label_fields: where the label is: the first of these that a line has.
        meaning: of labels 0 and 1.
        texts: what the prompts are, in a word.

    Raises:
        ValueError: for a prompt without its fields, or label words that are not two different ones.
        DataError: for missing files or a bad line, naming file, line number and reason.
    """

    fields: tuple[str, ...] = ()
    label_fields: tuple[str, ...] = ("label",)
    meaning: tuple[str, str] = ("no", "yes")
    texts = "texts"

    def __init__(
        self,
        *,
        path: str,
        train_examples: int | None,
        val_examples: int | None,
        test_examples: int | None,
        prompt: str,
        label_words: Sequence[str],
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for field in self.fields:
            if prompt.count(f"{{{field}}}") != 1:
                raise ValueError(f"prompt={prompt!r}: say where the text goes with one {{{field}}}.")
        if len(set(label_words)) != 2 or len(label_words) != 2:
            meant = " and ".join(self.meaning)
            raise ValueError(f"label_words={list(label_words)}: give two different ones, for {meant}.")
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
            if kept < 1:
                raise DataError(
                    f"{self.path}: val_examples={self.limits[1]} of {len(train)} leave nothing to train on: pass"
                    " data.val_examples=<fewer>, or a validation split beside a test split with labels."
                )
            train, val = train[:kept], train[kept:]
        parts = zip((train, val, test), self.limits, strict=True)
        return tuple(self._examples(lines[:limit]) for lines, limit in parts)

    def _splits(self) -> tuple[list[Line], list[Line], list[Line]]:
        """Training, validation and test lines; those of validation are none where they have to be the test."""
        train, val, test = (read_split(self.path, *names) for names in (("train",), ("dev", "validation"), ("test",)))
        needed(train, self.path, "train")
        if not any(self._is_labelled(line) for line in test):
            val, test = [], needed(val, self.path, "dev")
        return train, val, test

    def _examples(self, lines: list[Line]) -> Any:
        examples = [self._example(line) for line in lines]
        cut = sum(example.cut for example in examples)
        if cut:
            rank_zero_warn(
                f"{self.path}: {cut} of {len(examples)} {self.texts} are cut on the left. Raise data.sequence_length"
                f" (now {self.sequence_length})."
            )
        return examples

    def _example(self, line: Line) -> Choices:
        prompt = self._prompt(line)
        ids, *continued = self.encode([prompt, *(prompt + word for word in self.label_words)])
        return choices(ids, continued, target=self._label(line), start=self.start, length=self.sequence_length)

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

    def _prompt(self, line: Line) -> str:
        texts = {field: self.field_text(field, line.words(field).strip()) for field in self.fields}
        return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), self.prompt)

    def field_text(self, field: str, text: str) -> str:
        """What is put into the prompt for the text of a field."""
        return text

    def _label_field(self, line: Line) -> str:
        return next((field for field in self.label_fields if field in line.row), self.label_fields[0])

    def _is_labelled(self, line: Line) -> bool:
        return str(line.row.get(self._label_field(line), -1)) != "-1"

    def _label(self, line: Line) -> int:
        field = self._label_field(line)
        value = line.field(field)
        if str(value) not in LABELS:
            raise line.error(f"{field!r} is {value!r}; needs 0 ({self.meaning[0]}) or 1 ({self.meaning[1]}).")
        return LABELS[str(value)]
