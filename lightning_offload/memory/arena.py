"""Host memory of exact size: one anonymous mapping per region, pinned in place where that is allowed.

torch rounds each pinned tensor up to a power of two, up to twice the RAM. Here a region is mapped once, at its size
rounded to a page, registered with CUDA where it lies, and carved into tensors that each have a storage of their own.

The mapping is shared, not private: after a fork (data loader workers) a private one would be copied page by page as
this process writes, up to twice the memory; a shared one never is. Huge pages are not asked for: shared anonymous
memory has them only where the administrator turned them on for tmpfs, and in-place sweeps measured no faster.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_offload.errors import HostMemoryError
from lightning_offload.memory.budget import GIB, Machine

ALIGN_BYTES = 256
LARGE_BYTES = GIB
"""From here on it matters that what earlier runs held is given back first; a collection takes tenths of a second."""
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of this process


def aligned(nbytes: int, align: int = ALIGN_BYTES) -> int:
    """Rounds ``nbytes`` up to a multiple of ``align``."""
    return -(-nbytes // align) * align


def region_bytes(tensors: Iterable[tuple[int, torch.dtype]], align: int = ALIGN_BYTES) -> int:
    """Bytes of the region from which tensors of these (numel, dtype) can be carved in this order."""
    end = 0
    for numel, dtype in tensors:
        end = aligned(end, align) + numel * dtype.itemsize if numel else end
    return end


@dataclass(frozen=True)
class Usage:
    """Bytes of host memory: what the tensors asked for, what is mapped (alignment, pages), and what of it is locked."""

    requested_bytes: int
    allocated_bytes: int
    locked_bytes: int


@dataclass(frozen=True)
class HostReport(Usage):
    """The sums over all regions, and each region by its name."""

    by_name: Mapping[str, Usage]


class Region:
    """One contiguous piece of zeroed host memory, handed out front to back by ``carve``.

    The memory lives as long as the region or any tensor carved from it, and is given back with the last of them.

    Attributes:
        name: What it is called in reports.
        nbytes: Its size as asked for; mapped in whole pages.
        pinned: Whether it is registered with CUDA.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.pinned = False
        self._memory = mmap.mmap(-1, aligned(nbytes, mmap.PAGESIZE)) if nbytes else None
        self._end = 0
        self._requested_bytes = 0

    def carve(self, numel: int, dtype: torch.dtype, align: int = ALIGN_BYTES) -> Tensor:
        """The next ``numel`` elements as a 1-D CPU tensor over this memory, zero where nothing was written.

        Its storage is its own and exactly its bytes, so that ``torch.save`` writes no neighbour and safetensors sees
        no sharing.
        """
        if numel == 0:  # takes no place; frombuffer refuses it
            return torch.empty(0, dtype=dtype, device="cpu")
        start = aligned(self._end, align)
        end = start + numel * dtype.itemsize
        assert end <= self.nbytes, f"region {self.name!r} of {self.nbytes} bytes is asked for bytes {start} to {end}"
        self._end = end
        self._requested_bytes += end - start
        assert self._memory is not None
        return torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=start)

    @property
    def usage(self) -> Usage:
        """What was carved, mapped and locked so far."""
        mapped = 0 if self._memory is None else len(self._memory)
        return Usage(self._requested_bytes, mapped, mapped if self.pinned else 0)

    @property
    def _address(self) -> int:
        assert self._memory is not None
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()


class HostMemory:
    """All host memory of one engine: regions by name, pinned while the lockable budget lasts.

    Regions are pinned in the order in which they are made, so make first those that matter most (the rings that every
    byte passes through). One that cannot be pinned is pageable: the results are the same, copies are slower.

    Args:
        pin: ``"auto"`` pins where CUDA is available, True also warns where it is not, False never pins.
        machine: What may be locked; detected by default.
        cap_bytes: What all regions together stay within; None is as far as the system goes.
    """

    def __init__(
        self, *, pin: bool | Literal["auto"] = "auto", machine: Machine | None = None, cap_bytes: int | None = None
    ) -> None:
        self._regions: dict[str, Region] = {}
        self._cap_bytes = cap_bytes
        self._machine = machine or Machine.detect()
        self._lockable_bytes = self._machine.lockable_bytes
        self._pins = _Pins(torch.cuda.cudart()) if pin and torch.cuda.is_available() else None
        self._warned = False
        if self._pins is not None:
            # without close: memory unmapped while registered stays locked, and its address cannot be registered again;
            # not at exit, when CUDA may be gone and the process gives everything back
            weakref.finalize(self, self._pins.release).atexit = False
        if pin is True and self._pins is None:
            warnings.warn("pin_memory=True, but CUDA is not available: host memory is pageable", stacklevel=2)

    def region(self, name: str, nbytes: int, *, pinned: bool) -> Region:
        """Maps a region of exactly ``nbytes``, zeroed, and pins it where ``pinned`` and the machine allow.

        A Trainer is a reference cycle, so what an earlier run held may still be mapped: it is collected once before
        this memory becomes large, because a system that overcommits refuses nothing, and where the system refuses.

        Raises:
            HostMemoryError: The system refuses the mapping, or it goes beyond the cap; nothing is allocated.
        """
        assert name not in self._regions, f"two regions are called {name!r}"
        held = self.report().allocated_bytes
        self._check_cap(name, held, aligned(nbytes, mmap.PAGESIZE))
        if held < LARGE_BYTES <= held + nbytes:
            gc.collect()
        self._regions[name] = region = _map(name, nbytes, held)
        if pinned and nbytes and self._pins is not None:
            self._pin(region, self._pins)
        return region

    def report(self) -> HostReport:
        """What was asked, mapped and locked, in sum and by region; empty after ``close``."""
        by_name = {name: region.usage for name, region in self._regions.items()}
        used = by_name.values()
        return HostReport(
            requested_bytes=sum(usage.requested_bytes for usage in used),
            allocated_bytes=sum(usage.allocated_bytes for usage in used),
            locked_bytes=sum(usage.locked_bytes for usage in used),
            by_name=MappingProxyType(by_name),
        )

    def close(self) -> None:
        """Unpins everything and lets go of it; tensors stay readable while they are referenced."""
        if self._pins is not None:
            self._pins.release()
        for region in self._regions.values():
            region.pinned = False
        self._regions.clear()

    def _check_cap(self, name: str, held: int, nbytes: int) -> None:
        if self._cap_bytes is not None and held + nbytes > self._cap_bytes:
            raise HostMemoryError(
                f"{name!r} needs {nbytes / GIB:.2f} GiB of host memory beside {held / GIB:.2f} GiB held already, but "
                f"max_host_gib keeps the run within {self._cap_bytes / GIB:.2f} GiB; use a smaller model or a method "
                "that keeps less on the host, or raise max_host_gib"
            )

    def _pin(self, region: Region, pins: _Pins) -> None:
        locked = self.report().locked_bytes
        nbytes = region.usage.allocated_bytes
        if locked + nbytes > self._lockable_bytes:
            reason = self._machine.lockable_limit
        else:
            reason = pins.lock(region._address, nbytes)
        region.pinned = not reason
        if reason:
            self._warn_pageable(locked + nbytes, reason)
            self._lockable_bytes = min(self._lockable_bytes, locked + nbytes - 1)  # smaller regions may still fit

    def _warn_pageable(self, asked_bytes: int, reason: str) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{asked_bytes / GIB:.2f} GiB of pinned host memory asked, {self._lockable_bytes / GIB:.2f} GiB lockable: "
            f"{reason}. What does not fit stays pageable: same results, slower copies (pin_memory=False asks for none)",
            stacklevel=4,
        )


def _map(name: str, nbytes: int, held: int) -> Region:
    with contextlib.suppress(OSError):
        return Region(name, nbytes)
    gc.collect()
    try:
        return Region(name, nbytes)
    except OSError as error:
        raise HostMemoryError(
            f"the system refuses {nbytes / GIB:.2f} GiB of host memory for {name!r}, beside {held / GIB:.2f} GiB held "
            f"already ({error}); use a smaller model, or raise the limit (ulimit -v, vm.overcommit_memory, "
            "vm.max_map_count)"
        ) from error


class _Pins:
    """The ranges registered with CUDA."""

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self._addresses: list[int] = []

    def lock(self, address: int, nbytes: int) -> str:
        """Registers a range where it lies; returns why it could not, or nothing."""
        try:
            code = self._cudart.cudaHostRegister(address, nbytes, _PORTABLE)
            reason = f"cudaHostRegister failed: {self._cudart.cudaGetErrorString(code)}" if int(code) else ""
        except RuntimeError as error:
            reason = f"cudaHostRegister failed: {error}"
        if reason:
            _clear_error()
        else:
            self._addresses.append(address)
        return reason

    def release(self) -> None:
        """Unregisters every range; to be called before any of them is unmapped."""
        while self._addresses:
            if int(self._cudart.cudaHostUnregister(self._addresses.pop())):
                _clear_error()


def _clear_error() -> None:
    """Takes a refused call's error off this thread, or the next kernel launch would report it as its own.

    torch does not bind ``cudaGetLastError`` everywhere, but calls it after each launch: one kernel takes the error.
    """
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
