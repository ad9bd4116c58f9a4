"""Steps on machines that are not here, by the plan's own simulation: beside their bound, and published seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_offload.bench.bounds import BYTES_FUSED
from lightning_offload.bench.report import Row, Table
from lightning_offload.memory.blocks import partition
from lightning_offload.memory.budget import GIB, Machine, machine_from
from lightning_offload.methods.base import Clip
from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.lsp import LSPSettings, linear_weights
from lightning_offload.methods.meter import Meter, Work
from lightning_offload.methods.part import CAST_BYTES
from lightning_offload.numerics.projector import Projector, apply_, compress, compress_activations
from lightning_offload.planning import Plan
from lightning_offload.planning.methods import FULL, NATIVE, SERIAL, SUBSPACE
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.text import CausalLM, batch_by_shape

PLANNED = (FULL, SUBSPACE)
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


@dataclass(frozen=True)
class Job:
    """A training whose seconds per iteration are published.

    Attributes:
        where: Name of the machine in ``conf/hardware``.
        shape: Of the model, a Llama with an untied head.
        batch: Sequences per step.
        length: Tokens of each.
        settings: Of lsp.
        published_s: By method.
    """

    where: str
    shape: dict[str, Any]
    batch: int
    length: int
    settings: LSPSettings
    published_s: dict[str, float]

    @property
    def scenario(self) -> Scenario:
        """Method lsp, neither clipped nor accumulated; every block computed again."""
        config = {"model_type": "llama", "vocab_size": 32256, "tie_word_embeddings": False, **self.shape}
        with torch.device("meta"):
            module = CausalLM(config=config, init="random", dtype="bfloat16", gradient_checkpointing=True)
            tokens = batch_by_shape(self.batch, self.length, 1)
        machine = machines()[self.where]
        return Scenario(module, tokens, machine, method=SUBSPACE, settings=self.settings, precision="bf16-true")


PAPER = {
    "1.3B, 1 x 384 tokens, laptop_4gb": Job(
        "laptop_4gb",
        {"num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16},
        1,
        384,
        LSPSettings(dim=1280, nnz=4),
        {NATIVE: 0.52, SERIAL: 4.0, SUBSPACE: 2.13},
    ),
    "6.7B, 4 x 1024 tokens, rtx4090": Job(
        "rtx4090",
        {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
        4,
        1024,
        LSPSettings(dim=2048, nnz=8),
        {NATIVE: 1.63, SERIAL: 4.11, SUBSPACE: 1.97},
    ),
}
"""Seconds per iteration that LSP-Offload's repository gives for DeepSeek-Coder (arXiv 2406.10181), without offloading,
with ZeRO-Offload and with its own method."""

_FAITHFUL: dict[str, Any] = {"others": "frozen"}
"""Its timings train the projected matrices alone."""


def published_jobs() -> dict[str, Scenario]:
    """The jobs of these figures, by title."""
    return {title: job.scenario for title, job in PAPER.items()}


def arms_of(job: Job) -> dict[str, Scenario]:
    """What stands in the job's table, by name."""
    lsp = job.scenario
    clipped = replace(lsp, clip=Clip(1.0, "norm"))

    def of_lsp(**changed: Any) -> Scenario:
        return replace(lsp, settings=replace(job.settings, **changed))

    return {
        NATIVE: replace(clipped, method=NATIVE),
        SERIAL: replace(clipped, method=SERIAL),
        FULL: replace(clipped, method=FULL),
        "full, layer by layer (neither clipped nor checked)": replace(
            lsp, method=FULL, settings=FullSettings(skip_nonfinite=False)
        ),
        SUBSPACE: lsp,
        "lsp, clipped": clipped,
        "lsp, ZeRO-Offload's schedule": replace(lsp, serial=True),
        "lsp, form=activations": of_lsp(form="activations"),
        "lsp, others frozen": of_lsp(**_FAITHFUL),
        "lsp, form=activations, others frozen": of_lsp(form="activations", **_FAITHFUL),
    }


def beside_published() -> Iterator[Table]:
    """The schedules on the machines of LSP-Offload's figures, beside its seconds; and the arithmetic of lsp.

    By torch's own operations on the host; ``fused casts``: with a host step that moves the 28 bytes of a kernel that
    casts as it goes, as DeepSpeed's and ``native="on"`` do.
    """
    for title, job in PAPER.items():
        rows: list[Row] = []
        for arm, scenario in arms_of(job).items():
            scenario = replace(scenario, settings=replace(scenario.settings, native="off"))
            plan = Dry(scenario).plan()
            values = {"step_s": plan.step_s, "bound_s": plan.bound_s}
            values["x_native"] = plan.step_s / (rows[0].values["step_s"] if rows else plan.step_s)
            values |= {"device_gib": plan.device.bytes / GIB, "host_gib": plan.host.bytes / GIB}
            if scenario.method in (SERIAL, FULL):
                values["fused_casts_s"] = Dry(_with_fused_casts(scenario)).plan().step_s
            values |= {"published_s": job.published_s[arm]} if arm in job.published_s else {}
            rows.append(Row(arm, values))
        yield Table("published", title, tuple(rows), ("simulated, not measured; bf16, blocks computed again",))
        yield arithmetic(title, job)


def arithmetic(title: str, job: Job) -> Table:
    """FLOPs per step that lsp adds, beside those of the weights' gradients that ``form="activations"`` does without.

    Counted as kernels are called, for ``block`` projectors; bytes as if no cache kept a temporary.
    """
    scenario, tokens = job.scenario, job.batch * job.length
    weights = linear_weights(scenario.module, partition(scenario.module))
    shapes = Counter((weight.shape[0], weight.shape[1]) for weight in weights.values())
    rows = [_matrices(shape, count, tokens, job.settings) for shape, count in shapes.items()]
    total = {key: sum(row.values[key] for row in rows) for key in rows[0].values if key.endswith("tflop")}
    note = "apply: decompression, decay and stochastic rounding of a bf16 weight; bytes per element of the weight"
    return Table("published", f"{title}: arithmetic of lsp", (*rows, Row("all", total)), (note,))


def _matrices(shape: tuple[int, int], count: int, tokens: int, settings: LSPSettings) -> Row:
    (m, n), dim = shape, settings.dim_of(*shape)
    spent: list[Work] = []
    with FakeTensorMode(), Meter(spent.append):

        def cost(run: Callable[[], object]) -> tuple[float, int]:
            spent.clear()
            run()
            return 1e-12 * count * sum(work.flops for work in spent), sum(work.bytes for work in spent)

        left, right = (Projector(torch.empty(rows, settings.nnz, dtype=torch.bfloat16), dim) for rows in (m, n))
        weight, delta = torch.empty(m, n, dtype=torch.bfloat16), torch.empty(dim, dim, dtype=torch.bfloat16)
        grad_output, inputs = (torch.empty(tokens, size, dtype=torch.bfloat16) for size in (m, n))
        whole, _ = cost(lambda: grad_output.t() @ inputs)
        compressed, _ = cost(lambda: compress(left, right, weight))
        direct, _ = cost(lambda: compress_activations(left, right, grad_output, inputs))
        noise, skip = torch.Generator(), torch.empty((), dtype=torch.bool)
        applied, moved = cost(lambda: apply_(weight, left, right, delta, decay=1.0, skip=skip, generator=noise))
    values = {
        "weight_gradient_tflop": whole,
        "compress_tflop": compressed,
        "activations_tflop": direct,
        "apply_tflop": applied,
        "apply_bytes_per_element": moved / (m * n),
    }
    return Row(f"{count} of {m} x {n}, d={dim}", values)


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
