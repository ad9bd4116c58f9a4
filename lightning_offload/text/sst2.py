"""SST-2 (Socher et al., 2013): sentences of film reviews, negative or positive, from local files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_offload.text.prompted import Prompted


class Sst2(Prompted):
    """Sentences in a prompt with a word for each label, for `PromptClassifier`; MeZO's protocol by default.

    Args:
        path: folder with the fields sentence and label (0 negative, 1 positive); files as in `Prompted`.
        train_examples, val_examples, test_examples: at most so many, drawn by `seed`; None for all.
        prompt: with ``{sentence}`` in it.
        label_words: what follows the prompt for labels 0 and 1, the space included.
        **common: see `Prompted`.

    Raises:
        ValueError: for a prompt without a sentence or label words that are not two different ones.
        DataError: for missing files or a bad line, naming file, line number and reason.
    """

    fields = ("sentence",)
    meaning = ("negative", "positive")
    texts = "sentences"

    def __init__(
        self,
        *,
        path: str,
        train_examples: int | None = 1000,
        val_examples: int | None = 500,
        test_examples: int | None = 1000,
        prompt: str = "{sentence} It was",
        label_words: Sequence[str] = (" terrible", " great"),
        **common: Any,
    ) -> None:
        limits = {"train_examples": train_examples, "val_examples": val_examples, "test_examples": test_examples}
        super().__init__(path=path, prompt=prompt, label_words=label_words, **limits, **common)
