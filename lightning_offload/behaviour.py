"""What every offload strategy does with Lightning's hooks, whatever base class it is combined with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_offload.attaching import make_lanes
from lightning_offload.checkpoint import OffloadCheckpointIO, compare_weights
from lightning_offload.materialising import (
    bring_rest,
    find_in_checkpoint,
    find_weights,
    forget_weights,
    is_made,
    quiet_about_meta,
    refuse_early_copies,
)
from lightning_offload.memory.budget import Machine, cap_device
from lightning_offload.memory.lanes import Lanes
from lightning_offload.memory.peers import Alone, Peers
from lightning_offload.memory.promises import parameters_on_meta
from lightning_offload.methods.base import Attached
from lightning_offload.methods.settings import CommonSettings
from lightning_offload.methods.uses import Uses
from lightning_offload.precision import AnyMethod, OffloadPrecision
from lightning_offload.savings import Run
from lightning_offload.shortage import reports_shortage
from lightning_offload.windows import Window

AnyEngine = TypeVar("AnyEngine", bound=Attached)
Settings = TypeVar("Settings", bound=CommonSettings)


class OffloadBehaviour(Strategy, Generic[AnyEngine]):
    """What makes a strategy an offload strategy, whatever base class it is combined with.

    The user's optimizer stays ``strategy.optimizers[0]`` and carries learning rate, betas, decay and groups; its
    state lives in the engine. While an engine is attached the masters are the truth about trained weights.

    Args:
        settings: Of the method, by name.
        accelerator: As for every Lightning strategy.
        checkpoint_io: As for every Lightning strategy.
        precision_plugin: As for every Lightning strategy.

    Attributes:
        engine: The engine of the running, or of the last, ``fit``; ``None`` where nothing is offloaded.
        settings: What was asked for; ``engine.method.settings`` has every ``"auto"`` resolved.
    """

    strategy_name: ClassVar[str]
    settings_type: ClassVar[type[CommonSettings]]
    settings: CommonSettings
    engine: AnyEngine | None = None
    uses: Uses | None = None
    """What a plan has found out about the forward; the engine then serves units in the right order from step one."""
    _given: Mapping[str, Any]
    """The settings that are not at their defaults, as they were given."""
    _window = Window()
    _adopt_due = False
    _peers: Peers = Alone()
    _uncap: Callable[[], None] | None = None

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        defaults = {field.name: field.default for field in fields(self.settings_type)}
        self._given = {name: value for name, value in settings.items() if value != defaults[name]}
        self.settings = self.settings_type(**self._given)
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)

    # Precision and checkpoints: whatever the Trainer brings becomes ours.

    @property
    @override
    def precision_plugin(self) -> OffloadPrecision:
        return OffloadPrecision.from_plugin(self._precision_plugin, self.strategy_name)

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is None:
            self._precision_plugin = None  # the Trainer chooses only where the strategy has not
            return
        self._precision_plugin = OffloadPrecision.from_plugin(plugin, self.strategy_name)
        self._precision_plugin.dtypes(self._method())

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = OffloadCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = OffloadCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    # Setting up.

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Parameters are made in host memory, as the device may be too small for all of them; empty ones nowhere."""
        if empty_init and self.lightning_module is not None:
            refuse_early_copies(self.lightning_module)
        where = parameters_on_meta() if empty_init else nullcontext()
        with where, torch.device("cpu"), self.precision_plugin.tensor_init_context():
            yield

    @override
    def setup_environment(self) -> None:
        if self.root_device.type not in ("cpu", "cuda"):
            raise MisconfigurationException(
                f"`{type(self).__name__}` runs on CUDA GPUs and, for tests, on the CPU; found "
                f"`{self.root_device.type}`. Pass `Trainer(accelerator='cuda')` or `Trainer(accelerator='cpu')`."
            )
        super().setup_environment()
        assert self.lightning_module is not None
        if not is_made(self.lightning_module):
            refuse_early_copies(self.lightning_module)

    @override
    @reports_shortage
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.use_device(self.root_device)
        self._detach()
        if trainer.state.fn == TrainerFn.FITTING:
            self._settle_settings(self.lightning_module)
        self._cap_device()
        find_weights(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING:  # else the last fit's state stays: it may still be saved
            self.engine = None
            self.setup_optimizers(trainer)
            self._attach(trainer)
        else:
            self._prepare_forwards(trainer)
        bring_rest(self.model, self.root_device, self.precision_plugin.dtypes(self._method()))
        self._convert()
        self.model_to_device()
        self.setup_precision_plugin()

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) > 1:
            raise MisconfigurationException(
                f"`{type(self).__name__}` supports a single optimizer, but `configure_optimizers` returned "
                f"{len(self.optimizers)}. Use one optimizer with several parameter groups."
            )

    def _prepare_forwards(self, trainer: Trainer) -> None:
        """Before an evaluation outside of fit."""

    def _convert(self) -> None:
        """Bring what the engine has not to the dtype it computes in."""
        assert self.model is not None
        self.model = self.precision_plugin.convert_module(self.model)

    @override
    def model_to_device(self) -> None:
        """Bring buffers and metrics to the device; the engine has brought each weight by itself."""
        assert self.model is not None
        self.model.to(self.root_device)

    def _convert_buffers(self) -> None:
        """Where weights are kept as they were put."""
        assert self.model is not None
        self.precision_plugin.convert_buffers(self.model)

    def _buffers_to_device(self) -> None:
        """Buffers and metrics alone, where weights are to stay where they were put."""
        assert self.model is not None
        device = self.root_device

        def move(tensor: Tensor) -> Tensor:
            return tensor if isinstance(tensor, nn.Parameter) else tensor.to(device)

        self.model._apply(move)
        for module in self.model.modules():
            if isinstance(module, _DeviceDtypeModuleMixin):
                module._device = device

    def _method(self) -> AnyMethod:
        """The method with the settings asked for."""
        raise NotImplementedError

    def _attach(self, trainer: Trainer) -> None:
        """Hang an engine on the module; without one it is trained as it is."""
        raise NotImplementedError

    def _settle_settings(self, module: LightningModule) -> None:
        """Take what the module itself says of the method (``LSPMixin.offload``).

        Raises:
            MisconfigurationException: It was written for another method.
            ValueError: Module and strategy do not agree.
        """
        method = getattr(module, "offload_method", None)
        if method not in (None, self._method().name):
            raise MisconfigurationException(
                f"`{type(module).__name__}` trains by method `{method}`, but the Trainer's strategy is "
                f"`{self.strategy_name}`. Pass `Trainer(strategy='{method}_offload')` or a plain strategy, or derive "
                "the module from `OffloadMixin`, which takes the strategy's method."
            )
        own: dict[str, Any] = getattr(module, "method_settings", {}) if method is not None else {}
        for name, value in own.items():
            if name in self._given and self._given[name] != value:
                raise ValueError(
                    f"`{type(module).__name__}.offload` says {name}={value!r}, `{type(self).__name__}` was given "
                    f"{name}={self._given[name]!r}: say it in one place"
                )
        self.settings = self.settings_type(**{**self._given, **own})

    def _agree(self, settings: Settings) -> Settings:
        """What all ranks have settled on."""
        return settings

    def _cap_device(self) -> None:
        gib = self.settings.max_device_gib
        if gib is not None and self.root_device.type == "cpu":
            rank_zero_warn(
                f"`max_device_gib={gib:g}` has no effect: the CPU is the device, and its memory is the host's "
                "(`max_host_gib`)."
            )
        self._lift_device_cap()  # of a setup that no teardown followed
        self._uncap = cap_device(self.root_device, gib)

    def _lift_device_cap(self) -> None:
        if self._uncap is not None:
            self._uncap()
        self._uncap = None

    def _make_lanes(self, machine: Machine, settings: CommonSettings) -> Lanes:
        return make_lanes(self.root_device, machine, settings)

    @staticmethod
    def _ends_epoch(trainer: Trainer) -> bool:
        """Whether epoch hooks may follow this step; a Timer can end the epoch at any step."""
        last = 0 <= trainer.max_steps <= trainer.global_step + 1
        timed = any(type(callback).__name__ == "Timer" for callback in trainer.callbacks)  # type: ignore[attr-defined]
        return trainer.is_last_batch or trainer.should_stop or last or timed

    # What may run out of memory.

    @override
    @reports_shortage
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().validation_step(*args, **kwargs)

    @override
    @reports_shortage
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().test_step(*args, **kwargs)

    @override
    @reports_shortage
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().predict_step(*args, **kwargs)

    def _run_at_hand(self) -> Run | None:
        module, engine = self.lightning_module, cast("Any", self.engine)
        if module is None:
            return None
        method = engine.method if engine is not None else self._method()
        dtypes = self.precision_plugin.dtypes(method)
        return Run(self.strategy_name, module, self.root_device, method, dtypes, engine)

    # Boundaries: nothing in flight, and what others wrote is taken over.

    @override
    def on_validation_start(self) -> None:
        self._flush()
        super().on_validation_start()

    @override
    def on_validation_end(self) -> None:
        self._adopt_due = self._window.may_write
        super().on_validation_end()

    @override
    def on_train_end(self) -> None:
        self._flush()
        super().on_train_end()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.engine is not None:
            self.engine.drop()
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        self._detach()
        module = self._lightning_module
        if module is not None and not is_made(module):  # a setup has failed, and nothing can move it to the CPU
            forget_weights(module)
            self._lightning_module = None
        super().teardown()
        self._lightning_module = module
        self._lift_device_cap()

    @reports_shortage
    def _flush(self) -> None:
        if self.engine is not None:
            self.engine.flush()

    def _detach(self) -> None:
        """The engine's state stays readable: a checkpoint may be saved after fit."""
        if self.engine is not None:
            if self._window.may_write and not self.engine.closed:
                self.engine.adopt()
            self.engine.detach()
        self._adopt_due = False
        self._window = Window()

    # State.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """CPU tensors under the module's own names; offloaded weights share the arenas' memory."""
        state: dict[str, Any] = super().lightning_module_state_dict()
        if self.engine is None or self.engine.closed or self._window.may_write:
            return {name: _cpu(value) for name, value in state.items()}  # what is in the module, whoever wrote it
        on_host = {t.parameter.data_ptr(): w for t, w in self.engine.weights()}
        return {name: _on_host(value, on_host) for name, value in state.items()}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        if strict and not is_overridden("load_state_dict", module, LightningModule):
            compare_weights(module.state_dict(), checkpoint["state_dict"], source="The checkpoint")
        find_in_checkpoint(module, checkpoint["state_dict"])
        with quiet_about_meta():
            super().load_model_state_dict(checkpoint, strict=strict)

    def __getstate__(self) -> dict[str, Any]:
        """Threads, streams and page-locked memory stay behind, and a module that they hang on."""
        state: dict[str, Any] = super().__getstate__() | {"engine": None, "_uncap": None}
        if self._hangs_on_module:
            state |= {"_lightning_module": None, "_model": None, "_optimizers": [], "lr_scheduler_configs": []}
        return state

    @property
    def _hangs_on_module(self) -> bool:
        """Whether hooks that bring weights or take gradients are on the module."""
        return self.engine is not None and not self.engine.closed


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _on_host(value: Any, on_host: Mapping[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    held = on_host.get(value.data_ptr())
    return held if held is not None and held.shape == value.shape and held.dtype == value.dtype else value.cpu()
