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
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._lanes = {"h2d": torch.cuda.Stream(self._device), "d2h": torch.cuda.Stream(self._device)}

    def enter_thread(self) -> None:
        """See ``Streams.enter_thread``: a new thread is on device 0, where even asking an event starts a context."""
        torch.cuda.set_device(self._device)

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
        return end, lambda: start.elapsed_time(end.event) / 1e3 if end.done() else None

    def compute_marker(self) -> Marker:
        """See ``Streams.compute_marker``: in a backward hook the current stream is that of the gradient."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return _CudaMarker(event)

    def compute_wait(self, marker: Marker) -> None:
        """See ``Streams.compute_wait``."""
        if isinstance(marker, _CudaMarker):
            torch.cuda.current_stream(self._device).wait_event(marker.event)

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
