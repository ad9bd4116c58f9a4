"""Weights on the meta device that know where their values are, and take them when they are first needed.

An engine reads each weight once, as it makes its home. What is promised until then takes no memory, so that nothing is
held beside the homes but the one weight that is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PROMISE = "_offload_promise"

Read = Callable[[], Tensor]
"""The values, of the parameter's shape and of any floating-point dtype; read again if a first reading failed."""


def promise(parameter: nn.Parameter, read: Read) -> None:
    """Have a parameter on the meta device take its values from ``read`` when they are needed; the latest counts."""
    parameter.__dict__[_PROMISE] = read


def forget(parameter: nn.Parameter) -> None:
    """Take a promise back."""
    if is_promised(parameter):
        parameter.__dict__[_PROMISE] = None


def is_promised(parameter: nn.Parameter) -> bool:
    """Whether it is on the meta device and knows where its values are."""
    return parameter.is_meta and parameter.__dict__.get(_PROMISE) is not None


def was_promised(parameter: nn.Parameter) -> bool:
    """Whether it is, or has been, promised values."""
    return _PROMISE in parameter.__dict__


def bring(parameter: nn.Parameter) -> None:
    """Take what was promised into host memory, in the parameter's own dtype; the ``Parameter`` object stays.

    One that has values, or was promised none, is left as it is.
    """
    read = parameter.__dict__.get(_PROMISE)
    if read is None or not parameter.is_meta:
        return
    with torch.inference_mode(False), torch.no_grad():
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        values.copy_(read())
        made = nn.Parameter(values, requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__, **{_PROMISE: None})
    torch.utils.swap_tensors(parameter, made)  # optimizers and tied modules hold the object


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters of modules made in here have shapes alone; buffers have values, as no file may have them.

    Between ``nn.Parameter(...)`` and its registration there is memory for one parameter.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta and not nn.parameter.is_lazy(param):
            made = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            made.__dict__.update(param.__dict__)
            module._parameters[name] = made

    patched: Any = on_meta
    nn.Module.register_parameter = patched  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
