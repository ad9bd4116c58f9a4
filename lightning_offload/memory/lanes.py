"""Lanes: resources that each do one thing at a time, and the one way to say what runs after what.

A method is a short program over four lanes: the device *computing*, the link *down* (``d2h``) and *up* (``h2d``),
and the *host* computing. ``after=`` is the only thing that orders two operations; no lane promises an order of its
own. The back ends (``InlineLanes`` here, ``CheckedLanes`` and ``ShuffledLanes`` in ``checked.py``, ``AsyncLanes`` in
``asynchronous.py``) run the same program with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_offload.memory.arena import HostMemory, region_bytes
from lightning_offload.memory.ledger import Instant, Ledger

Place = Literal["device", "host", "pinned"]
CopyLane = Literal["h2d", "d2h"]
Made = TypeVar("Made")


class Event:
    """Something that will have happened; given to ``after=`` and ``wait_compute``. Equal only to itself."""

    __slots__ = ("__weakref__",)


Own = TypeVar("Own", bound=Event)


def own_events(kind: type[Own], events: Iterable[Event]) -> list[Own]:
    """The events of one back end; those of another would order nothing."""
    own = []
    for event in events:
        assert isinstance(event, kind), "an event of other lanes"
        own.append(event)
    return own


class Lanes(Protocol):
    """What a method may ask of the machine. Thread-safe: backward hooks run on autograd's own thread."""

    device: torch.device
    memory: HostMemory
    ledger: Ledger

    @property
    def shares_memory(self) -> bool:
        """Whether the device's memory is the host's own."""
        ...

    def buffers(self, name: str, sizes: Sequence[int], dtype: torch.dtype, place: Place) -> list[Tensor]:
        """One flat tensor per entry of ``sizes`` (elements), for the engine alone; host places are exact in size.

        Every engine buffer is made here, so that it can be counted, checked and planned.
        """
        ...

    def watch(self, name: str, tensor: Tensor) -> None:
        """Declare memory that the engine did not make but copies into (a weight of the module)."""
        ...

    def unwatch(self, tensor: Tensor) -> None:
        """An engine buffer on the device is let go of: its memory is no longer the engine's."""
        ...

    def scratch(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host lane itself: valid inside one host function, contents undefined at its start."""
        ...

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
        """Copy each ``src`` into its ``dst`` (same shape and dtype) once everything in ``after`` has happened.

        The side on the host is contiguous: torch would stage any other through memory of its own, and wait for it.
        """
        ...

    def host(
        self,
        fn: Callable[[], object],
        *,
        after: Iterable[Event] = (),
        priority: int = 0,
        tag: str = "",
        traffic_bytes: int = 0,
    ) -> Event:
        """Run ``fn`` on the host worker; ``traffic_bytes`` is what it moves through host memory.

        Among what is ready the lowest ``priority`` goes first. An exception in ``fn`` is raised in the main thread
        at the next call of any lane method.
        """
        ...

    def compute(self) -> Event:
        """Everything issued to the compute lane so far."""
        ...

    def wait_compute(self, *events: Event) -> None:
        """What is issued to the compute lane from here on runs after ``events``."""
        ...

    def run(self, key: Hashable, fn: Callable[[], Made]) -> Made:
        """``fn()``, on the compute lane; calls of one ``key`` cost the same, so where nothing is real one is enough."""
        ...

    def mark(self, kind: str, order: int = -1) -> None:
        """Compute issued from here on does ``kind`` for the unit at place ``order``; an empty kind: nothing.

        For the timeline alone: it orders nothing, and costs nothing unless a trace runs.
        """
        ...

    def read(self, tensor: Tensor, default: float) -> float:
        """A host decision on a device value: waits for it; ``default`` where nothing is real."""
        ...

    def synchronize(self) -> None:
        """Return when nothing is in flight; raises what a worker raised."""
        ...

    def close(self) -> None:
        """Stop workers and give device buffers back; host memory stays readable. Idempotent."""
        ...


def host_buffers(memory: HostMemory, name: str, sizes: Sequence[int], dtype: torch.dtype, place: Place) -> list[Tensor]:
    """One exact region, carved into a flat tensor per size."""
    region = memory.region(name, region_bytes((size, dtype) for size in sizes), pinned=place == "pinned")
    return [region.carve(size, dtype) for size in sizes]


def shared_buffers(
    lanes: Lanes, label: str, sizes: Sequence[int], kinds: Sequence[tuple[torch.dtype, Place]]
) -> list[Tensor]:
    """One flat buffer per size; those of one dtype and place share one exact region."""
    made: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        chosen = [at for at, other in enumerate(kinds) if other == kind]
        name = ".".join([label, *(str(part) for part in kind)])
        made |= dict(zip(chosen, lanes.buffers(name, [sizes[at] for at in chosen], *kind), strict=True))
    return [made[at] for at in range(len(sizes))]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of ``tensors``."""
    return sum(t.numel() * t.element_size() for t in tensors)


def host_instant() -> Instant:
    """Now, on the host's clock."""
    now = Ledger.clock()
    return lambda: now


@contextmanager
def lane_context(device: torch.device) -> Iterator[None]:
    """What every lane operation runs in: no autograd, no autocast, never inference tensors.

    These modes are thread-local and a hook may fire under any of them.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class InlineLanes:
    """Runs everything at once and in order, on the caller's thread: CPU runs, notebooks, the reference in tests."""

    _now = Event()

    def __init__(self, memory: HostMemory, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.memory = memory
        self.ledger = Ledger()
        self._scratch: dict[torch.dtype, Tensor] = {}

    @property
    def shares_memory(self) -> bool:
        """See ``Lanes.shares_memory``."""
        return self.device.type == "cpu"

    def buffers(self, name: str, sizes: Sequence[int], dtype: torch.dtype, place: Place) -> list[Tensor]:
        """See ``Lanes.buffers``."""
        with torch.inference_mode(False):
            if place == "device":
                return [torch.empty(size, dtype=dtype, device=self.device) for size in sizes]
            return host_buffers(self.memory, name, sizes, dtype, place)

    def watch(self, name: str, tensor: Tensor) -> None:
        """See ``Lanes.watch``."""

    def unwatch(self, tensor: Tensor) -> None:
        """See ``Lanes.unwatch``."""

    def scratch(self, numel: int, dtype: torch.dtype) -> Tensor:
        """See ``Lanes.scratch``."""
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
        """See ``Lanes.copy``."""
        with self._working(lane, tag, nbytes(dst), priority):
            copy_all(dst, src)
        return self._now

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
        with self._working("host", tag, traffic_bytes, priority):
            fn()
        return self._now

    def compute(self) -> Event:
        """See ``Lanes.compute``."""
        return self._now

    def wait_compute(self, *events: Event) -> None:
        """See ``Lanes.wait_compute``."""

    def run(self, key: Hashable, fn: Callable[[], Made]) -> Made:
        """See ``Lanes.run``."""
        return fn()

    def mark(self, kind: str, order: int = -1) -> None:
        """See ``Lanes.mark``."""
        self.ledger.mark(kind, order, host_instant)

    def read(self, tensor: Tensor, default: float) -> float:
        """See ``Lanes.read``."""
        return float(tensor)

    def synchronize(self) -> None:
        """See ``Lanes.synchronize``."""

    def close(self) -> None:
        """See ``Lanes.close``."""
        self._scratch.clear()
        self.memory.close()

    @contextmanager
    def _working(self, lane: str, tag: str, nbytes: int, order: int) -> Iterator[None]:
        """Around one operation; compute stands still meanwhile."""
        marked = self.ledger.marked
        self.mark("")
        with lane_context(self.device), self.ledger.timed(lane, tag, nbytes, order):
            yield
        self.mark(*marked)


def copy_all(dst: Sequence[Tensor], src: Sequence[Tensor], *, non_blocking: bool = False) -> None:
    """``dst[i] <- src[i]``; a copy never converts, so dtypes and shapes must agree."""
    for to, source in zip(dst, src, strict=True):
        assert (to.dtype, to.shape) == (source.dtype, source.shape), (to.dtype, to.shape, source.dtype, source.shape)
        to.copy_(source, non_blocking=non_blocking)
