"""The text of a plan: what is said, where, and in which unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from lightning_offload import words
from lightning_offload.memory.ledger import Span
from lightning_offload.planning.report import report
from lightning_offload.planning.result import THE_RUN_ITSELF, Advice, Memory, Plan
from lightning_offload.timeline import LaneUse

GIB, MIB = 1024**3, 1024**2


def made(**changed: Any) -> Plan:
    """A plan for a GPU that fits."""
    given: dict[str, Any] = {
        "model": "Net of 8.03 B parameters",
        "method": "full",
        "precision": "bf16-true",
        "hardware": "rtx4090",
        "parameters": 8_030_000_000,
        "trained": 8_030_000_000,
        "micro_batches": 1,
        "tokens": 1024,
        "unit": "tokens",
        "flops": 50 * 10**12,
        "device": Memory(
            {"activations": 2 * GIB, "weights: blocks": 15 * GIB, "crumbs": 50 * MIB, "dust": 60 * MIB}, 24 * GIB
        ),
        "host": Memory({"masters": 30 * GIB, "optimizer state": 60 * GIB}, 256 * GIB),
        "pinned": Memory({"wire and rings": 15 * GIB}, 256 * GIB),
        "step_s": 5.0,
        "bound_s": 4.0,
        "forward_s": 0.1,
        "backward_s": 0.4,
        "lanes": {"compute": LaneUse(0, 0.5), "d2h": LaneUse(16 * 10**9, 0.65), "host": LaneUse(32 * 10**10, 4.25)},
        "bottleneck": "the host's step",
    }
    return Plan(**{**given, **changed})


def on_cpu(device: Mapping[str, int], arenas: Mapping[str, int], limit_gib: float = 16) -> Plan:
    host = Memory({**arenas, THE_RUN_ITSELF: sum(device.values())}, int(limit_gib * GIB))
    return made(device=Memory(device, None), host=host, pinned=Memory({}, 0), hardware="this CPU")


def test_first_it_says_whether_it_fits_and_how_fast_it_is() -> None:
    lines = report(made()).splitlines()
    assert lines[0] == "Net of 8.03 B parameters on rtx4090"
    assert lines[1] == "method full, bf16-true, 1,024 tokens per step"
    assert lines[3].split(maxsplit=1) == [
        "fits",
        "17.11 of 24.00 GiB device memory, 90.00 of 256.00 GiB host memory",
    ]
    assert lines[4].split(maxsplit=2)[2] == (
        "5.00 s: 205 tokens/s, 10.0 TFLOP/s; no schedule takes less than 4.00 s (1.25 x)"
    )
    assert lines[5].split(maxsplit=2)[2] == "the host's step"


def test_what_is_trained_and_how_a_step_is_cut_is_said_where_it_is_unusual() -> None:
    text = report(made(trained=1_000_000, micro_batches=4, unit="samples", tokens=32))
    assert "Net of 8.03 B parameters (1.00 M trained) on rtx4090" in text
    assert "32 samples per step, in 4 micro-batches" in text


def test_rows_go_from_the_largest_and_the_small_ones_are_one() -> None:
    lines = report(made()).splitlines()
    at = lines.index(next(line for line in lines if line.startswith("device memory ")))
    assert [line.split("  ")[1] for line in lines[at + 1 : at + 4]] == ["weights: blocks", "activations", "the rest"]
    assert lines[at + 1].split()[-3:] == ["15.00", "88", "%"]


def test_numbers_stand_below_each_other() -> None:
    lines = [line for line in report(made()).splitlines() if line.endswith("%") and "GB" not in line]
    assert len(lines) >= 5
    assert len({len(line) for line in lines}) == 1


def test_small_models_are_shown_in_mib() -> None:
    text = report(on_cpu({"activations": 66 * MIB}, {"masters": 7 * MIB}))
    assert "fits         73.0 MiB of 16.00 GiB memory" in text
    assert "  activations                               66.0        90 %" in text


def test_a_cpu_has_one_memory_and_no_link() -> None:
    text = report(on_cpu({"activations": 3 * GIB}, {"masters": GIB}))
    assert "4.00 of 16.00 GiB memory" in text
    for word in ("device", THE_RUN_ITSELF, "page-locked", "no schedule", "to host"):
        assert word not in text, word


@pytest.mark.parametrize("method", ["none", "full"])
def test_compute_is_whatever_the_device_does_and_traffic_is_no_capacity(method: str) -> None:
    lines = [" ".join(line.split()) for line in report(made(method=method)).splitlines()]
    assert "forward, backward, steps on device 500 ms 10 %" in lines
    assert "the host's optimizer step 4.25 s 85 % 320 GB moved through host memory" in lines


@pytest.mark.parametrize(
    "changed",
    [
        {"pinned": Memory({"wire and rings": 15 * GIB}, GIB)},
        {"pinned": Memory({}, GIB), "spans": (Span("host", "gradients pageable", 0, 0.0, 0.1),)},
    ],
)
def test_what_cannot_be_page_locked_is_said(changed: dict[str, Any]) -> None:
    said = "  not all that is copied is page-locked (1.00 GiB at most): the host's worker copies the rest, slower"
    assert said in report(made(**changed)).splitlines()
    assert "not all that is copied" not in report(made(spans=(Span("host", "step", 0, 0.0, 0.1),)))


def test_what_is_missing_and_the_way_out_come_before_the_tables() -> None:
    advice = Advice(("smaller micro-batches", "bf16"), ("data.batch_size=4", "precision=bf16-true"), 3 * GIB, 0, 6.5)
    text = report(made(device=Memory({"activations": 25 * GIB}, 24 * GIB), advice=(advice,)))
    assert "does NOT fit 1.00 GiB of device memory missing (takes 25.00 of 24.00 GiB)" in text
    assert "fits with    smaller micro-batches and bf16: 3.00 GiB less device memory, 6.50 s per step" in text
    assert "data.batch_size=4 precision=bf16-true" in text
    assert text.index("fits with") < text.index("activations")
    assert "device memory                              25.00 GiB of 24.00 GiB: too much" in text


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"device": Memory({"weights: blocks": 25 * GIB}, 24 * GIB)}, "weights alone are 25.00 GiB"),
        ({"device": Memory({"activations": 25 * GIB}, 24 * GIB)}, "shorter sequences"),
        ({"host": Memory({"masters": 300 * GIB}, 256 * GIB)}, "more host memory"),
    ],
)
def test_without_a_way_out_it_says_why(changed: dict[str, Any], says: str) -> None:
    assert says in report(made(**changed))


def test_methods_are_compared_in_one_table() -> None:
    other = made(method="none", device=Memory({"weights": 100 * GIB}, 24 * GIB), host=Memory({}, 256 * GIB), step_s=0.5)
    text = report(made(others=(other,)))
    head, *rows = text.split("\n\n")[2].splitlines()
    assert head.split() == ["method", "device", "GiB", "host", "GiB", "step", "tokens/s"]
    assert rows[0].split() == ["full", "17.11", "90.00", "5.00", "s", "205", "fits"]
    assert rows[1].split() == ["none", "100.00", "0.00", "500", "ms", "2,048", "does", "NOT", "fit"]


def test_the_brief_one_keeps_the_verdict_only() -> None:
    plan = made(notes=("something unusual",))
    brief, whole = report(plan, brief=True), report(plan)
    assert whole.startswith(brief)
    assert plan.brief() == brief
    assert "something unusual" in whole
    assert "something unusual" not in brief
    assert "activations" not in brief


def test_lines_are_not_long_and_nothing_is_lost() -> None:
    note = "word " * 60 + "end"
    lines = report(replace(made(notes=(note,)), bottleneck=note)).splitlines()
    assert max(map(len, lines)) <= 110
    assert " ".join(" ".join(lines).split()).count("word " * 60 + "end") == 2


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.count(1_918_560), "1.92 M"),
        (words.count(174_604_000_000), "175 B"),
        (words.count(999), "999"),
        (words.seconds(0.00133), "1.33 ms"),
        (words.seconds(1234.5), "1,234 s"),
        (words.flop_rate(6.3e10), "63.0 GFLOP/s"),
        (words.gigabytes(5.36e7), "53.6 MB"),
        (words.size_of_limit(134 * MIB, 22 * GIB), "134.0 MiB of 22.00 GiB"),
        (words.size_of_limit(3 * GIB, None), "3.00 GiB"),
        (words.size(GIB - 1), "1.00 GiB"),
    ],
)
def test_amounts_are_said_in_the_unit_that_reads_best(said: str, expected: str) -> None:
    assert said == expected
