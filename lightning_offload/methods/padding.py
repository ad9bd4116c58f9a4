"""Which tokens of a forward are padding, as the modules outside the blocks are told: ``attention_mask``, (B, L)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, eq=False)
class Padding:
    """The padded tokens of a call, all T of them in a row.

    Attributes:
        padded: (T,) bool.
        kept: Places of the others, int64.
    """

    padded: Tensor
    kept: Tensor


class Forwards:
    """Follows the calls of modules around the blocks; the innermost that is given a mask, or None as one, decides.

    So an encoder's mask does not reach the decoder. Masks that are not (B, L) of integers or bools are ignored.
    """

    def __init__(self) -> None:
        self.with_backward = False
        self._calls: list[tuple[nn.Module, _Mask | None]] = []  # going on, outermost first

    def watch(self, modules: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Hooks for these modules."""
        handles = []
        for module in modules:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        return handles

    def padding(self, x: Tensor) -> Padding | None:
        """Of a network's input, (B, L', d) or (B L', d), by the last L' columns; None where nothing is padded or said.

        L' is less than L in generation with a cache.
        """
        mask = self._calls[-1][1] if self._calls else None
        return None if mask is None else mask.padding(x)

    @property
    def backward_follows(self) -> bool:
        """Whether the forward that goes on is differentiated, be it through a checkpoint that turns gradients off."""
        return torch.is_grad_enabled() or (bool(self._calls) and self.with_backward)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        modules = [called for called, _ in self._calls]
        if module in modules:  # an interrupt kept it from leaving
            del self._calls[modules.index(module) :]
        if not self._calls:
            self.with_backward = torch.is_grad_enabled()
        mask = self._calls[-1][1] if self._calls else None
        given = _given(module, args, kwargs)
        if given is None:
            mask = None
        elif isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point():
            mask = mask if mask is not None and mask.mask is given else _Mask(given)
        self._calls.append((module, mask))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self._calls and self._calls.pop()[0] is not module:
            pass

    def __getstate__(self) -> dict[str, Any]:
        return {"with_backward": False, "_calls": []}


@dataclass(frozen=True, eq=False)
class _Mask:
    """(B, L), and what was found out for every length: all layers share one wait for the device."""

    mask: Tensor
    known: dict[int, Padding | None] = field(default_factory=dict)

    def padding(self, x: Tensor) -> Padding | None:
        batch, longest = self.mask.shape
        length, rest = divmod(x.numel() // x.shape[-1], max(batch, 1))
        if rest or not 0 < length <= longest or x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[0] != batch):
            return None
        if length not in self.known:
            attended = self.mask[:, longest - length :].flatten().bool().to(x.device)
            kept = attended.nonzero().flatten()
            self.known[length] = Padding(~attended, kept) if len(kept) < len(attended) else None
        return self.known[length]


_NOT_GIVEN = object()


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The ``attention_mask`` of a call."""
    if "attention_mask" in kwargs or not args:
        return kwargs.get("attention_mask", _NOT_GIVEN)
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    return args[names.index("attention_mask")] if "attention_mask" in names else _NOT_GIVEN
