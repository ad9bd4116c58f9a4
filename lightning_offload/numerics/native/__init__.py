"""Host loops in C++ that torch cannot express in one pass over memory; compiled when they are first asked for.

They change how long the host works, not what it computes: `Kernels` says which have the bits of their torch forms
(which are always there) and how near the others come.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lightning_offload.numerics.native.build import NotBuiltError, library
from lightning_offload.numerics.native.kernels import Kernels
from lightning_offload.numerics.native.proof import first_difference

__all__ = ["Kernels", "Native", "NotBuiltError", "load", "settle"]

Native = Literal["auto", "on", "off"]


@cache
def load() -> tuple[Kernels, str]:
    """The kernels, once per process, and where they come from in a sentence.

    Raises:
        NotBuiltError: They cannot be had here, with the reason; asked again, at once.
    """
    failed = _FAILED.get("reason")
    if failed is not None:
        raise NotBuiltError(failed)
    try:
        built, origin = library()
        kernels = Kernels(built)
        with _disable_current_modes(), torch.no_grad():  # fake tensors, and what others count
            difference = first_difference(kernels)
        if difference is not None:
            raise NotBuiltError(f"what was compiled does not compute what torch does ({difference})")
    except Exception as error:  # whatever it is, training goes on without them
        _FAILED["reason"] = str(error) if isinstance(error, NotBuiltError) else f"{type(error).__name__}: {error}"
        raise NotBuiltError(_FAILED["reason"]) from error
    return kernels, origin


_FAILED: dict[str, str] = {}
"""Why not, where nobody needs to try again in this process."""


def settle(native: Native) -> tuple[Literal["on", "off"], str]:
    """What ``native`` is on this machine, and why.

    Raises:
        NotBuiltError: ``"on"``, and they cannot be had.
    """
    if native == "off":
        return "off", "torch's own operations, as asked"
    try:
        return "on", load()[1]
    except NotBuiltError as error:
        if native == "on":
            raise NotBuiltError(f"native='on', but {error}; pass native='auto' to go on without them") from error
        return "off", f"{error}; torch's own operations do the same, slower"
