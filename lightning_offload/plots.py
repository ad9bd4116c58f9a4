"""Pictures of runs, drawn from the CSV files that Lightning's logger writes."""

from __future__ import annotations

import csv
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_offload.runs import CONFIG
from lightning_offload.writing import written_file

Curve = list[tuple[int, float]]

_SMOOTHING_SHARE = 0.1  # of the run: the width of the running mean
_TOLD_APART_BY = 3  # settings, at most
_PER_EXAMPLE = {"Glue", "Sst2", "BoolQ"}  # data whose losses are of examples, not of tokens
_NOT_TRAINING = {"name", "runs_dir", "ckpt_path", "plan", "trace", "export", "callbacks", "logger"}  # of the settings


def metrics_files(run: Path) -> list[Path]:
    """Return the CSV files of a run, oldest first: one for each time it was started or continued."""
    return sorted(run.glob("logs/version_*/metrics.csv"), key=lambda file: int(file.parent.name.rpartition("_")[2]))


def columns(run: Path) -> list[str]:
    """Return what a run has logged, by name, without step and epoch."""
    found = [name for file in metrics_files(run) for name in next(csv.reader(file.read_text().splitlines()), [])]
    return [name for name in dict.fromkeys(found) if name not in ("step", "epoch")]


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


def seconds_of(run: Path) -> Callable[[float], float]:
    """Return what tells the seconds of training up to a step, without validation, from the logged seconds per step."""
    steps, seconds = [0.0], [0.0]
    for step, step_s in read_curve(run, "offload/step_s"):
        seconds.append(seconds[-1] + step_s * (step - steps[-1]))
        steps.append(step)

    def at(step: float) -> float:
        last = min(max(bisect(steps, step), 1), len(steps) - 1)  # the last pace goes on after the last row
        pace = (seconds[last] - seconds[last - 1]) / (steps[last] - steps[last - 1])
        return seconds[last - 1] + pace * (step - steps[last - 1])

    return at


def plot_losses(runs: Sequence[Path], out: Path) -> Path:
    """Draw the training loss (smoothed; of one run over the raw one) and the held-out loss of one or more runs.

    Several runs are drawn by optimizer step, and where they logged their seconds per step by time as well.

    Args:
        runs: Folders of runs.
        out: The picture to write; its suffix gives the format.

    Returns:
        ``out``.

    Raises:
        ValueError: No run has a logged loss.
    """
    drawable = [run for run in runs if read_curve(run, "train/loss") or read_curve(run, "val/loss")]
    if not drawable:
        raise ValueError(f"no losses in logs/version_*/metrics.csv of {', '.join(map(str, runs))}")
    timed = len(drawable) > 1 and all(read_curve(run, "offload/step_s") for run in drawable)
    figure = new_figure((11.0, 4.4) if timed else (7.2, 4.2))
    panels = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    if len(drawable) == 1:
        _draw_run(panels[0], drawable[0], labels(drawable)[0])
    else:
        _draw_runs(figure, panels, drawable)
    for axes, label in zip(panels, ("optimizer step", "seconds of training"), strict=False):
        axes.set_xlabel(label)
        _finish(axes)
    panels[0].set_ylabel(_loss_unit(drawable))
    return save(figure, out)


def new_figure(inches: tuple[float, float]) -> Any:
    """Return an empty figure of this width and height, by object: pyplot keeps global state and may open a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, out: Path) -> Path:
    """Write a figure, with the folder it is to be in."""
    with written_file(out) as file:
        figure.savefig(file, format=out.suffix[1:])
    return out


def labels(runs: Sequence[Path]) -> list[str]:
    """Return the method of each run, with the settings or else the folder that tell it apart where methods repeat."""
    made = methods = [_method_of(run) for run in runs]
    if len(set(made)) < len(runs):
        made = [", ".join([method, *said]) for method, said in zip(methods, differing(runs), strict=True)]
    return [label if made.count(label) == 1 else f"{label} ({run.name})" for run, label in zip(runs, made, strict=True)]


def differing(runs: Sequence[Path]) -> list[list[str]]:
    """Return for each run the settings by which it differs from others, as ``lr=0.001``; of equal ones the shortest."""
    flat = [dict(_leaves(_config(run), run.name)) for run in runs]
    columns = {key: tuple(config.get(key) for config in flat) for key in sorted({k for c in flat for k in c}, key=len)}
    told: dict[tuple[str | None, ...], str] = {}
    for key, values in columns.items():
        if len(set(values)) > 1:
            told.setdefault(values, key.rpartition(".")[2])
    chosen = list(told.items())[:_TOLD_APART_BY]
    return [[f"{name}={values[place]}" for values, name in chosen] for place in range(len(runs))]


def _leaves(config: Any, of_run: str, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings by their dotted keys, without what is named after the run's folder."""
    if isinstance(config, dict):
        for name, value in config.items() if key else ((k, v) for k, v in config.items() if k not in _NOT_TRAINING):
            yield from _leaves(value, of_run, f"{key}.{name}" if key else str(name))
    elif of_run not in str(config).split("/"):
        yield key, str(config)


def _draw_run(axes: Any, run: Path, label: str) -> None:
    train, held_out = read_curve(run, "train/loss"), read_curve(run, "val/loss")
    if train:
        axes.plot(*_xy(train), color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(*_xy(_smoothed(train)), color="C0", linewidth=1.6, label=f"{label}, training")
    if held_out:
        axes.plot(*_xy(held_out), "o--", color="C0", label=f"{label}, held out", **_DOTS)
        _annotate(axes, held_out[0], (-8, 0), "right", "C0")
        _annotate(axes, held_out[-1], (8, 0), "left", "C0")
    axes.legend(frameon=False)


def _draw_runs(figure: Any, panels: Any, runs: Sequence[Path]) -> None:
    """A colour for each run, named above; the first lines are the widest, to be seen where others cover them."""
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        width = 1.4 + 0.5 * (len(runs) - 1 - number) / (len(runs) - 1) * min(len(runs), 4)
        held_out = read_curve(run, "val/loss")
        name = f"{label}: {held_out[-1][1]:.2f}" if held_out else label
        for axes, at in zip(panels, (float, seconds_of(run)), strict=False):
            train = [(at(step), loss) for step, loss in _smoothed(read_curve(run, "train/loss"))]
            axes.plot(*_xy(train), color=f"C{number}", linewidth=width, label=name)
            axes.plot(*_xy([(at(step), loss) for step, loss in held_out]), "o--", color=f"C{number}", **_DOTS)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    kinds = [
        *panels[0].plot([], [], "-", color="0.4", label="training, smoothed"),
        *panels[0].plot([], [], "o--", color="0.4", label="held out, at the end as above", **_DOTS),
    ]
    panels[0].legend(handles=kinds, frameon=False)


_DOTS = {"linewidth": 1, "markersize": 5, "markeredgecolor": "white"}


def _xy(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _smoothed(curve: Curve) -> Curve:
    width = max(1, round(len(curve) * _SMOOTHING_SHARE))
    return list(zip((step for step, _ in curve), smooth([loss for _, loss in curve], width), strict=True))


def _annotate(axes: Any, point: tuple[float, float], offset: tuple[int, int], side: str, color: str) -> None:
    place = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "center"}
    axes.annotate(f"{point[1]:.2f}", point, color=color, fontsize=9, **place)


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)


def _loss_unit(runs: Sequence[Path]) -> str:
    data = {str((_config(run).get("data") or {}).get("_target_")).rpartition(".")[2] for run in runs}
    return "loss" if data & _PER_EXAMPLE else "loss (nats per token)"


def _method_of(run: Path) -> str:
    """Return the method's name from the run's configuration, else the folder's name."""
    return str(_config(run).get("method", {}).get("name", run.name))


def _config(run: Path) -> dict[str, Any]:
    import yaml

    config = run / CONFIG
    return dict(yaml.safe_load(config.read_text())) if config.is_file() else {}
