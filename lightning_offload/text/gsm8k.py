"""GSM8K (arXiv 2110.14168): grade-school mathematics, answered in words with calculations, from local files."""

from __future__ import annotations

import random
import re
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.text.batches import Example, answered
from lightning_offload.text.data import TextData
from lightning_offload.text.lines import Line, cut, needed, read_split

QUESTION = "Question: {question}\nAnswer:"
FINAL = re.compile(r"#### *\$?(-?[\d.,]*\d)")


class Gsm8k(TextData):
    """Questions and whole answers; the loss is on the answers.

    Args:
        path: folder with the splits train and test as .jsonl, .csv or .parquet with the fields question and answer:
            OpenAI's own files, or ``main`` of the hub's.
        val_examples: drawn from the training split by `seed`, for validation; the test split is for the test.
        **common: see `TextData`. Longer examples are cut on the right, which is counted and said once.

    Raises:
        DataError: for missing files or a bad line, naming file, line number and reason.
    """

    def __init__(self, *, path: str, val_examples: int = 500, **common: Any) -> None:
        super().__init__(**common)
        if val_examples < 1:
            raise ValueError(f"val_examples={val_examples}: hold at least one example out.")
        self.path = path
        self.val_examples = val_examples

    @override
    def read(self) -> tuple[Dataset[Example], ...]:
        train, test = (needed(read_split(self.path, split), self.path, split) for split in ("train", "test"))
        if self.val_examples >= len(train):
            raise ValueError(f"val_examples={self.val_examples} of {len(train)} leave nothing to train on.")
        random.Random(self.seed).shuffle(train)
        parts = train[self.val_examples :], train[: self.val_examples], test
        return tuple(self._examples(part) for part in parts)

    answer_end = None

    @override
    def final_answer(self, text: str) -> str:
        """The number after ``####``, without commas; nothing where there is none."""
        found = FINAL.search(text)
        return found[1].replace(",", "") if found else ""

    def _examples(self, lines: list[Line]) -> Any:
        return cut(self.path, ((line, self._example(line)) for line in lines), self.sequence_length)

    def _example(self, line: Line) -> Example:
        question, answer = self.encode([QUESTION.format(question=line.words("question")), f" {line.words('answer')}"])
        return answered([*self.start, *question], [*answer, self.end])
