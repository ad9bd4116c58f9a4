"""The methods that can be planned, and the settings that each takes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.methods.lsp import LSP, LSPSettings
from lightning_offload.methods.method import Method
from lightning_offload.methods.settings import GradientSettings

NATIVE, SERIAL, FULL, SUBSPACE = "none", "zero-offload", "full", "lsp"
METHODS = {
    NATIVE: "everything on the device",
    SERIAL: "full, each step waiting for its weights",
    FULL: "full",
    SUBSPACE: "AdamW in a d x d subspace of each linear weight",
}
"""What can be planned; ``zero-offload`` is its schedule on this engine, for comparison."""

FITTED_STEPS = 2
"""Of a fit in a dry run: memory does not grow after them, and the steady state has none."""


def settings_of(method: str) -> type[GradientSettings]:
    """The class of a method's settings."""
    return LSPSettings if method == SUBSPACE else FullSettings


def settings_for(method: str, given: GradientSettings) -> GradientSettings:
    """``given``; of another method's, what all methods have."""
    kind = settings_of(method)
    if isinstance(given, kind):
        return given
    return kind(**{field.name: getattr(given, field.name) for field in fields(GradientSettings)})


def method_for(settings: Any) -> Method:
    """The method that takes these settings."""
    if isinstance(settings, LSPSettings):
        return LSP(replace(settings, fit_steps=min(settings.fit_steps, FITTED_STEPS)))
    return Full(settings)
