"""Who looks at weights or gradients while they may be in flight: hooks of the module and of callbacks.

Weights may be in flight from the optimizer step to each unit's next forward, gradients leave as they arrive. What a
user overrides in between is found here once, at the start of fit, and answered with the slower but exact order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.utilities.model_helpers import is_overridden

WEIGHT_HOOKS = (
    "on_train_batch_end",
    "on_train_batch_start",
    "on_validation_model_eval",  # these two run before the strategy hears of the validation
    "on_validation_start",
)
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
EPOCH_HOOKS = ("on_train_epoch_end", "on_train_epoch_start", "on_train_end")
VALIDATION_HOOKS = (
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
)
EVALUATION_HOOKS = tuple(
    f"on_{stage}_{when}"
    for stage in ("validation", "test", "predict")
    for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end")
)
END_HOOKS = ("on_fit_end",)
GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step")
STEP_HOOKS = ("backward", "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad", "on_before_zero_grad")

_COPIES_MODULE = {"StochasticWeightAveraging", "WeightAveraging"}
"""Callbacks whose ``setup`` copies the module, parameter by parameter."""

_READS_NO_WEIGHTS = {
    "BatchSizeFinder",
    "DeviceStatsMonitor",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",  # saves through the strategy, which flushes
    "ModelSummary",
    "RichModelSummary",
    "RichProgressBar",
    "ThroughputMonitor",
    "Timer",
    "TQDMProgressBar",
}


@dataclass(frozen=True)
class Window:
    """What was found, as ``class.hook`` names.

    Attributes:
        weights: Hooks that run while weights may be in flight, every step.
        epochs: The same at the end or start of an epoch, and of training.
        boundaries: Hooks that run where nothing is in flight, but that may write weights all the same.
        gradients: Hooks between backward and step, which may read or write gradients.
    """

    weights: tuple[str, ...] = ()
    epochs: tuple[str, ...] = ()
    boundaries: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()

    @property
    def may_write(self) -> bool:
        """Whether weights may differ from what the engine sent up."""
        return bool(self.weights or self.epochs or self.boundaries)


def find_window(trainer: Trainer, module: LightningModule) -> Window:
    """List the hooks of ``module`` and of the Trainer's callbacks that look at weights or gradients in flight.

    Raises:
        NotImplementedError: A callback that cannot work.
    """
    _refuse_finetuning(trainer)
    callbacks = [callback for callback in _callbacks(trainer) if not _is_known(callback)]
    weights = [*_overridden(module, LightningModule, (*WEIGHT_HOOKS, *TRANSFER_HOOKS))]
    epochs = [*_overridden(module, LightningModule, EPOCH_HOOKS)]
    boundaries = [*_overridden(module, LightningModule, (*VALIDATION_HOOKS, *END_HOOKS))]
    gradients = [*_overridden(module, LightningModule, (*GRADIENT_HOOKS, *STEP_HOOKS))]
    for callback in callbacks:
        weights += _overridden(callback, Callback, [hook for hook in WEIGHT_HOOKS if hasattr(Callback, hook)])
        epochs += _overridden(callback, Callback, EPOCH_HOOKS)
        boundaries += _overridden(callback, Callback, (*VALIDATION_HOOKS, *END_HOOKS))
        gradients += _overridden(callback, Callback, (*GRADIENT_HOOKS, "on_before_zero_grad"))
    return Window(tuple(weights), tuple(epochs), tuple(boundaries), tuple(gradients))


def copies_module(trainer: Trainer) -> bool:
    """Whether a callback copies the module before the strategy is set up."""
    return any(kind.__name__ in _COPIES_MODULE for callback in _callbacks(trainer) for kind in type(callback).__mro__)


def writes_while_evaluating(trainer: Trainer, module: LightningModule) -> bool:
    """Whether a hook between the batches of an evaluation outside of fit may write weights."""
    callbacks = [callback for callback in _callbacks(trainer) if not _is_known(callback)]
    found = _overridden(module, LightningModule, (*EVALUATION_HOOKS, *TRANSFER_HOOKS))
    return bool(found or [hook for callback in callbacks for hook in _overridden(callback, Callback, EVALUATION_HOOKS)])


def _refuse_finetuning(trainer: Trainer) -> None:
    for callback in _callbacks(trainer):
        if isinstance(callback, pl_callbacks.BaseFinetuning):
            raise NotImplementedError(
                f"`{type(callback).__name__}` is a `BaseFinetuning`, which unfreezes parameters while training runs, "
                "but host memory is laid out once, when `fit` begins, and cannot grow. Remove the callback and set "
                "`requires_grad` before `fit`, with one `fit` for each phase, or give what comes later a group with "
                "lr=0 from the start."
            )


def _callbacks(trainer: Trainer) -> list[Callback]:
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def _is_known(callback: Callback) -> bool:
    kind = type(callback)
    return kind.__name__ in _READS_NO_WEIGHTS and kind.__module__.startswith(pl_callbacks.__name__)


def _overridden(instance: object, parent: type[object], hooks: Iterable[str]) -> list[str]:
    name = type(instance).__name__
    return [f"`{name}.{hook}`" for hook in hooks if is_overridden(hook, instance, parent) and not _ours(instance, hook)]


def _ours(instance: object, hook: str) -> bool:
    """What this package overrides itself looks at neither weights nor gradients."""
    module: str = getattr(getattr(instance, hook), "__module__", "")
    return module.startswith("lightning_offload.")
