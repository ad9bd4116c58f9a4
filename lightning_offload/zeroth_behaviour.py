"""What the `zo2` strategy does with Lightning's hooks: several forwards for one `training_step`, and no backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_offload.behaviour import OffloadBehaviour
from lightning_offload.errors import OffloadError
from lightning_offload.memory.blocks import partition
from lightning_offload.memory.budget import Machine
from lightning_offload.methods.forwards import StreamedForwards
from lightning_offload.methods.steplog import Entry, LogFile
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from lightning_offload.parts import parts_of, weight_of
from lightning_offload.resuming import EXTRAS, chosen_before
from lightning_offload.windows import find_window


class ZerothBehaviour(OffloadBehaviour[ZerothEngine]):
    """See the module docstring.

    Attributes:
        log_file: Where the log of updates is written as the run goes, if anywhere.
    """

    settings_type: ClassVar[type[ZO2Settings]] = ZO2Settings
    settings: ZO2Settings
    log_file: Path | None = None
    _forwards: StreamedForwards | None = None
    _log: LogFile | None = None
    _resumed = False

    @override
    def _method(self) -> ZO2:
        return ZO2(self.settings)

    @property
    def log(self) -> list[Entry]:
        """Every update of the weights since the run began, one entry for each."""
        return [] if self.engine is None else self.engine.log

    # Setting up.

    @override
    def setup(self, trainer: Trainer) -> None:
        self._close_forwards()
        super().setup(trainer)

    @override
    def _prepare_forwards(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        machine, method, units = self._resolved(trainer, module)
        lanes = self._make_lanes(machine, method.settings)
        self._forwards = StreamedForwards(module, method, lanes, self.precision_plugin.dtypes(method), units)

    @override
    def _attach(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        _check_module(module)
        machine, method, units = self._resolved(trainer, module)
        self.engine = ZerothEngine(
            module,
            self.optimizers[0],
            method,
            self._make_lanes(machine, method.settings),
            self.precision_plugin.dtypes(method),
            machine=machine,
            uses=self.uses,
            units=units,
        )
        self._window = find_window(trainer, module)
        self._resumed = False
        self.precision_plugin.records_clip = True
        if self._window.weights:
            rank_zero_info(
                f"{self.strategy_name}: {', '.join(self._window.weights)} may look at weights between steps, so every "
                "step brings all of them up once more for its update. Move that to `on_validation_start` to save it."
            )
        if self._window.gradients:
            rank_zero_warn(
                f"{self.strategy_name}: {', '.join(self._window.gradients)} will find no gradients: zo2 has none."
            )

    def _resolved(self, trainer: Trainer, module: LightningModule) -> tuple[Machine, ZO2, list[Any]]:
        method = self._method()
        asked = method.settings
        machine = Machine.detect(self.root_device)
        machine = machine.capped(device_bytes=asked.max_device_bytes, host_bytes=asked.max_host_bytes)
        units = partition(module, asked.blocks)
        for reason in method.resolve(
            units, machine, self.precision_plugin.dtypes(method), before=chosen_before(trainer)
        ):
            rank_zero_info(f"{self.strategy_name}: {reason}")
        return machine, method, units

    @override
    def _convert(self) -> None:
        """Buffers alone: weights are kept as the engine keeps them."""
        assert self.model is not None
        self.precision_plugin.convert_buffers(self.model)

    @override
    def model_to_device(self) -> None:
        """Buffers and metrics alone: a weight at rest is where its berth is."""
        assert self.model is not None
        device = self.root_device

        def move(tensor: Tensor) -> Tensor:
            return tensor if isinstance(tensor, nn.Parameter) else tensor.to(device)

        self.model._apply(move)
        for module in self.model.modules():
            if isinstance(module, _DeviceDtypeModuleMixin):
                module._device = device

    # Stepping.

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.engine is None:
            return
        if not self._resumed:
            self.engine.drop()  # what an exception that somebody caught has left (the batch size finder does)
        if self.log_file is not None:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log = LogFile(self.log_file, self.engine.header(), self.engine.log)

    @override
    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        engine, module = self.engine, self.lightning_module
        assert engine is not None
        assert module is not None
        if self._adopt_due or self._window.weights:
            self._adopt_due = False
            engine.adopt()
        parts = parts_of(batch, self.settings.micro_batches)
        with self.precision_plugin.train_step_context(), _mode(module, train=self.settings.train_mode):
            return engine.micro_batch(
                lambda part: _loss(module.training_step(part, *args, **kwargs)), parts, [weight_of(p) for p in parts]
            )

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """There is none."""
        return closure_loss

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        engine, module = self.engine, self.lightning_module
        assert engine is not None
        assert module is not None
        result = closure()
        self.precision_plugin._after_closure(module, optimizer)
        before = len(engine.log)
        engine.step(self.precision_plugin.take_clip())
        if self._log is not None:
            self._log.append(engine.log[before:])
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's schedulers look for
        if self._window.weights or (self._window.epochs and self._ends_epoch(module.trainer)):
            engine.flush()
            self._adopt_due = True
        return result

    @override
    def teardown(self) -> None:
        self._close_forwards()
        super().teardown()

    @override
    def _detach(self) -> None:
        super()._detach()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _close_forwards(self) -> None:
        if self._forwards is not None:
            self._forwards.detach()
        self._forwards = None

    # State.

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self.engine is None:
            return super().optimizer_state(optimizer)
        return self.engine.optimizer_state() | {EXTRAS: self.engine.extras()}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.engine is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        self._resumed = True
        (state,) = checkpoint["optimizer_states"]
        self.engine.load_optimizer_state(state)
        if EXTRAS in state:
            self.engine.load_extras(state[EXTRAS])

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_forwards": None, "_log": None}


def _check_module(module: LightningModule) -> None:
    who = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"`{who}` steps by itself (`automatic_optimization = False`), but `zo2_offload` has no gradients that a "
            "`manual_backward` could make. Derive it from `ZO2Mixin` and write `loss`, or use automatic optimization."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"`{who}.training_step` takes `dataloader_iter`, but `zo2_offload` runs each batch several times. Take "
            "`batch` instead."
        )


def _loss(output: Any) -> Tensor:
    """Of what a `training_step` returned."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise OffloadError(
            f"`training_step` returned {type(output).__name__}; `zo2_offload` needs the loss of every batch, a tensor "
            "or a dictionary with 'loss'"
        )
    return loss


@contextmanager
def _mode(module: nn.Module, *, train: bool) -> Iterator[None]:
    """Around the forwards of a step: ``eval()`` as MeZO has it, or as it is; afterwards as before."""
    if train:
        yield
        return
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
