from __future__ import annotations

import threading
import time

import pytest

from lightning_offload.memory.ledger import Ledger, Total


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
