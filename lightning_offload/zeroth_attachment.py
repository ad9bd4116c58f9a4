"""Method `zo2` under a plain strategy: the engine of a mixin that the Trainer's strategy knows nothing of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_offload.attaching import make_lanes
from lightning_offload.attachment import Attachment
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.zeroth_attaching import (
    attach_zeroth,
    look_for_zeroth_readers,
    pack_zeroth,
    run_micro_batch,
    unpack_zeroth,
)


class ZerothAttachment(Attachment[ZerothEngine]):
    """Weights take an update when they are next needed, or at once where somebody may look at them."""

    _resumed = False

    @override
    def _attach(self, who: str, trainer: Trainer, module: LightningModule, method: Any, dtypes: DTypes) -> ZerothEngine:
        device = module.device
        engine = attach_zeroth(who, trainer, module, method, dtypes, device, partial(make_lanes, device))
        self._window, self._resumed = look_for_zeroth_readers(who, trainer, module), False
        if self._window.may_write:
            self._take_validation(trainer.strategy, engine)
        return engine

    @override
    def _load(self, engine: ZerothEngine, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        states, self._resumed = checkpoint["optimizer_states"], True
        unpack_zeroth(engine, states)
        states[:] = [engine.optimizer_state()]  # another method has other groups

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.engine is not None and not self._resumed:
            self.engine.drop()  # what an exception that somebody caught has left

    def micro_batch(self, run: Callable[[Any], Any], batch: Any) -> Tensor:
        """Every forward of a micro-batch; see ``run_micro_batch``."""
        engine = self.engine
        assert engine is not None
        if self._window.may_write:
            engine.adopt()
        return run_micro_batch(engine, engine.module, run, batch)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """As an offload strategy does it: either continues from the other's checkpoint."""
        if self.engine is not None and "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [pack_zeroth(self.engine)]

    @property
    @override
    def sees_gradients(self) -> bool:
        """There are none."""
        return False

    @override
    def _step(self, engine: ZerothEngine, clip: Clip | None) -> None:
        engine.step(clip)
        if self._window.may_write:
            engine.flush()
