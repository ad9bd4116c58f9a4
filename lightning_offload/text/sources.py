"""Running text, packed: the shipped corpus and files of one's own."""

from __future__ import annotations

import glob
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.errors import DataError
from lightning_offload.text.batches import Example, Packed, pack, spread
from lightning_offload.text.corpus import Domain, Split, load_corpus
from lightning_offload.text.data import TextData
from lightning_offload.text.lines import read_utf8

SUFFIXES = (".txt", ".md", ".rst", ".py")


class ShippedCorpus(TextData):
    """The pinned corpus (`lightning_offload.text.corpus`), with its own held-out documents for validation.

    Args:
        split: what to train on: ``"train"``, or ``"pretrain"``, what the shipped model has seen.
        limit_train_tokens: at most this many training tokens, spread over the documents; None for all.
        limit_val_tokens: the same for validation.
        **common: see `TextData`.
    """

    domain: Domain

    def __init__(
        self,
        *,
        split: Split = "train",
        limit_train_tokens: int | None = None,
        limit_val_tokens: int | None = 32_768,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for name, limit in (("limit_train_tokens", limit_train_tokens), ("limit_val_tokens", limit_val_tokens)):
            if limit is not None and limit < self.sequence_length:
                raise ValueError(f"{name}={limit} is less than one sequence of {self.sequence_length} tokens.")
        self.split: Split = split
        self.limit_train_tokens = limit_train_tokens
        self.limit_val_tokens = limit_val_tokens

    @override
    def read(self) -> tuple[Dataset[Example], Dataset[Example]]:
        return self._packed(self.split, self.limit_train_tokens), self._packed("heldout", self.limit_val_tokens)

    def _packed(self, split: Split, limit: int | None) -> Packed:
        documents = self.encode(load_corpus(self.domain, split))
        return Packed(spread(pack(documents, start=self.start, end=self.end, length=self.sequence_length), limit))


class PythonSource(ShippedCorpus):
    """Standard-library source without docstrings and comments: the domain that the shipped model has not seen."""

    domain = "code"


class PythonDocs(ShippedCorpus):
    """Documentation of Python and its standard library: the domain of the shipped model."""

    domain = "docs"


class TextFiles(TextData):
    """Text files, one document each, packed into one stream with the tokens that begin and end a text between them.

    A sequence may hold the end of a document and the beginning of the next, which sees it, as in pretraining. Texts
    that are to be kept apart are rows with a text field: ``data=jsonl data.packing=true``.

    Args:
        path: a file, a folder (searched for .txt, .md, .rst and .py), or a glob pattern.
        val_path: the same for validation; None to hold out a part of `path`.
        val_fraction: that part: the last sequences after files were put in an order drawn by `seed`, so that at most
            one file is on both sides.
        **common: see `TextData`.

    Raises:
        DataError: when nothing is found, or a file is not UTF-8 text.
    """

    def __init__(self, *, path: str, val_path: str | None = None, val_fraction: float = 0.1, **common: Any) -> None:
        super().__init__(**common)
        check_fraction(val_fraction)
        self.path = path
        self.val_path = val_path
        self.val_fraction = val_fraction

    @override
    def read(self) -> tuple[Dataset[Example], Dataset[Example]]:
        train = self._sequences(self.path)
        if self.val_path is not None:
            return Packed(train), Packed(self._sequences(self.val_path))
        held_out = held_out_count(len(train), self.val_fraction)
        return Packed(train[: len(train) - held_out]), Packed(train[len(train) - held_out :])

    def _sequences(self, path: str) -> Any:
        texts = [read_text(file) for file in find_files(path)]
        random.Random(self.seed).shuffle(texts)
        documents = self.encode(texts)
        sequences = pack(documents, start=self.start, end=self.end, length=self.sequence_length)
        total = sum(map(len, documents)) + len(documents) * (len(self.start) + 1)
        left = total - sequences.numel()
        if 0 < total < 100 * left and len(sequences):  # without any it is an error
            rank_zero_warn(
                f"{path}: the last {left} of {total} tokens do not fill a sequence and are left out. A smaller"
                f" data.sequence_length (now {self.sequence_length}) leaves fewer."
            )
        return sequences


def find_files(path: str) -> Sequence[Path]:
    """The files meant by a file, a folder or a glob pattern, in a fixed order."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [file for file in place.rglob("*") if file.is_file() and file.suffix in SUFFIXES]
        if not found:
            raise DataError(
                f"The folder path={path!r} holds no {', '.join(SUFFIXES)} files: pass a file or a glob pattern."
            )
        return sorted(found)
    matches = [Path(match) for match in glob.glob(str(place), recursive=True) if Path(match).is_file()]
    if not matches:
        raise DataError(f"There is no file, folder or match for path={path!r}: pass data.path=<file, folder or glob>.")
    return sorted(matches)


def read_text(file: Path) -> str:
    """A file's text; raises DataError when it is not UTF-8."""
    return read_utf8(file)


def check_fraction(val_fraction: float) -> None:
    """Raise when nothing would be left to train on, or to validate with."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: give a share between 0 and 1, or a val_path.")


def held_out_count(count: int, val_fraction: float) -> int:
    """How many of `count` examples to hold out: at least one, when there are two."""
    return min(max(1, round(count * val_fraction)), max(0, count - 1))
