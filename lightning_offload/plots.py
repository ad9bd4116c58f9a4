"""Pictures of runs, drawn from the CSV files that Lightning's logger writes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_offload.writing import written_file

Curve = list[tuple[int, float]]

_SMOOTHING_SHARE = 0.1  # of the run: the width of the running mean


def metrics_files(run: Path) -> list[Path]:
    """Return the CSV files of a run, oldest first: one for each time it was started or continued."""
    return sorted(run.glob("logs/version_*/metrics.csv"), key=lambda file: int(file.parent.name.rpartition("_")[2]))


def read_curve(run: Path, column: str) -> Curve:
    """Return ``(step, value)`` of one column; where a run was continued, what it trained again replaces the old."""
    curve: Curve = []
    for file in metrics_files(run):
        rows = list(csv.DictReader(file.read_text().splitlines()))
        # validation before a continued fit is logged at step 0, before Lightning restores the step
        first = min((int(row["step"]) for row in rows if row.get("train/loss")), default=0)
        start = first if curve else 0
        added = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        curve = [point for point in curve if point[0] < first] + [point for point in added if point[0] >= start]
    return curve


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Centred running mean over ``width`` values, over fewer at the ends."""
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_losses(runs: Sequence[Path], out: Path) -> Path:
    """Draw the training loss (smoothed over the raw one) and the held-out loss of one or more runs.

    Args:
        runs: Folders of runs.
        out: The picture to write; its suffix gives the format.

    Returns:
        ``out``.

    Raises:
        ValueError: No run has a logged loss.
    """
    # by object: pyplot would keep figures in global state and could open a window
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawable = [run for run in runs if read_curve(run, "train/loss") or read_curve(run, "val/loss")]
    if not drawable:
        raise ValueError(f"no losses in logs/version_*/metrics.csv of {', '.join(map(str, runs))}")
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (run, label) in enumerate(zip(drawable, labels(drawable), strict=True)):
        _draw_run(axes, run, label, f"C{number}")
    _finish(axes)
    with written_file(out) as file:
        figure.savefig(file, format=out.suffix[1:])
    return out


def labels(runs: Sequence[Path]) -> list[str]:
    """Return the method of each run, with the folder where methods repeat."""
    methods = [_method_of(run) for run in runs]
    return [
        method if methods.count(method) == 1 else f"{method} ({run.name})"
        for run, method in zip(runs, methods, strict=True)
    ]


def _draw_run(axes: Any, run: Path, label: str, color: str) -> None:
    train, held_out = read_curve(run, "train/loss"), read_curve(run, "val/loss")
    if train:
        steps, losses = zip(*train, strict=True)
        width = max(1, round(len(losses) * _SMOOTHING_SHARE))
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses, width), color=color, linewidth=1.6, label=f"{label}, training")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        style = {"linewidth": 1, "markersize": 5, "markeredgecolor": "white"}
        axes.plot(steps, losses, "o--", color=color, label=f"{label}, held out", **style)
        _annotate(axes, held_out[0], (-8, 0), "right", color)
        _annotate(axes, held_out[-1], (8, 0), "left", color)


def _annotate(axes: Any, point: tuple[int, float], offset: tuple[int, int], side: str, color: str) -> None:
    place = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "center"}
    axes.annotate(f"{point[1]:.2f}", point, color=color, fontsize=9, **place)


def _finish(axes: Any) -> None:
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    axes.legend(frameon=False)


def _method_of(run: Path) -> str:
    """Return the method's name from the run's configuration, else the folder's name."""
    import yaml

    config = run / "config.yaml"
    content = yaml.safe_load(config.read_text()) if config.is_file() else {}
    return str(content.get("method", {}).get("name", run.name))
