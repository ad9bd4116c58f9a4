"""The picture shows what the spans say, the trace is what Perfetto reads, and the table is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_offload.memory.ledger import Span
from lightning_offload.timeline import (
    PHASES,
    LaneUse,
    StepUse,
    busy_s,
    draw,
    step_starts_s,
    summary,
    unit_name,
    write_trace,
)

UNITS = ["embed", "layers.0", "layers.1", "head"]


def two_steps(slower: float = 1.0) -> list[Span]:
    """Forward, backward with gradients trailing, steps on the host, weights up; every number a round one."""
    spans, now = [], 10.0
    for _ in range(2):
        for order in (1, 2, 3, 4):
            spans.append(Span("compute", "forward", order, now, now + 1 * slower))
            now += 1 * slower
        for order in (4, 3, 2, 1):
            spans.append(Span("compute", "backward", order, now, now + 2 * slower))
            now += 2 * slower
            spans.append(Span("d2h", "gradients", order, now, now + 1, 2_000_000_000))
        spans.append(Span("compute", "step", -1, now, now + 0.5))
        now += 0.5
        for order in (1, 2, 3, 4):
            spans.append(Span("host", "step", order, now + order, now + order + 1, 28_000_000_000))
            spans.append(Span("h2d", "weights", order, now + order + 1, now + order + 2, 2_000_000_000))
        spans.append(Span("wait", "issue", -1, now, now + 1))
        now += 2
    return spans


# The picture.


def pixels(file: Path) -> set[tuple[int, int, int]]:
    from matplotlib.image import imread

    image = imread(file)
    assert image.shape[1] >= 1200  # pixels wide
    return {tuple(round(255 * float(channel)) for channel in pixel[:3]) for row in image[::3] for pixel in row[::3]}


def rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def test_picture_has_a_colour_for_each_unit_and_each_phase(tmp_path: Path) -> None:
    from lightning_offload.timeline import _unit_colors

    found = pixels(draw({"predicted": two_steps(), "measured": two_steps(1.3)}, tmp_path / "a" / "t.png", units=UNITS))
    for color in _unit_colors(4):
        assert tuple(round(255 * channel) for channel in color[:3]) in found
    assert {rgb(PHASES[kind]) for kind in ("forward", "backward", "step")} <= found


def test_many_operations_and_an_empty_timeline_beside_them(tmp_path: Path) -> None:
    many = [Span("d2h", "gradients", at % 40, at, at + 0.5, 1) for at in range(10_000)]
    assert len(pixels(draw({"predicted": [], "measured": many}, tmp_path / "t.png", title="many"))) > 40


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no operation of compute, d2h, host, h2d in the timelines measured"):
        draw({"measured": [Span("wait", "issue", -1, 0.0, 1.0)]}, tmp_path / "t.png")
    assert list(tmp_path.iterdir()) == []


def test_busy_is_the_union_of_a_lane_s_operations() -> None:
    spans = [Span("host", "step", 1, at, at + 2.0) for at in (0.0, 1.0, 5.0)] + [Span("h2d", "weights", 1, 0.0, 9.0)]
    assert busy_s(spans, "host") == 5.0
    assert busy_s([*spans, Span("host", "step", 2, 0.5, 1.5)], "host") == 5.0
    assert busy_s(spans, "d2h") == 0.0


def test_a_step_starts_where_a_forward_follows_a_step() -> None:
    assert list(step_starts_s(two_steps())) == [24.5]
    assert list(step_starts_s([])) == []


def test_units_are_named_from_one_on() -> None:
    assert [unit_name(order, UNITS) for order in (-1, 0, 1, 4, 5)] == ["", "", "embed", "head", "unit 5"]


# The trace.


def test_trace_is_what_perfetto_reads(tmp_path: Path) -> None:
    timelines = {"predicted": two_steps(), "measured": two_steps(1.5)}
    content = json.loads(write_trace(timelines, tmp_path / "new" / "trace.json", units=UNITS).read_text())
    events = content["traceEvents"]
    assert content["displayTimeUnit"] == "ms"
    names: dict[tuple[int, int], str] = {}
    for event in events:
        assert event["ph"] in ("X", "M")
        assert {"name", "pid", "tid", "args"} <= event.keys()
        if event["name"] == "thread_name":
            names[event["pid"], event["tid"]] = event["args"]["name"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {1: "predicted", 2: "measured"}
    assert [names[1, tid] for tid in range(5)] == [
        "device computes (compute)",
        "device to host (d2h)",
        "host computes (host)",
        "host to device (h2d)",
        "wait",
    ]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == sum(map(len, timelines.values()))
    for event in complete:
        assert event["ts"] >= 0
        assert event["dur"] > 0
        assert (event["pid"], event["tid"]) in names


def test_trace_has_microseconds_units_bytes_and_rates(tmp_path: Path) -> None:
    spans = [Span("compute", "forward", 1, 5.0, 6.0), Span("d2h", "gradients", 2, 6.0, 6.25, 10**9)]
    spans.append(Span("h2d", "verdict", -1, 7.0, 7.0, 12))
    events = json.loads(write_trace({"m": spans}, tmp_path / "t.json", units=UNITS).read_text())["traceEvents"]
    forward, gradients, verdict = (event for event in events if event["ph"] == "X")
    assert (forward["name"], forward["ts"], forward["dur"]) == ("forward embed", 0.0, 1e6)
    assert (gradients["name"], gradients["ts"], gradients["dur"]) == ("gradients layers.0", 1e6, 0.25e6)
    assert gradients["args"] == {"unit": "layers.0", "bytes": 10**9, "GB/s": 4.0}
    assert (verdict["name"], verdict["args"]) == ("verdict", {"unit": "", "bytes": 12})


# The table.


def test_table_is_exact() -> None:
    predicted = StepUse(
        {"compute": LaneUse(0, 0.1), "d2h": LaneUse(10**9, 0.04), "h2d": LaneUse(10**9, 0.05)}, 0.4, 2**32
    )
    measured = StepUse(
        {"compute": LaneUse(0, 0.12), "d2h": LaneUse(10**9, 0.041), "h2d": LaneUse(10**9 - 7, 0.045)}, 0.44, 2**32
    )
    assert summary(predicted, measured) == "\n".join(
        [
            "one step                      predicted       measured  difference",
            "------------------------------------------------------------------",
            "device computes, busy ms         100.00         120.00     +20.0 %",
            "device to host, bytes     1,000,000,000  1,000,000,000        none",
            "device to host, busy ms           40.00          41.00      +2.5 %",
            "host to device, bytes     1,000,000,000    999,999,993          -7",
            "host to device, busy ms           50.00          45.00     -10.0 %",
            "wall time, ms                    400.00         440.00     +10.0 %",
            "device peak, GiB                   4.00           4.00      +0.0 %",
        ]
    )


def test_table_without_a_prediction_and_of_lanes_that_one_side_lacks() -> None:
    measured = StepUse({"host": LaneUse(28, 0.5)}, 1.0)
    assert summary(None, measured) == "\n".join(
        [
            "one step                predicted  measured  difference",
            "-------------------------------------------------------",
            "host computes, bytes            -        28",
            "host computes, busy ms          -    500.00",
            "wall time, ms                   -  1,000.00",
        ]
    )
    predicted = StepUse({"h2d": LaneUse(0, 0.0)}, 1.0)
    assert summary(predicted, measured).splitlines()[4:6] == [
        "host to device, bytes            0         -",
        "host to device, busy ms       0.00         -",
    ]


@pytest.mark.parametrize(("end_s", "unit", "labels"), [(0.5, "ms", {"100"}), (20.0, "s", {"5", "10"})])
def test_long_steps_are_drawn_in_seconds(
    end_s: float, unit: str, labels: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    draw({"predicted": [Span("compute", "forward", 1, 0.0, end_s)]}, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == unit
    assert labels <= {label.get_text() for label in axes.get_xticklabels()}
