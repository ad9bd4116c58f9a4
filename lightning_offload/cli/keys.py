"""Misspelt keys are refused before anything is made, with the nearest that there is."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from difflib import get_close_matches

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lightning_offload.errors import OffloadError

_OBJECTS = ("callbacks", "logger")  # each of these is one
_BESIDE = {"model": ("lightning_offload.text.CausalLM",)}
"""What else may take the keys of a node: of a classifier, settings that only language models have are left out."""


def check_keys(cfg: DictConfig, at: str = "") -> None:
    """Refuse a key that nothing would read: one that no schema has, or no constructor.

    Raises:
        OffloadError: It names the key, and the nearest that is known.
    """
    known = _known(cfg, at)
    for name in map(str, cfg):
        key = f"{at}.{name}" if at else name
        if known is not None and name not in known and not name.startswith("_"):
            raise OffloadError(_unknown(cfg, at, key, name, known))
        if not OmegaConf.is_interpolation(cfg, name) and not OmegaConf.is_missing(cfg, name):
            node = cfg[name]
            if at in _OBJECTS and isinstance(node, DictConfig) and "_target_" not in node:
                raise OffloadError(f"{key} has no _target_, the class that it is{did_you_mean(name, {*cfg} - {name})}")
            if isinstance(node, DictConfig):
                check_keys(node, key)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'model'?)``; nothing where nothing is near."""
    nearest = get_close_matches(name, [*known], n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _unknown(cfg: DictConfig, at: str, key: str, name: str, known: set[str]) -> str:
    if "_target_" in cfg:
        return f"{at}: got an unexpected keyword argument {name!r}{did_you_mean(name, known)}"
    return f"no key {key!r}{did_you_mean(name, known)}; there are {', '.join(sorted(known))}"


def _known(cfg: DictConfig, at: str) -> set[str] | None:
    """The keys that a node may have; None where that is not known before it is made."""
    kind = OmegaConf.get_type(cfg)
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    if "_target_" not in cfg or OmegaConf.is_interpolation(cfg, "_target_"):
        return None
    known: set[str] = set()
    for target in (*_of_several(cfg._target_), *_BESIDE.get(at, ())):
        accepted = _accepted(target)
        if accepted is None:
            return None
        known |= accepted
    return known


def _of_several(target: str) -> tuple[str, ...]:
    """A strategy may still become that for several devices."""
    several = target.replace("OffloadStrategy", "OffloadDDPStrategy")
    return (target,) if several == target else (target, several)


def _accepted(target: str) -> set[str] | None:
    """Names of the parameters, those of base classes as far as arguments are passed on; None where there is no end."""
    try:
        made = get_object(target)
        parameters = inspect.signature(made).parameters
    except Exception:  # what cannot be found or read is refused when it is made, in its own words
        return None
    known = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    if len(known) == len(parameters):
        return known
    for base in made.__mro__ if isinstance(made, type) else ():
        if "__init__" in vars(base):
            own = inspect.signature(vars(base)["__init__"]).parameters
            known |= own.keys()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
                return known
    return None
