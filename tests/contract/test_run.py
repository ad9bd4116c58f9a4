"""The strict comparison, on outcomes made up here; the runs themselves need Lightning's source tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.contract.run import STOCK, STRATEGIES, Refusal, problems, read, refusals, row

STOCK_OUTCOMES = {"a.py::one": "passed", "a.py::two[1]": "passed", "a.py::two[2]": "passed", "a.py::bad": "Error: x"}
LISTED = [Refusal("why", ["full_offload"], ["a.py::two[*]"]), Refusal("alone", [STOCK], ["a.py::bad"])]


def test_what_is_listed_fails_and_nothing_else() -> None:
    outcomes = {**STOCK_OUTCOMES, "a.py::two[1]": "ValueError: refused", "a.py::two[2]": "ValueError: refused"}
    assert problems("full_offload", outcomes, LISTED, STOCK_OUTCOMES) == []
    assert problems(STOCK, STOCK_OUTCOMES, LISTED, STOCK_OUTCOMES) == []
    assert row("full_offload", outcomes, STOCK_OUTCOMES).split() == ["full_offload", "1", "1", "2", "0"]


@pytest.mark.parametrize(
    ("strategy", "changes", "problem"),
    [
        ("full_offload", {}, "passes, but is listed (why): a.py::two[1]"),
        ("full_offload", {"a.py::two[1]": "E: x", "a.py::one": "E: y\nz"}, "fails: a.py::one: E: y"),
        ("lsp_offload", {"a.py::two[1]": "E: x"}, "fails: a.py::two[1]: E: x"),
        (STOCK, {"a.py::one": "E: y"}, "fails: a.py::one: E: y"),
        (STOCK, {"a.py::bad": "passed"}, "passes, but is listed (alone): a.py::bad"),
    ],
)
def test_each_difference_is_an_error(strategy: str, changes: dict[str, str], problem: str) -> None:
    assert problem in problems(strategy, {**STOCK_OUTCOMES, **changes}, LISTED, STOCK_OUTCOMES)


def test_a_pattern_that_names_no_test_is_an_error() -> None:
    assert problems("full_offload", {"a.py::one": "passed"}, LISTED, {}) == ["names no test: a.py::two[*]"]


def test_a_failure_after_a_test_that_passed_counts(tmp_path: Path) -> None:
    lines = [["x/tests_pytorch/a.py::one", "passed", ""], ["x/tests_pytorch/a.py::one", "failed", "E: left a thread"]]
    lines += [["x/tests_pytorch/a.py::two", "failed", "E: no"], ["x/tests_pytorch/a.py::two", "passed", ""]]
    path = tmp_path / "outcomes.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read(path) == {"a.py::one": "E: left a thread", "a.py::two": "E: no"}


def test_the_list_has_a_reason_for_every_line() -> None:
    listed = refusals(Path(__file__).with_name("expected.toml"))
    assert listed
    for refusal in listed:
        assert refusal.reason
        assert refusal.tests
        assert {*refusal.strategies} <= {STOCK, *STRATEGIES}
