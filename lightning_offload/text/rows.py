"""Rows of prompt and answer, of conversations, or of plain text: what `jsonl` and `hf` have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from typing_extensions import override

from lightning_offload.text.batches import Example, answered, collate
from lightning_offload.text.data import TextData
from lightning_offload.text.lines import Line, cut
from lightning_offload.text.loading import check_flags
from lightning_offload.text.loss import IGNORED
from lightning_offload.text.packing import collate_packed, pack_examples


class Rows(TextData):
    """Base of what has one example in each row; the loss is on answers only.

    A row has one of three shapes, told apart by its fields: prompt and completion; messages, rendered by the
    tokenizer's chat template, learning what the assistant says; or text, learned whole. Prompt and completion are
    joined as they stand.

    Args:
        prompt_field, completion_field, text_field, messages_field: names of the fields.
        packing: train with as many examples in a sequence as it holds, which do not see each other: each has the loss
            that it has alone, see `packing`. Validation is never packed. Running text (``data=text``) is one stream of
            documents, as in pretraining: to keep texts apart, put them into rows.
        **common: see `TextData`. Longer examples are cut on the right, those without any answer left are dropped; both
            are counted and said once.
    """

    answer_end = None

    def __init__(
        self,
        *,
        prompt_field: str = "prompt",
        completion_field: str = "completion",
        text_field: str = "text",
        messages_field: str = "messages",
        packing: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_flags(packing=packing)
        self.prompt_field = prompt_field
        self.completion_field = completion_field
        self.text_field = text_field
        self.messages_field = messages_field
        self.packing = packing

    def examples(self, source: str, lines: Iterable[Line]) -> list[Example]:
        """One of each line, cut to length."""
        return cut(source, ((line, self._example(line)) for line in lines), self.sequence_length)

    def packed(self, examples: list[Example]) -> list[Example]:
        """Those to train on: several in a sequence, if they are to be."""
        return pack_examples(examples, self.sequence_length) if self.packing else examples

    @property
    @override
    def _collate(self) -> partial[Example]:
        return partial(collate_rows, pad=self.pad)

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
        for message in messages:
            line.characters("content", message["content"])
        try:
            whole = self._render(messages)
            parts = [(self._before(messages, turn), self._render(messages[: turn + 1])) for turn in turns]
            ids = self.encode([whole])[0]
        except Exception as error:  # of the template's own, or of its language
            reason = " ".join(str(error).split())
            raise line.error(f"the tokenizer's chat template cannot render it ({reason}): change the line.") from error
        labels = [IGNORED] * len(ids)
        for texts in parts:
            start, end = self._edges(line, whole, ids, texts)
            labels[start:end] = ids[start:end]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def _edges(self, line: Line, whole: str, ids: list[int], texts: tuple[str, str]) -> tuple[int, int]:
        """How many tokens of a conversation are in each of two texts that it begins with."""
        if not all(map(whole.startswith, texts)):
            raise line.error(
                "this chat template renders a turn differently once more follows, so what the assistant said cannot"
                " be told apart. Split the conversation: one line per answer."
            )
        first, second = self.encode(texts)
        for text, tokens in zip(texts, (first, second), strict=True):
            if ids[: len(tokens)] != tokens:
                at = len(text)
                raise line.error(
                    f"the tokenizer joins {whole[max(0, at - 10) : at]!r} and {whole[at : at + 10]!r} across the edge"
                    " of what the assistant said. Take white space off there: off the end of the chat template's"
                    " generation prompt, or off the message."
                )
        return len(first), len(second)

    def _before(self, messages: list[dict[str, str]], turn: int) -> str:
        """What stands before the words of a turn; nothing before the first, as templates need a message."""
        return self._render(messages[:turn], add_generation_prompt=True) if turn else ""

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))


def collate_rows(examples: Sequence[Example], *, pad: int) -> Example:
    """A batch of examples, or of packed sequences of them."""
    return (collate_packed if "position_ids" in examples[0] else collate)(examples, pad=pad)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
