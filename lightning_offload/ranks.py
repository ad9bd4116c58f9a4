"""The behaviour on several devices: a process each, on Lightning's own launchers and ``torch.distributed``."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_offload.behaviour import AnyEngine, OffloadBehaviour, Settings
from lightning_offload.memory.peers import ProcessPeers
from lightning_offload.methods.settings import GradientSettings
from lightning_offload.methods.zo2 import ZO2Settings

OF_THE_MACHINE = ("pin_memory", "blocks", "max_device_gib", "max_host_gib")
"""Settings that may differ between ranks: they decide no bits."""


class SeveralDevices(OffloadBehaviour[AnyEngine], DDPStrategy):
    """The behaviour on every device of the Trainer, in a process each. To be combined with a method's strategy.

    Weights are replicated, data is sharded by Lightning's ``DistributedSampler``, and ranks stay identical bit for bit.
    Nothing wraps the module: engines exchange what their method needs.

    Args:
        start_method: How processes start: ``"popen"`` (the command again), ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        process_group_backend: Of ``torch.distributed``; ``None`` is NCCL on GPUs, gloo on CPUs.
        timeout_s: Seconds after which a rank that waits for another gives up.
        cluster_environment: As for every Lightning strategy; found by itself under torchrun and SLURM.
        settings: Of the method's strategy.
    """

    def __init__(
        self,
        *,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        timeout_s: float = 1800.0,
        cluster_environment: ClusterEnvironment | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._start_method = start_method
        self._process_group_backend = process_group_backend
        self._timeout = timedelta(seconds=timeout_s)
        self.cluster_environment = cluster_environment

    # Setting up.

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        trainer = model._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._check_module(model)
            self._check_callbacks(trainer)

    def _check_callbacks(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            kind = type(callback).__name__
            if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
                raise NotImplementedError(
                    f"`{kind}` saves when an exception is raised, but under `{type(self).__name__}` the other ranks "
                    "are elsewhere then, and what they step is with them. Save every so many steps instead: "
                    "`ModelCheckpoint(every_n_train_steps=...)`."
                )

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        if not isinstance(self._peers, ProcessPeers) or self._peers.left:
            assert self._timeout is not None
            self._peers = ProcessPeers(self._timeout)
        super().setup(trainer)

    @override
    def _settle_settings(self, module: LightningModule) -> None:
        super()._settle_settings(module)
        settings = self.settings
        if isinstance(settings, GradientSettings):
            if settings.accumulate == "host":
                raise MisconfigurationException(
                    f"`{type(self).__name__}(accumulate='host')`: sums over micro-batches stay on the device where "
                    "several ranks share them. Pass `accumulate='device'`, or train on one device."
                )
            settings = replace(settings, accumulate="device")
        if getattr(settings, "row_optimizer", None) == "deferred":
            raise MisconfigurationException(
                f"`{type(self).__name__}(row_optimizer='deferred')`: ranks would catch up with rows at different "
                "steps, and drift apart by rounding. Pass `row_optimizer='dense'` or `'lazy'`."
            )
        if getattr(settings, "row_optimizer", None) == "auto":
            settings = replace(settings, row_optimizer="dense")  # type: ignore[call-arg]
        if getattr(settings, "seed", 0) is None:
            settings = replace(settings, seed=self._peers.first(torch.initial_seed()))  # type: ignore[call-arg]
        self.settings = settings

    @override
    def _agree(self, settings: Settings) -> Settings:
        mine = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in OF_THE_MACHINE}
        return replace(settings, **self._peers.first(mine))

    @override
    def _attach(self, trainer: Trainer) -> None:
        self._share_weights()
        super()._attach(trainer)

    @override
    def _prepare_forwards(self, trainer: Trainer) -> None:
        self._share_weights()
        super()._prepare_forwards(trainer)

    def _claims_anything(self, method: Any) -> bool:
        """An engine is what makes ranks one training, whatever it offloads."""
        return True

    def _check_module(self, module: LightningModule) -> None:
        if not module.automatic_optimization and not hasattr(module, "offload_step"):
            raise MisconfigurationException(
                f"`{type(module).__name__}` steps by itself (`automatic_optimization = False`), and "
                f"`{type(self).__name__}` would not know when gradients of all ranks are complete. Derive it from "
                "`OffloadMixin` and write `loss`, or use automatic optimization."
            )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share out the directions of a batch see the same one."""
        found: dict[str, Any] = super().distributed_sampler_kwargs
        module = self.lightning_module
        trains = module is None or module._trainer is None or module.trainer.training
        share = self.settings.direction_ranks if isinstance(self.settings, ZO2Settings) and trains else 1
        return {"num_replicas": found["num_replicas"] // share, "rank": found["rank"] // share}

    # What is not trained must be the same too.

    def _share_weights(self) -> None:
        """Every rank begins with what rank 0 has."""
        assert self.lightning_module is not None
        module = self.lightning_module
        self._share([*module.parameters(), *module.buffers()])

    def _share(self, tensors: list[Tensor]) -> None:
        self._peers.share_([tensor.data for tensor in tensors if not tensor.is_meta], 0, "module")

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        module = self.lightning_module
        if changing := [b for part in module.modules() for b in _statistics(part)]:
            self._share(changing)
        return super().training_step(*args, **kwargs)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Rank 0 writes; for the others what is on the device is not copied."""
        if self.is_global_zero or self.root_device.type == "cpu":
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    # The end.

    @override
    def teardown(self) -> None:
        super().teardown()
        if isinstance(self._peers, ProcessPeers):
            self._peers.close()

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._peers.leave()  # the others are elsewhere
        if self.engine is not None:
            rank_zero_warn(
                f"{self.strategy_name}: weights in the module may be of two steps after an exception, as those that "
                "other ranks have stepped did not arrive. Continue with the last checkpoint, `fit(ckpt_path=...)`."
            )
        super().on_exception(exception)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_peers": OffloadBehaviour._peers}


def _statistics(part: torch.nn.Module) -> list[Tensor]:
    """What a forward of training changes, as ``DistributedDataParallel`` shares it: those of batch normalization."""
    normalizes = isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
    return [b for b in part._buffers.values() if b is not None] if normalizes else []
