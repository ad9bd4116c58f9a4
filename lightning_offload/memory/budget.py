"""What the machine has: device and host memory, what may be locked, and cores."""

from __future__ import annotations

import math
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from lightning_offload.errors import HostMemoryError

GIB = 1024**3

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")

# limit, usage, prefix in memory.stat: cgroup v2 (hard, and the mark above which it throttles), then v1
_MEMORY_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.high", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


@dataclass(frozen=True)
class Machine:
    """The machine as this process may use it, at the moment of ``detect``.

    Attributes:
        device_type: ``"cuda"`` or ``"cpu"``.
        device_name: The device as its driver calls it.
        device_total_bytes: Memory of the device; of the host where the device is the CPU.
        device_free_bytes: What is free of it.
        host_total_bytes: Host memory this process could have: RAM, or the cgroup limit where that is less.
        host_available_bytes: What it can still allocate without swapping; page cache counts as available.
        host_limit: Which of the two binds ``host_available_bytes``.
        lockable_bytes: How much of the host memory CUDA can be expected to pin.
        lockable_limit: What binds that.
        physical_cores: Cores of the machine, hyper-threads not counted.
        affinity_cores: Physical cores among the CPUs that this process may run on.
        cpu_quota: CPUs' worth of time that the cgroup grants; None without a quota.
        torch_threads: ``torch.get_num_threads()`` as found.
        omp_num_threads: ``OMP_NUM_THREADS`` as set; None where it is not.
    """

    device_type: str
    device_name: str
    device_total_bytes: int
    device_free_bytes: int
    host_total_bytes: int
    host_available_bytes: int
    host_limit: str
    lockable_bytes: int
    lockable_limit: str
    physical_cores: int
    affinity_cores: int
    cpu_quota: float | None
    torch_threads: int
    omp_num_threads: str | None

    @classmethod
    def detect(cls, device: torch.device | str = "cpu") -> Machine:
        """Looks at this machine; CUDA is initialised only when ``device`` is a CUDA device.

        Raises:
            ValueError: A device that is neither CUDA nor the CPU.
        """
        device = torch.device(device)
        host = _host()
        name, total, free = _device(device, host)
        lockable, lockable_limit = _lockable(host)
        return cls(
            device_type=device.type,
            device_name=name,
            device_total_bytes=total,
            device_free_bytes=free,
            host_total_bytes=host.total_bytes,
            host_available_bytes=host.available_bytes,
            host_limit=host.limit,
            lockable_bytes=lockable,
            lockable_limit=lockable_limit,
            physical_cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
            affinity_cores=_affinity_cores(),
            cpu_quota=_cpu_quota(),
            torch_threads=torch.get_num_threads(),
            omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        )

    @property
    def host_threads(self) -> int:
        """Threads for host arithmetic: the physical cores at hand, less one that launches kernels."""
        return max(1, self._cores - 1)

    @property
    def host_threads_reason(self) -> str:
        """Why ``host_threads`` is what it is, for the log."""
        if self._cores < self.affinity_cores:
            source = f"the cgroup's quota of {self.cpu_quota:g} CPUs"
        else:
            source = f"{self.affinity_cores} of {self.physical_cores} physical cores in the affinity"
        why = f"{source}, less one for the main thread" if self._cores > 1 else f"{source}; at least one"
        ignored = self.omp_num_threads is not None and self.omp_num_threads != str(self.host_threads)
        return f"{why}; OMP_NUM_THREADS={self.omp_num_threads} is not followed" if ignored else why

    @property
    def _cores(self) -> int:
        return self.affinity_cores if self.cpu_quota is None else min(self.affinity_cores, math.floor(self.cpu_quota))

    def require_host(self, needed_bytes: int, *, what: str, on_misfit: Literal["error", "warn"] = "error") -> None:
        """Checks, before anything is allocated, that the host can hold ``needed_bytes`` more.

        Args:
            needed_bytes: What will be allocated.
            what: What it is for; the subject of the message.
            on_misfit: Whether too little is an error, or a warning for those who know better (swap).

        Raises:
            HostMemoryError: The host has less, and ``on_misfit`` is ``"error"``.
        """
        if needed_bytes <= self.host_available_bytes:
            return
        message = (
            f"{what} needs {needed_bytes / GIB:.2f} GiB of host memory, but {self.host_available_bytes / GIB:.2f} GiB "
            f"is available ({self.host_limit}); use a smaller model or a method that keeps less on the host, "
            "free memory, or raise the limit"
        )
        if on_misfit == "error":
            raise HostMemoryError(f"{message}. on_misfit='warn' tries all the same.")
        warnings.warn(f"{message}. Trying all the same (on_misfit='warn').", stacklevel=2)


class _Host(NamedTuple):
    total_bytes: int
    available_bytes: int
    limit: str


def _host() -> _Host:
    memory = psutil.virtual_memory()
    ram = _Host(memory.total, memory.available, "free memory of the machine")
    known = [ram, *_cgroup_memory()]
    tightest = min(known, key=lambda host: host.available_bytes)
    return tightest._replace(total_bytes=min(host.total_bytes for host in known))


def _cgroup_memory() -> Iterator[_Host]:
    for folder in _cgroup_folders("memory"):
        for limit_name, usage_name, prefix in _MEMORY_FILES:
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is None or usage is None:
                continue
            # the usage counts file pages, which the kernel drops before it refuses memory
            cache = sum(_stat(folder / "memory.stat", f"{prefix}{kind}_file") for kind in ("active", "inactive"))
            left = max(0, limit - max(0, usage - cache))
            yield _Host(limit, left, f"cgroup limit {folder / limit_name} of {limit / GIB:.2f} GiB")


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """The folder of this process and all above it, for any of them may limit it.

    Inside a container the path may be the host's and not exist here; the mount itself then holds the limits.
    """
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = _CGROUP / controller if controllers else _CGROUP
        folder = mount / path.lstrip("/")
        yield from (above for above in (folder, *folder.parents) if above == mount or mount in above.parents)


def _cpu_quota() -> float | None:
    quotas = []
    for folder in _cgroup_folders("cpu"):
        v2 = _text(folder / "cpu.max").split()
        v1 = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        for quota, period in (pair for pair in (v2, v1) if len(pair) == 2):
            if quota.isdecimal() and period.isdecimal():  # "max" and -1 are no quota
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _affinity_cores() -> int:
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_text(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") for cpu in cpus}
    if "" in siblings:  # not told: no more than the machine has
        return min(len(cpus), psutil.cpu_count(logical=False) or len(cpus))
    return len(siblings)


def _lockable(host: _Host) -> tuple[int, str]:
    """How much CUDA can pin.

    ``RLIMIT_MEMLOCK`` is left out on purpose: it governs ``mlock``, while ``cudaHostRegister`` has the kernel driver
    pin the pages, which is not counted against it (containers default to 64 KiB or 8 MiB and pin tens of GiB). What
    does bind is the memory itself, which pinned pages occupy for good; under WSL2 a small pool of the Windows driver,
    shared by all processes; on Windows about half of the RAM. None of them is a promise: a refused registration is
    handled where it happens.
    """
    if "microsoft" in platform.release().lower():
        return min(GIB, host.available_bytes), "WSL2 pins about 1 GiB"
    if platform.system() == "Windows":
        return min(psutil.virtual_memory().total // 2, host.available_bytes), "Windows pins about half of the RAM"
    return host.available_bytes, host.limit


def _device(device: torch.device, host: _Host) -> tuple[str, int, int]:
    if device.type == "cpu":
        return platform.processor() or platform.machine(), host.total_bytes, host.available_bytes
    if device.type != "cuda":
        raise ValueError(f"device={str(device)!r} is not supported; use 'cuda' or 'cpu'")
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.get_device_name(device), total, free


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says ``max``."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _stat(path: Path, key: str) -> int:
    pairs = (line.split() for line in _text(path).splitlines())
    return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == key), 0)
