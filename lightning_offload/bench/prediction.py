"""The plan against the machine: predicted and measured, for several models, batches and precisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from lightning_offload.bench.arms import METHODS, Arm
from lightning_offload.bench.measure import CannotRun
from lightning_offload.bench.report import Row, Table
from lightning_offload.bench.training import Workload, take_turn
from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.memory.rates import Rates
from lightning_offload.planning import Plan, plan
from lightning_offload.text import CausalLM, batch_by_shape

POINTS = (
    ("opt_350m", 4, "32-true"),
    ("opt_350m", 8, "bf16-mixed"),
    ("gpt2_large", 4, "bf16-true"),
    ("llama_1b3", 2, "bf16-true"),
    ("llama_1b3", 8, "bf16-true"),
    ("qwen3_1b7", 4, "bf16-true"),
)
"""Model, sequences per step, precision."""


def predictions(shape: Callable[[str], Any], *, device: str, length: int, steps: int, rates: Rates) -> Table:
    """Each method at each point: the plan, then a few steps, clipped, every block computed again."""
    machine = replace(Machine.detect(device), rates=rates)
    rows, notes = [], []
    for (name, batch, precision), arm in product(POINTS, METHODS):
        method = arm.name.removesuffix("_offload")
        title = f"{method}: {name}, {batch} x {length}, {precision}"
        work = Workload(
            title=title,
            config=shape(name),
            batch=batch,
            length=length,
            device=device,
            precision=precision,
            clip=1.0,
            recompute=True,
        )
        made = _planned(work, arm, method, machine)
        try:
            turn = take_turn(work, arm, steps)
        except CannotRun as error:
            notes.append(f"{title}: {error}")
            continue
        rows.append(Row(title, _values(made, turn.step_s, turn.values.get("reserved_gib"), machine)))
    return Table("prediction", f"plan against {machine.device_name}", tuple(rows), tuple(notes))


def _planned(work: Workload, arm: Arm, method: str, machine: Machine) -> Plan:
    with torch.device("meta"):
        module = CausalLM(config=work.config, init="random", dtype=work.dtype, gradient_checkpointing=True)
        batch = batch_by_shape(work.batch, work.length, 1)
    how: Any = {"method": method, "precision": work.precision, "gradient_clip_val": work.clip}
    return plan(module, batch, hardware=machine, optimizer=arm.optimizer(module), **how)


def _values(made: Plan, step_s: float, reserved_gib: float | None, machine: Machine) -> dict[str, float]:
    values = {"planned_s": made.step_s, "measured_s": step_s, "planned_over_measured": made.step_s / step_s}
    if reserved_gib is None:  # no device of its own
        return values
    planned_gib, measured_gib = made.device.bytes / GIB, reserved_gib + machine.context_bytes / GIB
    return values | {
        "planned_gib": planned_gib,
        "measured_gib": measured_gib,
        "gib_planned_over_measured": planned_gib / measured_gib,
    }
