"""CUDA streams and events behind ``AsyncLanes``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.asynchronous import AsyncLanes, Marker
from lightning_offload.memory.lanes import CopyLane, copy_all


class CudaStreams:
    """CUDA streams and events; made in ``setup``, never pickled."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lanes = {"h2d": torch.cuda.Stream(device), "d2h": torch.cuda.Stream(device)}

    def copy(
        self, lane: CopyLane, dst: Sequence[Tensor], src: Sequence[Tensor], after: Sequence[Marker]
    ) -> tuple[Marker, Callable[[], float | None]]:
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
        return end, lambda: start.elapsed_time(end.event) / 1e3 if end.event.query() else None

    def compute_marker(self) -> Marker:
        """See ``Streams.compute_marker``."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return _CudaMarker(event)

    def compute_wait(self, marker: Marker) -> None:
        """See ``Streams.compute_wait``."""
        if isinstance(marker, _CudaMarker):
            torch.cuda.current_stream(self._device).wait_event(marker.event)
        else:
            marker.wait()

    def is_asynchronous(self, host: Tensor) -> bool:
        """See ``Streams.is_asynchronous``: only page-locked memory."""
        return host.is_pinned()

    def synchronize(self) -> None:
        """See ``Streams.synchronize``."""
        for stream in self._lanes.values():
            stream.synchronize()


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
