"""BoolQ (arXiv 1905.10044): a passage and a question that yes or no answers, from local files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from lightning_offload.text.prompted import Prompted


class BoolQ(Prompted):
    """Passages and questions in a prompt, with No and Yes, for `PromptClassifier`; MeZO's protocol by default.

    Args:
        path: folder with the fields passage, question, and answer or label (false or 0, true or 1); files as in
            `Prompted`: Google's own, SuperGLUE's, or the hub's.
        train_examples, val_examples, test_examples: at most so many, drawn by `seed`; None for all.
        prompt: with ``{passage}`` and ``{question}`` in it; the question begins with a capital and ends with its mark.
        label_words: what follows the prompt for no and yes.
        **common: see `Prompted`.

    Raises:
        ValueError: for a prompt without passage or question, or label words that are not two different ones.
        DataError: for missing files or a bad line, naming file, line number and reason.
    """

    fields = ("passage", "question")
    label_fields = ("label", "answer")
    meaning = ("false", "true")
    texts = "passages"

    def __init__(
        self,
        *,
        path: str,
        train_examples: int | None = 1000,
        val_examples: int | None = 500,
        test_examples: int | None = 1000,
        prompt: str = "{passage} {question}\n",
        label_words: Sequence[str] = ("No", "Yes"),
        **common: Any,
    ) -> None:
        limits = {"train_examples": train_examples, "val_examples": val_examples, "test_examples": test_examples}
        super().__init__(path=path, prompt=prompt, label_words=label_words, **limits, **common)

    @override
    def field_text(self, field: str, text: str) -> str:
        if field != "question":
            return text
        return text[:1].upper() + text[1:].removesuffix("?") + "?"
