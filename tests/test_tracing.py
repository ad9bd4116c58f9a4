"""The callback in real runs: two files and a table, and the same bits with it as without."""

from __future__ import annotations

import json
import logging
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_offload import OffloadTimeline, ZO2OffloadStrategy
from lightning_offload.memory.ledger import Span
from lightning_offload.timeline import LaneUse, Prediction, StepUse
from tests.lit import Lit, assert_equal_modules, fit, offload
from tests.streams import thread_lanes
from tests.test_parity import WritesWeights
from tests.test_trainer_on_streams import Streamed

pytestmark = pytest.mark.timeout(120)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return [event for event in found if event["ph"] == "X" and event["name"].split(" ")[0] == kind]


def offloaded_bytes(strategy: Any) -> int:
    return sum(t.parameter.numel() * t.parameter.element_size() for t in strategy.engine.host.trained)


def test_two_steps_of_a_fit_are_traced_and_every_byte_is_in_the_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = offload()
    with caplog.at_level(logging.INFO):
        fit(Lit(), strategy, callbacks=[OffloadTimeline(tmp_path / "new", first_step=4, steps=2)])
    folder = tmp_path / "new"
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    weights = events(folder, "weights")
    moved = offloaded_bytes(strategy)
    assert sum(event["args"]["bytes"] for event in weights) == 2 * moved
    assert {event["args"]["unit"] for event in weights} == {"net.embed", "net.norm", "net.head"} | {
        f"net.blocks.{at}" for at in range(3)
    }
    assert len(events(folder, "step")) >= 2 * 6  # a host step per unit
    table = caplog.messages[-1]
    assert table.startswith("one step")
    assert [line.split()[-1] for line in table.splitlines() if line.startswith("host to device, bytes")] == [
        f"{moved:,}"
    ]
    assert "wall time, ms" in table
    assert "device peak" not in table  # nothing is known of it on a CPU


@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_the_same_bits_and_nothing_left_behind(tmp_path: Path, accumulate_grad_batches: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate_grad_batches, "gradient_clip_val": 0.05}
    traced, plain = Lit(dropout=0.1, recompute="reentrant"), Lit(dropout=0.1, recompute="reentrant")
    strategy = offload()
    fit(plain, offload(), **options)
    fit(traced, strategy, callbacks=[OffloadTimeline(tmp_path, first_step=2)], **options)
    assert_equal_modules(traced, plain)
    assert strategy.engine.lanes.ledger.spans is None
    assert sum(event["args"]["bytes"] for event in events(tmp_path, "weights")) == 2 * offloaded_bytes(strategy)
    assert strategy._window.weights == ()  # it is no reason to wait for weights


def bytes_of(table: str, label: str) -> int:
    (row,) = [line for line in table.splitlines() if line.startswith(f"{label}, bytes")]
    return int(row.split()[-1].replace(",", ""))


def test_on_lanes_side_by_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, traced = Lit(tied=True), Lit(tied=True)
    fit(plain, offload())
    with thread_lanes() as lanes, caplog.at_level(logging.INFO):
        strategy = Streamed(min_numel=0)
        strategy.lanes = lanes
        fit(traced, strategy, callbacks=[OffloadTimeline(tmp_path)])
        assert not lanes.streams.clock_kept
    assert_equal_modules(traced, plain)
    moved = offloaded_bytes(strategy)
    assert sum(event["args"]["bytes"] for event in events(tmp_path, "weights")) == 2 * moved
    assert bytes_of(caplog.messages[-1], "host to device") == moved


def test_what_belongs_to_no_step_is_not_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that others may write are taken over between steps."""
    with caplog.at_level(logging.INFO):
        fit(Lit(), offload(), callbacks=[OffloadTimeline(tmp_path)])
        expected = bytes_of(caplog.messages[-1], "device to host")
        strategy = offload()
        fit(Lit(), strategy, callbacks=[OffloadTimeline(tmp_path), WritesWeights()])
    assert strategy.engine.lanes.ledger.moved("d2h", "adopt") > 0
    assert bytes_of(caplog.messages[-1], "device to host") == expected


def test_prediction_is_drawn_above_and_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    use = StepUse({"h2d": LaneUse(1000, 0.001)}, 0.5)
    predicted = Prediction([Span("h2d", "weights", 1, 0.0, 0.001, 1000)], use, ["net.embed"])
    with caplog.at_level(logging.INFO):
        fit(Lit(), offload(), callbacks=[OffloadTimeline(tmp_path, predicted=predicted)], max_steps=6)
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in found if e["name"] == "process_name"] == ["predicted", "measured"]
    row = next(line for line in caplog.messages[-1].splitlines() if line.startswith("host to device, bytes"))
    assert row.split()[4] == "1,000"
    assert row.split()[-1].startswith("+")


def test_a_run_that_ends_within_the_trace_writes_what_there_is(tmp_path: Path) -> None:
    strategy = offload()
    fit(Lit(), strategy, callbacks=[OffloadTimeline(tmp_path, steps=100)], max_steps=5)
    assert sum(event["args"]["bytes"] for event in events(tmp_path, "weights")) == 3 * offloaded_bytes(strategy)


def test_a_run_too_short_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Lit(), offload(), callbacks=[OffloadTimeline(tmp_path, first_step=7)], max_steps=6)
    assert "the run ended after 6 steps, before step first_step=7 was done" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_without_an_engine_it_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Lit(), callbacks=[OffloadTimeline(tmp_path)])
    assert caplog.text.count("nothing is offloaded, so there is no timeline") == 1
    assert list(tmp_path.iterdir()) == []


class BreaksIn(Lit):
    """Fails in the middle of the trace."""

    def one(self, batch: torch.Tensor) -> torch.Tensor:
        if len(self.losses) == 3:
            raise OSError("the data is gone")
        return super().one(batch)


def test_an_exception_ends_the_trace(tmp_path: Path) -> None:
    strategy = offload()
    with pytest.raises(OSError, match="data is gone"):
        fit(BreaksIn(), strategy, callbacks=[OffloadTimeline(tmp_path)])
    assert strategy.engine.lanes.ledger.spans is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "least"), [("first_step", 1), ("steps", 0)])
def test_nonsense_is_refused(name: str, least: int) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be an integer >= {least}, got {least - 1}"):
        OffloadTimeline("out", **{name: least - 1})


def test_zo2_is_drawn_unit_by_unit(tmp_path: Path) -> None:
    strategy = ZO2OffloadStrategy(min_numel=0, seed=0)
    module = Lit(make_optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1e-3))
    fit(module, strategy, callbacks=[OffloadTimeline(tmp_path, first_step=3, steps=2)])
    engine = strategy.engine
    assert engine is not None
    order = {name: at for at, name in enumerate(engine.unit_names)}
    streamed = {berth.unit.name for berth in engine.streaming.streamed}
    traced = {kind: events(tmp_path, kind) for kind in ("update", "l+", "l-", "weights")}
    for kind in ("l+", "l-"):
        units = [name for name, _ in groupby(event["args"]["unit"] for event in traced[kind])]
        assert [order[name] for name in units] == 2 * sorted(order.values()), kind
    assert {event["args"]["unit"] for event in traced["weights"]} == streamed
    assert {event["args"]["unit"] for event in traced["update"]} == set(order)
