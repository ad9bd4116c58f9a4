"""Buffers on the meta device that no file has (rotary frequencies, masks): made again where that is well defined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn


def fill(owner: nn.Module, name: str, values: Tensor) -> None:
    """Put values in the place of a buffer on the meta device, in its dtype."""
    before = owner._buffers[name]
    assert before is not None
    with torch.inference_mode(False), torch.no_grad():
        owner._buffers[name] = torch.empty(before.shape, dtype=before.dtype, device="cpu").copy_(values)


def remake_buffers(module: nn.Module) -> None:
    """Make buffers that no state dict has again, by the ``_init_weights`` of the transformers model around them.

    That is how ``from_pretrained`` itself makes them. Whether it did is seen from the values.

    Raises:
        MisconfigurationException: Nothing is known to make some of them; names them and the way out.
    """
    lost = [path for path, owner in module.named_modules() if any(_on_meta(owner)) and not _remade(module, path, owner)]
    if not lost:
        return
    names = [f"{path}.{name}".lstrip(".") for path in lost for name in _on_meta(module.get_submodule(path))]
    raise MisconfigurationException(
        f"`{type(module).__name__}` has {len(names)} buffers on the meta device that no file has and nothing is known "
        f"to make again ({', '.join(f'`{name}`' for name in names[:3])}). Make the module under "
        "`trainer.init_module(empty_init=True)` instead of `torch.device('meta')`: it leaves parameters alone without "
        "values."
    )


def _on_meta(owner: nn.Module) -> Iterator[str]:
    return (name for name, buffer in owner._buffers.items() if buffer is not None and buffer.is_meta)


def _remade(module: nn.Module, path: str, owner: nn.Module) -> bool:
    """Whether the model around has made all of them; else they are as they were."""
    make = _maker(module, path)
    if make is None or owner._parameters:  # which it would initialise too
        return False
    before = {name: owner._buffers[name] for name in _on_meta(owner)}
    for name, buffer in before.items():
        assert buffer is not None
        fill(owner, name, _mark(buffer.dtype))
    make(owner)
    if all(_is_written(owner._buffers[name]) for name in before):
        return True
    owner._buffers.update(before)
    return False


def _maker(module: nn.Module, path: str) -> Any:
    """The ``_init_weights`` of the innermost model around the module at ``path``."""
    parts = path.split(".")
    around = (module.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1))
    return next((model._init_weights for model in around if callable(getattr(model, "_init_weights", None))), None)


def _mark(dtype: torch.dtype) -> Tensor:
    """What no buffer holds."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.tensor(torch.nan, dtype=dtype)
    return torch.tensor(False) if dtype == torch.bool else torch.tensor(torch.iinfo(dtype).min, dtype=dtype)


def _is_written(buffer: Tensor | None) -> bool:
    """Not to be told of truth values, so never."""
    assert buffer is not None
    if buffer.dtype == torch.bool:
        return False
    mark = _mark(buffer.dtype)
    return not bool((buffer.isnan() if mark.is_floating_point() or mark.is_complex() else buffer == mark).any())
