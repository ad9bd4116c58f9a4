"""What is where, as tables: each unit with its bytes, and each place with what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lightning_offload.memory.budget import GIB
from lightning_offload.memory.lanes import nbytes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.meft import MEFT
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.streaming import Berth
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.words import in_unit, memory_unit

AnyEngine = Engine | ZerothEngine


def summary(engine: AnyEngine) -> str:
    """The table of ``OffloadSummary`` as text."""
    zeroth = isinstance(engine, ZerothEngine)
    columns = ("unit", "parameters", "dtype", "weights are" if zeroth else "trained on", "host MiB", "device MiB")
    rows: list[tuple[str, ...]] = [columns]
    if isinstance(engine, ZerothEngine):
        rows += _merge([_berth_row(berth) for berth in engine.streaming.berths])
    else:
        rows += _merge([_unit_row(engine, index) for index in range(len(engine.units))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(_align(cell, width, column) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    report = engine.lanes.memory.report()
    host = f"host {report.requested_bytes / GIB:.3f} GiB ({report.locked_bytes / GIB:.3f} GiB page-locked)"
    lines.append(_last_line(engine, host))
    return "\n".join(lines)


def _last_line(engine: AnyEngine, host: str) -> str:
    device = f"device {engine.device_bytes / GIB:.3f} GiB"
    if isinstance(engine, ZerothEngine):
        settings = engine.method.settings
        return (
            f"method {engine.method.name}, {settings.noise} noise, {2 * settings.directions} forwards per micro-batch; "
            f"{host}, {device}: resident weights, {settings.slots - 1} slots and what forwards see"
        )
    placement, sums = "", str(engine.method.settings.accumulate)
    if isinstance(engine.method, MEFT):
        placement, sums = f", placement {engine.method.settings.placement}", f"host, those of routers on the {sums}"
    return (
        f"method {engine.method.name} with {engine.rule.name}{placement}; {host}, {device} beside the weights, "
        f"micro-batches accumulate on the {sums}"
    )


def _unit_row(engine: Engine, index: int) -> tuple[str, ...]:
    unit = engine.units[index]
    host = [t for t in engine.host.trained if t.unit is unit]
    resident = [t for t in engine.resident.trained if t.unit is unit]
    own = [t for t in engine.own.trained if t.unit is unit] if engine.own is not None else []
    label = engine.own.label(own) if engine.own is not None and own else ""
    groups = {label: own, "host": host, "device": resident}
    parts = [(label, sum(t.parameter.numel() for t in group)) for label, group in groups.items()]
    frozen = unit.numel - sum(count for _, count in parts)
    where = " + ".join(f"{label} {count:,}" for label, count in [*parts, ("frozen", frozen)] if count)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in unit.parameters.values()})
    there = {id(t.parameter) for t in own}
    device = nbytes(p for p in unit.parameters.values() if id(p) not in there)
    device += engine.own.device_bytes_of(own) if engine.own is not None else 0
    mib = 1024**2
    return (
        unit.name or "(root)",
        f"{unit.numel:,}",
        ", ".join(dtypes),
        where or "-",
        f"{engine.host_bytes([*own, *host]) / mib:.1f}",
        f"{device / mib:.1f}",
    )


def _berth_row(berth: Berth) -> tuple[str, ...]:
    """A unit of `zo2`."""
    size, mib = nbytes(berth.stored), 1024**2
    frozen = sum(leaf.parameter.numel() for leaf in berth.frozen)
    where = "resident" if berth.resident else "streamed"
    return (
        berth.unit.name or "(root)",
        f"{berth.unit.numel:,}",
        ", ".join(sorted({str(rest.dtype).removeprefix("torch.") for rest in berth.stored})),
        where + (f", {frozen:,} frozen" if frozen else ""),
        f"{0 if berth.resident else size / mib:.1f}",
        f"{size / mib if berth.resident else 0:.1f}",
    )


def _merge(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Neighbouring rows that differ in nothing but the name become one."""
    merged: list[list[tuple[str, ...]]] = []
    for row in rows:
        if merged and merged[-1][0][1:] == row[1:]:
            merged[-1].append(row)
        else:
            merged.append([row])
    return [
        group[0] if len(group) == 1 else (f"{group[0][0]} .. {group[-1][0]} ({len(group)} units, each)", *group[0][1:])
        for group in merged
    ]


def _align(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column in (1, 4, 5) else cell.ljust(width)


def host_holds(engine: AnyEngine | None, module: nn.Module, device: torch.device) -> dict[str, int]:
    """Bytes of host memory by what they hold: the arenas; without them the weights that are not on the device."""
    if engine is None:
        return {} if device.type == "cpu" else {"weights": nbytes(_on(torch.device("cpu"), module.parameters()))}
    held = Counter[str]()
    if isinstance(engine, ZerothEngine):
        held["weights"] = engine.streaming.host_bytes
    else:
        for part in engine.senders:
            held.update(part.holdings)
    held["alignment, small buffers"] = max(engine.lanes.memory.report().allocated_bytes - sum(held.values()), 0)
    return {kind: count for kind, count in held.items() if count}


def device_holds(engine: AnyEngine | None, module: nn.Module, device: torch.device) -> dict[str, int]:
    """Bytes on the device by what they hold, as far as module and engine know."""
    gradients = nbytes(_on(device, [p.grad for p in module.parameters() if p.grad is not None]))
    buffers = nbytes(_on(device, module.buffers()))
    if isinstance(engine, ZerothEngine):
        resident = engine.streaming.resident_bytes
        weights = {"resident weights": resident, "slots, and what forwards see": engine.device_bytes - resident}
    else:
        at_home = engine.own.trained if engine is not None and isinstance(engine.own, RowOptimizer) else ()
        there = {id(t.parameter) for t in at_home}
        beside = engine.device_bytes if engine is not None else 0
        on_device = _on(device, [p for p in module.parameters() if id(p) not in there])
        weights = {"weights": nbytes(on_device), "what the method holds beside them": beside}
    held = {**weights, "gradients": gradients, "buffers of the module": buffers}
    return {kind: count for kind, count in held.items() if count}


def table(holds: Mapping[str, int]) -> list[str]:
    """One line for each, the largest first."""
    unit = memory_unit(max(holds.values(), default=0))
    width = max(map(len, holds), default=0)
    ordered = sorted(holds.items(), key=lambda item: -item[1])
    return [f"  {kind.ljust(width)}  {in_unit(count, unit):>8} {unit}" for kind, count in ordered]


def _on(device: torch.device, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if tensor.device.type == device.type]
