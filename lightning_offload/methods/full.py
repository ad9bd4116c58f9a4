"""full: exact AdamW, offloaded. What every other method is judged by, and the safe default.

``W <- AdamW(W, G)`` as ``torch.optim.AdamW(fused=True)`` does it, on fp32 masters, with the state, the masters and
the arithmetic on the host. Gradients go down during backward; once the last norm is known the host steps, lowest
unit first, and each unit's new weights go up; the next forward waits per unit, for its own arrival only. Source:
ZeRO-Offload (arXiv 2101.06840); differs from it in overlapping the host step with the next forward without ever
using a stale weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.methods.base import CommonSettings, DTypes, require
from lightning_offload.methods.homes import weight_dtype


@dataclass(frozen=True, kw_only=True)
class FullSettings(CommonSettings):
    """Settings of ``full``.

    Attributes:
        accumulate: Where micro-batches accumulate: ``"device"`` (in ``p.grad``, one link transfer per step), ``"host"``
            (in fp32, one transfer per micro-batch, 4 more host bytes per parameter), or ``"auto"``: on the device if
            its gradients fit.
    """

    accumulate: Literal["auto", "device", "host"] = "auto"

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the setting."""
        super().__post_init__()
        choices = ("auto", "device", "host")
        require(self.accumulate in choices, "accumulate", self.accumulate, "'auto', 'device' or 'host'")


class Full:
    """The method ``full``: claims every trained parameter that is worth moving."""

    name = "full"

    def __init__(self, settings: FullSettings) -> None:
        self.settings = settings

    def claims(self, name: str, parameter: nn.Parameter, unit: Unit) -> bool:
        """Whether the host steps this parameter; the rest stay on the device."""
        return parameter.numel() >= self.settings.min_numel

    def resolve(
        self,
        units: Sequence[Unit],
        machine: Machine,
        dtypes: DTypes,
        *,
        accumulates: bool,
        before: Mapping[str, Any] | None = None,
    ) -> tuple[FullSettings, list[str]]:
        """Replace every ``"auto"``; also the reasons, a sentence each.

        Args:
            units: The model's.
            machine: What there is.
            dtypes: Which dtype lives where.
            accumulates: Whether a step has more than one micro-batch.
            before: What the run that is continued had chosen, of the settings that decide the bits of a step.
        """
        settings, reasons = self.settings, []
        if settings.accumulate == "auto":
            where, reason = _where_to_accumulate(units, machine, dtypes, accumulates=accumulates)
            if before and before.get("accumulate") in ("device", "host"):
                where, reason = before["accumulate"], "as in the run that is continued"
            settings = replace(settings, accumulate=where)
            reasons.append(f"accumulate={where!r}: {reason}")
        if settings.pin_memory == "auto":
            pin = machine.device_type == "cuda"
            why = f"{machine.lockable_bytes / GIB:.1f} GiB can be page-locked ({machine.lockable_limit})"
            settings = replace(settings, pin_memory=pin)
            reasons.append(f"pin_memory={pin}: {why if pin else 'device and host are one memory'}")
        if settings.host_threads == "auto":
            threads, reason = machine.host_threads, machine.host_threads_reason
            if machine.device_type == "cpu":
                threads, reason = machine.torch_threads, "the CPU is the device too, so all of torch's threads"
            settings = replace(settings, host_threads=threads)
            reasons.append(f"host_threads={threads}: {reason}")
        return settings, reasons


def decisive(settings: FullSettings) -> dict[str, Any]:
    """The settings that decide the bits of a step; a checkpoint keeps them, so that a continued run chooses alike."""
    return {"accumulate": settings.accumulate}


def _where_to_accumulate(
    units: Sequence[Unit], machine: Machine, dtypes: DTypes, *, accumulates: bool
) -> tuple[Literal["device", "host"], str]:
    """On the device while gradients take at most a quarter of what the weights leave free there."""
    if not accumulates:
        return "device", "one micro-batch a step"
    if machine.device_type == "cpu":
        return "device", "device and host are one memory"
    sizes_of = [(p, p.numel() * weight_dtype(p, dtypes).itemsize) for unit in units for p in unit.parameters.values()]
    gradients = sum(size for parameter, size in sizes_of if parameter.requires_grad)
    weights = sum(size for _, size in sizes_of)
    free = max(machine.device_free_bytes - weights, 0)
    sizes = f"gradients {gradients / GIB:.2f} GiB, free beside the weights {free / GIB:.2f} GiB"
    return ("device", sizes) if gradients <= free // 4 else ("host", sizes)
