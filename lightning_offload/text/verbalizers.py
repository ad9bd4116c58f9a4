"""Classification by a prompt and label words, as MeZO does it (arXiv 2305.17333): no new parameters.

A text in its prompt is continued by each label word; a word's score is the log-likelihood of its tokens. Training
minimises the cross-entropy of the scores, the prediction is the word with the highest.

A batch of n examples with c label words, sequences padded on the right to s tokens, int64:

    input_ids       (n, c, s)   the prompt and one label word
    labels          (n, c, s)   the word's tokens, -100 elsewhere
    attention_mask  (n, c, s)   only when there is padding
    target          (n,)        which word is right
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_offload.text.base import Batch
from lightning_offload.text.batches import Example, answered, collate
from lightning_offload.text.loss import IGNORED, next_token_losses
from lightning_offload.text.modules import CausalLM

Score = Literal["mean", "sum"]


class Choices(NamedTuple):
    """One example: the prompt with each label word, which is right, and whether the prompt was cut."""

    candidates: list[Example]
    target: int
    cut: bool


def choices(
    prompt: Sequence[int], continued: Sequence[Sequence[int]], *, target: int, start: Sequence[int], length: int
) -> Choices:
    """Candidates of at most `length` tokens; a longer prompt is cut on the left, as the question stands at its end.

    Args:
        prompt: its tokens.
        continued: those of the prompt with each label word. Where the two meet in one token, it is scored: what all
            share with the prompt is context.
        target: which one is right.
        start: tokens before the prompt that are not cut.
        length: tokens, at most.

    Raises:
        ValueError: for a label word that adds no token, or a `length` without room for the longest.
    """
    shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(prompt, *continued, strict=False)))
    words = [ids[shared:] for ids in continued]
    if not all(words):
        raise ValueError(f"Label word {words.index([])} adds no token to the prompt: give words with text.")
    room = length - len(start) - max(map(len, words))
    if room < 1:
        raise ValueError(f"The label words leave no room for a prompt: raise data.sequence_length (now {length}).")
    context = [*start, *prompt[:shared][-room:]]
    return Choices([answered(context, word) for word in words], target, cut=shared > room)


def collate_choices(examples: Sequence[Choices], *, pad: int) -> Example:
    """A batch as described above; all examples have the same number of candidates."""
    flat = collate([candidate for example in examples for candidate in example.candidates], pad=pad)
    batch = {name: value.unflatten(0, (len(examples), -1)) for name, value in flat.items()}
    return {**batch, "target": torch.tensor([example.target for example in examples])}


def word_scores(network: Any, batch: Batch, *, chunk_tokens: int, score: Score) -> Tensor:
    """Log-likelihood of each label word after its prompt, over (mean) or for (sum) its tokens.

    Args:
        network: a causal language model of transformers.
        batch: as described above.
        chunk_tokens: see `next_token_losses`.
        score: ``"mean"`` keeps long words from losing; ``"sum"`` is the word's log-probability.

    Returns:
        (n, c), fp32.
    """
    flat = {name: value.flatten(0, 1) for name, value in batch.items() if name != "target"}
    total = -next_token_losses(network, flat, chunk_tokens=chunk_tokens).sum(1)
    if score == "mean":
        total = total / (flat["labels"] != IGNORED).sum(1)
    return total.view(batch["labels"].shape[:2])


class PromptClassifier(CausalLM):
    """A causal language model that classifies by the scores of label words; batches as described above.

    Args:
        score: a word's log-likelihood per token (``"mean"``), or whole (``"sum"``).
        **common: see `CausalLM`.

    Raises:
        ValueError: for another `score`, or a batch without label words.
    """

    def __init__(self, *, score: Score = "mean", **common: Any) -> None:
        super().__init__(**common)
        if score not in ("mean", "sum"):
            raise ValueError(f"score={score!r}: the choice is 'mean' or 'sum'.")
        if self.match_answers:
            raise ValueError("match_answers is for CausalLM: PromptClassifier reports its accuracy. Leave it out.")
        self.score: Score = score
        self.accuracy = MulticlassAccuracy(average="micro")

    def scores(self, batch: Batch) -> Tensor:
        """See `word_scores`."""
        if "target" not in batch or batch["input_ids"].ndim != 3:
            raise ValueError(
                f"PromptClassifier takes batches with label words and a target; this one has {sorted(batch)}."
                " Use data=sst2, or the model CausalLM."
            )
        return word_scores(self.network, batch, chunk_tokens=self.loss_chunk_tokens, score=self.score)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.scores(batch), batch["target"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["target"]))
        return self.weighed(loss, batch_idx)

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.accuracy.reset()

    on_test_epoch_start = on_validation_epoch_start

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        scores, target = self.scores(batch), batch["target"]
        self.total_loss.update(F.cross_entropy(scores, target, reduction="sum"))
        self.total_tokens.update(len(target))
        self.accuracy.update(scores.argmax(1), target)

    test_step = validation_step

    @override
    def _report(self, stage: str) -> None:
        """Log the mean loss over examples, and the accuracy."""
        self.log(f"{stage}/loss", float(self.total_loss.compute() / self.total_tokens.compute()), prog_bar=True)
        self.log(f"{stage}/accuracy", float(self.accuracy.compute()), prog_bar=True)
