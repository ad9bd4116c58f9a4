"""What the LightningModules around transformers models share: weights, tokenizer, optimizer and schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_offload.text.loading import build_network, check_flags, load_tokenizer, recompute_blocks
from lightning_offload.text.lora import put_lora

Batch = dict[str, Tensor]


class TextModule(L.LightningModule):
    """A transformers model, its tokenizer, and how it is optimized; a subclass says what it is trained for.

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
        optimizer: from parameters (or groups) to an optimizer; default AdamW, lr 1e-3, fused.
        scheduler: from the optimizer to a schedule stepped after each optimizer step; when it takes ``total_steps``
            and that is left open, it gets the Trainer's estimate.
        tokenizer_path: where the tokenizer is, when not at `path`.
        no_decay_norms: see above.
        lora: ``{"rank": 8}`` trains low-rank adapters of PEFT's on frozen weights; see `LoRA` for the other settings.
        extra: what else the model's config is to say.

    Attributes:
        network: the transformers model.
        tokenizer: its tokenizer, or None.

    Raises:
        ValueError: when not exactly one of `path` and `config` is given, or a value is not known.
        OffloadError: when `path` holds no model.
    """

    #: the class of transformers that knows the kind of model
    auto: ClassVar[str]

    def __init__(
        self,
        *,
        path: str | None = None,
        config: dict[str, Any] | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        tokenizer_path: str | None = None,
        no_decay_norms: bool = False,
        lora: Mapping[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_flags(gradient_checkpointing=gradient_checkpointing, no_decay_norms=no_decay_norms)
        # no save_hyperparameters: factories in a checkpoint would need more than weights_only=True to load
        self.network: Any = build_network(path=path, config=config, init=init, dtype=dtype, auto=self.auto, extra=extra)
        put_lora(self.network, lora)
        self.tokenizer: Any = load_tokenizer(tokenizer_path, path)
        self.no_decay_norms = no_decay_norms
        self._has_weights = path is not None or init == "random"
        self._make_optimizer = optimizer or partial(AdamW, lr=1e-3, fused=True)
        self._make_schedule = scheduler
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

    def weighed(self, loss: Tensor, batch_idx: int) -> Tensor:
        """`loss`, times what its batch weighs in its accumulation window (see `TextData.loss_weight`).

        As it is without a data module that knows, under manual optimization, and where the strategy weighs by itself.
        """
        trainer: Any = self._trainer
        weigh = getattr(getattr(trainer, "datamodule", None), "loss_weight", None)
        if weigh is None or not self.automatic_optimization or getattr(trainer.strategy, "weighs_batches", False):
            return loss
        weight: float = weigh(batch_idx)
        return loss if weight == 1 else loss * weight

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._make_optimizer(self._parameter_groups())
        if self._make_schedule is None:
            return optimizer
        schedule = self._make_schedule(optimizer, **self._open_total_steps(self._make_schedule))
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
