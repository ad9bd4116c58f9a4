"""The methods that can be planned, and the settings that each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from lightning_offload.methods.base import DTypes
from lightning_offload.methods.catalogue import CATALOGUE
from lightning_offload.methods.full import Full
from lightning_offload.methods.lsp import LSPSettings
from lightning_offload.methods.method import Method
from lightning_offload.methods.settings import CommonSettings, GradientSettings
from lightning_offload.methods.zo2 import ZO2, ZO2Settings

NATIVE, SERIAL, FULL, SUBSPACE, ZEROTH, SPARSE = "none", "zero-offload", "full", "lsp", "zo2", "meft"


def methods() -> dict[str, str]:
    """What can be planned, in a few words each; ``zero-offload`` is its schedule on this engine, for comparison."""
    known = {NATIVE: "everything on the device", SERIAL: "full, each step waiting for its weights"}
    known |= {name: kind.summary for name, kind in CATALOGUE.items()} | {ZEROTH: ZO2.summary}
    first = (NATIVE, SERIAL, FULL, SUBSPACE, ZEROTH, SPARSE)
    return {name: known[name] for name in (*first, *(name for name in known if name not in first))}


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
    return ZO2Settings if method == ZEROTH else CATALOGUE.get(method, Full).settings_type


def settings_for(method: str, given: CommonSettings) -> CommonSettings:
    """``given``; of another method's, what both have."""
    kind = settings_of(method)
    if isinstance(given, kind):
        return given
    both = GradientSettings if issubclass(kind, GradientSettings) and isinstance(given, GradientSettings) else None
    return kind(**{field.name: getattr(given, field.name) for field in fields(both or CommonSettings)})


def method_for(method: str, settings: Any) -> Method:
    """The method of this name with these settings."""
    if isinstance(settings, LSPSettings):
        settings = replace(settings, fit_steps=min(settings.fit_steps, FITTED_STEPS))
    return CATALOGUE.get(method, Full)(settings)
