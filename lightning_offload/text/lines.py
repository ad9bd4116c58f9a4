"""Rows of files with named fields: JSON lines, CSV, Parquet; what is wrong with one says file, line and reason."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from lightning_offload.errors import DataError, OffloadError
from lightning_offload.text.batches import Example
from lightning_offload.text.loss import IGNORED


class Line(NamedTuple):
    """One parsed line, or row, of a file."""

    file: Path
    number: int
    row: dict[str, Any]

    def error(self, reason: str) -> DataError:
        """What is wrong with this line, in words a user can act on."""
        return DataError(f"{self.file}, line {self.number}: {reason}")

    def field(self, name: str) -> Any:
        """The value of a field; raises DataError when there is none."""
        if name not in self.row:
            raise self.error(f"has the fields {sorted(map(str, self.row))}; needs {name!r}.")
        return self.row[name]

    def text(self, name: str) -> str:
        """The same for a field that is text."""
        value = self.field(name)
        if not isinstance(value, str):
            raise self.error(
                f"{name!r} is {type(value).__name__}, not text: write it in quotes, or leave the line out."
            )
        return self.characters(name, value)

    def characters(self, name: str, text: str) -> str:
        """`text`, which is in the field `name`; raises DataError where a character of it is half a one."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(
                f"{name!r} has half a character (\\u{ord(text[error.start]):x}): mend the text."
            ) from error
        return text

    def words(self, name: str) -> str:
        """The same for text that says something."""
        value = self.text(name)
        if not value.strip():
            raise self.error(f"holds nothing to learn, its {name!r} is empty: leave the line out.")
        return value


_SHAPE = 'write one JSON object a line, such as {"text": "..."}'


def read_lines(file: Path, key: str = "data.path") -> Iterator[Line]:
    """The JSON objects of a file; empty lines are allowed at its end only.

    Args:
        file: which.
        key: the setting that names it.

    Raises:
        DataError: naming the file, and for a bad line its number and the reason.
    """
    if file.is_dir():
        raise DataError(f"{file} is a folder: pass {key}=<a .jsonl file in it>.")
    if not file.is_file():
        raise DataError(f"There is no file {file}: pass {key}=<file.jsonl>.")
    lines = _text(file).rstrip().split("\n")
    if lines == [""]:
        raise DataError(f"{file} is empty: {_SHAPE}.")
    for number, text in enumerate(lines, start=1):
        try:
            row = json.loads(text, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg}, column {error.colno}): {_SHAPE}" if text.strip() else _EMPTY
            raise DataError(f"{file}, line {number}: {reason}.") from error
        except (_TwiceError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: {error}.") from error
        line = Line(file, number, row)
        if not isinstance(row, dict):
            raise line.error(f"a {type(row).__name__}, not a JSON object with named fields: {_SHAPE}.")
        yield line


_EMPTY = "empty, with others after it: take it out"


class _TwiceError(Exception):
    """A field that a JSON object has twice: nobody knows which one counts."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"the field {twice!r} is there twice: keep one")
    return row


def _csv(file: Path) -> Iterator[Line]:
    # newlines inside quotes belong to a field: the reader has to split, and GLUE's .tsv knows no quotes
    of_kind: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
    reader = csv.DictReader(_text(file).splitlines(keepends=True), strict=True, **of_kind)
    try:
        for row in reader:
            line = Line(file, reader.line_num, row)
            if None in row or None in row.values():
                raise line.error(f"does not have the {len(reader.fieldnames or ())} fields that the first line names.")
            yield line
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.reader.line_num}: {error}.") from error


def _parquet(file: Path) -> Iterator[Line]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise OffloadError(
            f"{file}: reading Parquet needs pyarrow; pip install 'lightning-offload[data]', or convert the file to"
            " .jsonl or .csv."
        ) from error
    try:
        rows = parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: no Parquet file that can be read ({str(error).splitlines()[0]}).") from error
    return (Line(file, number, row) for number, row in enumerate(rows, start=1))


def _text(file: Path) -> str:
    return read_utf8(file)


_OTHER_KINDS = {
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"PAR1": "Parquet: name it .parquet, or use data=hf",
}


def read_utf8(file: Path) -> str:
    """A file's text; raises DataError when it is not UTF-8, with the line."""
    content = file.read_bytes()
    for start, kind in _OTHER_KINDS.items():
        if content.startswith(start):
            raise DataError(f"{file} is {kind}.")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}: not UTF-8 text (byte {error.start}) in line {number}. Convert it: save it as UTF-8."
        ) from error


READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    ".jsonl": read_lines,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
}


def read_split(path: str, *names: str) -> list[Line]:
    """The lines of one split of a data set in a folder, as it is on disk or as the Hugging Face hub keeps it.

    Args:
        path: the folder, searched with all below: ``train.jsonl``, ``main/train-00000-of-00001.parquet``, ...
        names: what the split may be called, e.g. ``"dev", "validation"``.

    Returns:
        Its lines; none when there is no such split.

    Raises:
        DataError: when there is no folder, the split is there twice, a shard is missing, or a line is bad.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"There is no folder path={path!r}: pass data.path=<folder with train.jsonl, .parquet or .csv>."
        )
    named = re.compile(rf"({'|'.join(names)})(-\d+-of-(?P<shards>\d+))?")
    found: dict[tuple[Path, str], list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in READERS and named.fullmatch(file.stem):
            found.setdefault((file.parent, file.suffix), []).append(file)
    if len(found) > 1:
        places = " and ".join(str(files[0].relative_to(folder)) for files in found.values())
        raise DataError(f"path={path!r} has the split {names[0]!r} more than once, in {places}: pass one's folder.")
    files = next(iter(found.values()), [])
    parts = named.fullmatch(files[0].stem) if files else None
    wanted = int(parts["shards"] or 1) if parts else 0
    if len(files) != wanted:
        raise DataError(f"{files[0].parent} has {len(files)} of the files of the split {names[0]!r}, needs {wanted}.")
    return [line for file in files for line in READERS[file.suffix](file)]


def needed(lines: list[Line], path: str, split: str) -> list[Line]:
    """The lines; raises DataError when there are none."""
    if not lines:
        endings = ", ".join(READERS)
        raise DataError(f"path={path!r} has no {split} file with anything in it: needs {split} ending in {endings}.")
    return lines


def cut(path: str, examples: Iterable[tuple[Line, Example]], sequence_length: int) -> list[Example]:
    """Examples of at most `sequence_length` tokens, cut on the right; says once what was cut or dropped.

    Raises:
        DataError: for an example with nothing to learn, or when none has any of its answer left.
    """
    kept, shortened, dropped = [], 0, []
    for line, example in examples:
        if not _learned(example):
            raise line.error("holds nothing to learn.")
        whole = len(example["input_ids"]) <= sequence_length
        short = {name: values[:sequence_length] for name, values in example.items()}
        if _learned(short):
            kept.append(short)
            shortened += not whole
        else:
            dropped.append(line.number)
    way_out = f"Raise data.sequence_length (now {sequence_length})."
    if dropped and not kept:
        raise DataError(f"{path}: no example has any of its answer within data.sequence_length. {way_out}")
    if dropped:
        first = ", ".join(map(str, dropped[:5])) + ", ..." * (len(dropped) > 5)
        rank_zero_warn(
            f"{path}: {len(dropped)} examples dropped, all of their answer is cut (lines {first}). {way_out}"
        )
    if shortened:
        rank_zero_warn(f"{path}: {shortened} of {len(kept)} examples are cut on the right. {way_out}")
    return kept


def _learned(example: Example) -> bool:
    """Whether any label counts; the first token is not predicted."""
    return bool((example["labels"][1:] != IGNORED).any())
