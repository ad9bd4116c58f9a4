"""How large a subspace may be so that its traffic hides under backward: ``dim="auto"`` of ``lsp``."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from lightning_offload.memory.budget import Machine
from lightning_offload.memory.rates import Rates
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.homes import weight_dtype
from lightning_offload.methods.part import CAST_BYTES

MOST, STEP = 0.5, 1 / 32
"""A fraction beyond a half moves more and learns little more; a finer step changes nothing."""


def host_step_bytes(gradient_itemsize: int, wire_itemsize: int, *, fused: bool) -> int:
    """Host memory traffic of an element's step: gradient read, fp32 moments read and written, delta written; casts."""
    casts = wire_itemsize == 2 and not fused
    return gradient_itemsize + 16 + wire_itemsize + CAST_BYTES * casts


def largest_hidden_dim(
    weights: Mapping[str, nn.Parameter], machine: Machine, dtypes: DTypes, tokens: int, *, fused: bool
) -> tuple[float, str]:
    """The largest fraction d / min(m, n) at which link and host keep up with backward, and the reason.

    ``sum d^2 <= t_backward min(link bytes/s / wire bytes, host bytes/s / step bytes)``, with ``t_backward`` the FLOPs
    of both products of the weights' backward at the device's rate. The paper asks for the same in words ("d as large
    as communication hiding allows").

    Args:
        weights: Those to be projected, by name.
        machine: Without rates it is measured.
        dtypes: Which dtype lives where.
        tokens: Of one micro-batch.
        fused: Whether the host has compiled kernels.
    """
    if machine.device_type == "cpu" or not weights:
        return MOST, "device and host are one memory"
    rates = machine.rates or Rates.cached(machine)
    parameters = list(weights.values())
    wire = max(weight_dtype(p, dtypes).itemsize for p in parameters)
    tflops = rates.bf16_tflops if wire == 2 else rates.fp32_tflops
    backward_s = 4 * sum(p.numel() for p in parameters) * tokens / (1e12 * tflops)
    link = 1e9 * min(rates.h2d_gb_per_s, rates.d2h_gb_per_s) * rates.duplex / wire
    host = 1e9 * rates.host_gb_per_s / host_step_bytes(wire, wire, fused=fused)
    whole = sum(min(p.shape) ** 2 for p in parameters)
    fraction = min(math.sqrt(backward_s * min(link, host) / whole), MOST)
    fraction = max(math.floor(fraction / STEP), 1) * STEP
    slower = "the link" if link < host else "the host"
    return fraction, f"largest up to {MOST} that {slower} hides under the backward of {tokens:,} tokens"
