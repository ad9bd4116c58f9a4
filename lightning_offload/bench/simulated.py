"""Steps on machines that are not here: what the schedule reaches of its bound, by the plan's own simulation."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import torch

from lightning_offload.bench.report import Row, Table
from lightning_offload.memory.budget import GIB, Machine, machine_from
from lightning_offload.methods.base import Clip
from lightning_offload.planning import Plan
from lightning_offload.planning.scenario import FULL, NATIVE, SERIAL, Dry, Scenario
from lightning_offload.text import CausalLM, batch_by_shape

PLANNED = (FULL,)
"""The methods of this package; each has a row per machine."""


def machines() -> dict[str, Machine]:
    """The machines that ``conf/hardware`` describes with their rates."""
    import yaml

    folder = files("lightning_offload.conf").joinpath("hardware")
    described = [yaml.safe_load(file.read_text())["hardware"] for file in folder.iterdir()]
    return {node["name"]: machine_from(node) for node in sorted(described, key=str) if _has_rates(node)}


def _has_rates(node: Mapping[str, Any]) -> bool:
    return any(rate is not None for rate in (node.get("rates") or {}).values())


def simulate(name: str, config: dict[str, Any], *, batch: int, length: int) -> Table:
    """Planned steps of one model: ``bf16-true``, clipping, every block computed again in the backward pass.

    Beside each: everything on the device (whether or not it fits), and ZeRO-Offload's schedule on the same machine.
    """
    with torch.device("meta"):
        module = CausalLM(config=config, init="random", dtype="bfloat16", gradient_checkpointing=True)
        tokens = batch_by_shape(batch, length, config["vocab_size"])

    def planned(machine: Machine, method: str) -> Plan:
        return Dry(
            Scenario(module, tokens, machine, method=method, precision="bf16-true", clip=Clip(1.0, "norm"))
        ).plan()

    rows, notes = [], ["simulated, not measured; bound: of any schedule that moves the same bytes, by the same plan"]
    for where, machine in machines().items():
        beside = {"native_s": planned(machine, NATIVE).step_s, "zero_offload_s": planned(machine, SERIAL).step_s}
        for method in PLANNED:
            plan = planned(machine, method)
            rows.append(Row(f"{where}: {method}", {**_values(plan), **beside}))
            notes += [] if plan.fits else [f"{where}: {method} does not fit"]
    return Table("simulated", f"{name}, {batch} x {length} tokens, bf16-true", tuple(rows), tuple(notes))


def _values(plan: Plan) -> dict[str, float]:
    return {
        "step_s": plan.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "bound_s": plan.bound_s,
        "percent_of_bound": 100 * plan.bound_s / plan.step_s,
        "device_gib": plan.device.bytes / GIB,
        "host_gib": plan.host.bytes / GIB,
    }
