"""Machines to plan for that need not be here."""

from __future__ import annotations

from typing import Any

from lightning_offload.memory.budget import Machine
from lightning_offload.memory.rates import Rates

RATES: dict[str, float] = {
    "fp32_tflops": 50,
    "bf16_tflops": 150,
    "device_gb_per_s": 850,
    "h2d_gb_per_s": 25,
    "d2h_gb_per_s": 25,
    "duplex": 1.0,
    "pageable_gb_per_s": 8,
    "host_gb_per_s": 75,
    "op_us": 5,
}


def gpu(device_gib: float = 24, host_gib: float = 256, **rates: float) -> Machine:
    return Machine.described(
        name="a gpu", device_type="cuda", device_gib=device_gib, host_gib=host_gib, cores=16, rates=_rates(rates)
    )


def cpu(host_gib: float = 16, **rates: float) -> Machine:
    return Machine.described(name="a cpu", device_type="cpu", host_gib=host_gib, cores=4, rates=_rates(rates))


def _rates(changed: dict[str, Any]) -> Rates:
    return Rates(**{**RATES, **changed})
