"""Time to equal loss: steps, from measured curves, times seconds of a step, from plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from lightning_offload.bench.report import Row, Table
from lightning_offload.bench.simulated import published_jobs
from lightning_offload.planning import Plan
from lightning_offload.planning.methods import FULL, SERIAL, SUBSPACE
from lightning_offload.planning.scenario import Dry

SHARES = (0.5, 0.75, 0.9, 1.0)
"""Of what the method gains in all its steps: the losses at which times are compared."""

PUBLISHED = "LSP-Offload (arXiv 2406.10181): 33.1 to 62.5 % less time to equal accuracy than offloading before it"

Curve = Sequence[tuple[int, float]]


def steps_to(curve: Curve, loss: float) -> float | None:
    """Steps after which a curve first is at ``loss``, between two points linearly; None where it never is."""
    if curve[0][1] <= loss:
        return float(curve[0][0])
    for (before, above), (after, below) in pairwise(curve):
        if below <= loss:
            return before + (after - before) * (above - loss) / (above - below)
    return None


def published_plans() -> dict[str, dict[str, Plan]]:
    """Of the jobs of LSP-Offload's figures, not clipped, by method."""
    return {
        title: {method: Dry(replace(job, method=method, clip=None)).plan() for method in (SUBSPACE, FULL, SERIAL)}
        for title, job in published_jobs().items()
    }


def equal_loss(method: str, own: Curve, full: Curve, plans: Mapping[str, Mapping[str, Plan]], text: str) -> Table:
    """A row per job and loss: steps of both, seconds of each, and how much less the method takes.

    Args:
        method: Its name in ``plans``.
        own: Its curve.
        full: Of exact AdamW, which ``full`` and ZeRO-Offload's schedule share.
        plans: By job, then by method: of ``method``, ``full`` and ``zero-offload``.
        text: What both were trained on.
    """
    rows = [row for job, planned in plans.items() for row in _rows(job, method, own, full, planned)]
    notes = (
        "steps: measured on the shipped model, at the losses that the method reaches after these shares of its gain",
        "seconds: steps times the planned step of this model on this machine; not measured",
        PUBLISHED,
    )
    title = f"{text}: time to equal loss, {method} beside full and ZeRO-Offload's schedule"
    return Table("quality", title, tuple(rows), notes)


def _rows(job: str, method: str, own: Curve, full: Curve, plans: Mapping[str, Plan]) -> Iterator[Row]:
    for share in SHARES:
        loss = own[0][1] - share * (own[0][1] - own[-1][1])
        steps, full_steps = steps_to(own, loss), steps_to(full, loss)
        if steps is None or full_steps is None:
            continue
        own_s = steps * plans[method].step_s
        full_s, serial_s = (full_steps * plans[other].step_s for other in (FULL, SERIAL))
        values = {
            "loss": loss,
            "steps": steps,
            "full_steps": full_steps,
            "seconds": own_s,
            "full_s": full_s,
            "zero_offload_s": serial_s,
            "less_than_full_percent": 100 * (1 - own_s / full_s),
            "less_than_zero_offload_percent": 100 * (1 - own_s / serial_s),
        }
        yield Row(f"{job}: {100 * share:.0f} % of its gain", values)
