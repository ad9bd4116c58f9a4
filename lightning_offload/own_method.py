"""Strategies of methods that others write: one line each."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from inspect import Parameter, signature
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision

from lightning_offload.gradient_behaviour import GradientBehaviour
from lightning_offload.methods.catalogue import CATALOGUE, check
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.method import Method
from lightning_offload.ranks import SeveralDevices
from lightning_offload.registry import register_one
from lightning_offload.strategies import OneDevice


class OwnMethod(GradientBehaviour):
    """What `OffloadStrategy` and `OffloadDDPStrategy` share: they take the settings of their method by name."""

    def __init_subclass__(cls, *, method: type[Method] | None = None, **more: Any) -> None:
        """Make a method known: to ``plan`` by its name, to a Trainer as ``<name>_offload``."""
        if method is None:
            super().__init_subclass__(**more)
            return
        check(method)
        cls.method_type = method
        super().__init_subclass__(**more)
        cls.strategy_name = f"{method.name}_offload" + "_ddp" * issubclass(cls, SeveralDevices)
        taken = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=_default(field), annotation=field.type)
            for field in fields(cls.settings_type)
        ]
        own = signature(OwnMethod.__init__)
        others = [p for p in own.parameters.values() if p.kind == Parameter.KEYWORD_ONLY]
        cls.__signature__ = own.replace(parameters=[*taken, *others])  # type: ignore[attr-defined]
        CATALOGUE[method.name] = method
        register_one(cls)

    def __init__(
        self,
        *,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        **settings: Any,
    ) -> None:
        known = [field.name for field in fields(self.settings_type)]
        for name in settings:
            if name not in known:
                raise TypeError(f"`{type(self).__name__}` has no setting {name!r}; there are {', '.join(known)}")
        super().__init__(
            settings, accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin
        )


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return Parameter.empty if field.default is MISSING else field.default


class OffloadStrategy(OwnMethod, OneDevice[Engine]):
    """Base of the strategy of a method of your own, on one device.

    ::

        class SignSGDStrategy(OffloadStrategy, method=SignSGD): ...

    is all of it: the class takes the method's settings by name, a Trainer knows it as ``"signsgd_offload"``, the
    command line by ``_target_``, and ``plan(..., method="signsgd")`` plans it.

    Args:
        accelerator: As for every Lightning strategy.
        checkpoint_io: As for every Lightning strategy; the default streams to disk.
        precision_plugin: An ``OffloadPrecision``, to choose dtypes one by one.
        settings: Of the method.

    Raises:
        TypeError: There is no such setting.
        ValueError: A setting that cannot work; a method without name, summary or settings.
    """


class OffloadDDPStrategy(SeveralDevices[Engine], OwnMethod):
    """The same on several devices: ``class SignSGDDDPStrategy(OffloadDDPStrategy, method=SignSGD)``."""
