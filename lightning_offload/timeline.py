"""What every lane did, and when: as a picture, as a trace for Perfetto, and as a table against the prediction."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from lightning_offload.memory.budget import GIB
from lightning_offload.memory.ledger import Span
from lightning_offload.writing import written_file

LANES = {"compute": "device computes", "d2h": "device to host", "host": "host computes", "h2d": "host to device"}
"""The lanes from top to bottom, and what a reader calls them."""

GREY = "#9a9a9a"
_PALE, _DARK, _WARM = "#d9e6f2", "#33506e", "#c8743a"
PHASES = {"forward": _PALE, "backward": _DARK, "step": _WARM, "l+": _PALE, "l-": _DARK, "update": _WARM}
"""Colours of the strip above the device's row; the last three are zo2's."""

_ROW, _STRIP = 0.8, 0.26  # heights, in rows
_LABELLED = 8  # units that the colour scale has room to name
_IN_SECONDS_S = 5  # from here on the axis counts seconds
_SLIVER = 0.003  # share of the picture's width below which a bar has no white edge


@dataclass(frozen=True)
class LaneUse:
    """What one lane did in one step.

    Attributes:
        bytes: What it moved: over the link, or through host memory.
        busy_s: Seconds in which it worked.
    """

    bytes: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class StepUse:
    """What one step costs.

    Attributes:
        lanes: By lane.
        step_s: Wall time from one step to the next.
        device_peak_bytes: Most device memory taken at once, by torch's allocator and by CUDA itself; ``None`` where
            nothing is known of it.
    """

    lanes: Mapping[str, LaneUse]
    step_s: float
    device_peak_bytes: int | None = None


@dataclass(frozen=True)
class Prediction:
    """What a plan expects of a few steps.

    Attributes:
        spans: Its operations.
        use: What one of its steps costs.
        units: Names of the units in the order of execution.
        union: Of meft: the part of a layer's rows for which bytes are expected.
    """

    spans: Sequence[Span]
    use: StepUse
    units: Sequence[str] = field(default=())
    union: float | None = None


def summary(predicted: StepUse | None, measured: StepUse) -> str:
    """The table of one step, predicted against measured: bytes to the last one, times with their difference."""
    steps = (predicted, measured)
    rows = [("one step", "predicted", "measured", "difference")]
    for lane, label in LANES.items():
        uses = [step.lanes.get(lane) if step is not None else None for step in steps]
        if uses == [None, None]:
            continue
        if lane != "compute":
            rows.append(_row(f"{label}, bytes", *(None if use is None else use.bytes for use in uses)))
        rows.append(_row(f"{label}, busy ms", *(None if use is None else use.busy_s * 1e3 for use in uses)))
    rows.append(_row("wall time, ms", *(None if step is None else step.step_s * 1e3 for step in steps)))
    peaks = [None if step is None else step.device_peak_bytes for step in steps]
    if peaks != [None, None]:
        rows.append(_row("device peak, GiB", *(None if peak is None else peak / GIB for peak in peaks)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _row(label: str, predicted: float | None = None, measured: float | None = None) -> tuple[str, str, str, str]:
    cells = [
        "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
        for value in (predicted, measured)
    ]
    return label, cells[0], cells[1], _difference(predicted, measured)


def _difference(predicted: float | None, measured: float | None) -> str:
    """Bytes differ by a count, times by a share."""
    if predicted is None or measured is None:
        return ""
    if isinstance(measured, int):
        return "none" if predicted == measured else f"{measured - predicted:+,}"
    return f"{100 * (measured / predicted - 1):+.1f} %" if predicted else ""


def write_trace(timelines: Mapping[str, Sequence[Span]], out: Path, *, units: Sequence[str] = ()) -> Path:
    """Write the JSON that https://ui.perfetto.dev and ``chrome://tracing`` open.

    One process per timeline, one thread per lane; every timeline starts at zero.

    Args:
        timelines: Spans by the name of their timeline (``predicted``, ``measured``).
        out: The file to write.
        units: Names of the units in the order of execution: ``Span.order`` 1 is the first.

    Returns:
        ``out``.
    """
    events: list[dict[str, Any]] = []
    for pid, (name, spans) in enumerate(timelines.items(), start=1):
        lanes = _lanes_of(spans)
        events += _named("process", pid, 0, name, pid)
        for tid, lane in enumerate(lanes):
            events += _named("thread", pid, tid, f"{LANES[lane]} ({lane})" if lane in LANES else lane, tid)
        start_s = min((span.start_s for span in spans), default=0.0)
        events += [_event(span, pid, lanes.index(span.lane), start_s, units) for span in spans]
    with written_file(out) as file:
        file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return out


def _lanes_of(spans: Sequence[Span]) -> list[str]:
    found = {span.lane for span in spans}
    return [lane for lane in LANES if lane in found] + sorted(found - LANES.keys())


def _named(what: str, pid: int, tid: int, name: str, place: int) -> list[dict[str, Any]]:
    common = {"ph": "M", "pid": pid, "tid": tid}
    return [
        {"name": f"{what}_name", "args": {"name": name}, **common},
        {"name": f"{what}_sort_index", "args": {"sort_index": place}, **common},
    ]


def _event(span: Span, pid: int, tid: int, origin_s: float, units: Sequence[str]) -> dict[str, Any]:
    unit, seconds = unit_name(span.order, units), span.end_s - span.start_s
    args: dict[str, Any] = {"unit": unit, "bytes": span.bytes}
    if span.bytes and seconds > 0:
        args["GB/s"] = round(span.bytes / seconds / 1e9, 3)
    return {
        "name": f"{span.kind} {unit}".strip(),
        "cat": span.lane,
        "ph": "X",
        "ts": (span.start_s - origin_s) * 1e6,
        "dur": seconds * 1e6,
        "pid": pid,
        "tid": tid,
        "args": args,
    }


def unit_name(order: int, units: Sequence[str]) -> str:
    """The name of the unit at place ``order`` (from 1), its number where names are not known; empty for none."""
    if order < 1:
        return ""
    return units[order - 1] if order <= len(units) else f"unit {order}"


def busy_s(spans: Sequence[Span], lane: str) -> float:
    """Seconds in which ``lane`` did anything."""
    total, until_s = 0.0, float("-inf")
    for span in sorted((span for span in spans if span.lane == lane), key=lambda span: span.start_s):
        total += max(span.end_s - max(span.start_s, until_s), 0.0)
        until_s = max(until_s, span.end_s)
    return total


def step_starts_s(spans: Sequence[Span]) -> Iterator[float]:
    """Where a forward follows an optimizer step, on the clock of ``spans``."""
    compute = sorted((span for span in spans if span.lane == "compute"), key=lambda span: span.start_s)
    for before, after in pairwise(compute):
        if before.kind == "step" and after.kind != "step":
            yield after.start_s


def draw(timelines: Mapping[str, Sequence[Span]], out: Path, *, units: Sequence[str] = (), title: str = "") -> Path:
    """Draw what each lane did: the same picture for a prediction and for a measurement.

    Args:
        timelines: Spans by the name of their timeline, drawn one below the other from a common zero.
        out: The picture to write; its suffix gives the format.
        units: Names of the units in the order of execution: ``Span.order`` 1 is the first.
        title: What the run was.

    Returns:
        ``out``.

    Raises:
        ValueError: There is nothing to draw.
    """
    # by object: pyplot would keep figures in global state and could open a window
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(span.lane in LANES for spans in timelines.values() for span in spans):
        raise ValueError(f"no operation of {', '.join(LANES)} in the timelines {', '.join(timelines) or '(none)'}")
    heights = [*[2.3] * len(timelines), 0.3]
    figure = Figure(figsize=(12, sum(heights) + 0.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    count = max(len(units), *(span.order for spans in timelines.values() for span in spans), 1)
    colors = _unit_colors(count)
    panels: list[Any] = []
    for row, (name, spans) in enumerate(timelines.items()):
        panels.append(figure.add_subplot(grid[row], sharex=panels[0] if panels else None))
        _draw_panel(panels[-1], name, [span for span in spans if span.lane in LANES], colors)
        panels[-1].tick_params(labelbottom=row == len(timelines) - 1)
    extent_s = max(_extent_s(spans) for spans in timelines.values())
    panels[0].set_xlim(0, extent_s * 1e3)
    panels[-1].set_xlabel("s" if extent_s >= _IN_SECONDS_S else "ms")
    if extent_s >= _IN_SECONDS_S:
        panels[-1].xaxis.set_major_formatter(lambda ms, _: f"{ms / 1e3:g}")
    kinds = {span.kind for spans in timelines.values() for span in spans if span.lane == "compute"}
    _draw_legend(figure.add_subplot(grid[-1]), colors, units, kinds)
    if title:
        figure.suptitle(title, fontsize=12)
    with written_file(out) as file:
        figure.savefig(file, format=out.suffix[1:])
    return out


def _extent_s(spans: Sequence[Span]) -> float:
    drawn = [span for span in spans if span.lane in LANES]
    return max((s.end_s for s in drawn), default=0.0) - min((s.start_s for s in drawn), default=0.0)


def _unit_colors(count: int) -> list[Any]:
    """One colour per unit, from dark (first) to light (last), short of the ends that vanish on paper."""
    from matplotlib import colormaps

    scale = colormaps["plasma"]
    return [scale(0.02 + 0.9 * (at / max(count - 1, 1))) for at in range(count)]


def _draw_panel(axes: Any, name: str, spans: Sequence[Span], colors: Sequence[Any]) -> None:
    origin_s, extent_s = min((span.start_s for span in spans), default=0.0), _extent_s(spans)
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
    for row, lane in enumerate(LANES):
        own = [span for span in spans if span.lane == lane]
        bars = [((span.start_s - origin_s) * 1e3, (span.end_s - span.start_s) * 1e3) for span in own]
        faces = [colors[span.order - 1] if span.order > 0 else GREY for span in own]
        edges = ["white" if ms > _SLIVER * extent_s * 1e3 else face for (_, ms), face in zip(bars, faces, strict=True)]
        axes.broken_barh(bars, (row - _ROW / 2, _ROW), facecolors=faces, edgecolors=edges, linewidth=0.4)
        axes.text(
            1.006, row, _use(own, lane, extent_s), transform=axes.get_yaxis_transform(), va="center", fontsize=8.5
        )
    _draw_phases(axes, [span for span in spans if span.lane == "compute"], origin_s, extent_s)
    for start_s in step_starts_s(spans):
        at = (start_s - origin_s) * 1e3
        axes.axvline(at, color="black", linewidth=1, linestyle=(0, (4, 3)))
        place = {"xycoords": axes.get_xaxis_transform(), "xytext": (0, 2), "textcoords": "offset points"}
        axes.annotate("next step", (at, 1), **place, fontsize=8, ha="center")
    axes.set_yticks(range(len(LANES)), list(LANES.values()), fontsize=9)
    axes.set_ylim(len(LANES) - 0.45, -0.5 - _STRIP - 0.08)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_phases(axes: Any, compute: Sequence[Span], origin_s: float, extent_s: float) -> None:
    """The strip that says forward, backward or step above the device's row."""
    middle = -_ROW / 2 - _STRIP / 2 - 0.04
    for kind, group in groupby(sorted(compute, key=lambda span: span.start_s), key=lambda span: span.kind):
        spans = list(group)
        start_ms, end_ms = (spans[0].start_s - origin_s) * 1e3, (spans[-1].end_s - origin_s) * 1e3
        color = PHASES.get(kind, GREY)
        axes.broken_barh([(start_ms, end_ms - start_ms)], (middle - _STRIP / 2, _STRIP), facecolors=color)
        if (end_ms - start_ms) / 1e3 > 0.07 * extent_s:
            ink = "white" if color == _DARK else "black"
            axes.text((start_ms + end_ms) / 2, middle, kind, ha="center", va="center", fontsize=7.5, color=ink)


def _use(spans: Sequence[Span], lane: str, extent_s: float) -> str:
    """Share of the time in which the lane was busy, and what it moved."""
    busy = busy_s(spans, lane)
    share = 100 * busy / extent_s if extent_s else 0.0
    text = f"{share:.{0 if share >= 1 or not share else 1}f} % busy"
    moved = sum(span.bytes for span in spans)
    if moved and busy:
        rate = f"{moved / busy / 1e9:.3g} GB/s"
        amount = f"{moved / 1e9:.3g} GB" if moved >= 1e9 else f"{moved / 1e6:.3g} MB"
        text += f"\n{rate} of memory" if lane == "host" else f"\n{amount}, {rate}"
    return text


def _draw_legend(axes: Any, colors: Sequence[Any], units: Sequence[str], kinds: Collection[str]) -> None:
    """The scale of the units in the order in which a forward runs them, and what the other colours are."""
    width = 0.64 / len(colors)
    axes.broken_barh([(at * width, width) for at in range(len(colors))], (0, 1), facecolors=colors)
    places = list(range(0, len(colors), -(-len(colors) // _LABELLED)))
    places[-1] = max(len(colors) - 1, places[-1])
    axes.set_xticks(
        [(at + 0.5) * width for at in places], [_short(unit_name(at + 1, units)) for at in places], fontsize=8
    )
    labels = {color: kind for kind, color in PHASES.items() if kind in kinds}  # of one colour the last: zo2's update
    for place, (color, label) in enumerate({GREY: "no unit", **labels}.items()):
        axes.broken_barh([(0.67 + 0.09 * place, 0.015)], (0, 1), facecolors=color)
        axes.text(0.692 + 0.09 * place, 0.5, label, va="center", fontsize=8.5)
    axes.set_yticks([0.5], ["units, first to last"], fontsize=9)
    axes.set_xlim(0, 1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _short(name: str) -> str:
    """The last part of a module's path, with the part before where that is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])
