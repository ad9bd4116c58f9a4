"""Batches apart, to whose gradients a method fits something; nothing else of the run sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_offload.methods.engine import Engine
from lightning_offload.methods.settings import GradientSettings


class Calibration:
    """Hands batches of ``loader``, round and round, to ``Engine.calibrate``, once before each step that needs it.

    Args:
        loader: Of calibration batches, as the training loader gives them; every round in an order that depends on its
            number alone.
        settings: Of the method.

    Raises:
        ValueError: ``calibration="batch"`` without a loader.
    """

    def __init__(self, loader: Iterable[Any] | None, settings: GradientSettings) -> None:
        self._needed = getattr(settings, "calibration", None) == "batch"
        if loader is None and self._needed:
            raise ValueError(
                "`calibration='batch'` needs batches: pass `calibration_dataloader=DataLoader(...)`, or "
                "calibration='train' to fit projectors to the gradients of training"
            )
        self._loader: Iterable[Any] = () if loader is None else loader
        self._round, self._taken = -1, 0
        self._batches: Iterator[Any] = iter(())
        self._done = False

    def run(self, engine: Engine, trainer: Trainer, module: LightningModule) -> None:
        """Before a micro-batch: calibrate, if its step needs it and has not done so."""
        if self._done or not engine.calibration_due:
            return
        with isolate_rng(), _unseen(trainer, module):
            batch = self._next(trainer)
            engine.calibrate(lambda: _backward(trainer, module, batch))
        self._done = True

    def stepped(self) -> None:
        """An optimizer step was made."""
        self._done = False

    def state(self) -> dict[str, int]:
        """Where it stands among its batches."""
        return {"round": self._round, "taken": self._taken, "done": int(self._done)}

    def load(self, state: Mapping[str, int]) -> None:
        """Go on where a checkpoint stopped."""
        if state and self._needed:
            with isolate_rng():
                self._start(state["round"], skip=state["taken"])
            self._done = bool(state["done"])

    def _start(self, number: int, *, skip: int = 0) -> None:
        self._round, self._taken = number, skip
        torch.manual_seed(max(number, 0))
        self._batches = iter(self._loader) if number >= 0 else iter(())
        for _ in range(skip):
            next(self._batches)

    def _next(self, trainer: Trainer) -> Any:
        batch = next(self._batches, None)
        if batch is None:
            self._start(self._round + 1)
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError("`calibration_dataloader` has no batch")
        self._taken += 1
        module = trainer.lightning_module
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def _backward(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Of the module's own loss, without any hook but its forward's."""
    with trainer.precision_plugin.train_step_context():
        loss = _loss(module, batch)
    with torch.autocast(module.device.type, enabled=False):
        loss.backward()


def _loss(module: Any, batch: Any) -> Tensor:
    if not module.automatic_optimization and not callable(getattr(module, "offload_step", None)):
        raise MisconfigurationException(
            f"`calibration='batch'` needs a loss without a step, but `{type(module).__name__}.training_step` steps by "
            "itself (manual optimization). Use `LSPMixin` and write `loss`, or pass calibration='train'."
        )
    step: Callable[..., Any] = module.training_step if module.automatic_optimization else module.loss
    output = step(batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)
    loss = output["loss"] if isinstance(output, Mapping) else output
    assert isinstance(loss, Tensor), "a training step that returns None gives nothing to calibrate with"
    return loss


@contextmanager
def _unseen(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """No logs, no metrics, buffers as before."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    loggers = list(trainer.loggers)
    with ExitStack() as stack:
        stack.callback(_put_back, buffers)
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        for part in module.modules():
            for name, silent in _silenced(part).items():
                stack.callback(_restore, part, name, vars(part).get(name, _restore))
                object.__setattr__(part, name, silent)
        yield


@torch.no_grad()
def _put_back(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)


def _silenced(part: nn.Module) -> dict[str, Callable[..., Any]]:
    if isinstance(part, LightningModule):
        return dict.fromkeys(("log", "log_dict", "print"), lambda *_, **__: None)
    if any(base.__module__.partition(".")[0] == "torchmetrics" for base in type(part).__mro__):
        return dict.fromkeys(("forward", "update", "compute", "reset"), lambda *_, **__: torch.zeros(()))
    return {}


def _restore(part: nn.Module, name: str, before: Any) -> None:
    if before is _restore:
        del vars(part)[name]
    else:
        object.__setattr__(part, name, before)
