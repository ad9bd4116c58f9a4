"""One method on one machine under two schedules: layer by layer, and ZeRO-Offload's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lightning_offload.planning.result import Plan
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.timeline import draw
from lightning_offload.words import seconds


def schedules(scenario: Scenario) -> dict[str, Plan]:
    """Plans of the same bytes and arithmetic, by the name of their schedule.

    Args:
        scenario: As it is to be run; ``bench.simulated.published_jobs()`` has those of LSP-Offload's figures.
    """
    return {
        "layer by layer": Dry(replace(scenario, serial=False)).plan(),
        "one phase after the other": Dry(replace(scenario, serial=True)).plan(),
    }


def draw_schedules(plans: Mapping[str, Plan], path: str | Path) -> Path:
    """One step of each, one above the other; the suffix of ``path`` gives the format.

    Args:
        plans: Of one model, by what to call them.
        path: Where to.

    Returns:
        ``path``.
    """
    first = next(iter(plans.values()))
    named = ("model", "method", "precision", "hardware")
    shared = [getattr(first, name) for name in named if len({getattr(plan, name) for plan in plans.values()}) == 1]
    title = f"{', '.join(shared)}: planned"
    spans = {f"{name}, {seconds(plan.step_s)}": plan.spans for name, plan in plans.items()}
    return draw(spans, Path(path), units=first.units, title=title)
