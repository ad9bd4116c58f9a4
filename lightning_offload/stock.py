"""The transformers model in a module, and the one that it was before anything was put on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_COMPILED = "_orig_mod."


def is_stock(part: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    kind = type(part)
    return all(hasattr(kind, name) for name in ("save_pretrained", "get_input_embeddings")) and hasattr(part, "config")


def stock_model(module: nn.Module) -> Any:
    """The one model of transformers in ``module``: itself, at ``.network``, or anywhere else.

    Raises:
        TypeError: There is none, or several beside each other.
    """
    named = getattr(module, "network", None)
    found = [named] if isinstance(named, nn.Module) and is_stock(named) else list(_outermost(module))
    kind = type(module).__name__
    if not found:
        raise TypeError(f"`export_to_hf` needs a transformers model, or a module with one in it; got {kind}")
    if len(found) > 1:
        kinds = " and ".join(type(one).__name__ for one in found)
        raise TypeError(f"this {kind} has several transformers models ({kinds}): give the one that is meant")
    return found[0]


def stock_parts(network: nn.Module) -> dict[str, nn.Module]:
    """Modules of ``network`` by the names that they have in a model on which nothing was put.

    Adapters of PEFT stand in the place of what they are beside.
    """
    named = {name.replace(_COMPILED, ""): part for name, part in network.named_modules(remove_duplicate=False)}
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): part
        for name, part in sorted(named.items(), key=lambda item: len(item[0]))
    }


def is_wrapped(network: nn.Module) -> bool:
    """Whether parts of it were compiled in their place, which shows in the names of weights."""
    return any(_COMPILED in name for name, _ in network.named_modules())


def bare(network: Any) -> Any:
    """A model of the same class and shape that shares all weights but those of adapters; all of them frozen."""
    with torch.device("meta"):
        made = type(network)(copy.deepcopy(network.config))
    parts, seen = stock_parts(network), dict[int, nn.Parameter]()
    for path, part in made.named_modules(remove_duplicate=False):
        source = parts[path]
        for name in part._parameters:
            part._parameters[name] = _frozen(source._parameters[name], seen)
        for name in part._buffers:
            part._buffers[name] = source._buffers[name]
    for name in ("generation_config", "_weight_conversions"):
        if hasattr(network, name):
            setattr(made, name, getattr(network, name))
    return made.train(network.training)


def _frozen(parameter: nn.Parameter | None, seen: dict[int, nn.Parameter]) -> nn.Parameter | None:
    """What loads adapters also freezes; that is not to reach the parameters of a model that goes on being trained."""
    if parameter is None:
        return None
    return seen.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if is_stock(module):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)
