"""Finished runs side by side: a table, their losses in one picture, and what they cost in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from lightning_offload import words
from lightning_offload.memory.budget import GIB
from lightning_offload.plots import columns, labels, metrics_files, new_figure, plot_losses, read_curve, save
from lightning_offload.writing import written_file

LOSSES, COSTS, TABLE = "loss.png", "comparison.png", "comparison.txt"

_FOLLOWS = {"val/loss", "val/perplexity", "val/bits_per_byte"}  # the loss, and what follows from it
_ROW_INCHES = 0.42


@dataclass(frozen=True)
class Outcome:
    """What a run came to, as its CSV files have it; ``None`` and empty where they do not.

    Attributes:
        label: Its method, and what tells it apart from others of that.
        losses: Held out, before and after.
        metrics: Other held-out metrics by name, likewise.
        steps: Optimizer steps.
        step_s: Seconds of one, the median.
        rate: Tokens per second, the median; samples where batches have no tokens.
        unit: What ``rate`` counts.
        device_bytes: Most that torch held on the device.
        host_bytes: Arenas in host memory.
    """

    label: str
    losses: tuple[float, float] | None = None
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    steps: int = 0
    step_s: float | None = None
    rate: float | None = None
    unit: str = "tok"
    device_bytes: float | None = None
    host_bytes: float | None = None


def compare(runs: Sequence[Path], out: Path) -> str:
    """Write ``comparison.txt``, ``loss.png`` and ``comparison.png`` of finished runs into the folder ``out``.

    Args:
        runs: Their folders.
        out: Created where it is missing.

    Returns:
        The table.

    Raises:
        ValueError: A run has logged nothing, or none a loss.
        OSError: A file could not be written, with its path.
    """
    silent = [str(run) for run in runs if not metrics_files(run)]
    if silent or not runs:
        raise ValueError(f"no logs/version_*/metrics.csv in {', '.join(silent) or 'no run'}: nothing to compare")
    found = outcomes(runs)
    out.mkdir(parents=True, exist_ok=True)
    text = table(found)
    with written_file(out / TABLE) as file:
        file.write_text(text + "\n")
    plot_losses(runs, out / LOSSES)
    draw_costs(found, out / COSTS)
    return text


def outcomes(runs: Sequence[Path]) -> list[Outcome]:
    """What each run came to."""
    return [_outcome(run, label) for run, label in zip(runs, labels(runs), strict=True)]


def _outcome(run: Path, label: str) -> Outcome:
    logged = columns(run)
    values = {name: [value for _, value in read_curve(run, name)] for name in logged}
    unit = "tok" if "offload/tok/s" in values else "samples"
    peak = {
        place: max(values.get(f"offload/{place}_GiB", [])) * GIB if values.get(f"offload/{place}_GiB") else None
        for place in ("device", "host")
    }
    metrics = {name: _ends(of) for name, of in values.items() if name.startswith("val/") and of}
    return Outcome(
        label=label,
        losses=metrics.get("val/loss"),
        metrics={name.removeprefix("val/"): ends for name, ends in metrics.items() if name not in _FOLLOWS},
        steps=max((step for name in logged for step, _ in read_curve(run, name)), default=0),
        step_s=_median(values.get("offload/step_s")),
        rate=_median(values.get(f"offload/{unit}/s")),
        unit=unit,
        device_bytes=peak["device"],
        host_bytes=peak["host"],
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[-1]


def _median(values: Sequence[float] | None) -> float | None:
    return median(values) if values else None


def table(found: Sequence[Outcome]) -> str:
    """One line for each run."""
    names = list(dict.fromkeys(name for one in found for name in one.metrics))
    rows = [["run", "held-out loss", *(name.replace("_", " ") for name in names), "steps", "one step", "per second"]]
    rows[0] += ["device", "host"]
    for one in found:
        ends = [one.losses, *(one.metrics.get(name) for name in names)]
        cells = ["-" if pair is None else f"{pair[0]:.3f} -> {pair[1]:.3f}" for pair in ends]
        rate = "-" if one.rate is None else f"{one.rate:,.0f} {one.unit}"
        sizes = ["-" if size is None else words.size(size) for size in (one.device_bytes, one.host_bytes)]
        took = "-" if one.step_s is None else words.seconds(one.step_s)
        rows.append([one.label, *cells, f"{one.steps:,}", took, rate, *sizes])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw_costs(found: Sequence[Outcome], out: Path) -> Path | None:
    """Draw the held-out loss before and after, the time of a step and the memory of each run, as far as known.

    Returns:
        ``out``; ``None`` where nothing of it is known.
    """
    panels = [
        draw
        for draw, known in (
            (_draw_change, any(one.losses for one in found)),
            (_draw_time, any(one.step_s for one in found)),
            (_draw_memory, any(one.device_bytes or one.host_bytes for one in found)),
        )
        if known
    ]
    if not panels:
        return None
    figure = new_figure((1.5 + 3.6 * len(panels), 1.3 + _ROW_INCHES * len(found)))
    figure.get_layout_engine().set(wspace=0.06)
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    every[0].set_yticks(range(len(found)), [one.label for one in found])
    every[0].invert_yaxis()
    for axes, draw in zip(every, panels, strict=True):
        draw(axes, found)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return save(figure, out)


def _draw_change(axes: Any, found: Sequence[Outcome]) -> None:
    """Held-out loss: a ring before, a dot after."""
    axes.set_xlabel("held-out loss, before (ring) and after (dot)")
    for row, one in enumerate(found):
        if one.losses is not None:
            before, after = one.losses
            axes.plot([before, after], [row, row], "-", color=f"C{row}", linewidth=1.6, alpha=0.5)
            axes.plot(before, row, "o", markerfacecolor="white", color=f"C{row}", markersize=7)
            axes.plot(after, row, "o", color=f"C{row}", markersize=7)
            _say(axes, after, row, f"{after:.2f}", above=True)
    axes.margins(x=0.12, y=0.25)


def _draw_time(axes: Any, found: Sequence[Outcome]) -> None:
    axes.set_xlabel("seconds per step")
    for row, one in enumerate(found):
        if one.step_s is not None:
            axes.barh(row, one.step_s, height=0.55, color=f"C{row}")
            rate = "" if one.rate is None else f", {one.rate:,.0f} {one.unit}/s"
            _say(axes, one.step_s, row, f"{words.seconds(one.step_s)}{rate}")
    axes.margins(x=0.75)
    axes.set_xlim(left=0)


def _draw_memory(axes: Any, found: Sequence[Outcome]) -> None:
    most = max(max(one.device_bytes or 0, one.host_bytes or 0) for one in found)
    unit = words.memory_unit(most)
    scale = GIB if unit == "GiB" else words.MIB
    axes.set_xlabel(f"memory ({unit}): device dark, host pale")
    for row, one in enumerate(found):
        bars = [("device", one.device_bytes, 1.0), ("host", one.host_bytes, 0.45)]
        known = [(size, alpha) for _, size, alpha in bars if size]
        for place, (size, alpha) in enumerate(known):
            height = 0.6 / len(known)
            at = row + (place - (len(known) - 1) / 2) * height
            axes.barh(at, size / scale, height=height * 0.9, color=f"C{row}", alpha=alpha)
            _say(axes, size / scale, at, words.size(size))
    axes.margins(x=0.35)
    axes.set_xlim(left=0)


def _say(axes: Any, x: float, y: float, text: str, *, above: bool = False) -> None:
    place = {"xytext": (0, 7) if above else (4, 0), "ha": "center" if above else "left"}
    va = "bottom" if above else "center"
    axes.annotate(text, (x, y), textcoords="offset points", fontsize=9, va=va, annotation_clip=False, **place)
