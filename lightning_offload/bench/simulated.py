"""Steps on machines that are not here, by the plan's own simulation: beside their bound, and published seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

import torch

from lightning_offload.bench.bounds import BYTES_FUSED
from lightning_offload.bench.report import Row, Table
from lightning_offload.memory.budget import GIB, Machine, machine_from
from lightning_offload.methods.base import Clip
from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.part import CAST_BYTES
from lightning_offload.planning import Plan
from lightning_offload.planning.methods import FULL, NATIVE, SERIAL
from lightning_offload.planning.scenario import Dry, Scenario
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


PAPER = {
    "1.3B, 1 x 384 tokens, laptop_4gb": (
        "laptop_4gb",
        {"num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16},
        (1, 384),
        {NATIVE: 0.52, SERIAL: 4.0},
    ),
    "6.7B, 4 x 1024 tokens, rtx4090": (
        "rtx4090",
        {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
        (4, 1024),
        {NATIVE: 1.63, SERIAL: 4.11},
    ),
}
"""Seconds per iteration that LSP-Offload's repository gives for DeepSeek-Coder (arXiv 2406.10181), without offloading
and with ZeRO-Offload."""


def beside_published() -> Iterator[Table]:
    """The schedules on the machines of LSP-Offload's figures, beside its seconds.

    ``fused casts``: with a host step that moves the 28 bytes of a kernel that casts as it goes, as DeepSpeed's does.
    """
    for title, (where, shape, (batch, length), published) in PAPER.items():
        config = {"model_type": "llama", "vocab_size": 32256, "tie_word_embeddings": False, **shape}
        with torch.device("meta"):
            module = CausalLM(config=config, init="random", dtype="bfloat16", gradient_checkpointing=True)
            tokens = batch_by_shape(batch, length, 1)
        asked = Scenario(module, tokens, machines()[where], precision="bf16-true", clip=Clip(1.0, "norm"))
        layer_wise = replace(asked, clip=None, settings=FullSettings(skip_nonfinite=False))
        arms = {NATIVE: replace(asked, method=NATIVE), SERIAL: replace(asked, method=SERIAL), FULL: asked}
        rows = []
        for arm, scenario in {**arms, "full, layer by layer (neither clipped nor checked)": layer_wise}.items():
            values = {"step_s": Dry(scenario).plan().step_s}
            if scenario.method != NATIVE:
                values["fused_casts_s"] = Dry(_with_fused_casts(scenario)).plan().step_s
            values |= {"published_s": published[arm]} if arm in published else {}
            rows.append(Row(arm, values))
        yield Table("published", title, tuple(rows), ("simulated, not measured; bf16, blocks computed again",))


def _with_fused_casts(scenario: Scenario) -> Scenario:
    rates = scenario.machine.rates
    assert rates is not None
    faster = replace(rates, host_gb_per_s=rates.host_gb_per_s * (BYTES_FUSED + CAST_BYTES) / BYTES_FUSED)
    return replace(scenario, machine=replace(scenario.machine, rates=faster))


def _values(plan: Plan) -> dict[str, float]:
    return {
        "step_s": plan.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "bound_s": plan.bound_s,
        "percent_of_bound": 100 * plan.bound_s / plan.step_s,
        "device_gib": plan.device.bytes / GIB,
        "host_gib": plan.host.bytes / GIB,
    }
