"""Lanes that really run side by side: two copy streams, the current compute stream, one host worker.

``AsyncLanes`` is the scheduling, written against the few things a device must offer (``Streams``); ``cuda.py`` offers
them with CUDA streams and events. The same scheduling is tested on any machine with streams made of threads and
random delays.

What waits for what: a copy waits, on its stream, for the markers of ``after``; a copy that follows host work cannot
be issued before that work is done, so the host worker issues it; the host worker waits for copies by their markers;
the main thread waits for nothing but the *issuing* of a copy.

What fails (on the worker, or in a copy that it issues) is raised in the main thread at its next call. What follows
the failed operation never happens, everything else does, and nobody waits for ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import (
    CopyLane,
    Event,
    Made,
    Place,
    host_buffers,
    lane_context,
    nbytes,
    own_events,
)
from lightning_offload.memory.ledger import Instant, Ledger


class Marker(Protocol):
    """A point in a stream, or in the host worker's work."""

    def done(self) -> bool:
        """Whether it has been reached; never blocks. Raises if it never will be."""
        ...

    def wait(self) -> None:
        """Block the calling thread until it has been reached. Raises if it never will be."""
        ...


class Streams(Protocol):
    """What a device must offer: asynchronous copies on two lanes, and a compute stream that can wait."""

    def enter_thread(self) -> None:
        """Called once by a worker thread before it does anything."""
        ...

    def copy(
        self, lane: CopyLane, dst: Sequence[Tensor], src: Sequence[Tensor], after: Sequence[Marker]
    ) -> tuple[Marker, Callable[[], tuple[float, float] | None]]:
        """Issue the copies behind ``after`` on the lane's stream; the second value tells their time once done.

        That is start and end in seconds: on the ledger's clock while ``keep_clock`` is on, else only their difference
        means anything. Blocks the calling thread only where ``is_asynchronous`` says no.
        """
        ...

    def compute_marker(self) -> Marker:
        """Everything issued on the calling thread's compute stream."""
        ...

    def compute_wait(self, marker: Marker) -> None:
        """Later compute of the calling thread runs after ``marker``."""
        ...

    def compute_instant(self) -> Instant:
        """When the calling thread's compute stream gets here; asked for while ``keep_clock`` is on."""
        ...

    def keep_clock(self, on: bool) -> None:
        """From here on times are needed on the ledger's clock, or no longer; nothing is in flight."""
        ...

    def is_asynchronous(self, host: Tensor) -> bool:
        """Whether copies from and to this host memory do not block the thread that issues them."""
        ...

    def synchronize(self) -> None:
        """Block until every stream is empty, compute too."""
        ...


class Reached:
    """A marker that lies behind: of host work that is done, or that never will be."""

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
    """A copy to be issued, or host work to be run; ``run`` is given the markers of ``after`` and returns its own."""

    run: Callable[[list[Marker]], Marker]
    after: list[_Async]
    priority: int
    event: _Async = field(default_factory=_Async)

    @property
    def issuable(self) -> bool:
        return all(event.marker is not None for event in self.after)

    @property
    def reached(self) -> bool:
        """Whether all it follows has happened; forgets what has, because asking a device costs."""
        try:
            while self.after and (marker := self.after[-1].marker) is not None and marker.done():
                self.after.pop()
        except Exception:
            return True  # running it raises the same again, where it is handed on
        return not self.after

    def complete(self) -> None:
        self.event.marker = self.run([event.marker for event in self.after if event.marker is not None])
        self.after = []


@dataclass
class _Copying:
    """A copy in flight. Holds its tensors: their memory must outlive it, whoever else lets go of them."""

    lane: str
    tag: str
    dst: Sequence[Tensor]
    src: Sequence[Tensor]
    order: int
    time: Callable[[], tuple[float, float] | None]


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
        self._worker: threading.Thread | None = None
        self._in_flight: deque[_Copying] = deque()
        self._scratch: dict[torch.dtype, Tensor] = {}
        self.ledger.on_trace = self.streams.keep_clock

    @property
    def shares_memory(self) -> bool:
        """See ``Lanes.shares_memory``."""
        return self.device.type == "cpu"

    def buffers(self, name: str, sizes: Sequence[int], dtype: torch.dtype, place: Place) -> list[Tensor]:
        """See ``Lanes.buffers``."""
        with torch.inference_mode(False):
            if place != "device":
                return host_buffers(self.memory, name, sizes, dtype, place)
            made = [torch.empty(size, dtype=dtype, device=self.device) for size in sizes]
        self.streams.synchronize()  # recycled memory: compute may still use it, and copies do not wait for compute
        return made

    def watch(self, name: str, tensor: Tensor) -> None:
        """See ``Lanes.watch``."""

    def unwatch(self, tensor: Tensor) -> None:
        """See ``Lanes.unwatch``."""

    def scratch(self, numel: int, dtype: torch.dtype) -> Tensor:
        """See ``Lanes.scratch``; only the worker calls it, so one buffer per dtype is enough."""
        held = self._scratch.get(dtype)
        if held is None or held.numel() < numel:
            held = self._scratch[dtype] = torch.empty(numel, dtype=dtype, device="cpu")
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
        """See ``Lanes.copy``. Between pageable memory and the device a copy blocks, so the worker does it."""
        issue = partial(self._issue, lane, list(dst), list(src), tag, priority)
        on_host = src if lane == "h2d" else dst
        if not all(self.streams.is_asynchronous(tensor) for tensor in on_host):
            return self.host(lambda: issue([]).wait(), after=after, priority=priority, tag=f"{tag} pageable")
        with self._changed:
            self._check()
            operation = _Operation(issue, own_events(_Async, after), priority)
            if operation.issuable:
                operation.complete()
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
            operation = _Operation(
                partial(self._call, fn, tag, traffic_bytes, priority), own_events(_Async, after), priority
            )
            self._work.append(operation)
            self._start_worker()
            self._changed.notify_all()
        return operation.event

    def compute(self) -> Event:
        """See ``Lanes.compute``."""
        self._check()
        return _Async(self.streams.compute_marker())

    def wait_compute(self, *events: Event) -> None:
        """See ``Lanes.wait_compute``: blocks only until each copy has been issued; that time is the lane ``wait``."""
        self._check()
        marked = self.ledger.marked
        self.mark("")  # whoever waits does not compute
        for event in own_events(_Async, events):
            self.streams.compute_wait(event.marker or self._issued(event))
            self._check()
        self.mark(*marked)

    def run(self, key: Hashable, fn: Callable[[], Made]) -> Made:
        """See ``Lanes.run``."""
        return fn()

    def mark(self, kind: str, order: int = -1) -> None:
        """See ``Lanes.mark``."""
        self.ledger.mark(kind, order, self.streams.compute_instant)

    def read(self, tensor: Tensor, default: float) -> float:
        """See ``Lanes.read``."""
        self._check()
        return float(tensor)

    def synchronize(self) -> None:
        """See ``Lanes.synchronize``; nothing is in flight when it raises either."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._copies or self._work or self._running))
        try:
            self.streams.synchronize()
            self._settle()
        finally:
            self._check()

    def close(self) -> None:
        """See ``Lanes.close``; what was not synchronized is dropped. Later host work starts a new worker."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()
            self._worker = None
        with self._changed:
            for operation in (*self._copies, *self._work):
                self._drop(operation)
            self._changed.notify_all()
        try:
            self.streams.synchronize()  # no copy may touch host memory that is being unpinned
            self._settle()
        finally:
            self._in_flight.clear()
            self._scratch.clear()
            self.memory.close()

    def _issued(self, event: _Async) -> Marker:
        with self.ledger.timed("wait", "issue", 0), self._changed:
            self._changed.wait_for(lambda: event.marker is not None)
        assert event.marker is not None
        return event.marker

    def _check(self) -> None:
        """Raise what the worker raised, once."""
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _issue(
        self, lane: CopyLane, dst: Sequence[Tensor], src: Sequence[Tensor], tag: str, order: int, after: list[Marker]
    ) -> Marker:
        self._settle()
        with lane_context(self.device):
            marker, time = self.streams.copy(lane, dst, src, after)
        self._in_flight.append(_Copying(lane, tag, dst, src, order, time))
        return marker

    def _settle(self) -> None:
        """Move copies that are done to the ledger: their time is known only when the device says so."""
        with self._changed:
            while self._in_flight and (time := self._in_flight[0].time()) is not None:
                done = self._in_flight.popleft()
                self.ledger.record(done.lane, done.tag, nbytes(done.dst), *time, done.order)

    def _call(self, fn: Callable[[], object], tag: str, traffic_bytes: int, order: int, after: list[Marker]) -> Marker:
        for marker in after:
            marker.wait()  # there is one only where asking it raised
        with self.ledger.timed("host", tag, traffic_bytes, order), lane_context(self.device):
            fn()
        return Reached()

    def _start_worker(self) -> None:
        if self._worker is None:  # started late, so that dataloader workers forked before it are safe
            self._stop = False
            self._worker = threading.Thread(target=self._run, name="offload-host", daemon=True)
            self._worker.start()

    def _run(self) -> None:
        self.streams.enter_thread()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        while (operation := self._next()) is not None:
            error: BaseException | None = None
            try:
                operation.complete()
            except BaseException as raised:  # handed to the main thread
                error = raised
            with self._changed:
                self._running = False
                if error is not None:
                    self._fail(operation, error)
                self._issue_copies()
                self._changed.notify_all()

    def _next(self) -> _Operation | None:
        """The operation to run now: all it follows has happened; ``None`` when stopping."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or any(op.issuable for op in self._work))
                if self._stop:
                    return None
                ready = [op for op in self._work if op.reached]
                if ready:
                    operation = min(ready, key=lambda op: op.priority)  # of equals the one submitted first
                    self._work.remove(operation)
                    self._running = True
                    return operation
                marker = next(op for op in self._work if op.issuable).after[-1].marker
            assert marker is not None
            with suppress(Exception):  # raised again when the operation runs
                marker.wait()

    def _issue_copies(self) -> None:
        """Issue what only waited for host work, shallow layers first; one copy may follow another."""
        while issuable := [op for op in self._copies if op.issuable]:
            operation = min(issuable, key=lambda op: op.priority)
            self._copies.remove(operation)
            try:
                operation.complete()
            except BaseException as error:
                self._fail(operation, error)

    def _fail(self, operation: _Operation, error: BaseException) -> None:
        """Hand on the first error, and drop what follows the operation."""
        if self._error is None:
            self._error = error
        self._drop(operation)

    def _drop(self, operation: _Operation) -> None:
        """It never happens, nor does what follows it; whoever waits for it goes on."""
        dropped = [operation]
        for gone in dropped:
            dropped += [op for op in (*self._copies, *self._work) if gone.event in op.after and op not in dropped]
            gone.event.marker = Reached()
        self._copies = [op for op in self._copies if op not in dropped]
        self._work = [op for op in self._work if op not in dropped]
