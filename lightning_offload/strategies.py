"""The strategies that a Trainer knows: one behaviour, combined with Lightning's own base classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

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

from lightning_offload.behaviour import AnyEngine, OffloadBehaviour
from lightning_offload.gradient_behaviour import GradientBehaviour
from lightning_offload.meft_behaviour import MEFTBehaviour
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.full import Full
from lightning_offload.methods.lsp import LSP
from lightning_offload.methods.method import Method
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2Settings
from lightning_offload.ranks import SeveralDevices
from lightning_offload.zeroth_behaviour import ZerothBehaviour


class OneDevice(OffloadBehaviour[AnyEngine], SingleDeviceStrategy):
    """The behaviour on exactly one device: the first that the Trainer offers."""

    def __init__(self, settings: Mapping[str, Any], **of_lightning: Any) -> None:
        self._devices: list[torch.device] = []
        super().__init__(settings, **of_lightning)

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
                f"`{type(self).__name__}` runs on exactly one device, found `num_nodes={nodes}`. Remove `num_nodes`, "
                f"or pass `Trainer(strategy='{self.strategy_name}_ddp')`."
            )

    @override
    def connect(self, model: LightningModule) -> None:
        if model._trainer is not None:
            self._check_devices(model.trainer)
        super().connect(model)

    @override
    def setup_environment(self) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1 and "LOCAL_RANK" in os.environ:
            raise MisconfigurationException(
                f"`{type(self).__name__}` runs on exactly one device, but was launched as one of {world} processes. "
                f"Start it without `torchrun`, or pass `Trainer(strategy='{self.strategy_name}_ddp')`."
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
                f"`Trainer(devices=1, strategy={self.strategy_name!r})`, or `strategy='{self.strategy_name}_ddp'` for "
                "all of them."
            )
        rank_zero_warn(
            f"`{type(self).__name__}` runs on one device: of the {len(self._devices)} found it uses "
            f"{self._devices[0]}. Pass `Trainer(devices=1)` to say so, or `devices=[...]` to choose another."
        )


class FullOffload(GradientBehaviour):
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
        native: Compiled kernels for what the host computes: ``"auto"`` where a C++ compiler is, ``"on"``, ``"off"``.
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

    strategy_name: ClassVar[str] = "full_offload"
    method_type: ClassVar[type[Method]] = Full

    def __init__(
        self,
        *,
        accumulate: Literal["auto", "device", "host"] = "auto",
        min_numel: int = 4096,
        blocks: Sequence[str | type[nn.Module]] | None = None,
        pin_memory: bool | Literal["auto"] = "auto",
        host_threads: int | Literal["auto"] = "auto",
        native: Literal["auto", "on", "off"] = "auto",
        skip_nonfinite: bool = True,
        max_skips: int = 10,
        on_misfit: Literal["error", "warn"] = "error",
        max_device_gib: float | None = None,
        max_host_gib: float | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            {
                "accumulate": accumulate,
                "min_numel": min_numel,
                "blocks": blocks,
                "pin_memory": pin_memory,
                "host_threads": host_threads,
                "native": native,
                "skip_nonfinite": skip_nonfinite,
                "max_skips": max_skips,
                "on_misfit": on_misfit,
                "max_device_gib": max_device_gib,
                "max_host_gib": max_host_gib,
            },
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )


class LSPOffload(GradientBehaviour):
    """AdamW in a d x d subspace of each linear weight, in host memory: d x d numbers cross the link, not whole weights.

    The LightningModule stays as it is, with ``torch.optim.AdamW``. What is not a linear weight of the blocks is trained
    by exact AdamW, or not at all (``others``). Layers do not wait for each other unless gradients are clipped. Source:
    LSP-Offload (arXiv 2406.10181).

    Args:
        projector: ``"pca"`` (block-diagonal, the closed-form best of each block; the default), ``"block"``
            (block-diagonal, orthonormal at random) or ``"learned"`` (the paper: positions at random, values fitted).
        nnz: Nonzeros per row of a projector; 8.
        refit_every: Optimizer steps between two looks at a matrix's projectors; 100.
        bias_threshold: Relative bias up to which they are kept; 0.8.
        threshold_over: Whether each ``"matrix"`` (the default) is judged by itself, or the mean over ``"all"``.
        calibration: Projectors are fitted to the gradients of training (``"train"``, the default) or to those of
            ``calibration_dataloader`` (``"batch"``).
        moments: At a refit: ``"transfer"`` (into the new subspace, the default; a random one, ``"block"``, starts
            anew), ``"paper"`` or ``"reset"``.
        scale: ``"match"`` (an update has the size of AdamW's, the default) or ``"none"``.
        preset: ``"paper"`` changes the defaults above to the paper's choices; what is given wins.
        dim: d, an integer or a fraction of min(m, n); ``"auto"`` is the largest that hides under backward here.
        share: Projectors per ``"matrix"``, or per ``"type"``: one pair for all matrices of one shape and name.
        fit_steps: Steps of a fit of learned projectors.
        fit_lr: Its learning rate, decayed along a cosine.
        fit_beta: Its weight decay.
        others: Embeddings, head, norms and biases: ``"adamw"`` or ``"frozen"``.
        form: From the ``"gradient"``, or from ``"activations"`` and output gradients without ever forming it.
        tokens: Of a micro-batch, for ``dim="auto"`` to reckon with.
        seed: Of everything drawn; ``None`` is torch's initial seed.
        accumulate: Where micro-batches accumulate: ``"device"``, ``"host"`` (fp32), or ``"auto"``.
        min_numel: Smaller parameters stay on the device with their optimizer state.
        blocks: Module paths or classes that are the model's blocks, when discovery is wrong.
        pin_memory: Page-lock the host memory that crosses the link; ``"auto"`` as far as the machine allows.
        host_threads: Threads of the host worker; ``"auto"`` is the physical cores less one.
        native: Compiled kernels for what the host computes: ``"auto"`` where a C++ compiler is, ``"on"``, ``"off"``.
        skip_nonfinite: Leave everything as it is in a step whose gradient norm is not finite.
        max_skips: Skipped steps in a row that are put up with; one more is an error.
        on_misfit: ``"error"`` or ``"warn"`` when host memory is too small.
        max_device_gib: Device memory to stay within, CUDA's own part included, as if the device had no more.
        max_host_gib: Host memory that the arenas stay within, as if the machine had no more.
        calibration_dataloader: Batches like those of training, for ``calibration="batch"``; taken round and round.
        accelerator: As for every Lightning strategy.
        checkpoint_io: As for every Lightning strategy; the default streams to disk.
        precision_plugin: An ``OffloadPrecision``, to choose dtypes one by one.

    Raises:
        ValueError: A setting that cannot work.
    """

    strategy_name: ClassVar[str] = "lsp_offload"
    method_type: ClassVar[type[Method]] = LSP

    def __init__(
        self,
        *,
        projector: Literal["learned", "pca", "block"] | None = None,
        nnz: int | None = None,
        refit_every: int | float | None = None,
        bias_threshold: float | None = None,
        threshold_over: Literal["matrix", "all"] | None = None,
        calibration: Literal["train", "batch"] | None = None,
        moments: Literal["transfer", "paper", "reset"] | None = None,
        scale: Literal["match", "none"] | None = None,
        preset: Literal["paper"] | None = None,
        dim: int | float | Literal["auto"] = 0.5,
        share: Literal["matrix", "type"] = "matrix",
        fit_steps: int = 100,
        fit_lr: float = 0.06,
        fit_beta: float = 0.01,
        others: Literal["adamw", "frozen"] = "adamw",
        form: Literal["gradient", "activations"] = "gradient",
        tokens: int = 1024,
        seed: int | None = None,
        accumulate: Literal["auto", "device", "host"] = "auto",
        min_numel: int = 4096,
        blocks: Sequence[str | type[nn.Module]] | None = None,
        pin_memory: bool | Literal["auto"] = "auto",
        host_threads: int | Literal["auto"] = "auto",
        native: Literal["auto", "on", "off"] = "auto",
        skip_nonfinite: bool = True,
        max_skips: int = 10,
        on_misfit: Literal["error", "warn"] = "error",
        max_device_gib: float | None = None,
        max_host_gib: float | None = None,
        calibration_dataloader: Iterable[Any] | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self.calibration_dataloader = calibration_dataloader
        super().__init__(
            {
                "projector": projector,
                "nnz": nnz,
                "refit_every": refit_every,
                "bias_threshold": bias_threshold,
                "threshold_over": threshold_over,
                "calibration": calibration,
                "moments": moments,
                "scale": scale,
                "preset": preset,
                "dim": dim,
                "share": share,
                "fit_steps": fit_steps,
                "fit_lr": fit_lr,
                "fit_beta": fit_beta,
                "others": others,
                "form": form,
                "tokens": tokens,
                "seed": seed,
                "accumulate": accumulate,
                "min_numel": min_numel,
                "blocks": blocks,
                "pin_memory": pin_memory,
                "host_threads": host_threads,
                "native": native,
                "skip_nonfinite": skip_nonfinite,
                "max_skips": max_skips,
                "on_misfit": on_misfit,
                "max_device_gib": max_device_gib,
                "max_host_gib": max_host_gib,
            },
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )

    @override
    def _claims_anything(self, method: Method) -> bool:
        """Nothing to project is an error of the method."""
        return True


class ZO2Offload(ZerothBehaviour):
    """Fine-tuning by forwards alone, of models whose weights live in host memory and visit the device block by block.

    The LightningModule stays as it is, with ``torch.optim.SGD``: its own ``training_step`` runs twice per micro-batch,
    on weights moved to either side along a random direction, and its log is that of the first. Memory is that of
    inference of three blocks. Sources: MeZO (arXiv 2305.17333), ZO2 (arXiv 2503.12668).

    Args:
        eps: How far weights are moved, to either side.
        directions: Random directions per step, each with its own pair of forwards.
        micro_batches: Parts of a batch that share one visit of the weights.
        noise: ``"philox"`` or ``"mezo"`` (MeZO bit for bit).
        distribution: Of philox noise: ``"popcount"``, ``"gaussian"`` or ``"rademacher"``.
        train_mode: Whether forwards of training drop out; MeZO does not.
        write_back_every: Steps between two copies of a unit's weights back to the host.
        slots: Device buffers of the size of a unit.
        prefetch: Units that come up ahead.
        resident: What stays on the device beside what is no block: ``"auto"``, GiB, or names of units.
        seed: Of philox noise; ``None`` is torch's initial seed.
        direction_ranks: Of several devices, those among which the directions of a batch are shared out.
        log_file: Where the log of updates is written as the run goes; with the weights that the run began with it is
            the whole fine-tune (``replay``).
        min_numel: Smaller units stay on the device.
        blocks: Module paths or classes that are the model's blocks, when discovery is wrong.
        pin_memory: Page-lock the host memory that crosses the link; ``"auto"`` as far as the machine allows.
        host_threads: Of the host worker, which copies what is not page-locked.
        native: Compiled kernels for what the host computes: ``"auto"`` where a C++ compiler is, ``"on"``, ``"off"``.
        skip_nonfinite: Drop a step whole when a loss is not finite.
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

    strategy_name: ClassVar[str] = "zo2_offload"
    settings_type = ZO2Settings

    def __init__(
        self,
        *,
        eps: float = 1e-3,
        directions: int = 1,
        micro_batches: int = 1,
        noise: Literal["philox", "mezo"] = "philox",
        distribution: Literal["popcount", "gaussian", "rademacher"] = "popcount",
        train_mode: bool = False,
        write_back_every: int = 1,
        slots: int = 3,
        prefetch: int = 1,
        resident: Literal["auto"] | float | Sequence[str] = "auto",
        seed: int | None = None,
        direction_ranks: int = 1,
        min_numel: int = 4096,
        blocks: Sequence[str | type[nn.Module]] | None = None,
        pin_memory: bool | Literal["auto"] = "auto",
        host_threads: int | Literal["auto"] = "auto",
        native: Literal["auto", "on", "off"] = "auto",
        skip_nonfinite: bool = True,
        max_skips: int = 10,
        on_misfit: Literal["error", "warn"] = "error",
        max_device_gib: float | None = None,
        max_host_gib: float | None = None,
        log_file: str | Path | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self.log_file = None if log_file is None else Path(log_file)
        super().__init__(
            {
                "eps": eps,
                "directions": directions,
                "micro_batches": micro_batches,
                "noise": noise,
                "distribution": distribution,
                "train_mode": train_mode,
                "write_back_every": write_back_every,
                "slots": slots,
                "prefetch": prefetch,
                "resident": resident,
                "seed": seed,
                "direction_ranks": direction_ranks,
                "min_numel": min_numel,
                "blocks": blocks,
                "pin_memory": pin_memory,
                "host_threads": host_threads,
                "native": native,
                "skip_nonfinite": skip_nonfinite,
                "max_skips": max_skips,
                "on_misfit": on_misfit,
                "max_device_gib": max_device_gib,
                "max_host_gib": max_host_gib,
            },
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )


class MEFTOffload(MEFTBehaviour):
    """A very wide sparse adapter beside each feed-forward network, whose rows and their AdamW live in host memory.

    The LightningModule stays as it is, with ``torch.optim.AdamW``; its own weights are frozen. Of the rows only those
    that a micro-batch uses come up, and only their gradients go down. Source: MEFT (arXiv 2406.04984).

    Args:
        width: Rows (keys and values) per layer.
        experts: Groups of rows that a router chooses from; ``"auto"`` is about ``4 sqrt(width)``.
        active_experts: Experts per token.
        top_k: Rows per token.
        variant: ``"repro"`` (the released code) or ``"paper"`` (Algorithm 1).
        gate: ``"logit"`` or ``"none"``; ``None`` is the variant's.
        scope: ``"token"`` or ``"union"``; ``None`` is the variant's.
        placement: What of the rows stays on the device too: ``"host"`` (nothing), ``"keys"``, ``"device"`` (all), or
            ``"auto"``: keys while they fit.
        row_optimizer: ``"dense"``, ``"deferred"`` (the same, paid when a row is touched), ``"lazy"`` (SparseAdam) or
            ``"auto"``.
        layers: ``"all"``, or indices of blocks.
        targets: Feed-forward networks by name or regular expression, where they are not found.
        router_init: ``"keys"`` or ``"normal"``.
        key_std: Standard deviation of the initial keys; ``"auto"`` is the paper's, scaled to the hidden size.
        seed: Of the initial keys; ``None`` is torch's initial seed.
        adapter_only: Leave the frozen weights out of checkpoints.
        accumulate: Where micro-batches of the routers accumulate; those of rows do so on the host.
        min_numel: Has no effect on rows and routers.
        blocks: Module paths or classes that are the model's blocks, when discovery is wrong.
        pin_memory: Page-lock the host memory that crosses the link; ``"auto"`` as far as the machine allows.
        host_threads: Threads of the host worker; ``"auto"`` is the physical cores less one.
        native: Compiled kernels for what the host computes: ``"auto"`` where a C++ compiler is, ``"on"``, ``"off"``.
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

    strategy_name: ClassVar[str] = "meft_offload"

    def __init__(
        self,
        *,
        width: int = 1024,
        experts: int | Literal["auto"] = "auto",
        active_experts: int = 8,
        top_k: int = 64,
        variant: Literal["repro", "paper"] = "repro",
        gate: Literal["logit", "none"] | None = None,
        scope: Literal["token", "union"] | None = None,
        placement: Literal["auto", "host", "keys", "device"] = "auto",
        row_optimizer: Literal["auto", "dense", "deferred", "lazy"] = "auto",
        layers: Literal["all"] | Sequence[int] = "all",
        targets: str | Sequence[str] | None = None,
        router_init: Literal["keys", "normal"] = "keys",
        key_std: float | Literal["auto"] = "auto",
        seed: int | None = None,
        accumulate: Literal["auto", "device", "host"] = "auto",
        min_numel: int = 4096,
        blocks: Sequence[str | type[nn.Module]] | None = None,
        pin_memory: bool | Literal["auto"] = "auto",
        host_threads: int | Literal["auto"] = "auto",
        native: Literal["auto", "on", "off"] = "auto",
        skip_nonfinite: bool = True,
        max_skips: int = 10,
        on_misfit: Literal["error", "warn"] = "error",
        max_device_gib: float | None = None,
        max_host_gib: float | None = None,
        adapter_only: bool = False,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self.adapter_only = adapter_only
        super().__init__(
            {
                "width": width,
                "experts": experts,
                "active_experts": active_experts,
                "top_k": top_k,
                "variant": variant,
                "gate": gate,
                "scope": scope,
                "placement": placement,
                "row_optimizer": row_optimizer,
                "layers": layers,
                "targets": targets,
                "router_init": router_init,
                "key_std": key_std,
                "seed": seed,
                "accumulate": accumulate,
                "min_numel": min_numel,
                "blocks": blocks,
                "pin_memory": pin_memory,
                "host_threads": host_threads,
                "native": native,
                "skip_nonfinite": skip_nonfinite,
                "max_skips": max_skips,
                "on_misfit": on_misfit,
                "max_device_gib": max_device_gib,
                "max_host_gib": max_host_gib,
            },
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )


class FullOffloadStrategy(FullOffload, OneDevice[Engine]):  # noqa: D101
    __doc__ = FullOffload.__doc__


class LSPOffloadStrategy(LSPOffload, OneDevice[Engine]):  # noqa: D101
    __doc__ = LSPOffload.__doc__


class ZO2OffloadStrategy(ZO2Offload, OneDevice[ZerothEngine]):  # noqa: D101
    __doc__ = ZO2Offload.__doc__


class MEFTOffloadStrategy(MEFTOffload, OneDevice[Engine]):  # noqa: D101
    __doc__ = MEFTOffload.__doc__


class FullOffloadDDPStrategy(SeveralDevices[Engine], FullOffload):
    """`FullOffloadStrategy` on several devices; see `SeveralDevices` for what it takes beside that one's arguments."""

    strategy_name: ClassVar[str] = "full_offload_ddp"


class LSPOffloadDDPStrategy(SeveralDevices[Engine], LSPOffload):
    """`LSPOffloadStrategy` on several devices; see `SeveralDevices` for what it takes beside that one's arguments."""

    strategy_name: ClassVar[str] = "lsp_offload_ddp"


class ZO2OffloadDDPStrategy(SeveralDevices[ZerothEngine], ZO2Offload):
    """`ZO2OffloadStrategy` on several devices; see `SeveralDevices` for what it takes beside that one's arguments."""

    strategy_name: ClassVar[str] = "zo2_offload_ddp"


class MEFTOffloadDDPStrategy(SeveralDevices[Engine], MEFTOffload):
    """`MEFTOffloadStrategy` on several devices; see `SeveralDevices` for what it takes beside that one's arguments."""

    strategy_name: ClassVar[str] = "meft_offload_ddp"


STRATEGIES: tuple[type[OneDevice[Any]], ...] = (
    FullOffloadStrategy,
    LSPOffloadStrategy,
    ZO2OffloadStrategy,
    MEFTOffloadStrategy,
)
DDP_STRATEGIES: tuple[type[SeveralDevices[Any]], ...] = (
    FullOffloadDDPStrategy,
    LSPOffloadDDPStrategy,
    ZO2OffloadDDPStrategy,
    MEFTOffloadDDPStrategy,
)
