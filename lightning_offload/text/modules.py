"""A causal language model of transformers as a LightningModule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, SumMetric
from typing_extensions import override

from lightning_offload.text.answers import Match, right_answers
from lightning_offload.text.loading import build_network, load_tokenizer, recompute_blocks
from lightning_offload.text.lora import put_lora
from lightning_offload.text.loss import next_token_loss

Batch = dict[str, Tensor]


class CausalLM(L.LightningModule):
    """Fine-tune any causal language model of transformers; the loss never holds full fp32 logits.

    Optimizer and scheduler come as factories, so that a config can name them::

        CausalLM(path=TINY_PATH, optimizer=partial(torch.optim.AdamW, lr=1e-3), scheduler=linear_decay)

    By default all trainable parameters form one group; ``no_decay_norms=True`` puts those with fewer than two
    dimensions (norms, biases) into a second one without weight decay.

    Args:
        path: folder with ``config.json`` and safetensors, or a hub id.
        config: the model by shape, e.g. ``{"model_type": "llama", "hidden_size": 64, ...}``.
        init: ``"pretrained"`` weights, or ``"random"``; a model by shape has only the latter, and has to say so to be
            trained.
        dtype: of the weights as loaded.
        gradient_checkpointing: recompute each block in the backward pass.
        loss_chunk_tokens: tokens whose logits exist at the same time; 0 for the model's own forward.
        optimizer: from parameters (or groups) to an optimizer; default AdamW, lr 1e-3, fused.
        scheduler: from the optimizer to a schedule stepped after each optimizer step; when it takes ``total_steps``
            and that is left open, it gets the Trainer's estimate.
        tokenizer_path: where the tokenizer is, when not at `path`.
        no_decay_norms: see above.
        match_answers: validation and test also have the model answer each prompt by itself, greedily, and report the
            share of right answers as ``exact_match`` or ``contains_match``; see `right_answers`.
        max_answer_tokens: tokens of such an answer, at most; GSM8K takes 256 and more.
        lora: ``{"rank": 8}`` trains low-rank adapters of PEFT's on frozen weights; see `LoRA` for the other settings.

    Attributes:
        network: the transformers model.
        tokenizer: its tokenizer, or None.

    Raises:
        ValueError: when not exactly one of `path` and `config` is given, or a value is not known.
        OffloadError: when `path` holds no model.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        config: dict[str, Any] | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        loss_chunk_tokens: int = 1024,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        tokenizer_path: str | None = None,
        no_decay_norms: bool = False,
        match_answers: Match | None = None,
        max_answer_tokens: int = 64,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if loss_chunk_tokens < 0:
            raise ValueError(f"loss_chunk_tokens={loss_chunk_tokens}: give the tokens per chunk, or 0 for no chunks.")
        if match_answers not in (None, "exact", "contains") or max_answer_tokens < 1:
            raise ValueError(
                f"match_answers={match_answers!r}, max_answer_tokens={max_answer_tokens}: the choice is 'exact',"
                " 'contains' or None, with at least one token."
            )
        # no save_hyperparameters: factories in a checkpoint would need more than weights_only=True to load
        self.network: Any = build_network(path=path, config=config, init=init, dtype=dtype)
        put_lora(self.network, lora)
        self.tokenizer: Any = load_tokenizer(tokenizer_path, path)
        self.loss_chunk_tokens = loss_chunk_tokens
        self.no_decay_norms = no_decay_norms
        self.match_answers = match_answers
        self.max_answer_tokens = max_answer_tokens
        self._has_weights = path is not None or init == "random"
        self._optimizer = optimizer or partial(AdamW, lr=1e-3, fused=True)
        self._scheduler = scheduler
        # of the evaluation that is going on; "disable" lets a NaN through, where the default leaves it out (two sums,
        # as with it torchmetrics 1.9's MeanMetric forgets the weights)
        self.total_loss = SumMetric(nan_strategy="disable")
        self.total_tokens = SumMetric(nan_strategy="disable")
        self.matched = MeanMetric()
        if gradient_checkpointing:
            recompute_blocks(self.network)

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and not self._has_weights:
            raise ValueError(
                "This model is given by its shape (config=...) and has no pretrained weights to fine-tune."
                " Pass path=<folder or hub id>, or init='random' (model.init=random) to train from scratch."
            )

    @override
    def forward(self, **inputs: Tensor) -> Any:
        return self.network(**inputs)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = next_token_loss(self.network, batch, chunk_tokens=self.loss_chunk_tokens).mean
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

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

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._optimizer(self._parameter_groups())
        if self._scheduler is None:
            return optimizer
        schedule = self._scheduler(optimizer, **self._open_total_steps(self._scheduler))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _parameter_groups(self) -> list[Any]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not self.no_decay_norms:
            return trained
        flat = [parameter for parameter in trained if parameter.ndim < 2]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        return [{"params": matrices}, {"params": flat, "weight_decay": 0.0}]

    def _open_total_steps(self, scheduler: Callable[..., LRScheduler]) -> dict[str, int]:
        """``total_steps`` from the Trainer, when `scheduler` takes it and does not have it yet."""
        wanted = inspect.signature(scheduler).parameters.get("total_steps")
        bound = isinstance(scheduler, partial) and "total_steps" in scheduler.keywords
        if wanted is None or bound:
            return {}
        return {"total_steps": int(self.trainer.estimated_stepping_batches)}

    @property
    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("This model has no tokenizer: pass tokenizer_path=<folder or hub id>.")
        return self.tokenizer

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
