"""`OffloadPrecision`: owns every dtype, and what Lightning asks of a precision plugin."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_offload.methods.base import Clip, DTypes, Rounding
from lightning_offload.methods.method import Method
from lightning_offload.methods.zo2 import ZO2

AnyMethod = Method | ZO2
PrecisionName = Literal["32-true", "bf16-mixed", "bf16-true", "16-true"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class OffloadPrecision(Precision):
    """Which dtype lives where under an offload strategy.

    ============  ==========================  ========  ====================================  =======
    precision     compute, device weights     wire      master                                moments
    ============  ==========================  ========  ====================================  =======
    32-true       as the weights are          weight's  the fp32 weight itself                fp32
    bf16-mixed    autocast over fp32 weights  fp32      the fp32 weight itself                fp32
    bf16-true     bf16                        bf16      fp32 on the host; lsp: none where it  fp32
                                                        projects, stochastic rounding instead
    16-true       fp16 (zo2 alone)            fp16      none, stochastic rounding             none
    ============  ==========================  ========  ====================================  =======

    Weights that are 16-bit already get fp32 masters under every precision (but for those that ``lsp`` projects).
    ``zo2`` keeps one copy of each weight, in the dtype in which it crosses the link: that of the compute weight with
    stochastic rounding, ``wire``, or fp32 with ``master=float32``.
    Inside the steps everything is as with Lightning's own plugin of the same name, except that ``bf16-true`` leaves
    non-persistent buffers (rotary frequencies) in their dtype: rounding them would change the positions that a
    pretrained model has learned.

    Args:
        precision: One of the names above.
        master: dtype of the masters; float32.
        wire: dtype that crosses the link; that of the compute weights.
        moments: dtype of the optimizer state; float32.
        rounding: How a 16-bit weight takes a finer step: ``"nearest"``, or for methods without masters (lsp)
            ``"stochastic"``, their default.

    Raises:
        ValueError: A precision or dtype that is not supported, naming the argument and what is.
    """

    precision: Any = "32-true"

    def __init__(
        self,
        precision: PrecisionName = "32-true",
        *,
        master: torch.dtype | str | None = None,
        wire: torch.dtype | str | None = None,
        moments: torch.dtype | str | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        if precision not in get_args(PrecisionName):
            raise ValueError(
                f"`OffloadPrecision(precision={precision!r})` is not supported. `precision` must be one of: "
                f"{get_args(PrecisionName)}."
            )
        self.precision = precision
        self._asked = {
            "master": _dtype("master", master),
            "wire": _dtype("wire", wire),
            "moments": _dtype("moments", moments),
        }
        self._rounding = rounding
        self._half = HalfPrecision(precision) if precision in ("bf16-true", "16-true") else None
        self._mixed: MixedPrecision | None = None
        self.records_clip = False
        """Whether a clip call is left to the step (the gradients are on their way down) or done at once."""
        self._clip: Clip | None = None

    @classmethod
    def from_plugin(cls, plugin: Precision | None, strategy: str) -> OffloadPrecision:
        """What the Trainer chose, as our own plugin.

        Raises:
            ValueError: A precision that cannot be offloaded.
            TypeError: A plugin with behaviour of its own.
        """
        if plugin is None:
            return cls()
        if isinstance(plugin, OffloadPrecision):
            return plugin
        if plugin.precision not in get_args(PrecisionName):
            raise ValueError(
                f"`Trainer(strategy={strategy!r}, precision={plugin.precision!r})` is not supported. `precision` must "
                f"be one of: {get_args(PrecisionName)}."
            )
        if type(plugin) not in (Precision, HalfPrecision, MixedPrecision):
            raise TypeError(
                f"`{strategy}` can only work with the `OffloadPrecision` plugin, found `{type(plugin).__qualname__}`. "
                "Pass `precision=` instead of `plugins=`, or an `OffloadPrecision`."
            )
        name: Any = plugin.precision
        return cls(name)

    def under(self, precision: PrecisionName) -> OffloadPrecision:
        """The same wishes with another precision."""
        return OffloadPrecision(precision, rounding=self._rounding, **self._asked)

    def dtypes(self, method: AnyMethod) -> DTypes:
        """The dtypes for one method.

        Raises:
            ValueError: The method cannot work with one that was asked for, naming the argument.
        """
        if self._rounding not in (None, *get_args(Rounding)):
            raise ValueError(f"`OffloadPrecision(rounding={self._rounding!r})` must be one of: {get_args(Rounding)}.")
        if isinstance(method, ZO2):
            return self._dtypes_of_forwards(method)
        if self.precision == "16-true":
            others = tuple(name for name in get_args(PrecisionName) if name != "16-true")
            raise ValueError(
                f"`Trainer(strategy='{method.name}_offload', precision='16-true')` is not supported: gradients in "
                f"float16 underflow. `precision` must be one of: {others}."
            )
        keeps_masters = method.rounding == "nearest"
        if self._rounding not in (None, "nearest") and keeps_masters:
            raise ValueError(
                f"`OffloadPrecision(rounding={self._rounding!r})` is not supported by method `{method.name}`, which "
                "keeps fp32 masters; it must be 'nearest'."
            )
        dtypes = DTypes.of(self.precision, self._rounding or method.rounding)
        if dtypes.compute is not None and self._asked["master"] is not None and not keeps_masters:
            raise ValueError(
                f"`OffloadPrecision(master={self._asked['master']})` is not supported by method `{method.name}` with "
                f"`precision={self.precision!r}`, which keeps no masters of the weights that it projects. Leave it out "
                "(rounding='stochastic' loses no small steps), or use `precision='bf16-mixed'`."
            )
        supported = {"master": torch.float32, "moments": torch.float32, "wire": dtypes.compute or torch.float32}
        for name, only in supported.items():
            if self._asked[name] not in (None, only):
                raise ValueError(
                    f"`OffloadPrecision({name}={self._asked[name]})` is not supported by method `{method.name}` with "
                    f"`precision={self.precision!r}`; it must be {only}."
                )
        return dtypes

    def _dtypes_of_forwards(self, method: ZO2) -> DTypes:
        """Of a method without gradients: one copy of each weight, as it crosses the link."""
        asked, exact = self._asked, method.settings.noise == "mezo"
        wrong = {
            "moments": asked["moments"] is not None and "which has no optimizer state",
            "master": asked["master"] not in (None, torch.float32) and "whose masters are float32",
            "wire": asked["master"] is not None and asked["wire"] not in (None, asked["master"]) and "with a master",
        }
        if exact:
            wrong["master"] = asked["master"] is not None and "with noise='mezo', which keeps weights as MeZO does"
            wrong["wire"] = asked["wire"] is not None and "with noise='mezo', which keeps weights as MeZO does"
        for name, why in wrong.items():
            if why:
                raise ValueError(
                    f"`OffloadPrecision({name}={asked[name]})` is not supported by method `{method.name}`, {why}. "
                    "Leave it out."
                )
        if exact and self._rounding == "stochastic":
            raise ValueError(
                "`OffloadPrecision(rounding='stochastic')` is not supported by method `zo2` with noise='mezo', which "
                "rounds as MeZO does. Leave it out, or pass noise='philox'."
            )
        dtypes = DTypes.of(self.precision, self._rounding or method.rounding)
        return replace(dtypes, wire=asked["master"] or asked["wire"])

    @property
    def _half_dtype(self) -> torch.dtype | None:
        return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(self.precision)

    def use_device(self, device: torch.device) -> None:
        """Tell where autocast happens; the Trainer knows it only after the plugin is made."""
        if self.precision == "bf16-mixed":
            self._mixed = MixedPrecision("bf16-mixed", device.type)

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Round parameters and persistent buffers to 16 bits under ``bf16-true`` and ``16-true``."""
        dtype = self._half_dtype
        for parameter in module.parameters() if dtype is not None else ():
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        self.convert_buffers(module)
        return module

    def convert_buffers(self, module: nn.Module) -> None:
        """Round persistent buffers alone: the weights are an engine's."""
        dtype = self._half_dtype
        for owner in module.modules() if dtype is not None else ():
            for name, buffer in owner._buffers.items():
                if buffer is not None and buffer.is_floating_point() and name not in owner._non_persistent_buffers_set:
                    owner._buffers[name] = buffer.to(dtype)

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._half.tensor_init_context() if self._half is not None else super().tensor_init_context()

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    @override
    def convert_input(self, data: Any) -> Any:
        return self._half.convert_input(data) if self._half is not None else super().convert_input(data)

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        inner = self._half or self._mixed
        with inner.forward_context() if inner is not None else super().forward_context():
            yield

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip now, or leave it to the step that follows."""
        if clip_val <= 0:
            return
        if self.records_clip:
            algorithm: Any = GradClipAlgorithmType(gradient_clip_algorithm).value
            self._clip = Clip(float(clip_val), algorithm)
        else:
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    def take_clip(self) -> Clip | None:
        """The clip call since the last step, once."""
        clip, self._clip = self._clip, None
        return clip


def _dtype(name: str, value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    if value in _DTYPES:
        return _DTYPES[value]
    raise ValueError(f"`OffloadPrecision({name}={value!r})` is not a dtype; use one of: {', '.join(_DTYPES)}")
