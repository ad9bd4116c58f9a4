"""Manual optimization for those who want to own the step, with the same numbers as automatic optimization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_offload.attachment import Attachment, GradientAttachment
from lightning_offload.gradient_behaviour import GradientBehaviour
from lightning_offload.memory.ambient import default_dtype
from lightning_offload.methods.base import Clip
from lightning_offload.shortage import reported
from lightning_offload.zeroth_attachment import ZerothAttachment
from lightning_offload.zeroth_behaviour import ZerothBehaviour


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a mixin steps: what Lightning drops under manual optimization.

    Attributes:
        accumulate_grad_batches: Micro-batches per optimizer step; as with Lightning the last step of an epoch may
            have fewer, and losses are divided by this number all the same.
        gradient_clip_val: Bound of the gradients' norm or value; ``None`` does not clip.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
    """

    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the setting."""
        if not isinstance(self.accumulate_grad_batches, int) or self.accumulate_grad_batches < 1:
            raise ValueError(
                f"`offload['accumulate_grad_batches']` must be an integer >= 1, got {self.accumulate_grad_batches!r}"
            )
        if self.gradient_clip_val is not None and self.gradient_clip_val <= 0:
            raise ValueError(f"`offload['gradient_clip_val']` must be positive, got {self.gradient_clip_val!r}")
        if self.gradient_clip_algorithm not in ("norm", "value"):
            raise ValueError(
                f"`offload['gradient_clip_algorithm']` must be 'norm' or 'value', got {self.gradient_clip_algorithm!r}"
            )


class OffloadMixin:
    """Write ``loss``; the mixin's ``training_step`` does the rest.

    ::

        class LitModel(OffloadMixin, L.LightningModule):
            offload = dict(accumulate_grad_batches=4, gradient_clip_val=1.0)

            def loss(self, batch, batch_idx): ...
            def configure_optimizers(self): ...

    It takes over what Lightning drops under manual optimization: accumulation, clipping, stepping schedulers by their
    interval and frequency, logging ``train/loss``, and ``global_step`` counted once per optimizer step. It works under
    any strategy with the same numbers, and offloads under an offload strategy. Those who write their own
    ``training_step`` call ``self.offload_step(closure)`` in it.

    Attributes:
        offload: Settings by name, see ``StepSettings``.
    """

    automatic_optimization = False
    offload: Mapping[str, Any] = {}
    _of_method: ClassVar[frozenset[str]] = frozenset()
    """Names in ``offload`` that are not of ``StepSettings``."""

    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one micro-batch (scalar with a graph)."""
        raise NotImplementedError(f"`{type(self).__name__}` must define `loss(self, batch, batch_idx)`")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One micro-batch; the last of an accumulation window also steps."""
        loss = self._take_part(lambda part: self.loss(part, batch_idx), batch)
        self._module.log("train/loss", loss, prog_bar=True)
        return loss

    def offload_step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Forward and backward of ``closure``; optimizer step and schedulers when the window is full.

        Under method ``zo2`` it is forward alone, called several times; micro-batches of a window then count alike.

        Args:
            closure: Returns the loss of one micro-batch.

        Returns:
            The loss, detached.

        Raises:
            MisconfigurationException: Several optimizers.
            ValueError: A setting in ``offload`` that cannot work.
        """
        return self._take_part(lambda _: closure(), None)

    def on_validation_model_zero_grad(self) -> None:
        """A validation inside a window leaves its gradients, as under automatic optimization."""
        done = self._module.trainer.fit_loop.epoch_loop.batch_idx + 1
        if done % self._step_settings.accumulate_grad_batches == 0 or self._ends_epoch:
            super().on_validation_model_zero_grad()  # type: ignore[misc]

    def _take_part(self, run: Callable[[Any], Tensor], batch: Any) -> Tensor:
        attachment = self._attachment
        with reported(attachment.run_at_hand, "`training_step`") if attachment is not None else nullcontext():
            return self._take_own_part(run, batch)

    def _take_own_part(self, run: Callable[[Any], Tensor], batch: Any) -> Tensor:
        module, settings = self._module, self._step_settings
        window, optimizer = settings.accumulate_grad_batches, self._optimizer
        batch_idx, ends_epoch = module.trainer.fit_loop.epoch_loop.batch_idx, self._ends_epoch
        last = (batch_idx + 1) % window == 0 or ends_epoch
        zeroth = self._zeroth
        if zeroth is not None:
            loss = zeroth.micro_batch(run, batch)
        else:
            loss = self._forward(run, batch, last)
            if batch_idx % window == 0:
                optimizer.zero_grad()
        # autocast and a 16-bit default dtype must not reach the step, which Lightning runs inside them here
        with torch.autocast(module.device.type, enabled=False), default_dtype(torch.float32):
            if zeroth is None:
                self._backward(loss / window, last)
            if last:
                self._step(optimizer, settings)
        if last:
            self._step_schedulers("step", batch_idx + 1)
        if ends_epoch:
            self._step_schedulers("epoch", module.trainer.current_epoch + 1)
        return loss.detach()

    def _forward(self, run: Callable[[Any], Tensor], batch: Any, last: bool) -> Tensor:
        attachment = self._attachment
        with attachment.micro_batch(last=last) if isinstance(attachment, GradientAttachment) else nullcontext():
            return run(batch)

    def _backward(self, loss: Tensor, last: bool) -> None:
        strategy, attachment = self._module.trainer.strategy, self._attachment
        if isinstance(strategy, GradientBehaviour):
            strategy.begin_micro_batch(last=last)
        with attachment.backward(last=last) if isinstance(attachment, GradientAttachment) else nullcontext():
            self._module.manual_backward(loss)

    @property
    def _module(self) -> LightningModule:
        assert isinstance(self, LightningModule), "put the mixin before LightningModule: class M(OffloadMixin, ...)"
        return self

    @property
    def _ends_epoch(self) -> bool:
        trainer = self._module.trainer
        return trainer.is_last_batch or trainer.fit_loop.epoch_loop.batch_idx + 1 >= trainer.num_training_batches

    @property
    def _step_settings(self) -> StepSettings:
        try:
            return StepSettings(**{name: v for name, v in self.offload.items() if name not in self._of_method})
        except TypeError as error:
            known = ", ".join([*StepSettings.__dataclass_fields__, *sorted(self._of_method)])
            raise ValueError(
                f"`{type(self).__name__}.offload` has an unknown setting ({error}); known: {known}"
            ) from None

    @property
    def _optimizer(self) -> LightningOptimizer:
        optimizer = self._module.optimizers()
        if not isinstance(optimizer, LightningOptimizer):
            raise MisconfigurationException(
                f"`{type(self).__name__}` steps one optimizer, but `configure_optimizers` returned "
                f"{len(optimizer) if isinstance(optimizer, list) else optimizer!r}. Return exactly one."
            )
        return optimizer

    @property
    def _attachment(self) -> Attachment[Any] | None:
        """What steps under a plain strategy, where the module has a method of its own."""
        return None

    @property
    def _zeroth(self) -> ZerothBehaviour | ZerothAttachment | None:
        """What runs several forwards for a loss, where the method has no backward."""
        strategy, attachment = self._module.trainer.strategy, self._attachment
        if isinstance(strategy, ZerothBehaviour):
            return strategy
        return attachment if isinstance(attachment, ZerothAttachment) else None

    def _step(self, optimizer: LightningOptimizer, settings: StepSettings) -> None:
        attachment, strategy = self._attachment, self._module.trainer.strategy
        if (
            isinstance(strategy, GradientBehaviour)
            and strategy.engine is not None
            and strategy.engine.gradients_visible
        ):
            strategy.engine.meet(visible=True)  # what is clipped is the mean
        if settings.gradient_clip_val is not None and attachment is not None and not attachment.sees_gradients:
            attachment.clip = Clip(settings.gradient_clip_val, settings.gradient_clip_algorithm)
        elif settings.gradient_clip_val is not None:
            self._module.clip_gradients(
                optimizer.optimizer,
                gradient_clip_val=settings.gradient_clip_val,
                gradient_clip_algorithm=settings.gradient_clip_algorithm,
            )
        optimizer.step()

    def _step_schedulers(self, interval: str, count: int) -> None:
        for config in self._module.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                raise MisconfigurationException(
                    f"`{type(self).__name__}` cannot step `ReduceLROnPlateau`: Lightning drops its `monitor` under "
                    "manual optimization. Use automatic optimization, or another scheduler."
                )
            if config.interval == interval and count % config.frequency == 0:
                self._module.lr_scheduler_step(config.scheduler, None)
