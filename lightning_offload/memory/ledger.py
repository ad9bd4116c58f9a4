"""What moved when: bytes and seconds of every lane operation, summed as they happen, and one by one in a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

Instant = Callable[[], float | None]
"""Tells a time in seconds on the ledger's clock, once it is known."""


@dataclass(frozen=True)
class Span:
    """One operation of a trace.

    Attributes:
        lane: ``compute``, ``h2d``, ``d2h``, ``host`` or ``wait``.
        kind: What it did: ``forward``, ``backward``, ``gradients``, ``step``, ``weights``, ...
        order: Place of its unit in the order of execution (the ``priority`` of the lane call); -1 where it has none.
        start_s: When it began, in seconds on a clock that all lanes share.
        end_s: When it was done.
        bytes: What it moved.
    """

    lane: str
    kind: str
    order: int
    start_s: float
    end_s: float
    bytes: int = 0


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

    def plus(self, other: Total) -> Total:
        """Both together."""
        return Total(self.operations + other.operations, self.bytes + other.bytes, self.seconds + other.seconds)

    def since(self, before: Total) -> Total:
        """What has come to it since it was ``before``."""
        return Total(self.operations - before.operations, self.bytes - before.bytes, self.seconds - before.seconds)


@dataclass
class Ledger:
    """Totals per lane and per (lane, kind of operation), always; every operation by itself while a trace runs.

    Lanes are ``h2d``, ``d2h`` and ``host``; ``wait`` holds the time the main thread spent waiting for a copy to be
    *issued* (never for the device, see ``engine.md``). ``compute`` is counted in traces only, between marks.
    Thread-safe: copies are timed by the worker that issues them.

    Attributes:
        lanes: Totals per lane.
        kinds: Totals per (lane, kind).
        spans: The operations of the running trace; ``None`` while there is none.
        on_trace: Told when a trace starts and when it has stopped.
    """

    lanes: dict[str, Total] = field(default_factory=dict)
    kinds: dict[tuple[str, str], Total] = field(default_factory=dict)
    spans: list[Span] | None = None
    on_trace: Callable[[bool], None] | None = field(default=None, repr=False)
    _marks: list[tuple[str, int, Instant]] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @staticmethod
    def clock() -> float:
        """Now, in seconds, on the clock of every span that is measured."""
        return perf_counter()

    def record(self, lane: str, kind: str, nbytes: int, start_s: float, end_s: float, order: int = -1) -> None:
        """Count one operation of ``nbytes`` bytes that lasted from ``start_s`` to ``end_s``; see ``Span``."""
        with self._lock:
            self.lanes.setdefault(lane, Total()).add(nbytes, end_s - start_s)
            self.kinds.setdefault((lane, kind), Total()).add(nbytes, end_s - start_s)
            if self.spans is not None:
                self.spans.append(Span(lane, kind, order, start_s, end_s, nbytes))

    @contextmanager
    def timed(self, lane: str, kind: str, nbytes: int, order: int = -1) -> Iterator[None]:
        """Time the body on the host clock and count it."""
        start_s = self.clock()
        yield
        self.record(lane, kind, nbytes, start_s, self.clock(), order)

    def mark(self, kind: str, order: int, stamp: Callable[[], Instant]) -> None:
        """See ``Lanes.mark``; ``stamp`` takes the time, and is called only where the mark says something new."""
        if self.spans is None:
            return
        with self._lock:
            if not self._marks or self._marks[-1][:2] != (kind, order):
                self._marks.append((kind, order, stamp()))

    @property
    def marked(self) -> tuple[str, int]:
        """Kind and order of the last mark; an empty kind where compute is not known to do anything."""
        return self._marks[-1][:2] if self._marks else ("", -1)

    def start_trace(self) -> None:
        """From here on keep every operation; nothing should be in flight."""
        if self.on_trace is not None:
            self.on_trace(True)
        with self._lock:
            self.spans, self._marks = [], []

    def stop_trace(self) -> list[Span]:
        """The operations since ``start_trace`` by their start; compute up to the last mark. Nothing is in flight."""
        self._close_marks()
        with self._lock:
            spans, self.spans, self._marks = self.spans or [], None, []
        if self.on_trace is not None:
            self.on_trace(False)
        return sorted(spans, key=lambda span: span.start_s)

    def _close_marks(self) -> None:
        for (kind, order, started), (_, _, ended) in pairwise(self._marks):
            start_s, end_s = started(), ended()
            if kind and start_s is not None and end_s is not None:
                self.record("compute", kind, 0, start_s, end_s, order)

    def moved(self, lane: str, kind: str | None = None) -> int:
        """Bytes moved so far on ``lane`` (only operations of ``kind``, if given)."""
        with self._lock:
            total = self.lanes.get(lane) if kind is None else self.kinds.get((lane, kind))
            return total.bytes if total else 0

    def snapshot(self) -> dict[str, Total]:
        """A copy of the totals per lane, to be subtracted from a later one."""
        with self._lock:
            return {lane: Total(t.operations, t.bytes, t.seconds) for lane, t in self.lanes.items()}
