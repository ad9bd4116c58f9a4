"""The strategies that a Trainer knows: one behaviour, combined with Lightning's own base classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_offload.behaviour import OffloadBehaviour
from lightning_offload.methods.full import FullSettings


class OneDevice(OffloadBehaviour, SingleDeviceStrategy):
    """The behaviour on exactly one device: the first that the Trainer offers."""

    def __init__(
        self,
        *,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self._devices: list[torch.device] = []
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Set by the Trainer: having this property is how a strategy given by name learns its device.

        Reads as empty, or a second Trainer would take the devices that the first one chose for a user's argument.
        """
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._devices = list(devices or [])
        if self._devices:
            self._root_device = self._devices[0]

    @property
    def num_nodes(self) -> int:
        """Always 1."""
        return 1

    @num_nodes.setter
    def num_nodes(self, nodes: int) -> None:
        if nodes != 1:
            raise MisconfigurationException(
                f"`{type(self).__name__}` runs on exactly one device, found `num_nodes={nodes}`. Remove `num_nodes`."
            )

    @override
    def connect(self, model: LightningModule) -> None:
        self._check_devices(model.trainer)
        super().connect(model)

    @override
    def setup_environment(self) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1 and "LOCAL_RANK" in os.environ:
            raise MisconfigurationException(
                f"`{type(self).__name__}` runs on exactly one device, but was launched as one of {world} processes. "
                "Start it without `torchrun`."
            )
        super().setup_environment()

    def _check_devices(self, trainer: Trainer) -> None:
        """Asking for several devices is an error; merely having several is not.

        The Trainer turns ``devices="auto"`` into the number of all devices, so asking for all of them by number can
        only be warned about.
        """
        if len(self._devices) < 2:
            return
        assert self.accelerator is not None
        if trainer._accelerator_connector._devices_flag != self.accelerator.auto_device_count():
            raise MisconfigurationException(
                f"`{type(self).__name__}` runs on exactly one device, found {len(self._devices)}. Pass "
                f"`Trainer(devices=1, strategy={self.strategy_name!r})`."
            )
        rank_zero_warn(
            f"`{type(self).__name__}` runs on one device: of the {len(self._devices)} found it uses "
            f"{self._devices[0]}. Pass `Trainer(devices=1)` to say so, or `devices=[...]` to choose another."
        )


class FullOffloadStrategy(OneDevice):
    """Exact AdamW (Adam, SGD) with optimizer state, fp32 masters and the step itself in host memory.

    The LightningModule stays as it is: clipping, accumulation, schedulers, callbacks and checkpoints keep working.
    Bit-identical to ``torch.optim.AdamW(fused=True)`` under the plain Trainer in fp32 on the CPU. Source:
    ZeRO-Offload (arXiv 2101.06840).

    Args:
        accumulate: Where micro-batches accumulate: ``"device"``, ``"host"`` (fp32), or ``"auto"``.
        min_numel: Smaller parameters stay on the device with their optimizer state.
        blocks: Module paths or classes that are the model's blocks, when discovery is wrong.
        pin_memory: Page-lock the host memory that crosses the link; ``"auto"`` as far as the machine allows.
        host_threads: Threads of the host worker; ``"auto"`` is the physical cores less one.
        skip_nonfinite: Leave everything as it is in a step whose gradient norm is not finite.
        max_skips: Skipped steps in a row that are put up with; one more is an error.
        on_misfit: ``"error"`` or ``"warn"`` when host memory is too small.
        max_device_gib: Device memory to stay within, CUDA's own part included, as if the device had no more.
        max_host_gib: Host memory that the arenas stay within, as if the machine had no more.
        accelerator: As for every Lightning strategy.
        checkpoint_io: As for every Lightning strategy; the default streams to disk.
        precision_plugin: An ``OffloadPrecision``, to choose dtypes one by one.

    Raises:
        ValueError: A setting that cannot work.
    """

    strategy_name: ClassVar[str] = "full_offload"  # type: ignore[misc]  # an instance variable in Lightning

    def __init__(
        self,
        *,
        accumulate: Literal["auto", "device", "host"] = "auto",
        min_numel: int = 4096,
        blocks: Sequence[str | type[nn.Module]] | None = None,
        pin_memory: bool | Literal["auto"] = "auto",
        host_threads: int | Literal["auto"] = "auto",
        skip_nonfinite: bool = True,
        max_skips: int = 10,
        on_misfit: Literal["error", "warn"] = "error",
        max_device_gib: float | None = None,
        max_host_gib: float | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self.settings = FullSettings(
            accumulate=accumulate,
            min_numel=min_numel,
            blocks=blocks,
            pin_memory=pin_memory,
            host_threads=host_threads,
            skip_nonfinite=skip_nonfinite,
            max_skips=max_skips,
            on_misfit=on_misfit,
            max_device_gib=max_device_gib,
            max_host_gib=max_host_gib,
        )
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)


STRATEGIES: tuple[type[OneDevice], ...] = (FullOffloadStrategy,)
