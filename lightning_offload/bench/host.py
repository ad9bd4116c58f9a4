"""The host's share of a step, beside torch's own kernel and the memory that it must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_offload.bench.bounds import BYTES_FUSED, BYTES_SUBSPACE
from lightning_offload.bench.measure import ratio, round_robin, timed
from lightning_offload.bench.report import Row, Table
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.lanes import InlineLanes
from lightning_offload.methods.base import DTypes, Flight, Trained, Verdict
from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.host import HostOptimizer
from lightning_offload.methods.lsp import LSPSettings
from lightning_offload.methods.method import Site
from lightning_offload.methods.row_source import PUBLISHED_UNION
from lightning_offload.methods.row_tables import RowSteps, RowTable
from lightning_offload.methods.rules import frozen_groups, rule_for
from lightning_offload.methods.subspace import SubspaceOptimizer
from lightning_offload.numerics.native import Kernels

_SWEEP = "in-place sweep of memory"
_NATIVE = "torch AdamW(fused=True), fp32"
Shapes = list[torch.Size]


@dataclass(frozen=True)
class Phase:
    """Host work of one step.

    Attributes:
        run: Does it.
        bytes: What it has to move through memory.
    """

    run: Callable[[], Any]
    bytes: int


def host_phase(numel: int, rounds: int) -> Table:
    """Host phases of all methods on about ``numel`` parameters; bound and GB/s count what each has to move."""
    shapes = _shapes(numel)
    total = sum(shape.numel() for shape in shapes)
    made = {_SWEEP: _sweep(shapes), _NATIVE: _torch_fused(shapes), "torch: up-cast, fused, down-cast": _cast(shapes)}
    arms = {name: Phase(run, BYTES_FUSED * total) for name, run in made.items()}
    compiled = FullSettings().kernels
    for phases in PHASES:
        arms |= phases(shapes, None)
        if compiled is not None:
            arms |= {f"{name}, compiled": phase for name, phase in phases(shapes, compiled).items()}
    samples, _ = round_robin({name: timed(arm.run) for name, arm in arms.items()}, rounds)
    return Table(
        "host",
        f"host phase, {total / 1e6:.0f} M parameters, {rounds} rounds",
        tuple(_row(name, samples, arms) for name in samples),
        (
            f"ratio: to {_NATIVE}",
            f"bound: {BYTES_FUSED} B per parameter, of lsp {BYTES_SUBSPACE} B and gradient and delta per element of a "
            "subspace, of meft all that is read and written of rows, at the rate of the sweep in the same round",
        ),
    )


def _row(name: str, samples: dict[str, list[float]], arms: dict[str, Phase]) -> Row:
    seconds, share = samples[name], arms[name].bytes / arms[_SWEEP].bytes
    values = {
        "ms": 1e3 * median(seconds),
        **ratio(seconds, samples[_NATIVE]),
        "gb_per_s": arms[name].bytes / median(seconds) / 1e9,
        "percent_of_bound": 100 * share * ratio(samples[_SWEEP], seconds)["ratio"],
    }
    return Row(name, values, tuple(seconds))


def _shapes(numel: int) -> Shapes:
    """Weights of a decoder: square and 4-to-1 matrices."""
    width = 1024
    blocks = max(round(numel / (12 * width * width)), 1)
    block = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return [torch.Size(shape) for _ in range(blocks) for shape in block]


def _sweep(shapes: Shapes) -> Callable[[], Any]:
    """As many bytes as a step moves, 8 for each element that is read and written."""
    swept = torch.ones(BYTES_FUSED * sum(shape.numel() for shape in shapes) // 8)
    return lambda: swept.mul_(1.0)


def _torch_fused(shapes: Shapes) -> Callable[[], Any]:
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return torch.optim.AdamW(weights, fused=True).step


def _cast(shapes: Shapes) -> Callable[[], Any]:
    """What a loop that keeps fp32 masters does without a kernel of its own."""
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(weights, fused=True)
    wires = [torch.randn(shape).to(torch.bfloat16) for shape in shapes]
    for weight in weights:
        weight.grad = torch.empty_like(weight)

    def step() -> None:
        for weight, wire in zip(weights, wires, strict=True):
            assert weight.grad is not None
            weight.grad.copy_(wire)
        optimizer.step()
        with torch.no_grad():
            for weight, wire in zip(weights, wires, strict=True):
                wire.copy_(weight)

    return step


def _full(shapes: Shapes, kernels: Kernels | None) -> dict[str, Phase]:
    total = BYTES_FUSED * sum(shape.numel() for shape in shapes)
    return {
        "full, 32-true": Phase(_full_step(shapes, torch.float32, kernels), total),
        "full, bf16-true": Phase(_full_step(shapes, torch.bfloat16, kernels), total),
    }


def _full_step(shapes: Shapes, dtype: torch.dtype, kernels: Kernels | None) -> Callable[[], Any]:
    """The host functions alone, unit by unit, without the copies."""
    trained, optimizer = _trained(shapes)
    lanes, rule = InlineLanes(HostMemory(pin=False)), rule_for(optimizer, kernels)
    host = HostOptimizer(trained, Site(rule, lanes, DTypes(compute=dtype), False, False))
    return lambda: host.step_all(frozen_groups(optimizer), Verdict(None, False, 1))


def _lsp(shapes: Shapes, kernels: Kernels | None) -> dict[str, Phase]:
    settings = LSPSettings(seed=0, min_numel=0)
    squares = sum(settings.dim_of(*shape) ** 2 for shape in shapes)
    dtypes = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
    return {
        f"lsp, d={settings.dim:g} m, {name}": Phase(
            _lsp_step(shapes, dtype, settings, kernels), (BYTES_SUBSPACE + 2 * dtype.itemsize) * squares
        )
        for name, dtype in dtypes.items()
    }


def _lsp_step(shapes: Shapes, dtype: torch.dtype, settings: LSPSettings, kernels: Kernels | None) -> Callable[[], Any]:
    trained, optimizer = _trained(shapes)
    rule = rule_for(optimizer, kernels)
    site = Site(rule, InlineLanes(HostMemory(pin=False)), DTypes(compute=dtype), False, False)
    part = SubspaceOptimizer(trained, site, settings)
    return lambda: part.step_all(frozen_groups(optimizer), Verdict(None, False, 1))


def _meft(shapes: Shapes, kernels: Kernels | None) -> dict[str, Phase]:
    """Rows of tables of these shapes, of which a published share is in use: other ones in every round."""
    used = [round(PUBLISHED_UNION * rows) for rows, _ in shapes]
    moved = sum(count * width for count, (_, width) in zip(used, shapes, strict=True))
    dense, step_all = _tables(shapes, "dense", used, kernels)
    _, step_some = _tables(shapes, "deferred", used, kernels)
    wire = dense[0].shadow.element_size()
    step_bytes = 8 + 24 + wire  # no casts: the bound is of one pass
    up = {t.name: torch.randn(count, t.master.shape[1]).bfloat16() for t, count in zip(dense, used, strict=True)}
    total, share = sum(shape.numel() for shape in shapes), f"{100 * PUBLISHED_UNION:.0f} % of rows"

    draws = _draws(dense, used)

    def gather() -> None:
        for table, rows in next(draws):
            table.gather(rows, up[table.name])

    def accumulate() -> None:
        for table, rows in next(draws):
            table.add(rows, up[table.name])

    return {
        "meft, dense, bf16-true": Phase(step_all, step_bytes * total),
        f"meft, deferred, {share}, bf16-true": Phase(step_some, step_bytes * moved),
        f"meft, gather {share}, bf16": Phase(gather, 2 * wire * moved),
        f"meft, accumulate {share}, bf16": Phase(accumulate, (8 + wire) * moved),
    }


def _tables(
    shapes: Shapes, steps: RowSteps, used: list[int], kernels: Kernels | None
) -> tuple[list[RowTable], Callable[[], None]]:
    """Tables, and what steps them."""
    trained, optimizer = _trained(shapes)
    rule, (group,) = rule_for(optimizer, kernels), frozen_groups(optimizer)

    def table(one: Trained) -> RowTable:
        master = one.parameter.data
        states = {name: torch.zeros_like(master) for name in rule.states}
        sums, shadow = torch.zeros_like(master), master.bfloat16()
        return RowTable(
            name=one.name,
            trained=one,
            master=master,
            states=states,
            total=sums,
            shadow=shadow,
            steps=steps,
            kernels=kernels,
        )

    def step() -> None:
        for table, rows in next(draws):
            table.touched[rows] = True
            table.make_step(rule, group, Verdict(None, False, 1))

    tables = [table(one) for one in trained]
    draws = _draws(tables, used)
    return tables, step


def _draws(tables: list[RowTable], used: list[int]) -> Iterator[list[tuple[RowTable, Tensor]]]:
    """Random rows of each table, in order; drawn ahead, a few times."""

    def drawn() -> list[tuple[RowTable, Tensor]]:
        places = (torch.randperm(len(table.master))[:count] for table, count in zip(tables, used, strict=True))
        return [(table, rows.sort().values) for table, rows in zip(tables, places, strict=True)]

    return cycle([drawn() for _ in range(4)])


def _trained(shapes: Shapes) -> tuple[list[Trained], torch.optim.Optimizer]:
    """Random weights, six to a unit."""
    module = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
    named = dict(module.named_parameters())
    trained = []
    for index, (name, parameter) in enumerate(named.items()):
        unit = Unit(index // 6, f"block{index // 6}", module, True, named, ())
        trained.append(Trained(name, parameter, unit, Flight(index // 6), 0, index))
    return trained, torch.optim.AdamW(module.parameters(), fused=True)


PHASES: tuple[Callable[[Shapes, Kernels | None], dict[str, Phase]], ...] = (_full, _lsp, _meft)
"""One entry per method that works on the host: its phases by name, for weights of these shapes, with kernels."""
