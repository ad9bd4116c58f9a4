"""Counts what runs: FLOPs and bytes of every operation, and the memory that is alive, by what it holds.

It sees operations as torch dispatches them, so it counts a run on fake tensors and a real one alike.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

Allocation = tuple[int, int]
"""A number that names a piece of memory, and its bytes when it is taken; 0 when it is given back."""


class Work(NamedTuple):
    """One operation: floating-point operations, bytes read and written, whether it computes in 16 bits."""

    flops: int
    bytes: int
    narrow: bool


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory was alive: all of it in bytes, and by what it held."""

    bytes: int = 0
    kinds: tuple[tuple[str, int], ...] = ()


class Meter(TorchDispatchMode):
    """See the module docstring; nothing outside the mode is seen, so ``hold`` what was there before.

    Attributes:
        kind: What new memory is counted as.
        on_work: Told of every operation that takes time.
        flops: Floating-point operations so far.
        peak: The moment of most memory so far.
        allocations: What was taken and given back, in order; for ``memory.allocator.replay``.
    """

    def __init__(self, on_work: Callable[[Work], None] | None = None) -> None:
        super().__init__()
        self.kind = "activations"
        self.on_work = on_work
        self.flops = 0
        self.peak = Peak()
        self.allocations: list[Allocation] = []
        self._held: dict[int, _Held] = {}
        self._live: Counter[str] = Counter()
        self._total = 0
        self._count = 0
        self._paused = False

    @contextmanager
    def counting_as(self, kind: str | None) -> Iterator[None]:
        """What is made inside is of ``kind``; ``None``: neither its memory nor its time counts."""
        before = self.kind, self._paused
        self.kind, self._paused = kind or self.kind, kind is None
        try:
            yield
        finally:
            self.kind, self._paused = before

    def hold(self, tensor: Tensor, kind: str) -> None:
        """Count memory as ``kind``, from now on where it is counted already."""
        storage = tensor.untyped_storage()
        held = self._held.get(storage._cdata)
        if held is None:
            self._take(storage, kind)
        else:
            self._live[held.kind] -= held.bytes
            self._live[kind] += held.bytes
            held.kind = kind

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._counted(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _counted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = self._run(func, args, kwargs)
        if self._paused or func.is_view or func is torch.ops.prim.device.default:  # how a fake tensor answers `.device`
            return result
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        given = {tensor.untyped_storage()._cdata for tensor in inputs}  # in place, `out=`: there before, counted or not
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._held:
                self._take(storage, self.kind)
        if func not in _FREE:
            self._count_work(func, args, kwargs, result, inputs, outputs)
        return result

    def _count_work(
        self, func: Any, args: Any, kwargs: Any, result: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        formula = _FLOPS.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
        self.flops += flops
        if self.on_work is not None:
            if "out" in kwargs:  # written, not read
                inputs = _tensors((args, {**kwargs, "out": None}))
            deciding = inputs if func in _WIDENING else outputs
            narrow = bool(deciding) and deciding[0].dtype in (torch.bfloat16, torch.float16)
            written = outputs or _written(func, args, kwargs)
            self.on_work(Work(flops, _traffic(func, inputs, written), narrow))

    def _take(self, storage: torch.UntypedStorage, kind: str) -> None:
        size = storage.nbytes()
        if not size:
            return
        key = storage._cdata
        self._count += 1
        self._held[key] = _Held(self._count, size, kind, weakref.ref(storage, lambda _: self._give_back(key)))
        self.allocations.append((self._count, size))
        self._live[kind] += size
        self._total += size
        self._note_peak()

    def _give_back(self, key: int) -> None:
        held = self._held.pop(key)
        self.allocations.append((held.number, 0))
        self._live[held.kind] -= held.bytes
        self._total -= held.bytes

    def _note_peak(self) -> None:
        if self._total > self.peak.bytes:
            self.peak = Peak(self._total, tuple(self._live.items()))


@dataclass
class _Held:
    number: int
    bytes: int
    kind: str
    storage: weakref.ref[torch.UntypedStorage]


def seconds(work: Work, *, wide_flops: float, narrow_flops: float, bytes_per_s: float, least_s: float) -> float:
    """What one operation takes: its FLOPs or its bytes, whichever is slower, and never less than a launch.

    Args:
        work: The operation.
        wide_flops: FLOPs per second in fp32.
        narrow_flops: FLOPs per second in 16 bits.
        bytes_per_s: Rate of device memory.
        least_s: Time from one launch to the next.
    """
    return max(work.flops / (narrow_flops if work.narrow else wide_flops), work.bytes / bytes_per_s, least_s)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operation that returns nothing writes: the lists of a fused optimizer."""
    declared = func._schema.arguments
    given = {argument.name: value for argument, value in zip(declared, args, strict=False)} | kwargs
    names = {at.name for at in declared if at.alias_info is not None and at.alias_info.is_write}
    return _tensors([given.get(name) for name in names - {"grads"}])  # those are written under a gradient scaler only


def _traffic(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes read and written; a look-up reads no more than it gives."""
    written = sum(map(_nbytes, outputs))
    if func._overloadpacket in _LOOKUPS:
        return 2 * written
    if func._overloadpacket in _OVERWRITES:
        inputs = inputs[1:]
    return written + sum(map(_nbytes, inputs))


def _nbytes(tensor: Tensor) -> int:
    """Bytes of the elements, those of an expanded tensor once."""
    own = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return own * tensor.element_size() if tensor.numel() else 0


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Scores, and values by scores; whole where the mask is causal, as torch counts its other kernels."""
    return 2 * _scores(query, key) * int(query.shape[-1] + value.shape[-1])


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Scores again, then the gradients of scores, values, queries and keys."""
    return 2 * _scores(query, key) * int(3 * query.shape[-1] + 2 * value.shape[-1])


def _scores(query: Any, key: Any) -> int:
    """Batch x query heads (keys may have fewer) x positions x positions."""
    return int(query.shape[:-1].numel()) * int(key.shape[-2])


def _grouped_mm(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Tokens by groups (2-D times 3-D), or the weights' gradients (2-D times 2-D): each token meets one group."""
    return 2 * int(a.shape[-2]) * int(a.shape[-1]) * int(b.shape[-1])


_FLOPS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    aten._grouped_mm: _grouped_mm,
}
"""torch's formulas, and those of two kernels that it lacks."""

_FREE = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten._local_scalar_dense.default,
}
"""Not views, and yet no kernel runs."""

_WIDENING = {aten.mm.dtype, aten.mm.dtype_out}
"""Products of 16-bit operands, summed and given in fp32."""

_LOOKUPS = {aten.embedding, aten.index, aten.gather, aten.index_select}
_OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.random_}
