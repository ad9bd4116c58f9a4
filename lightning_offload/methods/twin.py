"""A fake twin of a module: the same code on tensors that have a shape and no memory.

``deepcopy`` with every parameter and buffer replaced by a fake one; a 175B model takes seconds and megabytes. What a
real run would decide by looking at values is answered here, and noted, for a real run waits for the device there.
"""

from __future__ import annotations

import copy
import random
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_map

from lightning_offload.errors import OffloadError
from lightning_offload.memory.ambient import default_dtype
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.meter import Meter

Step = Callable[[nn.Module, Any], Tensor]
"""The loss of one micro-batch: ``step(module, batch)``."""

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default


class TwinError(OffloadError):
    """A model whose step cannot be run on fake tensors; names the operation and what to pass instead."""


@dataclass(frozen=True)
class HostRead:
    """A place where a real run waits for a value of the device.

    Attributes:
        what: The operation.
        where: ``file:line`` in the model's code.
        answer: What the dry run took instead.
    """

    what: str
    where: str
    answer: str


class TwinMeter(Meter):
    """A meter that answers questions about values: no padding, every mask full, no upper bound reached."""

    def __init__(self, on_work: Any = None) -> None:
        super().__init__(on_work)
        self.reads: dict[HostRead, int] = {}
        self._doubts: set[int] = set()  # storages of single truth values that ask for what is wrong

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # autograd asks before most operations
            return args[0].fake_device
        if func in _INDEXED:
            args = (args[0], _without_masks(args[1]), *args[2:])
        answer = _ANSWERS.get(func)
        if answer is None or not isinstance(args[0], Tensor):
            made = self._counted(func, args, kwargs or {})
            if isinstance(made, Tensor) and made.dtype is torch.bool and made.numel() == 1:
                self._doubt(func, args, made)
            return made
        value = answer(*args, **(kwargs or {}))
        if value is True and args[0].untyped_storage()._cdata in self._doubts:
            value = False
        shown = f"{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        read = HostRead(func._overloadpacket.__name__.lstrip("_"), _model_line(), shown)
        self.reads[read] = self.reads.get(read, 0) + 1
        return value

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shapes that a kernel in C++ knows are asked there: the fake mode's own cache takes three times as long."""
        if func in _IN_CPP and not kwargs and all(_is_plain(arg) for arg in args if isinstance(arg, Tensor)):
            with in_kernel_invocation_manager(args[0].fake_mode):
                made = func(*args)
            return FakeTensor(args[0].fake_mode, made, args[0].fake_device)
        return func(*args, **kwargs)

    def _doubt(self, func: Any, args: tuple[Any, ...], made: Tensor) -> None:
        """Remember what asks whether something is wrong: ``any``, ``isnan``, ``isinf``; it is not."""
        differs_from_itself = func is aten.ne.Tensor and args[0] is args[1]  # how torch spells isnan
        key = made.untyped_storage()._cdata
        if differs_from_itself or func._overloadpacket in (aten.any, aten.isnan, aten.isinf):
            self._doubts.add(key)
        else:
            self._doubts.discard(key)


def _is_plain(tensor: Tensor) -> bool:
    """Fake, on the CPU, and without a value that would have to be carried along."""
    return type(tensor) is FakeTensor and tensor.constant is None and tensor.fake_device == _CPU


_CPU = torch.device("cpu")

_IN_CPP = {
    aten.detach.default,
    aten.expand.default,
    aten.mm.default,
    aten.slice.Tensor,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.view.dtype,
    aten._unsafe_view.default,
}
"""The most frequent operations of which shape, strides and dtype are known without Python."""


def _without_masks(indices: Any) -> list[Any]:
    """Masks as the positions they select: at most all of them."""
    plain: list[Any] = []
    for index in indices:
        mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        plain += list(_nonzero(index).unbind(1)) if mask else [index]
    return plain


def _scalar(tensor: Tensor) -> bool | int | float:
    """``.all()`` of a mask: nothing is padded; a count or a position: one."""
    return True if tensor.dtype is torch.bool else 1.0 if tensor.is_floating_point() else 1


def _nonzero(tensor: Tensor) -> Tensor:
    """At most every element."""
    return torch.empty(tensor.numel(), tensor.dim(), dtype=torch.int64, device=tensor.device)


def _masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    return torch.empty(torch.broadcast_shapes(tensor.shape, mask.shape), dtype=tensor.dtype).flatten()


_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten.equal.default: lambda *_: True,
}


_INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
"""Their second argument may hold masks, of which nobody knows how much they select."""


class Twin:
    """See the module docstring.

    Attributes:
        module: The twin; parameters and buffers have the dtype they would compute in.
        mode: The fake mode everything of the twin must run in.
        names: Full name of every parameter.

    Args:
        module: The original, on any device, ``meta`` included; it is not touched.
        compute: dtype of floating-point weights and persistent buffers; ``None`` leaves each as it is.

    Raises:
        TwinError: The module cannot be copied.
    """

    def __init__(self, module: nn.Module, compute: torch.dtype | None = None) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        memo: dict[int, Any] = {}
        with self.mode:
            for parameter in module.parameters():
                data = torch.empty(parameter.shape, dtype=_dtype(parameter, compute), device="cpu")
                memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            for owner in module.modules():
                for name, buffer in owner._buffers.items():
                    if buffer is not None and id(buffer) not in memo:
                        kept = None if name in owner._non_persistent_buffers_set else compute
                        memo[id(buffer)] = torch.empty(buffer.shape, dtype=_dtype(buffer, kept), device="cpu")
        self._of = {id(parameter): memo[id(parameter)] for parameter in module.parameters()}
        try:
            self.module = copy.deepcopy(module, memo)
        except Exception as error:
            raise TwinError(
                f"{type(module).__name__} cannot be planned, because it cannot be copied (copy.deepcopy: {error}). "
                "Define `__deepcopy__` or `__getstate__` on the part that cannot, or make it after the plan."
            ) from error
        for part in self.module.modules():
            _mute(part)
        self.names = {id(parameter): name for name, parameter in self.module.named_parameters()}

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The same optimizer, without state, over the twin's parameters."""
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        twin.param_groups = [
            {**group, "params": [self._of[id(p)] for p in group["params"]]} for group in optimizer.param_groups
        ]
        return twin

    def batch(self, batch: Any, compute: torch.dtype | None = None) -> Any:
        """The batch without its values; floating-point inputs in ``compute``."""
        with self.mode:
            return tree_map(
                lambda x: torch.empty(x.shape, dtype=_dtype(x, compute)) if isinstance(x, Tensor) else x, batch
            )


@contextmanager
def pretending() -> Iterator[None]:
    """Around all that runs on a twin: its path is that of a real run, and the process is as before afterwards.

    transformers asks whether a mask is fake and then builds masks (and copies of keys and values) that a real run does
    not build.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        helpers = sys.modules.get("transformers.utils.import_utils")
        if helpers is not None and hasattr(helpers, "is_fake_tensor"):
            stack.callback(setattr, helpers, "is_fake_tensor", helpers.is_fake_tensor)
            setattr(helpers, "is_fake_tensor", lambda _: False)  # noqa: B010
        yield


def forward_context(precision: str) -> Callable[[], AbstractContextManager[None]]:
    """What Lightning runs a forward in under ``precision``."""
    if precision == "bf16-mixed":
        return lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # as Lightning: casts are not kept
    narrow = DTypes.of(precision).compute
    return nullcontext if narrow is None else partial(default_dtype, narrow)


@contextmanager
def explaining(what: str, way_out: str) -> Iterator[None]:
    """Turn what goes wrong on fake tensors into an error that says where, and what to do instead."""
    try:
        yield
    except OffloadError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TwinError(
            f"{what} cannot be planned: it does not run on tensors without values ({_line_of(error)}: {said}). "
            f"{way_out}"
        ) from error


def _dtype(tensor: Tensor, compute: torch.dtype | None) -> torch.dtype:
    return compute if compute is not None and tensor.is_floating_point() else tensor.dtype


def _mute(module: nn.Module) -> None:
    """No logging, no metrics: they look at values, and would land in the real run's logs."""
    if any(base.__module__.partition(".")[0] == "torchmetrics" for base in type(module).__mro__):
        for name in ("forward", "update", "compute", "reset"):
            setattr(module, name, lambda *_, **__: torch.zeros(()))
    for name in ("log", "log_dict", "print"):
        if callable(getattr(module, name, None)) and hasattr(module, "log_dict"):
            setattr(module, name, lambda *_, **__: None)


_OURS = ("/torch/", "/lightning/", "/pytorch_lightning/", "/lightning_offload/methods/", "/lightning_offload/memory/")


def _model_line() -> str:
    """The line of the model (or of a library it calls) that asked."""
    frames = traceback.extract_stack()[:-2]
    return _place(frames)


def _line_of(error: BaseException) -> str:
    return _place(traceback.extract_tb(error.__traceback__))


def _place(frames: Any) -> str:
    for frame in reversed(frames):
        path = frame.filename.replace("\\", "/")
        if not any(part in path for part in _OURS):
            return f"{'/'.join(path.split('/')[-2:])}:{frame.lineno}"
    return "?"
