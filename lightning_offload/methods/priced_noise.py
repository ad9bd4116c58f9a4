"""The noise of ``zo2`` where nothing is real: what a perturbation and an update would take, without drawing it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_offload.memory.budget import Machine
from lightning_offload.methods.base import Rounding
from lightning_offload.methods.meter import Meter
from lightning_offload.methods.noises import PhiloxNoise
from lightning_offload.methods.steplog import Entry
from lightning_offload.methods.streaming import Leaf
from lightning_offload.methods.zo2 import ZO2Settings
from lightning_offload.numerics.noise import TILE

DRAWN_NS = {"popcount": 17.5, "gaussian": 11.0, "rademacher": 4.0}
"""Per element on a CPU, by torch's operations: one core of an AMD EPYC with AVX-512, as `bench.noise` prints it."""

ROUNDED_NS = 7.0
"""More of an update that rounds stochastically."""

PASSED_NS = 0.5
"""To read a weight and to write what comes of it."""

COMPILED_NS = ({"popcount": 1.7, "gaussian": 1.7, "rademacher": 0.1}, 0.6, 0.3)
"""The three by compiled kernels, on the same core."""


class PricedNoise(PhiloxNoise):
    """Philox noise as time and memory alone.

    On a GPU each is one pass of the fused kernel over device memory: the weight read, and written or its copy written
    (its arithmetic, some fifty integer operations an element, is not counted). On a CPU it is torch's operations, or
    compiled kernels, which have no temporaries.

    Args:
        settings: Of the method.
        rounding: Of updates.
        machine: What is imitated.
        spend: Told of the seconds that compute is busy.
        counting_as: Context in which memory is counted as what it says; ``None`` leaves memory and time out.
    """

    def __init__(
        self,
        settings: ZO2Settings,
        rounding: Rounding,
        machine: Machine,
        spend: Callable[[float], None],
        counting_as: Callable[[str | None], AbstractContextManager[object]],
    ) -> None:
        super().__init__(0, settings.eps, settings.distribution, rounding)
        assert machine.rates is not None
        self._rates, self._on_cpu = machine.rates, machine.device_type == "cpu"
        compiled = settings.kernels is not None
        self._has_temporaries = self._on_cpu and not compiled
        drawn, self._rounded_ns, self._passed_ns = COMPILED_NS if compiled else (DRAWN_NS, ROUNDED_NS, PASSED_NS)
        self._drawn_ns = drawn[settings.distribution]
        self._spend, self._counting_as = spend, counting_as
        self._workspaces: dict[Hashable, int] = {}

    def show(self, leaf: Leaf, weight: Tensor, out: Tensor, *, seed: int, step: int, direction: int, sign: int) -> None:
        """See ``Noise.show``."""
        how: Any = {"seed": seed, "step": step, "direction": direction, "sign": sign}
        self._use(
            (weight.dtype, out.dtype), weight, lambda part: super(PricedNoise, self).show(leaf, part, out[:TILE], **how)
        )
        self._pass(weight.numel(), weight.nbytes + out.nbytes, self._passed_ns + self._drawn_ns)

    def apply(self, leaf: Leaf, weight: Tensor, entries: Sequence[Entry]) -> None:
        """See ``Noise.apply``."""
        self._use(weight.dtype, weight, lambda part: super(PricedNoise, self).apply(leaf, part, entries[:1]))
        rounds = self._rounding == "stochastic" and weight.dtype != torch.float32
        each_ns = self._passed_ns + self._drawn_ns + self._rounded_ns * rounds
        self._pass(weight.numel(), 2 * weight.nbytes, each_ns * len(entries))

    def _pass(self, numel: int, nbytes: int, ns: float) -> None:
        """One pass over a weight, never less than a launch."""
        slow_s = 1e-9 * ns * numel if self._on_cpu else nbytes / self._rates.device_gb_per_s / 1e9
        self._spend(max(slow_s, 1e-6 * self._rates.op_us))

    def _use(self, key: Hashable, weight: Tensor, run: Callable[[Tensor], None]) -> None:
        """Take the memory of one tile's temporaries and give it back; the fused kernel has none."""
        if not self._has_temporaries:
            return
        size = min(weight.numel(), TILE)
        if (key, size) not in self._workspaces:
            with self._counting_as(None), Meter() as meter:
                run(weight[:size])
            self._workspaces[key, size] = meter.peak.bytes
        with self._counting_as("noise"):
            torch.empty(self._workspaces[key, size], dtype=torch.uint8)
