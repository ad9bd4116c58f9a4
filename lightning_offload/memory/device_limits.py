"""What a device has, where it hangs, and how to stay within less of it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_offload.memory.host_limits import GIB, HostMemoryLimit, text

CONTEXT_BYTES = GIB // 2
"""Device memory that a CUDA context takes, where it cannot be measured."""

_PCI = Path("/sys/bus/pci/devices")
_GENERATIONS = {"2.5": "1.0", "5.0": "2.0", "8.0": "3.0", "16.0": "4.0", "32.0": "5.0", "64.0": "6.0"}
"""PCIe by GT/s per lane."""


class Device(NamedTuple):
    """A device as its driver and the system describe it; see ``Machine`` for the fields."""

    name: str
    total_bytes: int
    free_bytes: int
    context_bytes: int
    budget_bytes: int
    numa_node: int | None
    link: str
    is_integrated: bool


def find_device(device: torch.device, host: HostMemoryLimit) -> Device:
    """Looks at a device; on CUDA this makes the context.

    Raises:
        ValueError: A device that is neither CUDA nor the CPU.
    """
    if device.type == "cpu":
        name, total, free = platform.processor() or platform.machine(), host.total_bytes, host.available_bytes
        return Device(name, total, free, 0, free, None, "host memory", is_integrated=False)
    if device.type != "cuda":
        raise ValueError(f"device={str(device)!r} is not supported; use 'cuda' or 'cpu'")
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    reserved = torch.cuda.memory_reserved(device)
    context = _context_bytes(total - free - reserved)
    folder = _PCI / _pci_address(properties)
    return Device(
        name=torch.cuda.get_device_name(device),
        total_bytes=total,
        free_bytes=free,
        context_bytes=context,
        budget_bytes=min(total, free + reserved + context),
        numa_node=_numa_node(folder),
        link=_link(folder),
        is_integrated=bool(getattr(properties, "is_integrated", False)),
    )


def cap_device(device: torch.device | str, gib: float | None) -> Callable[[], None]:
    """Keeps this process within ``gib`` of a device's memory, its CUDA context included; returns what undoes it.

    torch's allocator is told, so beyond the cap there is a ``torch.OutOfMemoryError`` as on a smaller device. None, the
    CPU, and more than the device has, change nothing.

    Raises:
        ValueError: The context alone takes that much.
    """
    device = torch.device(device)
    if gib is None or device.type != "cuda":
        return lambda: None
    found = find_device(device, HostMemoryLimit(0, 0, ""))
    context = max(found.context_bytes, CONTEXT_BYTES)  # it grows as kernels are loaded
    left = int(gib * GIB) - context
    if left <= 0:
        raise ValueError(
            f"`max_device_gib` must be more than the {context / GIB:.2f} GiB that CUDA itself takes on "
            f"{found.name}, got {gib!r}"
        )
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(before, left / found.total_bytes), device)
    return lambda: torch.cuda.set_per_process_memory_fraction(before, device)


def _context_bytes(taken_bytes: int) -> int:
    """What is taken beside torch's memory is the context, unless other processes are there too."""
    return taken_bytes if GIB // 10 <= taken_bytes <= GIB else CONTEXT_BYTES


def _pci_address(properties: object) -> str:
    domain, bus, slot = (getattr(properties, f"pci_{part}_id", -1) for part in ("domain", "bus", "device"))
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0" if bus >= 0 else "unknown"


def _numa_node(folder: Path) -> int | None:
    node = text(folder / "numa_node").strip()  # -1 where the machine has one node, or a hypervisor hides them
    return int(node) if node.isdecimal() else None


def _link(folder: Path) -> str:
    """Such as ``PCIe 4.0 x16``; an idle device lowers its speed, so what it can do is said beside it."""
    now, best = (_speed_and_width(folder, which) for which in ("current", "max"))
    if not now:
        return "not shown by the system"
    return f"PCIe {now}" if best in ("", now) else f"PCIe {now} now, {best} at most"


def _speed_and_width(folder: Path, which: str) -> str:
    speed = text(folder / f"{which}_link_speed").split(" ")[0]
    width = text(folder / f"{which}_link_width").strip()
    return f"{_GENERATIONS[speed]} x{width}" if speed in _GENERATIONS and width.isdecimal() else ""
