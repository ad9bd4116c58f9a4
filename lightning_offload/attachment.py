"""A method under a plain strategy: the engine of a mixin that the Trainer's strategy knows nothing of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_offload.attaching import attach, look_for_readers, make_lanes
from lightning_offload.calibration import Calibration
from lightning_offload.methods.base import Attached, Clip, DTypes
from lightning_offload.methods.engine import GRADIENTS, Engine
from lightning_offload.methods.meft import MEFT
from lightning_offload.precision import OffloadPrecision
from lightning_offload.resuming import EXTRAS, pack, restore_rows, unpack
from lightning_offload.savings import Run
from lightning_offload.windows import Window

AnyEngine = TypeVar("AnyEngine", bound=Attached)


class Attachment(Callback, Generic[AnyEngine]):
    """Puts an engine in the place of ``optimizer.step`` for the time of a fit.

    Attributes:
        engine: Of the running, or of the last, fit.
        clip: What the next step is to be clipped by.
    """

    def __init__(self) -> None:
        self.engine: AnyEngine | None = None
        self.clip: Clip | None = None
        self._window = Window()
        self._put_back: Callable[[], object] = bool
        self._give_back: Callable[[], object] = bool

    @staticmethod
    def of(trainer: Trainer) -> Attachment[Any] | None:
        """The Trainer's, if it has one."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Attachment)), None)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self.engine = None
        make: Callable[[], Any] | None = getattr(pl_module, "offload_own_method", None)
        if make is None:
            return
        who, method = type(pl_module).__name__, make()
        _check_strategy(trainer, who)
        dtypes = OffloadPrecision.from_plugin(trainer.precision_plugin, who).dtypes(method)
        self.engine = self._attach(who, trainer, pl_module, method, dtypes)
        self._take_step(trainer.strategy.optimizers[0])
        checkpoint = trainer._checkpoint_connector._loaded_checkpoint
        if checkpoint.get("optimizer_states"):  # empty: of no use to this method
            self._load(self.engine, trainer, checkpoint)

    def run_at_hand(self) -> Run | None:
        """What is attached, for those who tell of it."""
        engine: Any = self.engine
        if engine is None:
            return None
        who = type(engine.module).__name__
        return Run(who, engine.module, engine.lanes.device, engine.method, engine.dtypes, engine)

    def _attach(self, who: str, trainer: Trainer, module: LightningModule, method: Any, dtypes: DTypes) -> AnyEngine:
        """An engine, and the window of this fit."""
        raise NotImplementedError

    def _load(self, engine: AnyEngine, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Continue from the optimizer states of a checkpoint; the Trainer loads what is then in it."""
        raise NotImplementedError

    def _step(self, engine: AnyEngine, clip: Clip | None) -> None:
        """What the optimizer's step is."""
        raise NotImplementedError

    @property
    def sees_gradients(self) -> bool:
        """Whether somebody looks at ``p.grad``, where gradients then stay until the step."""
        return bool(self._window.gradients)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _take_step(self, optimizer: Any) -> None:
        before = optimizer.__dict__.get("step")

        def put_back() -> None:
            optimizer.__dict__.pop("step")
            if before is not None:  # a scheduler's wrapper
                optimizer.step = before

        def step(closure: Callable[[], Any] | None = None) -> Any:
            assert self.engine is not None
            result = closure() if closure is not None else None
            clip, self.clip = self.clip, None
            self._step(self.engine, clip)
            optimizer._opt_called = True  # what torch's schedulers look for
            return result

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # torch's schedulers look for their own wrapper
        optimizer.step, self._put_back = step, put_back

    def _take_validation(self, strategy: Any, engine: AnyEngine) -> None:
        """Hooks before a batch may have written weights of which there are copies; the strategy comes after all."""
        validate = strategy.validation_step

        def validation_step(*args: Any, **kwargs: Any) -> Any:
            engine.adopt()
            return validate(*args, **kwargs)

        strategy.validation_step = validation_step
        self._give_back = partial(strategy.__dict__.pop, "validation_step")

    def _detach(self) -> None:
        """State stays readable: a checkpoint may be saved after fit."""
        put_back, self._put_back = self._put_back, bool
        put_back()
        give_back, self._give_back = self._give_back, bool
        give_back()
        if self.engine is not None:
            self.engine.detach()

    def __getstate__(self) -> dict[str, Any]:
        """The engine stays behind."""
        return {**type(self)().__dict__}


class GradientAttachment(Attachment[Engine]):
    """Of a method with gradients; every step waits for its weights."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: Mapping[str, Tensor] = {}
        self._torn = False

    @override
    def _attach(self, who: str, trainer: Trainer, module: LightningModule, method: Any, dtypes: DTypes) -> Engine:
        self._pending, self._torn = {}, False
        self._calibration = Calibration(getattr(module, "offload_calibration", None), method.settings)
        device = module.device
        engine = attach(who, trainer, module, method, dtypes, device, partial(make_lanes, device))
        self._window = look_for_readers(who, trainer, module, method.settings)
        if self._window.may_write and isinstance(method, MEFT):
            self._take_validation(trainer.strategy, engine)
        return engine

    @override
    def _load(self, engine: Engine, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        restore_rows(engine, trainer, checkpoint)
        self._pending = unpack(engine, self._calibration, states)
        if GRADIENTS not in states[0].get(EXTRAS, {GRADIENTS: {}}):
            states[:] = [engine.optimizer_state()]  # not another optimizer's

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.engine is not None:
            self.engine.optimizer.state.clear()  # the Trainer has loaded what the engine holds
            self.engine.drop()
            self.engine.load_gradients(self._pending)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around the forward of a micro-batch."""
        engine = self.engine
        assert engine is not None
        module: Any = engine.module
        if self._window.may_write:
            engine.adopt()
        self._calibration.run(engine, module.trainer, module)
        engine.gradients_visible, engine.stepping = self.sees_gradients, last
        with engine.micro_batch():
            yield

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Around its backward: an exception in it leaves a part of the micro-batch in the gradients."""
        self._torn = True
        yield
        self._torn = last

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """As an offload strategy does it: either continues from the other's checkpoint."""
        if self.engine is not None and "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [pack(self.engine, self._calibration, torn=self._torn)]

    @override
    def _step(self, engine: Engine, clip: Clip | None) -> None:
        engine.step(clip)
        engine.flush()
        self._torn = False
        self._calibration.stepped()


def _check_strategy(trainer: Trainer, who: str) -> None:
    strategy, device = trainer.strategy, trainer.strategy.root_device
    if not isinstance(strategy, SingleDeviceStrategy) or device.type not in ("cpu", "cuda"):
        raise MisconfigurationException(
            f"`{who}` trains by a method of its own, on one CUDA GPU or the CPU; found `{type(strategy).__name__}` on "
            f"`{device.type}`. Pass `Trainer(devices=1, accelerator='cuda')` or 'cpu'."
        )
