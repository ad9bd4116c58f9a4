"""Prompt and answer, conversations or plain text, one JSON object per line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.text.batches import Example
from lightning_offload.text.lines import read_lines
from lightning_offload.text.rows import Rows
from lightning_offload.text.sources import check_fraction, held_out_count


class Jsonl(Rows):
    """Examples from a .jsonl file; see `Rows` for what a line may hold.

    Args:
        path: the file.
        val_path: another one for validation; None to hold out a part of `path`.
        val_fraction: that part, drawn by `seed`.
        **common: see `Rows` and `TextData`.

    Raises:
        DataError: for a missing or empty file, or a bad line, naming file, line number and reason.
    """

    def __init__(self, *, path: str, val_path: str | None = None, val_fraction: float = 0.1, **common: Any) -> None:
        super().__init__(**common)
        check_fraction(val_fraction)
        self.path = path
        self.val_path = val_path
        self.val_fraction = val_fraction

    @override
    def read(self) -> tuple[Dataset[Example], ...]:
        paths = {"data.path": self.path, "data.val_path": self.val_path}
        sets: list[Any] = [self._read(path, key) for key, path in paths.items() if path is not None]
        if len(sets) == 1:
            sets = held_out(sets[0], self.val_fraction, self.seed)
        return (self.packed(sets[0]), sets[1])  # type: ignore[return-value]

    def _read(self, path: str, key: str) -> list[Example]:
        return self.examples(path, read_lines(Path(path).expanduser(), key))


def held_out(examples: list[Example], fraction: float, seed: int) -> list[list[Example]]:
    """What to train on and what to validate with: a part of `examples`, drawn by `seed`."""
    random.Random(seed).shuffle(examples)
    count = held_out_count(len(examples), fraction)
    return [examples[count:], examples[:count]]
