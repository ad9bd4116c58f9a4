"""Prompt and answer, conversations or plain text, one JSON object per line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.text.batches import Example, answered
from lightning_offload.text.data import TextData
from lightning_offload.text.lines import Line, cut, read_lines
from lightning_offload.text.loss import IGNORED
from lightning_offload.text.sources import check_fraction, held_out_count


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

    answer_end = None

    @override
    def read(self) -> tuple[Dataset[Example], Dataset[Example]]:
        train = self._examples(self.path, "data.path")
        if self.val_path is not None:
            return train, self._examples(self.val_path, "data.val_path")
        random.Random(self.seed).shuffle(train)
        held_out = held_out_count(len(train), self.val_fraction)
        return train[held_out:], train[:held_out]

    def _examples(self, path: str, key: str) -> Any:
        lines = read_lines(Path(path).expanduser(), key)
        return cut(path, ((line, self._example(line)) for line in lines), self.sequence_length)

    def _example(self, line: Line) -> Example:
        """A line, whole."""
        row = line.row
        if self.messages_field in row:
            return self._conversation(line, row[self.messages_field])
        if self.prompt_field in row and self.completion_field in row:
            prompt = [*self.start, *self._ids(line, self.prompt_field)]
            line.words(self.completion_field)
            return answered(prompt, [*self._ids(line, self.completion_field), self.end])
        if self.text_field in row:
            line.words(self.text_field)
            return answered([], [*self.start, *self._ids(line, self.text_field), self.end])
        raise line.error(
            f"has the fields {sorted(row)}; needs {self.prompt_field!r} and {self.completion_field!r},"
            f" or {self.messages_field!r}, or {self.text_field!r}. Other names: data.prompt_field=... and so on."
        )

    def _ids(self, line: Line, field: str) -> list[int]:
        return self.encode([line.text(field)])[0]

    def _conversation(self, line: Line, messages: Any) -> Example:
        """The chat template's tokens; learned is what each assistant turn adds to the conversation before it."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise line.error(
                "has messages, but the tokenizer has no chat template: use prompt and completion, or another model."
            )
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise line.error(
                f"{self.messages_field!r} is not a list of {{'role': ..., 'content': ...}} with text: mend it."
            )
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise line.error("has no message of the assistant: there is nothing to learn. Leave it out.")
        try:
            ids = self._render(messages)
        except Exception as error:  # of the template's own, or of its language
            reason = " ".join(str(error).split())
            raise line.error(f"the tokenizer's chat template cannot render it ({reason}): change the line.") from error
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
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def _render(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return self.encode([text])[0]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
