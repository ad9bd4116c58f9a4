"""Offload strategies of the methods that have gradients: when they leave, and the step that follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_offload.attaching import attach, look_for_readers, warn_of_gradient_hooks
from lightning_offload.behaviour import OffloadBehaviour
from lightning_offload.calibration import Calibration
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.method import Method
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.settings import GradientSettings
from lightning_offload.resuming import pack, unpack
from lightning_offload.shortage import reports_shortage


class GradientBehaviour(OffloadBehaviour[Engine]):
    """See the module docstring."""

    method_type: ClassVar[type[Method]]
    settings_type: ClassVar[type[GradientSettings]]
    settings: GradientSettings
    calibration_dataloader: Iterable[Any] | None = None
    _calibration: Calibration
    _pending: Mapping[str, Tensor] = {}
    _torn = False

    def __init_subclass__(cls, **more: Any) -> None:
        """Settings are those of the method."""
        super().__init_subclass__(**more)
        if "method_type" in vars(cls):
            cls.settings_type = cls.method_type.settings_type

    @override
    def _method(self) -> Method:
        return self.method_type(self.settings)

    @override
    def _settle_settings(self, module: LightningModule) -> None:
        super()._settle_settings(module)
        loader = self.calibration_dataloader
        if loader is None:
            loader = getattr(module, "offload_calibration", None)
        self._calibration = Calibration(loader, self.settings)

    @override
    def _attach(self, trainer: Trainer) -> None:
        self._torn = False
        module, method = self.lightning_module, self._method()
        assert module is not None
        if not self.optimizers[0].param_groups or not self._claims_anything(method):  # none: there is no optimizer
            rank_zero_warn(
                f"`{type(self).__name__}` found no trained parameter with at least "
                f"min_numel={method.settings.min_numel:,} elements: nothing is offloaded and the optimizer runs as it "
                "is. Set `min_numel=0` to offload everything."
            )
            return
        self.engine = attach(
            self.strategy_name,
            trainer,
            module,
            method,
            self.precision_plugin.dtypes(method),
            self.root_device,
            self._make_lanes,
            uses=self.uses,
            peers=self._peers,
            agree=self._agree,
        )
        # before anything runs: the sanity check's hooks may write weights already
        self._window = look_for_readers(self.strategy_name, trainer, module, method.settings)

    def _claims_anything(self, method: Method) -> bool:
        """Whether an engine has anything to do."""
        trained = [p for o in self.optimizers for group in o.param_groups for p in group["params"] if p.requires_grad]
        return any(parameter.numel() >= method.settings.min_numel for parameter in trained)

    # Stepping.

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        module = self.lightning_module
        if self.engine is None or module is None:
            return
        self.engine.drop()  # what an exception that somebody caught has left (the batch size finder does)
        self._look_for_hooks(self.engine)
        self.engine.load_gradients(self._pending)  # between restoring and here Lightning clears every `p.grad`
        self._pending = {}

    def _look_for_hooks(self, engine: Engine) -> None:
        rows = isinstance(engine.own, RowOptimizer)
        if engine.own is None or not (rows or getattr(self.settings, "form", None) == "activations"):
            return
        why = "rows are fetched one by one, and theirs summed up in host memory." if rows else "form='activations'."
        hooked = [t.name for t in engine.own.trained if t.parameter._backward_hooks]
        warn_of_gradient_hooks(self.strategy_name, hooked, f"{why} Read `.grad` in `on_before_optimizer_step`.")

    @override
    @reports_shortage
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.engine is None:
            return super().training_step(*args, **kwargs)
        if self._adopt_due or self._window.weights:  # hooks may write after any micro-batch
            self._adopt_due = False
            self.engine.adopt()
        assert self.lightning_module is not None
        self._calibration.run(self.engine, self.lightning_module.trainer, self.lightning_module)
        # automatic: `optimizer_step` has said whether it is the last, and is running this as its closure;
        # manual: nobody has said yet that gradients may leave before the step
        self.begin_micro_batch(last=self.engine.stepping, visible=not self._is_automatic)
        with self.engine.micro_batch():
            return super().training_step(*args, **kwargs)

    @override
    @reports_shortage
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._torn = True  # an exception from here on leaves the gradients with a part of a micro-batch
        loss = super().backward(*args, **kwargs)
        self._torn = self.engine is not None and self.engine.stepping
        return loss

    @property
    def _is_automatic(self) -> bool:
        return self.lightning_module is not None and self.lightning_module.automatic_optimization

    @override
    @reports_shortage
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        engine, module = self.engine, self.lightning_module
        if engine is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        assert module is not None
        if module.automatic_optimization:
            self.begin_micro_batch(last=True)
        result = closure()
        if engine.gradients_visible:
            engine.meet(visible=True)
        self.precision_plugin._after_closure(module, optimizer)
        engine.step(self.precision_plugin.take_clip())
        self._torn = False
        self._calibration.stepped()
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's schedulers look for
        if self._window.weights or (self._window.epochs and self._ends_epoch(module.trainer)):
            engine.flush()
            self._adopt_due = True
        return result

    def begin_micro_batch(self, *, last: bool, visible: bool = False) -> None:
        """Say, before a backward, whether the step follows it and whether gradients must stay where users see them."""
        engine = self.engine
        if engine is not None:
            engine.gradients_visible = visible or bool(self._window.gradients)
            engine.stepping = last
            self.precision_plugin.records_clip = not engine.gradients_visible

    @override
    def _detach(self) -> None:
        super()._detach()
        self._pending = {}

    # State.

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """In torch's own layout, so that a plain Trainer resumes from it; the rest is under our key."""
        if self.engine is None:
            return super().optimizer_state(optimizer)
        return pack(self.engine, self._calibration, torn=self._torn)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.engine is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        self._pending = unpack(self.engine, self._calibration, checkpoint["optimizer_states"])
