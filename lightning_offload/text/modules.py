"""A causal language model of transformers as a LightningModule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric
from typing_extensions import override

from lightning_offload.text.answers import Match, right_answers
from lightning_offload.text.base import Batch, TextModule
from lightning_offload.text.loading import CAUSAL
from lightning_offload.text.loss import next_token_loss
from lightning_offload.text.packing import check_packing


class CausalLM(TextModule):
    """Fine-tune any causal language model of transformers; the loss never holds full fp32 logits.

    Args:
        loss_chunk_tokens: tokens whose logits exist at the same time; 0 for the model's own forward.
        match_answers: validation and test also have the model answer each prompt by itself, greedily, and report the
            share of right answers as ``exact_match`` or ``contains_match``; see `right_answers`.
        max_answer_tokens: tokens of such an answer, at most; GSM8K takes 256 and more.
        **common: see `TextModule`: where the model comes from, and how it is optimized.

    Raises:
        ValueError: for a value that is not known.
    """

    auto = CAUSAL

    def __init__(
        self,
        *,
        loss_chunk_tokens: int = 1024,
        match_answers: Match | None = None,
        max_answer_tokens: int = 64,
        **common: Any,
    ) -> None:
        if loss_chunk_tokens < 0:
            raise ValueError(f"loss_chunk_tokens={loss_chunk_tokens}: give the tokens per chunk, or 0 for no chunks.")
        if match_answers not in (None, "exact", "contains") or max_answer_tokens < 1:
            raise ValueError(
                f"match_answers={match_answers!r}, max_answer_tokens={max_answer_tokens}: the choice is 'exact',"
                " 'contains' or None, with at least one token."
            )
        super().__init__(**common)
        self.loss_chunk_tokens = loss_chunk_tokens
        self.match_answers = match_answers
        self.max_answer_tokens = max_answer_tokens
        # of the evaluation that is going on; "disable" lets a NaN through, where the default leaves it out (two sums,
        # as with it torchmetrics 1.9's MeanMetric forgets the weights)
        self.total_loss = SumMetric(nan_strategy="disable")
        self.total_tokens = SumMetric(nan_strategy="disable")
        self.matched = MeanMetric()

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = getattr(self._trainer, "datamodule", None)
        if getattr(data, "packing", False):
            check_packing(self.network)
        if self.match_answers and hasattr(data, "check_answers"):
            data.check_answers()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = next_token_loss(self.network, batch, chunk_tokens=self.loss_chunk_tokens).mean
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return self.weighed(loss, batch_idx)

    @override
    def on_validation_epoch_start(self) -> None:
        # here, not at the end: in the same inference mode (or not) as the updates that follow
        self.total_loss.reset()
        self.total_tokens.reset()
        self.matched.reset()

    on_test_epoch_start = on_validation_epoch_start

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = next_token_loss(self.network, batch, chunk_tokens=self.loss_chunk_tokens)
        self.total_loss.update(loss.mean * loss.tokens)
        self.total_tokens.update(loss.tokens)
        if self.match_answers:
            self.matched.update(self.right_answers(batch))

    test_step = validation_step

    def right_answers(self, batch: Batch) -> Tensor:
        """Which prompts of `batch` are answered right, (batch,), by `match_answers` and the data's own rules."""
        return right_answers(
            self.network,
            batch,
            tokenizer=self._needed_tokenizer,
            data=self.trainer.datamodule,  # type: ignore[attr-defined]
            match=self.match_answers or "exact",
            max_new_tokens=self.max_answer_tokens,
        )

    @override
    def predict_step(self, batch: dict[str, Any]) -> str:
        """Continue a prompt; `batch` is what `generate` takes."""
        return self.generate(**batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._report("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, stage: str) -> None:
        """Log the token-weighted mean of the loss, and what follows from it."""
        loss = float(self.total_loss.compute() / self.total_tokens.compute())
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/perplexity", math.exp(min(loss, 700.0)))  # above, a double overflows
        name = {"val": "bytes_per_token", "test": "test_bytes_per_token"}[stage]
        bytes_per_token = getattr(self.trainer.datamodule, name, None)  # type: ignore[attr-defined]
        if bytes_per_token:
            self.log(f"{stage}/bits_per_byte", loss / math.log(2) / bytes_per_token)
        if self.match_answers:
            self.log(f"{stage}/{self.match_answers}_match", float(self.matched.compute()), prog_bar=True)

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int = 64, **options: Any) -> str:
        """Continue `prompt`; `options` are those of transformers' ``generate`` (greedy by default)."""
        inputs = self._needed_tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.device)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **options}
        was_training = self.network.training
        self.network.eval()
        output = self.network.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        self.network.train(was_training)
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
