"""A device made of threads: each copy lane is a thread with a queue, random pauses, and gates that a test holds."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.asynchronous import AsyncLanes, Marker
from lightning_offload.memory.lanes import CopyLane, copy_all, host_instant, lane_context
from lightning_offload.memory.ledger import Instant


@dataclass(eq=False)
class ThreadMarker:
    """Reached when its job is done; a failed job raises in whoever asks, as a broken device does.

    ``awaited`` is set when somebody begins to wait.
    """

    error: BaseException | None = None
    time: tuple[float, float] | None = None
    awaited: threading.Event = field(default_factory=threading.Event)
    _reached: threading.Event = field(default_factory=threading.Event)

    def reach(self) -> None:
        self._reached.set()

    def done(self) -> bool:
        if self._reached.is_set() and self.error is not None:
            raise self.error
        return self._reached.is_set()

    def wait(self) -> None:
        self.awaited.set()
        self._reached.wait()
        self.done()


class _Lane(threading.Thread):
    """First in, first out; its target is NaN while a copy is under way, so that whoever reads too early shows."""

    def __init__(self, name: str, seed: int, pauses: int) -> None:
        super().__init__(name=f"stream-{name}", daemon=True)
        self.jobs: queue.SimpleQueue[tuple[ThreadMarker, Callable[[], object]] | None] = queue.SimpleQueue()
        self.open = threading.Event()
        self.open.set()
        self.error: BaseException | None = None
        self._random, self._pauses = random.Random(f"{name} {seed}"), pauses
        self.start()

    def submit(self, job: Callable[[], object]) -> ThreadMarker:
        marker = ThreadMarker()
        self.jobs.put((marker, job))
        return marker

    def run(self) -> None:
        while (item := self.jobs.get()) is not None:
            marker, job = item
            self.open.wait()
            start = time.perf_counter()
            try:
                job()
            except BaseException as error:
                marker.error = self.error = error
            marker.time = start, time.perf_counter()
            marker.reach()

    def copy(self, dst: Sequence[Tensor], src: Sequence[Tensor], after: Sequence[Marker]) -> None:
        for marker in after:
            marker.wait()
        with lane_context(torch.device("cpu")):
            for target in dst:
                if target.is_floating_point():
                    target.fill_(float("nan"))
            for pair in zip(dst, src, strict=True):
                self.pause()
                copy_all(*([tensor] for tensor in pair))

    def pause(self) -> None:
        for _ in range(self._random.randrange(self._pauses + 1)):
            time.sleep(0)  # lets other threads run; nothing waits for it


class ThreadStreams:
    """``Streams`` on the CPU; compute is the calling thread.

    Attributes:
        pinned: What ``is_asynchronous`` answers.
        failing: Raised by the next copy of a lane: ``("issue", error)`` where it is issued, ``("copy", error)`` where
            it runs.
        issued: The targets of every copy, in the order of issue.
        copying: Set by the first copy.
        entered: Names of the threads that entered.
        clock_kept: What ``keep_clock`` was last told.
    """

    def __init__(self, seed: int = 0, *, pinned: bool = True, pauses: int = 8) -> None:
        self.pinned = pinned
        self.failing: dict[str, tuple[str, BaseException]] = {}
        self.issued: list[tuple[str, Sequence[Tensor]]] = []
        self.copying = threading.Event()
        self.entered: list[str] = []
        self.clock_kept = False
        self._lanes = {lane: _Lane(lane, seed, pauses) for lane in ("h2d", "d2h")}

    def enter_thread(self) -> None:
        self.entered.append(threading.current_thread().name)

    def copy(
        self, lane: CopyLane, dst: Sequence[Tensor], src: Sequence[Tensor], after: Sequence[Marker]
    ) -> tuple[Marker, Callable[[], tuple[float, float] | None]]:
        where, error = self.failing.pop(lane, ("", None))
        if error is not None and where == "issue":
            raise error
        self.issued.append((lane, dst))
        self.copying.set()
        stream = self._lanes[lane]

        def job() -> None:
            if error is not None:
                raise error
            stream.copy(dst, src, after)

        marker = stream.submit(job)
        return marker, lambda: marker.time

    def compute_marker(self) -> Marker:
        marker = ThreadMarker()
        marker.reach()
        return marker

    def compute_wait(self, marker: Marker) -> None:
        marker.wait()

    def compute_instant(self) -> Instant:
        return host_instant()

    def keep_clock(self, on: bool) -> None:
        self.clock_kept = on

    def is_asynchronous(self, host: Tensor) -> bool:
        return self.pinned

    def synchronize(self) -> None:
        for marker in [stream.submit(lambda: None) for stream in self._lanes.values() if stream.is_alive()]:
            marker.wait()
        for stream in self._lanes.values():
            error, stream.error = stream.error, None
            if error is not None:
                raise error

    @contextmanager
    def held(self, lane: str) -> Iterator[None]:
        """No copy of ``lane`` starts inside."""
        self._lanes[lane].open.clear()
        try:
            yield
        finally:
            self._lanes[lane].open.set()

    def close(self) -> None:
        for stream in self._lanes.values():
            stream.open.set()
            stream.jobs.put(None)
            stream.join()


@contextmanager
def thread_lanes(seed: int = 0, *, threads: int | None = 1, **kwargs: Any) -> Iterator[AsyncLanes]:
    """``AsyncLanes`` on ``ThreadStreams``; everything is stopped at the end."""
    streams = ThreadStreams(seed, **kwargs)
    lanes = AsyncLanes(HostMemory(pin=False), torch.device("cpu"), streams, threads)
    try:
        yield lanes
    finally:
        try:
            lanes.close()
        finally:
            streams.close()
