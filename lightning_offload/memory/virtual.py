"""Lanes that do nothing but keep time: a clock per lane, advanced by bytes over rates and by the compute they are told.

The method's own program runs on them, on fake tensors, and what it would take comes out: when each operation would
begin and end, and what memory it asked for. The lanes serve in the order of the real ones: ``d2h`` first in first out,
``h2d`` and ``host`` the lowest priority among what is ready, nothing is interrupted.
"""

from __future__ import annotations

import heapq
import mmap
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from lightning_offload.memory.arena import HostMemory, HostReport, Usage, aligned, region_bytes
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.lanes import CopyLane, Event, Made, Place, nbytes, own_events
from lightning_offload.memory.ledger import Ledger, Total
from lightning_offload.memory.rates import Rates


class VirtualMemory(HostMemory):
    """Host memory that is counted and never mapped; locked in the order of the real one, while the budget lasts."""

    def __init__(self, lockable_bytes: int) -> None:
        super().__init__(pin=False)
        self._left_bytes = lockable_bytes
        self._usage: dict[str, Usage] = {}

    def count(self, name: str, sizes: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> bool:
        """Count the region that ``host_buffers`` would make; whether it would be page-locked."""
        assert name not in self._usage, f"two regions are called {name!r}"
        mapped = aligned(region_bytes((size, dtype) for size in sizes), mmap.PAGESIZE)
        locked = mapped if pinned and mapped <= self._left_bytes else 0
        self._left_bytes -= locked
        self._usage[name] = Usage(sum(sizes) * dtype.itemsize, mapped, locked)
        return bool(locked) or not mapped

    def report(self) -> HostReport:
        """What a real run would report."""
        kept = self._usage.values()
        return HostReport(
            sum(usage.requested_bytes for usage in kept),
            sum(usage.allocated_bytes for usage in kept),
            sum(usage.locked_bytes for usage in kept),
            dict(self._usage),
        )


class _Timed(Event):
    """One operation, or a moment of the compute lane; ``end_s`` is None until it is known when it ends."""

    __slots__ = (
        "end_s",
        "followers",
        "kind",
        "lane",
        "nbytes",
        "number",
        "priority",
        "ready_s",
        "seconds",
        "waits_for",
    )

    def __init__(self, lane: str, kind: str, nbytes: int, seconds: float, priority: int, number: int) -> None:
        self.lane, self.kind, self.nbytes, self.seconds = lane, kind, nbytes, seconds
        self.priority, self.number = priority, number
        self.ready_s = 0.0
        self.end_s: float | None = None
        self.waits_for = 0
        self.followers: list[_Timed] = []


class _Queue:
    """What one lane still has to do."""

    def __init__(self, *, fifo: bool) -> None:
        self.fifo = fifo
        self.free_s = 0.0
        self._order: deque[_Timed] = deque()  # submitted, of a first-in-first-out lane
        self._coming: list[tuple[float, int, _Timed]] = []  # by the moment they become ready
        self._waiting: list[tuple[int, int, _Timed]] = []  # ready when the lane is, by priority

    def submit(self, operation: _Timed) -> None:
        if self.fifo:
            self._order.append(operation)

    def ready(self, operation: _Timed) -> None:
        """All it follows has an end."""
        if not self.fifo:
            heapq.heappush(self._coming, (operation.ready_s, operation.number, operation))

    def next_start(self) -> float | None:
        """When its next operation begins, as far as that is known."""
        if self.fifo:
            head = self._order[0] if self._order else None
            return None if head is None or head.waits_for else max(self.free_s, head.ready_s)
        if self._waiting:
            return self.free_s
        return max(self.free_s, self._coming[0][0]) if self._coming else None

    def take(self, now_s: float) -> _Timed:
        """The operation that begins at ``now_s``."""
        if self.fifo:
            return self._order.popleft()
        while self._coming and self._coming[0][0] <= now_s:
            _, number, operation = heapq.heappop(self._coming)
            heapq.heappush(self._waiting, (operation.priority, number, operation))
        return heapq.heappop(self._waiting)[2]


class VirtualLanes:
    """See the module docstring; ``Lanes`` for fake tensors.

    A copy takes its bytes over the rate of its direction (times ``Rates.duplex`` when the other direction is busy as
    it begins), host work its declared traffic over the rate of host memory. Where the device is the CPU every
    operation runs on the caller's thread, as with ``InlineLanes``. What an operation submitted *later* could have
    overtaken is not seen; methods submit a step's operations before compute waits for the first of them.

    Attributes:
        now_s: The clock of the compute lane.
        busy_s: Seconds in which it has worked.
        remembers: Whether ``run`` takes what it knows already for an answer.
        asked: What was submitted so far, per lane and kind; the ledger knows an operation once its time has come.

    Args:
        machine: What is imitated; its rates are needed.
        counting_as: Context in which buffers are made: on the device "slots", "scratch", "rows in use" or "resident
            weights", by their names; ``None`` in host memory, which whoever counts device memory leaves out.
        pin: Whether host memory is page-locked, as far as the machine allows.

    Raises:
        ValueError: A machine without rates.
    """

    def __init__(
        self,
        machine: Machine,
        counting_as: Callable[[str | None], AbstractContextManager[object]] = nullcontext,
        *,
        pin: bool = True,
    ) -> None:
        if machine.rates is None:
            raise ValueError(f"`Machine(name={machine.name!r})` has no rates; give them, or let them be measured")
        self.device = torch.device("cpu")
        self.shares_memory = machine.device_type == "cpu"
        self._memory = VirtualMemory(machine.lockable_bytes if pin and not self.shares_memory else 0)
        self.memory: HostMemory = self._memory
        self._pageable: set[int] = set()  # storages of buffers that are not page-locked
        self.ledger = Ledger()
        self.now_s = self.busy_s = 0.0
        self.remembers = False
        self._known: dict[Hashable, tuple[float, Any]] = {}
        self.asked: dict[tuple[str, str], Total] = {}
        self._rates: Rates = machine.rates
        self._counting_as = counting_as
        self._queues = {lane: _Queue(fifo=lane == "d2h") for lane in ("d2h", "h2d", "host")}
        self._number = 0
        self._lock = threading.RLock()  # backward hooks may run on another thread

    def buffers(self, name: str, sizes: Sequence[int], dtype: torch.dtype, place: Place) -> list[Tensor]:
        """See ``Lanes.buffers``; to be called in the fake mode of the run."""
        if place == "device":
            with self._counting_as(_kind_of(name)):
                return [torch.empty(size, dtype=dtype, device=self.device) for size in sizes]
        locked = self._memory.count(name, sizes, dtype, pinned=place == "pinned")
        with self._counting_as(None):
            made = [torch.empty(size, dtype=dtype, device=self.device) for size in sizes]
        if not locked:
            self._pageable.update(tensor.untyped_storage()._cdata for tensor in made)
        return made

    def watch(self, name: str, tensor: Tensor) -> None:
        """See ``Lanes.watch``."""

    def unwatch(self, tensor: Tensor) -> None:
        """See ``Lanes.unwatch``."""

    def scratch(self, numel: int, dtype: torch.dtype) -> Tensor:
        """See ``Lanes.scratch``; host functions do not run here, so nobody asks."""
        with self._counting_as(None):
            return torch.empty(numel, dtype=dtype, device=self.device)

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
        """See ``Lanes.copy``. Between pageable memory and the device the host's worker does it."""
        size = nbytes(dst)
        on_host = src if lane == "h2d" else dst
        if not self.shares_memory and any(t.untyped_storage()._cdata in self._pageable for t in on_host):
            self.asked.setdefault((lane, tag), Total()).add(size, 0.0)
            seconds = size / self._rates.pageable_gb_per_s / 1e9
            return self._submit("host", f"{tag} pageable", 0, seconds, after, priority)
        rate = self._rates.h2d_gb_per_s if lane == "h2d" else self._rates.d2h_gb_per_s
        return self._submit(lane, tag, size, size / rate / 1e9, after, priority)

    def host(
        self,
        fn: Callable[[], object],
        *,
        after: Iterable[Event] = (),
        priority: int = 0,
        tag: str = "",
        traffic_bytes: int = 0,
    ) -> Event:
        """See ``Lanes.host``; ``fn`` is not called."""
        return self._submit(
            "host", tag, traffic_bytes, traffic_bytes / self._rates.host_gb_per_s / 1e9, after, priority
        )

    def compute(self) -> Event:
        """See ``Lanes.compute``."""
        with self._lock:
            return self._moment(self.now_s)

    def wait_compute(self, *events: Event) -> None:
        """See ``Lanes.wait_compute``: the time lost is the ledger's lane ``stall``."""
        with self._lock:
            for event in own_events(_Timed, events):
                end_s = self._end_of(event)
                if end_s > self.now_s:
                    self.ledger.record("stall", event.kind, 0, self.now_s, end_s, event.priority)
                    self._stand_still_until(end_s)

    def advance(self, seconds: float) -> None:
        """The compute lane was busy for ``seconds``."""
        with self._lock:
            self.now_s += seconds
            self.busy_s += seconds

    def run(self, key: Hashable, fn: Callable[[], Made]) -> Made:
        """See ``Lanes.run``: while it ``remembers``, only the first of each key is called."""
        if not self.remembers:
            return fn()
        if key not in self._known:
            before_s = self.busy_s
            made = fn()
            self._known[key] = self.busy_s - before_s, made
            return made
        seconds, known = self._known[key]
        self.advance(seconds)
        return cast(Made, known)

    def mark(self, kind: str, order: int = -1) -> None:
        """See ``Lanes.mark``."""
        now_s = self.now_s
        self.ledger.mark(kind, order, lambda: lambda: now_s)

    def read(self, tensor: Tensor, default: float) -> float:
        """See ``Lanes.read``: nothing is real here."""
        return default

    def synchronize(self) -> None:
        """See ``Lanes.synchronize``: the clock goes on to the end of everything."""
        with self._lock:
            while self._advance_lanes():
                pass
            self.now_s = max([self.now_s, *(queue.free_s for queue in self._queues.values())])

    def close(self) -> None:
        """See ``Lanes.close``."""

    def _stand_still_until(self, end_s: float) -> None:
        """Compute does nothing meanwhile, whatever it is marked to do."""
        marked = self.ledger.marked
        self.mark("")
        self.now_s = end_s
        self.mark(*marked)

    def _moment(self, end_s: float) -> _Timed:
        event = _Timed("compute", "", 0, 0.0, -1, 0)
        event.end_s = end_s
        return event

    def _submit(self, lane: str, kind: str, size: int, seconds: float, after: Iterable[Event], priority: int) -> _Timed:
        with self._lock:
            self.asked.setdefault((lane, kind), Total()).add(size, seconds)
            if self.shares_memory:
                end_s = self.now_s + seconds
                self.ledger.record(lane, kind, size, self.now_s, end_s, priority)
                self._stand_still_until(end_s)
                return self._moment(end_s)
            self._number += 1
            operation = _Timed(lane, kind, size, seconds, priority, self._number)
            for event in own_events(_Timed, after):
                if event.end_s is None:
                    operation.waits_for += 1
                    event.followers.append(operation)
                else:
                    operation.ready_s = max(operation.ready_s, event.end_s)
            queue = self._queues[lane]
            queue.submit(operation)
            if not operation.waits_for:
                queue.ready(operation)
            return operation

    def _end_of(self, event: _Timed) -> float:
        while event.end_s is None:
            progressed = self._advance_lanes()
            assert progressed, f"`{event.kind}` follows something that was never submitted"
        return event.end_s

    def _advance_lanes(self) -> bool:
        """Begin the operation that begins first of all lanes: what is not ready yet can only become ready later."""
        starts = [(start, lane) for lane, queue in self._queues.items() if (start := queue.next_start()) is not None]
        if not starts:
            return False
        start_s, lane = min(starts)
        operation = self._queues[lane].take(start_s)
        seconds = operation.seconds / self._share(lane, start_s)
        operation.end_s = self._queues[lane].free_s = start_s + seconds
        self.ledger.record(lane, operation.kind, operation.nbytes, start_s, operation.end_s, operation.priority)
        for follower in operation.followers:
            follower.waits_for -= 1
            follower.ready_s = max(follower.ready_s, operation.end_s)
            if not follower.waits_for:
                self._queues[follower.lane].ready(follower)
        operation.followers = []
        return True

    def _share(self, lane: str, start_s: float) -> float:
        other = {"h2d": "d2h", "d2h": "h2d"}.get(lane)
        return self._rates.duplex if other is not None and self._queues[other].free_s > start_s else 1.0


def _kind_of(name: str) -> str:
    """What a device buffer of this name holds."""
    if ".resident." in name:
        return "resident weights"
    return {"scratch": "scratch", "rows": "rows in use", "row indices": "rows in use"}.get(name, "slots")
