"""``meft`` beside LLaMA-7B as its authors ran it (arXiv 2406.04984): planned steps beside adapters on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from lightning_offload.bench.report import Row, Table
from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.methods.meft import MEFTSettings
from lightning_offload.methods.row_source import PUBLISHED_UNION, STAY, Placement
from lightning_offload.methods.sparse_adapter import attach_parameters
from lightning_offload.planning import Plan
from lightning_offload.planning.methods import NATIVE, SPARSE
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.text import CausalLM, batch_by_shape

WIDTHS = (1024, 6144, 16384)
"""Rows per layer; its authors ran LLaMA-7B with 6144."""

MICRO_BATCHES = 32
"""Per step, of the published traffic."""

PUBLISHED_TRAFFIC = 0.56
DENSE_TRAFFIC = 2.0
"""Both in adapter parameters per micro-batch: of the paper, and of an adapter that goes up and down whole."""

LORA_RANK = 16


@dataclass(frozen=True)
class Job:
    """What is trained in a step.

    Attributes:
        batch: Sequences of a micro-batch.
        length: Tokens of each.
        micro_batches: Per step.
    """

    batch: int
    length: int
    micro_batches: int

    def __str__(self) -> str:
        """As a table's title has it."""
        tokens = f"{self.batch} x {self.length} tokens"
        return tokens if self.micro_batches == 1 else f"{self.micro_batches} x {tokens}"


ONE, WHOLE = Job(2, 256, 1), Job(16, 256, 4)
"""The paper's example of a micro-batch, and its batch of 64 sequences."""


def beside_meft(
    config: dict[str, Any], jobs: Sequence[tuple[Machine, Job]], widths: Sequence[int] = WIDTHS
) -> Iterator[Table]:
    """A table per machine and job, then what the link carries.

    Args:
        config: The model by shape.
        jobs: What is trained, and where.
        widths: Rows per layer.
    """
    for machine, job in jobs:
        yield _steps(config, machine, job, widths)
    yield _traffic(config, jobs[0][0], jobs[0][1], widths[len(widths) // 2])


def scenario(config: dict[str, Any], machine: Machine, job: Job, width: int, placement: Placement) -> Scenario:
    """One of the steps of meft."""
    settings = MEFTSettings(width=width, placement=placement, seed=0)
    return replace(_frozen(config, machine, job), method=SPARSE, settings=settings)


def _frozen(
    config: dict[str, Any], machine: Machine, job: Job, add: Callable[[CausalLM], object] | None = None
) -> Scenario:
    """Everything on the device; of the weights those are trained that ``add`` brings."""
    with torch.device("meta"):
        module = CausalLM(config=config, init="random", dtype="bfloat16", gradient_checkpointing=True)
        tokens = batch_by_shape(job.batch, job.length, 1)
        if add is not None:
            add(module)
    return Scenario(module, tokens, machine, method=NATIVE, precision="bf16-true", micro_batches=job.micro_batches)


def _steps(config: dict[str, Any], machine: Machine, job: Job, widths: Sequence[int]) -> Table:
    rows, notes = [], [f"simulated, not measured; a union of {100 * PUBLISHED_UNION:.1f} % of the rows is assumed"]

    def row(name: str, of: Scenario, dense_s: float | None = None) -> float:
        plan = Dry(of).plan()
        speed = {} if dense_s is None else {"speed_percent": 100 * dense_s / plan.step_s}
        rows.append(Row(name, _values(plan) | speed))
        if not plan.fits:
            notes.append(f"{name} does not fit")
        return plan.step_s

    for width in widths:
        dense_s = row(f"r={width}, dense, on the device", _frozen(config, machine, job, partial(_dense, width=width)))
        for placement in STAY:
            row(f"r={width}, meft, placement={placement}", scenario(config, machine, job, width, placement), dense_s)
    if find_spec("peft"):
        row(f"LoRA, rank {LORA_RANK}, all linears", _frozen(config, machine, job, _lora))
    return Table("simulated_meft", f"{job} on {machine.name}", tuple(rows), tuple(notes))


def _values(plan: Plan) -> dict[str, float]:
    moved = sum(plan.lanes[lane].bytes for lane in ("d2h", "h2d") if lane in plan.lanes)
    return {
        "step_s": plan.step_s,
        "bound_s": plan.bound_s,
        "link_gb": moved / 1e9,
        "device_gib": plan.device.bytes / GIB,
        "host_gib": plan.host.bytes / GIB,
    }


def _dense(module: CausalLM, width: int) -> None:
    """The parallel adapter: every token uses every row."""
    settings: dict[str, Any] = {"experts": 1, "active_experts": 1, "top_k": width, "gate": "none", "scope": "union"}
    attach_parameters(module, width=width, device=torch.device("meta"), dtype=torch.bfloat16, **settings)


def _lora(module: CausalLM) -> None:
    from peft import LoraConfig

    module.network.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear"))


def _traffic(config: dict[str, Any], machine: Machine, job: Job, width: int) -> Table:
    numel = 2 * width * config["hidden_size"] * config["num_hidden_layers"]
    rows = [Row(f"meft, placement={p}", _moved(scenario(config, machine, job, width, p), numel)) for p in STAY]
    rows += [Row("the paper", {"both_p": PUBLISHED_TRAFFIC}), Row("dense adapter, whole", {"both_p": DENSE_TRAFFIC})]
    title = f"r={width}, {MICRO_BATCHES} micro-batches of {job}: elements on the link per micro-batch, in P"
    note = f"P: parameters of keys and values; a union of {100 * PUBLISHED_UNION:.1f} %; all that moves is counted"
    return Table("simulated_meft", title, tuple(rows), (note,))


def _moved(of: Scenario, numel: int) -> dict[str, float]:
    """Of ``MICRO_BATCHES``: every micro-batch after the first moves as much as the second."""
    one, two = (Dry(replace(of, micro_batches=count)) for count in (1, 2))

    def elements(lane: str) -> float:
        first, both = (dry.timing.lanes[lane].bytes for dry in (one, two))
        return (first + (MICRO_BATCHES - 1) * (both - first)) / 2 / MICRO_BATCHES / numel

    down, up = elements("d2h"), elements("h2d")
    return {"down_p": down, "up_p": up, "both_p": down + up}
