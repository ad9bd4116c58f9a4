"""Data sets of the Hugging Face hub, or in its library's formats, through ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.errors import DataError, OffloadError
from lightning_offload.text.batches import Example
from lightning_offload.text.jsonl import held_out
from lightning_offload.text.lines import Line
from lightning_offload.text.rows import Rows
from lightning_offload.text.sources import check_fraction

_ON_DISK = ("dataset_dict.json", "state.json")


class HfDataset(Rows):
    """Examples from a data set that ``datasets`` reads; see `Rows` for what a row may hold.

    Args:
        path: hub id, folder written by ``save_to_disk``, or folder with data files (.parquet, .csv, .jsonl, ...).
        name: of the configuration, where there are several.
        split: to train on; parts as in ``train[:1000]`` where the library reads files.
        val_split: for validation; None to hold out a part of `split`.
        val_fraction: that part, drawn by `seed`.
        **common: see `Rows` and `TextData`.

    Raises:
        OffloadError: where ``datasets`` is not installed.
        DataError: for what it cannot find or read, or a bad row, naming data set, split, row and reason.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_fraction(val_fraction)
        self.path = path
        self.name = name
        self.split = split
        self.val_split = val_split
        self.val_fraction = val_fraction

    @override
    def read(self) -> tuple[Dataset[Example], ...]:
        sets: list[Any] = [self._read(split) for split in (self.split, self.val_split) if split is not None]
        if len(sets) == 1:
            sets = held_out(sets[0], self.val_fraction, self.seed)
        return (self.packed(sets[0]), sets[1])  # type: ignore[return-value]

    def _read(self, split: str) -> list[Example]:
        source = f"{self.path} ({split})"
        return self.examples(source, _lines(source, load_split(self.path, self.name, split)))


def _lines(source: str, rows: Any) -> Iterator[Line]:
    if not len(rows):
        raise DataError(f"{source} is empty.")
    for number, row in enumerate(rows, start=1):
        # a table has every field in every row: None where a row has it not
        yield Line(Path(source), number, {name: value for name, value in row.items() if value is not None})


def load_split(path: str, name: str | None, split: str) -> Any:
    """The rows of one split.

    Raises:
        OffloadError: where ``datasets`` is not installed.
        DataError: for what it cannot find or read, in one line.
    """
    try:
        import datasets
    except ImportError as error:
        raise OffloadError(
            f"data.path={path!r}: `data=hf` needs the package datasets; pip install 'lightning-offload[data]', or use"
            " data=jsonl."
        ) from error
    folder = Path(path).expanduser()
    try:
        if not any((folder / mark).is_file() for mark in _ON_DISK):
            return datasets.load_dataset(str(folder) if folder.exists() else path, name, split=split)
        whole = datasets.load_from_disk(folder)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"Cannot load data.path={path!r}, data.split={split!r}: {reason} Pass a hub id, a folder of save_to_disk,"
            " or a folder with data files; data.name=<configuration> where there are several."
        ) from error
    known = whole if isinstance(whole, datasets.DatasetDict) else {str(whole.split or "train"): whole}
    if split not in known:
        raise DataError(f"data.path={path!r} has no split {split!r}; there are {', '.join(known)}.")
    return known[split]
