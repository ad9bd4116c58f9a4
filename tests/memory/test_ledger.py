from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from lightning_offload.memory.ledger import Instant, Ledger, Span, Total


def test_totals_per_lane_and_per_kind() -> None:
    ledger = Ledger()
    ledger.record("d2h", "gradients", 8, 1.0, 1.5)
    ledger.record("d2h", "verdict", 2, 1.5, 1.75)
    ledger.record("h2d", "weights", 4, 0.0, 1.0)
    assert ledger.lanes == {"d2h": Total(2, 10, 0.75), "h2d": Total(1, 4, 1.0)}
    assert ledger.kinds[("d2h", "verdict")] == Total(1, 2, 0.25)
    assert (ledger.moved("d2h"), ledger.moved("d2h", "gradients"), ledger.moved("d2h", "weights")) == (10, 8, 0)
    assert ledger.moved("host") == 0


def test_a_snapshot_stays_as_it_was() -> None:
    ledger = Ledger()
    ledger.record("host", "step", 8, 0.0, 0.5)
    before = ledger.snapshot()
    ledger.record("host", "step", 8, 0.0, 0.5)
    assert before == {"host": Total(1, 8, 0.5)}
    assert ledger.snapshot() == {"host": Total(2, 16, 1.0)}


def test_timed_counts_what_happened_and_not_what_failed() -> None:
    ledger = Ledger()
    with ledger.timed("host", "step", 3):
        pass
    with pytest.raises(ZeroDivisionError), ledger.timed("host", "step", 3):
        _ = 1 / 0
    total = ledger.lanes["host"]
    assert (total.operations, total.bytes) == (1, 3)
    assert total.seconds > 0


class Yielding(int):
    """Lets other threads run between the reading of a sum and its writing."""

    def __radd__(self, other: int) -> int:
        time.sleep(0)
        return int(self) + other


def test_many_threads_lose_no_operation() -> None:
    ledger, each, callers = Ledger(), 200, 8
    together = threading.Barrier(callers)

    def count() -> None:
        together.wait()
        for _ in range(each):
            ledger.record("host", "step", Yielding(3), 0.0, 0.0)

    threads = [threading.Thread(target=count) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.lanes["host"] == ledger.kinds[("host", "step")] == Total(each * callers, 3 * each * callers, 0.0)


# Traces.


def at(seconds: float | None) -> Callable[[], Instant]:
    return lambda: lambda: seconds


def test_a_trace_keeps_every_operation_by_its_start_and_the_totals_stay_their_sums() -> None:
    ledger = Ledger()
    ledger.record("host", "step", 8, 0.0, 0.5)  # before
    ledger.start_trace()
    ledger.record("h2d", "weights", 4, 2.0, 2.5, 7)
    ledger.record("d2h", "gradients", 2, 1.0, 1.25)
    spans = ledger.stop_trace()
    ledger.record("host", "step", 8, 3.0, 3.5)  # after
    assert spans == [Span("d2h", "gradients", -1, 1.0, 1.25, 2), Span("h2d", "weights", 7, 2.0, 2.5, 4)]
    assert ledger.spans is None
    assert ledger.stop_trace() == []
    assert ledger.lanes == {"host": Total(2, 16, 1.0), "h2d": Total(1, 4, 0.5), "d2h": Total(1, 2, 0.25)}


def test_compute_lies_between_marks() -> None:
    ledger = Ledger()
    ledger.start_trace()
    for kind, order, seconds in [("forward", 1, 0.0), ("forward", 2, 1.0), ("", -1, 3.0), ("step", -1, 4.0)]:
        ledger.mark(kind, order, at(seconds))
    assert ledger.marked == ("step", -1)
    assert ledger.stop_trace() == [Span("compute", "forward", 1, 0.0, 1.0), Span("compute", "forward", 2, 1.0, 3.0)]
    assert ledger.kinds["compute", "forward"] == Total(2, 0, 3.0)  # the last mark ends nothing
    ledger.start_trace()
    assert ledger.marked == ("", -1)
    ledger.mark("forward", 1, at(5.0))
    assert ledger.stop_trace() == []


def test_a_time_that_is_never_known_makes_no_span() -> None:
    ledger = Ledger()
    ledger.start_trace()
    for kind, seconds in [("forward", 0.0), ("backward", None), ("step", 2.0), ("", 3.0)]:
        ledger.mark(kind, 1, at(seconds))
    assert ledger.stop_trace() == [Span("compute", "step", 1, 2.0, 3.0)]


def test_the_time_is_taken_only_where_a_mark_says_something_new() -> None:
    ledger, taken = Ledger(), []

    def stamp() -> Instant:
        taken.append(0.0)
        return lambda: 0.0

    ledger.mark("forward", 1, stamp)
    assert taken == []
    ledger.start_trace()
    for order in (1, 1, 2, 2):
        ledger.mark("forward", order, stamp)
    assert len(taken) == 2


def test_who_keeps_the_clock_is_told() -> None:
    told: list[bool] = []
    ledger = Ledger(on_trace=told.append)
    ledger.start_trace()
    assert told == [True]
    ledger.stop_trace()
    assert told == [True, False]
