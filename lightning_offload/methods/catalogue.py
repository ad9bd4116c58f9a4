"""The methods with gradients, by name: those of this package, and those that others have added."""

from __future__ import annotations

from lightning_offload.methods.full import Full
from lightning_offload.methods.lsp import LSP
from lightning_offload.methods.meft import MEFT
from lightning_offload.methods.method import Method
from lightning_offload.methods.settings import GradientSettings

CATALOGUE: dict[str, type[Method]] = {kind.name: kind for kind in (Full, LSP, MEFT)}
"""See the module docstring."""

_OTHERS = frozenset({"none", "zero-offload", "zo2"})


def check(kind: type[Method]) -> None:
    """Refuse what cannot be known by its name; another of one's own with that name is replaced.

    Raises:
        ValueError: It has no name of its own, or no settings.
    """
    for needed in ("name", "summary", "settings_type"):
        if needed not in vars(kind):
            raise ValueError(f"`{kind.__name__}` does not say its `{needed}`: add it to the class")
    if not issubclass(kind.settings_type, GradientSettings):
        raise ValueError(
            f"`{kind.__name__}.settings_type` is {kind.settings_type.__name__}, which does not derive from "
            "`GradientSettings`: make it a frozen dataclass that does"
        )
    known = CATALOGUE.get(kind.name)
    if kind.name in _OTHERS or (known is not None and known.__module__.startswith(__package__)):
        raise ValueError(f"`{kind.__name__}.name` is {kind.name!r}, which is a method of this package: choose another")
