"""Prompt and answer, conversations or plain text, one JSON object per line."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.errors import DataError
from lightning_offload.text.batches import Example
from lightning_offload.text.data import TextData
from lightning_offload.text.loss import IGNORED
from lightning_offload.text.sources import check_fraction, held_out_count


class Line(NamedTuple):
    """One parsed line of a file."""

    file: Path
    number: int
    row: dict[str, Any]

    def error(self, reason: str) -> DataError:
        """What is wrong with this line, in words a user can act on."""
        return DataError(f"{self.file}, line {self.number}: {reason}")


class Jsonl(TextData):
    """Examples from a .jsonl file; the loss is on answers only.

    A line has one of three shapes, told apart by its fields: prompt and completion; messages, rendered by the
    tokenizer's chat template, learning what the assistant says; or text, learned whole. Prompt and completion are
    joined as they stand.

    Args:
        path: the file.
        val_path: another one for validation; None to hold out a part of `path`.
        val_fraction: that part, drawn by `seed`.
        prompt_field, completion_field, text_field, messages_field: names of the fields.
        **common: see `TextData`. Longer examples are cut on the right, those without any answer left are dropped; both
            are counted and said once.

    Raises:
        DataError: for a missing or empty file, or a bad line, naming file, line number and reason.
    """

    def __init__(
        self,
        *,
        path: str,
        val_path: str | None = None,
        val_fraction: float = 0.1,
        prompt_field: str = "prompt",
        completion_field: str = "completion",
        text_field: str = "text",
        messages_field: str = "messages",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_fraction(val_fraction)
        self.path = path
        self.val_path = val_path
        self.val_fraction = val_fraction
        self.prompt_field = prompt_field
        self.completion_field = completion_field
        self.text_field = text_field
        self.messages_field = messages_field

    @override
    def read(self) -> tuple[Dataset[Example], Dataset[Example]]:
        train = self._examples(self.path)
        if self.val_path is not None:
            return train, self._examples(self.val_path)  # type: ignore[return-value]
        random.Random(self.seed).shuffle(train)
        held_out = held_out_count(len(train), self.val_fraction)
        return train[held_out:], train[:held_out]  # type: ignore[return-value]

    def _examples(self, path: str) -> list[Example]:
        """All lines of a file as examples of at most `sequence_length` tokens."""
        examples, cut, dropped = [], 0, []
        for line in read_lines(Path(path).expanduser()):
            ids, labels = self._tokens(line)
            if not _learned(labels):
                raise line.error("holds nothing to learn.")
            cut += len(ids) > self.sequence_length
            ids, labels = ids[: self.sequence_length], labels[: self.sequence_length]
            if _learned(labels):
                examples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
            else:
                dropped.append(line.number)
        self._report(path, len(examples), cut, dropped)
        return examples

    def _report(self, path: str, kept: int, cut: int, dropped: list[int]) -> None:
        """Say once what truncation did; raise when it left nothing."""
        way_out = f"Raise data.sequence_length (now {self.sequence_length})."
        if dropped and not kept:
            raise DataError(f"{path}: no example has any of its answer within data.sequence_length. {way_out}")
        if dropped:
            first = ", ".join(map(str, dropped[:5])) + ", ..." * (len(dropped) > 5)
            rank_zero_warn(
                f"{path}: {len(dropped)} examples dropped, all of their answer is cut (lines {first}). {way_out}"
            )
        if cut - len(dropped) > 0:
            rank_zero_warn(f"{path}: {cut - len(dropped)} of {kept} examples are cut on the right. {way_out}")

    def _tokens(self, line: Line) -> tuple[list[int], list[int]]:
        """Ids and labels of a line, whole."""
        row = line.row
        if self.messages_field in row:
            return self._conversation(line, row[self.messages_field])
        if self.prompt_field in row and self.completion_field in row:
            prompt = self._start + self._ids(line, self.prompt_field)
            answer = [*self._ids(line, self.completion_field), self.end]
            return prompt + answer, [IGNORED] * len(prompt) + answer
        if self.text_field in row:
            ids = [*self._start, *self._ids(line, self.text_field), self.end]
            return ids, list(ids)
        raise line.error(
            f"has the fields {sorted(row)}; needs {self.prompt_field!r} and {self.completion_field!r},"
            f" or {self.messages_field!r}, or {self.text_field!r}. Other names: data.prompt_field=... and so on."
        )

    @property
    def _start(self) -> list[int]:
        """The token that this tokenizer puts before a text, if it does."""
        alone = self.tokenizer("")["input_ids"]
        return list(alone) if alone == [self.tokenizer.bos_token_id] else []

    def _ids(self, line: Line, field: str) -> list[int]:
        text = line.row[field]
        if not isinstance(text, str):
            raise line.error(f"{field!r} is {type(text).__name__}, not text.")
        return self.encode([text])[0]

    def _conversation(self, line: Line, messages: Any) -> tuple[list[int], list[int]]:
        """The chat template's tokens; learned is what each assistant turn adds to the conversation before it."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise line.error(
                "has messages, but the tokenizer has no chat template: use prompt and completion, or another model."
            )
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise line.error(f"{self.messages_field!r} is not a list of {{'role': ..., 'content': ...}}.")
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise line.error("has no message of the assistant: there is nothing to learn.")
        ids = self._render(messages)
        labels = [IGNORED] * len(ids)
        for turn in turns:
            before = self._render(messages[:turn], add_generation_prompt=True)
            after = self._render(messages[: turn + 1])
            if ids[: len(before)] != before or ids[: len(after)] != after:
                raise line.error(
                    "this chat template renders a turn differently once more follows, so what the assistant said cannot"
                    " be told apart. Split the conversation: one line per answer."
                )
            labels[len(before) : len(after)] = after[len(before) :]
        return ids, labels

    def _render(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return self.encode([text])[0]


def _learned(labels: list[int]) -> bool:
    """Whether any label counts; the first token is not predicted."""
    return any(label != IGNORED for label in labels[1:])


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def read_lines(file: Path) -> Iterator[Line]:
    """The JSON objects of a file; empty lines are allowed at its end only.

    Raises:
        DataError: naming the file, and for a bad line its number and the reason.
    """
    if not file.is_file():
        raise DataError(f"There is no file {file}: pass data.path=<file.jsonl>.")
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}).") from error
    if lines == [""]:
        raise DataError(f"{file} is empty.")
    for number, text in enumerate(lines, start=1):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg}, column {error.colno})" if text.strip() else "empty"
            raise DataError(f"{file}, line {number}: {reason}.") from error
        line = Line(file, number, row)
        if not isinstance(row, dict):
            raise line.error(f"a {type(row).__name__}, not a JSON object with named fields.")
        yield line
