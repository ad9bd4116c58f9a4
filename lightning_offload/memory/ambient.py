"""What torch keeps per thread and a function may depend on: taken on one thread, set on another."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


@dataclass(frozen=True)
class Ambient:
    """State of the thread that called ``capture``.

    Modes are carried as objects, without ``__enter__``: what they count or record goes on counting.

    Attributes:
        inference: Whether inference mode is on.
        grad: Whether gradients are recorded.
        autocast: Device type, whether autocast is on, and its dtype.
        autocast_cache: Whether autocast keeps the casts of weights.
        dispatch_modes: Active ``TorchDispatchMode``s, outermost first.
        function_modes: Active ``TorchFunctionMode``s, outermost first (``torch.set_default_device`` is one).
        threads: OpenMP's number of threads, on which the bits of a sum depend.
        flushes_denormals: Whether the processor rounds denormal numbers to zero.
        cuda: Current CUDA device and stream, once CUDA is initialised.
    """

    inference: bool
    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    dispatch_modes: tuple[Any, ...]
    function_modes: tuple[Any, ...]
    threads: int
    flushes_denormals: bool
    cuda: tuple[int, torch.cuda.Stream] | None

    @classmethod
    def capture(cls) -> Ambient:
        """The state of the calling thread."""
        on_cuda = torch.cuda.is_initialized()
        return cls(
            inference=torch.is_inference_mode_enabled(),
            grad=torch.is_grad_enabled(),
            autocast=tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _device_types()),
            autocast_cache=torch.is_autocast_cache_enabled(),
            dispatch_modes=tuple(_get_current_dispatch_mode_stack()),
            function_modes=tuple(_get_current_function_mode_stack()),
            threads=torch.get_num_threads(),
            flushes_denormals=_flushes_denormals(),
            cuda=(torch.cuda.current_device(), torch.cuda.current_stream()) if on_cuda else None,
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Set on a thread that does nothing else; what the next entry sets anyway is not taken back."""
        self._set_flags()
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            for mode in self.function_modes:
                torch._C._push_on_torch_function_stack(mode)
            for mode in self.dispatch_modes:
                torch._C._push_on_torch_dispatch_stack(mode)
            try:
                yield
            finally:
                for mode in reversed(self.dispatch_modes):
                    torch._C._pop_torch_dispatch_stack(getattr(mode, "_mode_key", None))
                for _ in self.function_modes:
                    torch._C._pop_torch_function_stack()

    def _set_flags(self) -> None:
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        if _flushes_denormals() != self.flushes_denormals:
            torch.set_flush_denormal(self.flushes_denormals)
        if self.cuda is not None:
            torch.cuda.set_device(self.cuda[0])
            torch.cuda.set_stream(self.cuda[1])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of ``dtype`` unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _device_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return sorted({"cpu", "cuda", *([] if accelerator is None else [accelerator.type])})


def _flushes_denormals() -> bool:
    smallest = sys.float_info.min  # torch has a setter only
    return smallest / 2 == 0
