"""What of the host this process may use: memory, what of it may be locked, cores, and the node they belong to."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

GIB = 1024**3

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")

# limit, usage, prefix in memory.stat: cgroup v2 (hard, and the mark above which it throttles), then v1
_MEMORY_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.high", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


class HostMemoryLimit(NamedTuple):
    """Host memory that this process could have, can have now, and what binds the latter."""

    total_bytes: int
    available_bytes: int
    limit: str


def host_memory() -> HostMemoryLimit:
    """RAM, or the tightest cgroup limit where that is less; page cache counts as available."""
    memory = psutil.virtual_memory()
    ram = HostMemoryLimit(memory.total, memory.available, "free memory of the machine")
    known = [ram, *_cgroup_memory()]
    tightest = min(known, key=lambda host: host.available_bytes)
    return tightest._replace(total_bytes=min(host.total_bytes for host in known))


def lockable(host: HostMemoryLimit) -> tuple[int, str]:
    """How much CUDA can pin, and what binds that.

    ``RLIMIT_MEMLOCK`` is left out on purpose: it governs ``mlock``, while ``cudaHostRegister`` has the kernel driver
    pin the pages, which is not counted against it (containers default to 64 KiB or 8 MiB and pin tens of GiB). What
    does bind is the memory itself, which pinned pages occupy for good; under WSL2 a small pool of the Windows driver,
    shared by all processes; on Windows about half of the RAM. None of them is a promise: a refused registration is
    handled where it happens.
    """
    if is_wsl():
        return min(GIB, host.available_bytes), "WSL2 pins about 1 GiB"
    if platform.system() == "Windows":
        return min(psutil.virtual_memory().total // 2, host.available_bytes), "Windows pins about half of the RAM"
    return host.available_bytes, host.limit


def is_wsl() -> bool:
    """Whether this is Linux under Windows."""
    return "microsoft" in platform.release().lower()


def cpu_model() -> str:
    """The processor as the kernel calls it; else as Python does, else the name of the host."""
    lines = (line.partition(":") for line in text(_PROC / "cpuinfo").splitlines())
    named = (value.strip() for key, _, value in lines if key.strip() == "model name")
    return next(named, "") or platform.processor() or platform.node()


def host_is_busy() -> bool:
    """Whether more runs than there are CPUs for, so that what is measured now holds for now only."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def cpu_quota() -> float | None:
    """CPUs' worth of time that the cgroup grants; None without a quota."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        v2 = text(folder / "cpu.max").split()
        v1 = [text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        for quota, period in (pair for pair in (v2, v1) if len(pair) == 2):
            if quota.isdecimal() and period.isdecimal():  # "max" and -1 are no quota
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def allowed_cpus() -> frozenset[int]:
    """The CPUs that this process may run on."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def cores_of(cpus: Iterable[int]) -> int:
    """Physical cores among ``cpus``."""
    cpus = frozenset(cpus)
    siblings = {text(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") for cpu in cpus}
    if "" in siblings:  # not told: no more than the machine has
        return min(len(cpus), psutil.cpu_count(logical=False) or len(cpus))
    return len(siblings)


def cpus_of_node(node: int | None) -> frozenset[int]:
    """The CPUs of a NUMA node; none where the system does not say."""
    cpus: set[int] = set()
    for part in text(_NODES / f"node{node}" / "cpulist").strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def text(path: Path) -> str:
    """What is in a file; empty where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _cgroup_memory() -> Iterator[HostMemoryLimit]:
    for folder in _cgroup_folders("memory"):
        for limit_name, usage_name, prefix in _MEMORY_FILES:
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is None or usage is None:
                continue
            # the usage counts file pages, which the kernel drops before it refuses memory
            cache = sum(_stat(folder / "memory.stat", f"{prefix}{kind}_file") for kind in ("active", "inactive"))
            left = max(0, limit - max(0, usage - cache))
            yield HostMemoryLimit(limit, left, f"cgroup limit {folder / limit_name} of {limit / GIB:.2f} GiB")


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """The folder of this process and all above it, for any of them may limit it.

    Inside a container the path may be the host's and not exist here; the mount itself then holds the limits.
    """
    for line in text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = _CGROUP / controller if controllers else _CGROUP
        folder = mount / path.lstrip("/")
        yield from (above for above in (folder, *folder.parents) if above == mount or mount in above.parents)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says ``max``."""
    content = text(path).strip()
    return int(content) if content.isdecimal() else None


def _stat(path: Path, key: str) -> int:
    pairs = (line.split() for line in text(path).splitlines())
    return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == key), 0)
