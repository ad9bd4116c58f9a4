"""The methods that can be planned, and the settings that each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from lightning_offload.methods.base import DTypes
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.methods.lsp import LSP, LSPSettings
from lightning_offload.methods.meft import MEFT, MEFTSettings
from lightning_offload.methods.method import Method
from lightning_offload.methods.settings import CommonSettings, GradientSettings
from lightning_offload.methods.zo2 import ZO2Settings

NATIVE, SERIAL, FULL, SUBSPACE, ZEROTH, SPARSE = "none", "zero-offload", "full", "lsp", "zo2", "meft"
METHODS = {
    NATIVE: "everything on the device",
    SERIAL: "full, each step waiting for its weights",
    FULL: "full",
    SUBSPACE: "AdamW in a d x d subspace of each linear weight",
    ZEROTH: "forwards alone, weights in host memory",
    SPARSE: "wide sparse adapters in host memory beside a frozen model",
}
"""What can be planned; ``zero-offload`` is its schedule on this engine, for comparison."""

FITTED_STEPS = 2
"""Of a fit in a dry run: memory does not grow after them, and the steady state has none."""


PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")


@runtime_checkable
class Precision(Protocol):
    """What is asked of an ``OffloadPrecision``.

    Attributes:
        precision: Lightning's name of it.
    """

    precision: Any

    def under(self, precision: Any) -> Precision:
        """The same wishes with another precision."""
        ...

    def dtypes(self, method: Any) -> DTypes:
        """The dtypes for one method."""
        ...


def default_optimizer(method: str) -> Callable[[Any], torch.optim.Optimizer]:
    """From parameters to the optimizer that a method takes by default."""
    return partial(torch.optim.SGD, lr=1e-6) if method == ZEROTH else partial(torch.optim.AdamW, fused=True)


def check_precision(method: str, precision: str) -> None:
    """Refuse what the method's strategy refuses.

    Raises:
        ValueError: Gradients in fp16.
    """
    if precision == "16-true" and method != ZEROTH:
        raise ValueError(
            f"`precision='16-true'` is for method 'zo2', got method={method!r}: gradients underflow in fp16; pass "
            "precision='bf16-true'"
        )


def settings_of(method: str) -> type[CommonSettings]:
    """The class of a method's settings."""
    kinds: dict[str, type[CommonSettings]] = {SUBSPACE: LSPSettings, ZEROTH: ZO2Settings, SPARSE: MEFTSettings}
    return kinds.get(method, FullSettings)


def settings_for(method: str, given: CommonSettings) -> CommonSettings:
    """``given``; of another method's, what both have."""
    kind = settings_of(method)
    if isinstance(given, kind):
        return given
    both = GradientSettings if issubclass(kind, GradientSettings) and isinstance(given, GradientSettings) else None
    return kind(**{field.name: getattr(given, field.name) for field in fields(both or CommonSettings)})


def method_for(settings: Any) -> Method:
    """The method that takes these settings."""
    if isinstance(settings, LSPSettings):
        return LSP(replace(settings, fit_steps=min(settings.fit_steps, FITTED_STEPS)))
    return MEFT(settings) if isinstance(settings, MEFTSettings) else Full(settings)
