"""CUDA streams and events behind ``AsyncLanes``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.asynchronous import AsyncLanes, Marker
from lightning_offload.memory.lanes import CopyLane, copy_all
from lightning_offload.memory.ledger import Instant, Ledger


class CudaStreams:
    """CUDA streams and events; made in ``setup``, never pickled."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._lanes = {"h2d": torch.cuda.Stream(self._device), "d2h": torch.cuda.Stream(self._device)}
        self._origin: tuple[torch.cuda.Event, float] | None = None  # one instant on both clocks

    def enter_thread(self) -> None:
        """See ``Streams.enter_thread``: a new thread is on device 0, where even asking an event starts a context."""
        torch.cuda.set_device(self._device)

    def copy(
        self, lane: CopyLane, dst: Sequence[Tensor], src: Sequence[Tensor], after: Sequence[Marker]
    ) -> tuple[Marker, Callable[[], tuple[float, float] | None]]:
        """See ``Streams.copy``."""
        stream = self._lanes[lane]
        for marker in after:
            if isinstance(marker, _CudaMarker):  # host work is done by the time a copy is issued
                stream.wait_event(marker.event)
        start = torch.cuda.Event(enable_timing=True)
        end = _CudaMarker(torch.cuda.Event(enable_timing=True, blocking=True))
        with torch.cuda.stream(stream):
            start.record(stream)
            copy_all(dst, src, non_blocking=True)
            end.event.record(stream)
        return end, lambda: self._between(start, end.event) if end.done() else None

    def compute_marker(self) -> Marker:
        """See ``Streams.compute_marker``: in a backward hook the current stream is that of the gradient."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return _CudaMarker(event)

    def compute_wait(self, marker: Marker) -> None:
        """See ``Streams.compute_wait``."""
        if isinstance(marker, _CudaMarker):
            torch.cuda.current_stream(self._device).wait_event(marker.event)

    def compute_instant(self) -> Instant:
        """See ``Streams.compute_instant``."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return lambda: self._since_origin(event) if event.query() else None

    def keep_clock(self, on: bool) -> None:
        """See ``Streams.keep_clock``: set anew for each trace, because device and host clocks drift apart."""
        self._origin = None
        if on:
            event, before_s = torch.cuda.Event(enable_timing=True), Ledger.clock()
            event.record(self._lanes["d2h"])
            event.synchronize()
            self._origin = event, (before_s + Ledger.clock()) / 2

    def _between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> tuple[float, float]:
        """The difference is taken by itself: CUDA tells times in fp32, which is coarse far from the origin."""
        start_s = self._since_origin(start)
        return start_s, start_s + float(start.elapsed_time(end)) / 1e3

    def _since_origin(self, event: torch.cuda.Event) -> float:
        if self._origin is None:
            return 0.0
        origin, origin_s = self._origin
        return origin_s + float(origin.elapsed_time(event)) / 1e3

    def is_asynchronous(self, host: Tensor) -> bool:
        """See ``Streams.is_asynchronous``: only page-locked memory (an empty tensor has none)."""
        return host.numel() == 0 or host.is_pinned()

    def synchronize(self) -> None:
        """See ``Streams.synchronize``."""
        torch.cuda.synchronize(self._device)


@dataclass
class _CudaMarker:
    event: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


def cuda_lanes(memory: HostMemory, device: torch.device, threads: int | None) -> AsyncLanes:
    """The lanes of a CUDA device."""
    return AsyncLanes(memory, device, CudaStreams(device), threads)
