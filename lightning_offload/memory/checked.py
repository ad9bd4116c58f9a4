"""Two ways to find a missing dependency without a GPU.

``CheckedLanes`` proves: every operation is a node that knows its ancestors, every read and write of an engine buffer
is recorded, by compute and by host work alike, and two conflicting accesses must be ordered by the declared
dependencies. ``ShuffledLanes`` tries: it runs copies and host work in any order the dependencies allow. It cannot
delay compute, which has always run when an operation is queued; the checker covers that.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_offload.errors import RaceError
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import (
    CopyLane,
    Event,
    InlineLanes,
    Place,
    copy_all,
    lane_context,
    nbytes,
    own_events,
)


@dataclass(eq=False)
class _Node(Event):
    """One operation; ``before`` is the set of its ancestors, itself included, as bits."""

    name: str
    index: int
    before: int

    def follows(self, other: _Node) -> bool:
        return bool(self.before >> other.index & 1)


@dataclass
class _Access:
    node: _Node
    start: int
    end: int
    write: bool

    def spans(self, other: _Access) -> bool:
        return self.start <= other.start and other.end <= self.end

    def supersedes(self, other: _Access) -> bool:
        return self.spans(other) and self.write >= other.write and self.node.follows(other.node)


@dataclass
class _Watched:
    """An engine buffer: an address range, and those who touched it that later accesses must still be compared with."""

    name: str
    start: int
    end: int
    accesses: list[_Access] = field(default_factory=list)

    def touch(self, node: _Node, start: int, end: int, write: bool) -> None:
        new = _Access(node, start, end, write)
        for old in self.accesses:
            if old.start < end and start < old.end and (write or old.write) and not node.follows(old.node):
                raise RaceError(_race(self, old, new))
        if any(old.node is node and old.spans(new) and old.write >= write for old in self.accesses):
            return
        # Whoever conflicts with a superseded access conflicts with the new one too, and after that it is after both.
        self.accesses = [old for old in self.accesses if not new.supersedes(old)]
        self.accesses.append(new)


def _race(buffer: _Watched, old: _Access, new: _Access) -> str:
    def verb(access: _Access) -> str:
        return "writes" if access.write else "reads"

    return (
        f"`{new.node.name}` {verb(new)} buffer `{buffer.name}`, which `{old.node.name}` {verb(old)}, and no declared "
        f"dependency orders them. Add the event of `{old.node.name}` to `after=` of `{new.node.name}`, or make "
        "compute wait for it."
    )


class CheckedLanes(InlineLanes):
    """Runs inline and raises ``RaceError`` at the first conflicting pair that ``after=`` does not order.

    Compute must run inside ``with lanes.checking():``, else its reads and writes are not seen. Native code that
    torch's dispatcher does not see must call ``touch`` itself.
    """

    def __init__(self, memory: HostMemory, device: torch.device | str = "cpu") -> None:
        super().__init__(memory, device)
        self._count = 0
        self._synchronized = 0  # nodes that everything later comes after, as bits
        self._starts: list[int] = []
        self._watched: list[_Watched] = []
        self._compute = self._node("compute", ())
        self._current = self._compute
        self._mode = _AccessMode(self)
        self._watching = False

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Records the compute lane's accesses on this thread."""
        self._watching = True
        try:
            with self._mode:
                yield
        finally:
            self._watching = False

    def buffers(self, name: str, sizes: Sequence[int], dtype: torch.dtype, place: Place) -> list[Tensor]:
        """See ``Lanes.buffers``."""
        made = super().buffers(name, sizes, dtype, place)
        for index, tensor in enumerate(made):
            self.watch(f"{name}[{index}]", tensor)
        return made

    def watch(self, name: str, tensor: Tensor) -> None:
        """See ``Lanes.watch``."""
        if tensor.numel() == 0:
            return
        start, end = _extent(tensor)
        at = bisect.bisect_left(self._starts, start)
        self._starts.insert(at, start)
        self._watched.insert(at, _Watched(name, start, end))

    def unwatch(self, tensor: Tensor) -> None:
        """See ``Lanes.unwatch``: whoever gets the memory next has nothing to do with who had it."""
        at = bisect.bisect_left(self._starts, tensor.data_ptr())
        del self._starts[at], self._watched[at]

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
        """See ``Lanes.copy``."""
        with self._as(self._node(f"{lane} {tag}", after)) as node:
            super().copy(dst, src, lane, priority=priority, tag=tag)
        return node

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
        with self._as(self._node(f"host {tag}", after)) as node:
            super().host(fn, priority=priority, tag=tag, traffic_bytes=traffic_bytes)
        return node

    def compute(self) -> Event:
        """See ``Lanes.compute``: closes the running compute node and opens the next."""
        done = self._compute
        self._compute = self._current = self._node("compute", (done,))
        return done

    def wait_compute(self, *events: Event) -> None:
        """See ``Lanes.wait_compute``."""
        self._compute = self._current = self._node("compute", (self._compute, *events))

    def synchronize(self) -> None:
        """See ``Lanes.synchronize``: everything so far comes before everything after."""
        self._synchronized = (1 << self._count) - 1
        self._compute = self._current = self._node("compute", ())

    def touch(self, tensor: Tensor, *, write: bool) -> None:
        """The operation that is running reads or writes ``tensor``."""
        if tensor.numel() == 0 or not self._watched:
            return
        start, end = _extent(tensor)
        at = max(bisect.bisect_right(self._starts, start) - 1, 0)
        for watched in self._watched[at:]:
            if watched.start >= end:
                break
            if watched.end > start:
                watched.touch(self._current, max(start, watched.start), min(end, watched.end), write)

    def _node(self, name: str, after: Iterable[Event]) -> _Node:
        before = self._synchronized | 1 << self._count
        for event in own_events(_Node, after):
            before |= event.before
        node = _Node(name, self._count, before)
        self._count += 1
        return node

    @contextmanager
    def _as(self, node: _Node) -> Iterator[_Node]:
        """Accesses inside belong to ``node``, also where nobody entered ``checking``."""
        outer, self._current = self._current, node
        try:
            with nullcontext() if self._watching else self._mode:
                yield node
        finally:
            self._current = outer


class _AccessMode(TorchDispatchMode):
    """Tells ``CheckedLanes`` which tensors each operator reads and writes; views read nothing."""

    def __init__(self, lanes: CheckedLanes) -> None:
        super().__init__()
        self._lanes = lanes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:
            for argument, value in _bound(func._schema.arguments, args, kwargs):
                write = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                        self._lanes.touch(tensor, write=write)
        return func(*args, **kwargs)


def _bound(arguments: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield from zip(arguments, args, strict=False)
    for argument in arguments[len(args) :]:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte address that a strided tensor reaches."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


@dataclass(eq=False)
class _Queued(Event):
    """An operation that has not run yet, or has."""

    run: Callable[[], object]
    after: list[_Queued]
    targets: Sequence[Tensor]
    done: bool = False
    poisoned: bool = False

    @property
    def ready(self) -> bool:
        return not self.done and all(event.done for event in self.after)

    def finish(self) -> None:
        """Lets go of what it worked on: who made it may keep the event."""
        self.done, self.run, self.after, self.targets = True, _nothing, [], ()


def _nothing() -> None:
    """What is left to do of an operation that is done."""


class ShuffledLanes(InlineLanes):
    """Runs copies and host work in a random order that ``after=`` allows, as late as it allows.

    The target of a copy is filled with NaN as soon as the copy may start, so that whoever uses it too early shows.
    """

    def __init__(self, memory: HostMemory, device: torch.device | str = "cpu", *, seed: int = 0) -> None:
        super().__init__(memory, device)
        self._random = random.Random(seed)
        self._queue: list[_Queued] = []

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
        """See ``Lanes.copy``."""
        dst, src = list(dst), list(src)

        def run() -> None:
            with self._working(lane, tag, nbytes(dst), priority):
                copy_all(dst, src)

        return self._submit(run, after, dst)

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

        def run() -> None:
            with self._working("host", tag, traffic_bytes, priority):
                fn()

        return self._submit(run, after, ())

    def compute(self) -> Event:
        """See ``Lanes.compute``."""
        self._progress()
        return _Queued(_nothing, [], (), done=True)

    def wait_compute(self, *events: Event) -> None:
        """See ``Lanes.wait_compute``: runs the events' ancestors, and at random whatever else is ready."""
        self._progress()
        waiting = own_events(_Queued, events)
        while not all(event.done for event in waiting):
            self._run_one(_ancestors(waiting) if self._random.random() < 0.7 else None)

    def synchronize(self) -> None:
        """See ``Lanes.synchronize``."""
        while self._queue:
            self._run_one(None)

    def _submit(self, run: Callable[[], object], after: Iterable[Event], targets: Sequence[Tensor]) -> Event:
        operation = _Queued(run, own_events(_Queued, after), targets)
        self._queue.append(operation)
        self._progress()
        return operation

    def _progress(self) -> None:
        self._poison()
        while self._queue and self._random.random() < 0.4:
            self._run_one(None)

    def _run_one(self, among: set[int] | None) -> None:
        ready = [op for op in self._queue if op.ready and (among is None or id(op) in among)]
        operation = self._random.choice(ready)
        self._queue.remove(operation)
        try:
            operation.run()
        except BaseException:
            self._drop_followers(operation)
            raise
        finally:
            operation.finish()
        self._poison()

    def _drop_followers(self, failed: _Queued) -> None:
        for operation in [op for op in self._queue if id(failed) in _ancestors([op])]:
            self._queue.remove(operation)
            operation.finish()

    def _poison(self) -> None:
        for operation in self._queue:
            if operation.ready and not operation.poisoned:
                operation.poisoned = True
                with lane_context(self.device):
                    for target in operation.targets:
                        if target.is_floating_point():
                            target.fill_(float("nan"))


def _ancestors(events: Iterable[_Queued]) -> set[int]:
    found: set[int] = set()
    stack = [event for event in events if not event.done]
    while stack:
        event = stack.pop()
        if id(event) not in found:
            found.add(id(event))
            stack.extend(e for e in event.after if not e.done)
    return found
