"""zo2: zeroth-order fine-tuning of weights that live in host memory, by forwards alone.

With noise z, drawn anew in every step and never stored::

    l+ = L(W + eps z),  l- = L(W - eps z)
    g  = (l+ - l-) / (2 eps)
    W <- W - lr (g z + wd W)                    when W is next on the device, in the step after

Both forwards pass each unit together, so that its weights cross the link once up and once down in a step. Sources:
MeZO (arXiv 2305.17333, Algorithm 1), ZO2 (arXiv 2503.12668). Differs from ZO2 in running the module's own code, in
one z per parameter object (tied weights), in evaluating and saving weights that are never a step behind, and in the
lr of the step that an update belongs to; ``noise="mezo"`` is MeZO bit for bit.

``eps``: epsilon; ``directions``: n of n-SPSA; the projected gradient is g, ``Entry.coefficient`` g / n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.methods.base import DTypes, Rounding
from lightning_offload.methods.settings import CommonSettings, pins, require, settle_native

Resident = Literal["auto"] | float | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class ZO2Settings(CommonSettings):
    """Settings of ``zo2``.

    Attributes:
        eps: How far weights are moved along z, to either side.
        directions: Draws of z per step, each with its own pair of forwards; the update is their mean.
        micro_batches: Parts of a batch that share one visit of the weights: less activation memory, the same traffic.
        noise: ``"philox"`` (every element of z on its own, from a counter; the same bits on any device) or ``"mezo"``
            (MeZO's own sequence and arithmetic, its drift in 16 bits included).
        distribution: Of philox noise: ``"popcount"`` (Gaussian to the eye, exact in 16 bits), ``"gaussian"`` or
            ``"rademacher"`` (+1 and -1).
        train_mode: Whether forwards of training drop out, with the same masks in all forwards of a step; MeZO does not.
        write_back_every: Steps between two copies of a unit's weights back to the host; updates between are redone.
        slots: Device buffers of the size of a unit: one for what forwards see, the others for units that come and go.
        prefetch: Units that come up ahead of the one that computes.
        resident: What stays on the device beside everything that is no block: ``"auto"`` is nothing, a number is GiB
            for as many blocks as fit in it, names are those of units.
        seed: Of philox noise; ``None`` is torch's initial seed.
        direction_ranks: Ranks among which the directions of a batch are shared out, where there are several; the
            groups of so many ranks see different batches.
    """

    eps: float = 1e-3
    directions: int = 1
    micro_batches: int = 1
    noise: Literal["philox", "mezo"] = "philox"
    distribution: Literal["popcount", "gaussian", "rademacher"] = "popcount"
    train_mode: bool = False
    write_back_every: int = 1
    slots: int = 3
    prefetch: int = 1
    resident: Resident = "auto"
    seed: int | None = None
    direction_ranks: int = 1

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the setting."""
        super().__post_init__()
        eps = self.eps
        finite = isinstance(eps, int | float) and not isinstance(eps, bool) and math.isfinite(eps)
        require(finite and eps > 0, "eps", eps, "a number > 0")
        for name in ("directions", "micro_batches", "write_back_every", "prefetch", "direction_ranks"):
            require(_whole(getattr(self, name), 1), name, getattr(self, name), "an integer >= 1")
        require(self.directions < 2**16, "directions", self.directions, "an integer <= 65535, as the log numbers them")
        require(
            _whole(self.slots, self.prefetch + 2),
            "slots",
            self.slots,
            f"an integer >= {self.prefetch + 2}: one for what forwards see, one for the unit that computes, "
            f"prefetch={self.prefetch} for those that come up",
        )
        require(self.noise in ("philox", "mezo"), "noise", self.noise, "'philox' or 'mezo'")
        kinds = ("popcount", "gaussian", "rademacher")
        require(self.distribution in kinds, "distribution", self.distribution, f"one of {', '.join(map(repr, kinds))}")
        require(isinstance(self.train_mode, bool), "train_mode", self.train_mode, "true or false")
        seed = self.seed is None or (_whole(self.seed, 0) and self.seed < 2**63)
        require(seed, "seed", self.seed, "an integer >= 0 and < 2**63, or None")
        self._check_resident()
        if self.directions % self.direction_ranks:
            raise ValueError(
                f"`direction_ranks={self.direction_ranks}` cannot share out `directions={self.directions}` evenly: "
                "pass a divisor of it"
            )
        if self.noise == "mezo" and self.directions > 1:
            raise ValueError(
                f"`noise='mezo'` has one direction per step, as MeZO has, got `directions={self.directions}`; "
                "pass noise='philox' for several"
            )

    def _check_resident(self) -> None:
        value = self.resident
        if isinstance(value, str) or not isinstance(value, Sequence):
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            require(value == "auto" or number, "resident", value, "'auto', a number of GiB >= 0, or a list of names")
        else:
            require(all(isinstance(v, str) for v in value), "resident", value, "a list of names of units")


class ZO2:
    """The method ``zo2``."""

    name: ClassVar[str] = "zo2"
    summary: ClassVar[str] = "forwards alone, weights in host memory"

    def __init__(self, settings: ZO2Settings) -> None:
        self.settings = settings

    @property
    def rounding(self) -> Rounding:
        """How 16-bit weights take a finer step, unless the user says otherwise: MeZO rounds to nearest."""
        return "nearest" if self.settings.noise == "mezo" else "stochastic"

    def resolve(
        self,
        units: Sequence[Unit],
        machine: Machine,
        dtypes: DTypes,
        *,
        before: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Replace every ``"auto"`` in the settings; returns the reasons, a sentence each.

        Args:
            units: The model's.
            machine: What there is.
            dtypes: Which dtype lives where.
            before: What the run that is continued had chosen, of the settings that decide the bits of a step.

        Raises:
            ValueError: ``resident`` names a unit that there is not.
        """
        settings, reasons = self.settings, []
        if settings.pin_memory == "auto":
            pin, reason = pins(machine)
            settings = replace(settings, pin_memory=pin)
            reasons.append(f"pin_memory={pin}: {reason}")
        if settings.host_threads == "auto":  # copies alone: nothing is computed there
            settings = replace(settings, host_threads=1)
        settings, reason = settle_native(settings)
        reasons.append(reason)
        if settings.seed is None:
            seed = int(before["seed"]) if before and "seed" in before else torch.initial_seed() % 2**63
            settings = replace(settings, seed=seed)
        self.settings = settings
        chosen = resident_units(units, settings, dtypes)
        streamed = [unit for unit in units if unit.index not in chosen]
        numel = sum(unit.numel for unit in streamed)
        reasons.append(
            f"streams {len(streamed)} of {len(units)} units ({numel:,} of {sum(u.numel for u in units):,} parameters) "
            f"through {min(settings.slots - 1, len(streamed))} slots; the others stay on the device"
        )
        return reasons

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the bits of a step; a checkpoint keeps them."""
        names = ("eps", "directions", "noise", "distribution", "seed", "train_mode")
        return {name: getattr(self.settings, name) for name in names}


def resident_units(units: Sequence[Unit], settings: ZO2Settings, dtypes: DTypes) -> set[int]:
    """Indices of the units that stay on the device: what is no block, what is small, and what ``resident`` says.

    Raises:
        ValueError: A name of no unit.
    """
    resident = settings.resident
    chosen = {unit.index for unit in units if not unit.is_block or unit.numel < settings.min_numel}
    if not any(unit.is_block for unit in units):  # then every module that owns parameters moves by itself
        chosen = {unit.index for unit in units if unit.numel < settings.min_numel}
    if isinstance(resident, str):
        return chosen
    if isinstance(resident, Sequence):
        index = {unit.name: unit.index for unit in units}
        unknown = [name for name in resident if name not in index]
        if unknown:
            raise ValueError(f"`resident` names {unknown[0]!r}, which is no unit; units: {', '.join(index)}")
        return chosen | {index[name] for name in resident}
    left = int(resident * GIB)
    for unit in reversed(units):  # the last ones: their updates are the freshest when the next step begins
        size = sum(p.numel() * stored_dtype(p, dtypes).itemsize for p in unit.parameters.values())
        if unit.index not in chosen and size <= left:
            chosen.add(unit.index)
            left -= size
    return chosen


def stored_dtype(parameter: torch.nn.Parameter, dtypes: DTypes) -> torch.dtype:
    """In which a weight is kept, and crosses the link."""
    if not parameter.is_floating_point():
        return parameter.dtype
    return dtypes.wire or dtypes.compute or parameter.dtype


def compute_dtype(parameter: torch.nn.Parameter, dtypes: DTypes) -> torch.dtype:
    """In which forwards see it."""
    return (dtypes.compute or parameter.dtype) if parameter.is_floating_point() else parameter.dtype


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
