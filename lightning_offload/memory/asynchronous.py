"""Lanes that really run side by side: two copy streams, the current compute stream, one host worker.

``AsyncLanes`` is the scheduling, written against the few things a device must offer (``Streams``); ``cuda.py`` offers
them with CUDA streams and events. The same scheduling is tested on any machine with streams made of threads and
random delays.

What waits for what: a copy waits, on its stream, for the markers of ``after``; a copy that follows host work cannot
be issued before that work is done, so the host worker issues it; the host worker waits for copies by their markers;
the main thread waits for nothing but the *issuing* of a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import CopyLane, Event, Place, copy_all, host_buffers, lane_context, nbytes
from lightning_offload.memory.ledger import Ledger


class Marker(Protocol):
    """A point in a stream, or in the host worker's work."""

    def done(self) -> bool:
        """Whether it has been reached; never blocks."""
        ...

    def wait(self) -> None:
        """Block the calling thread until it has been reached."""
        ...


class Streams(Protocol):
    """What a device must offer: asynchronous copies on two lanes, and a compute stream that can wait."""

    def copy(
        self, lane: CopyLane, dst: Sequence[Tensor], src: Sequence[Tensor], after: Sequence[Marker]
    ) -> tuple[Marker, Callable[[], float | None]]:
        """Issue the copies behind ``after`` on the lane's stream; the second value tells their seconds once done."""
        ...

    def compute_marker(self) -> Marker:
        """Everything issued on the calling thread's compute stream."""
        ...

    def compute_wait(self, marker: Marker) -> None:
        """Later compute of the calling thread runs after ``marker``."""
        ...

    def is_asynchronous(self, host: Tensor) -> bool:
        """Whether copies from and to this host memory do not block the thread that issues them."""
        ...

    def synchronize(self) -> None:
        """Block until every stream is empty."""
        ...


class Reached:
    """The marker of host work, which exists only once the work is done."""

    def done(self) -> bool:
        """See ``Marker.done``."""
        return True

    def wait(self) -> None:
        """See ``Marker.wait``."""


class _Async(Event):
    """An event whose marker exists once its operation has been issued (a copy) or run (host work)."""

    __slots__ = ("marker",)

    def __init__(self, marker: Marker | None = None) -> None:
        self.marker = marker


@dataclass(eq=False)
class _Operation:
    event: _Async
    after: list[_Async]
    priority: int
    order: int
    tag: str
    bytes: int
    work: Callable[[], object]
    lane: str

    @property
    def issuable(self) -> bool:
        return all(event.marker is not None for event in self.after)

    @property
    def markers(self) -> list[Marker]:
        return [event.marker for event in self.after if event.marker is not None]


@dataclass
class _Timing:
    lane: str
    tag: str
    bytes: int
    seconds: Callable[[], float | None]


@dataclass(eq=False)
class AsyncLanes:
    """See the module docstring.

    Args:
        memory: host memory of the run.
        device: where compute happens.
        streams: the device's streams.
        threads: torch threads of the host worker; ``None`` leaves torch's setting.
    """

    memory: HostMemory
    device: torch.device
    streams: Streams
    threads: int | None = None
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()  # guards everything below
        self._copies: list[_Operation] = []  # not issuable yet: they follow host work that has not run
        self._work: list[_Operation] = []  # host work that has not run
        self._running = False
        self._error: BaseException | None = None
        self._stop = False
        self._order = 0
        self._worker: threading.Thread | None = None
        self._timings: list[_Timing] = []
        self._scratch: dict[torch.dtype, Tensor] = {}

    def buffers(self, name: str, sizes: Sequence[int], dtype: torch.dtype, place: Place) -> list[Tensor]:
        """See ``Lanes.buffers``."""
        with torch.inference_mode(False):
            if place == "device":
                return [torch.empty(size, dtype=dtype, device=self.device) for size in sizes]
            return host_buffers(self.memory, name, sizes, dtype, place)

    def watch(self, name: str, tensor: Tensor) -> None:
        """See ``Lanes.watch``."""

    def scratch(self, numel: int, dtype: torch.dtype) -> Tensor:
        """See ``Lanes.scratch``; only the worker calls it, so one buffer per dtype is enough."""
        held = self._scratch.get(dtype)
        if held is None or held.numel() < numel:
            held = self._scratch[dtype] = torch.empty(numel, dtype=dtype)
        return held[:numel]

    def copy(
        self,
        dst: Sequence[Tensor],
        src: Sequence[Tensor],
        lane: CopyLane,
        *,
        after: Iterable[Event] = (),
        priority: int = 0,
        tag: str = "",
    ) -> Event:
        """See ``Lanes.copy``. Between pageable memory and the device a copy would block, so the worker runs it."""
        dst, src = list(dst), list(src)
        on_host = src if lane == "h2d" else dst
        if not all(self.streams.is_asynchronous(tensor) for tensor in on_host):
            return self.host(
                lambda: self._blocking_copy(lane, dst, src, tag), after=after, priority=priority, tag=f"{tag} pageable"
            )
        with self._changed:
            self._check()
            operation = self._operation(lambda: None, after, priority, tag, nbytes(dst), lane)
            operation.work = lambda: self._issue(operation, lane, dst, src)
            if operation.issuable:
                operation.work()
            else:
                self._copies.append(operation)
        return operation.event

    def host(
        self,
        fn: Callable[[], object],
        *,
        after: Iterable[Event] = (),
        priority: int = 0,
        tag: str = "",
        traffic_bytes: int = 0,
    ) -> Event:
        """See ``Lanes.host``."""
        with self._changed:
            self._check()
            operation = self._operation(fn, after, priority, tag, traffic_bytes, "host")
            self._work.append(operation)
            self._start_worker()
            self._changed.notify_all()
        return operation.event

    def compute(self) -> Event:
        """See ``Lanes.compute``."""
        return _Async(self.streams.compute_marker())

    def wait_compute(self, *events: Event) -> None:
        """See ``Lanes.wait_compute``: blocks only until each copy has been issued; that time is the lane ``wait``."""
        for event in events:
            assert isinstance(event, _Async), "an event of other lanes"
            if event.marker is None:
                with self.ledger.timed("wait", "issue", 0), self._changed:
                    self._changed.wait_for(partial(self._issued_or_broken, event))
            with self._changed:
                self._check()
            assert event.marker is not None
            self.streams.compute_wait(event.marker)

    def read(self, tensor: Tensor, default: float) -> float:
        """See ``Lanes.read``."""
        return float(tensor)

    def synchronize(self) -> None:
        """See ``Lanes.synchronize``."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._error is not None)
            self._check()
        self.streams.synchronize()
        self._settle()

    def close(self) -> None:
        """See ``Lanes.close``."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()
        self._worker = None
        self.streams.synchronize()  # no copy may touch host memory that is being unpinned
        self._settle()
        self._scratch.clear()
        self.memory.close()

    def _issued_or_broken(self, event: _Async) -> bool:
        return event.marker is not None or self._error is not None

    @property
    def _idle(self) -> bool:
        return not self._copies and not self._work and not self._running

    def _check(self) -> None:
        """Raise what the worker raised, once; what depended on it is dropped."""
        if self._error is not None:
            error, self._error = self._error, None
            for operation in (*self._copies, *self._work):
                operation.event.marker = Reached()  # dropped: whoever waits for it must not wait for ever
            self._copies.clear()
            self._work.clear()
            raise error

    def _operation(
        self, work: Callable[[], object], after: Iterable[Event], priority: int, tag: str, size: int, lane: str
    ) -> _Operation:
        known = [event for event in after if isinstance(event, _Async)]
        self._order += 1
        return _Operation(_Async(), known, priority, self._order, tag, size, work, lane)

    def _issue(self, operation: _Operation, lane: CopyLane, dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
        with lane_context(self.device):
            marker, seconds = self.streams.copy(lane, dst, src, operation.markers)
        operation.event.marker = marker
        operation.after = []
        self._timings.append(_Timing(lane, operation.tag, operation.bytes, seconds))
        if len(self._timings) > 256:
            self._settle_ready()

    def _blocking_copy(self, lane: CopyLane, dst: Sequence[Tensor], src: Sequence[Tensor], tag: str) -> None:
        with self.ledger.timed(lane, tag, nbytes(dst)):
            copy_all(dst, src)

    def _settle(self) -> None:
        with self._changed:
            self._settle_ready()

    def _settle_ready(self) -> None:
        """Move finished copies to the ledger: their time is known only when the device says so."""
        waiting = []
        for timing in self._timings:
            seconds = timing.seconds()
            if seconds is None:
                waiting.append(timing)
            else:
                self.ledger.record(timing.lane, timing.tag, timing.bytes, seconds)
        self._timings = waiting

    def _start_worker(self) -> None:
        if self._worker is None:  # started late, so that dataloader workers forked before it are safe
            self._stop = False
            self._worker = threading.Thread(target=self._run, name="offload-host", daemon=True)
            self._worker.start()

    def _run(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        while (operation := self._next()) is not None:
            try:
                start = perf_counter()
                with lane_context(self.device):
                    operation.work()
                self.ledger.record("host", operation.tag, operation.bytes, perf_counter() - start)
                self._finished(operation, None)
            except BaseException as error:  # handed to the main thread
                self._finished(operation, error)

    def _next(self) -> _Operation | None:
        """The operation to run now, with its markers reached; ``None`` when stopping."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or any(op.issuable for op in self._work))
                if self._stop:
                    return None
                waiting = [op for op in self._work if op.issuable]
                ready = [op for op in waiting if all(marker.done() for marker in op.markers)]
                if ready:
                    operation = min(ready, key=lambda op: (op.priority, op.order))
                    self._work.remove(operation)
                    self._running = True
                    return operation
                markers = min(waiting, key=lambda op: op.order).markers
            next(marker for marker in markers if not marker.done() or marker is markers[-1]).wait()

    def _finished(self, operation: _Operation, error: BaseException | None) -> None:
        with self._changed:
            self._running = False
            if error is None:
                operation.event.marker = Reached()
                operation.after = []
                self._issue_copies()
            else:
                self._error = error
            self._changed.notify_all()

    def _issue_copies(self) -> None:
        """Issue the copies that only waited for host work, shallow layers first."""
        for operation in sorted(self._copies, key=lambda op: (op.priority, op.order)):
            if operation.issuable:
                self._copies.remove(operation)
                try:
                    operation.work()
                except BaseException as error:
                    self._error = error
