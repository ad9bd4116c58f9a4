"""What moved when: bytes and seconds of every lane operation, summed as they happen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class Total:
    """Sums over operations: how many, how many bytes, how long."""

    operations: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """Count one operation."""
        self.operations += 1
        self.bytes += nbytes
        self.seconds += seconds


@dataclass
class Ledger:
    """Totals per lane and per (lane, kind of operation).

    Lanes are ``h2d``, ``d2h`` and ``host``; ``wait`` holds the time the main thread spent waiting for a copy to be
    *issued* (never for the device, see ``engine.md``). Thread-safe: copies are timed by the worker that issues them.
    """

    lanes: dict[str, Total] = field(default_factory=dict)
    kinds: dict[tuple[str, str], Total] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def record(self, lane: str, kind: str, nbytes: int, seconds: float) -> None:
        """Count one operation of ``nbytes`` bytes that took ``seconds``."""
        with self._lock:
            self.lanes.setdefault(lane, Total()).add(nbytes, seconds)
            self.kinds.setdefault((lane, kind), Total()).add(nbytes, seconds)

    @contextmanager
    def timed(self, lane: str, kind: str, nbytes: int) -> Iterator[None]:
        """Time the body on the host clock and count it."""
        start = perf_counter()
        yield
        self.record(lane, kind, nbytes, perf_counter() - start)

    def moved(self, lane: str, kind: str | None = None) -> int:
        """Bytes moved so far on ``lane`` (only operations of ``kind``, if given)."""
        with self._lock:
            total = self.lanes.get(lane) if kind is None else self.kinds.get((lane, kind))
            return total.bytes if total else 0

    def snapshot(self) -> dict[str, Total]:
        """A copy of the totals per lane, to be subtracted from a later one."""
        with self._lock:
            return {lane: Total(t.operations, t.bytes, t.seconds) for lane, t in self.lanes.items()}
