"""The machine as this process may use it: found, described by a hardware file, or made smaller."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import psutil
import torch

from lightning_offload.errors import HostMemoryError
from lightning_offload.memory.device_limits import CONTEXT_BYTES, cap_device, find_device
from lightning_offload.memory.host_limits import (
    GIB,
    allowed_cpus,
    cores_of,
    cpu_quota,
    cpus_of_node,
    host_memory,
    lockable,
)
from lightning_offload.memory.rates import Rates

__all__ = ["GIB", "Machine", "cap_device", "machine_from"]


@dataclass(frozen=True)
class Machine:
    """The machine as this process may use it, at the moment of ``detect``.

    Attributes:
        name: Of the hardware: ``"auto"`` where it was found, else as its file says.
        device_type: ``"cuda"`` or ``"cpu"``.
        device_name: The device as its driver calls it.
        device_total_bytes: Memory of the device; of the host where the device is the CPU.
        device_free_bytes: What can still be allocated on it; all of it where it is only described.
        device_budget_bytes: All that this process may hold on it: free, or its own already, the CUDA context included.
        context_bytes: What the CUDA context takes of it; 0 on the CPU.
        is_integrated: Whether the device shares the host's memory.
        link: What joins device and host.
        numa_node: The device's; None on the CPU and where there is one node only.
        numa_cpus: The CPUs of that node that this process may run on.
        host_total_bytes: Host memory this process could have: RAM, or the cgroup limit where that is less.
        host_available_bytes: What it can still allocate without swapping; page cache counts as available.
        host_limit: What binds ``host_available_bytes``.
        lockable_bytes: How much of the host memory CUDA can be expected to pin.
        lockable_limit: What binds that.
        physical_cores: Cores of the machine, hyper-threads not counted.
        affinity_cores: Physical cores among the CPUs that this process may run on.
        numa_cores: Physical cores among ``numa_cpus``.
        cpu_quota: CPUs' worth of time that the cgroup grants; None without a quota.
        torch_threads: ``torch.get_num_threads()`` as found.
        omp_num_threads: ``OMP_NUM_THREADS`` as set; None where it is not.
        rates: How fast it is; None where nobody has measured.
    """

    name: str
    device_type: str
    device_name: str
    device_total_bytes: int
    device_free_bytes: int
    device_budget_bytes: int
    context_bytes: int
    is_integrated: bool
    link: str
    numa_node: int | None
    numa_cpus: tuple[int, ...]
    host_total_bytes: int
    host_available_bytes: int
    host_limit: str
    lockable_bytes: int
    lockable_limit: str
    physical_cores: int
    affinity_cores: int
    numa_cores: int
    cpu_quota: float | None
    torch_threads: int
    omp_num_threads: str | None
    rates: Rates | None = None

    @classmethod
    def detect(cls, device: torch.device | str = "cpu") -> Machine:
        """Looks at this machine, without measuring; CUDA is initialised only when ``device`` is a CUDA device.

        Raises:
            ValueError: A device that is neither CUDA nor the CPU.
        """
        device = torch.device(device)
        host = host_memory()
        found = find_device(device, host)
        lockable_bytes, lockable_limit = lockable(host)
        cpus = allowed_cpus()
        numa_cpus = cpus & cpus_of_node(found.numa_node)
        return cls(
            name="auto",
            device_type=device.type,
            device_name=found.name,
            device_total_bytes=found.total_bytes,
            device_free_bytes=found.free_bytes,
            device_budget_bytes=found.budget_bytes,
            context_bytes=found.context_bytes,
            is_integrated=found.is_integrated,
            link=found.link,
            numa_node=found.numa_node,
            numa_cpus=tuple(sorted(numa_cpus)),
            host_total_bytes=host.total_bytes,
            host_available_bytes=host.available_bytes,
            host_limit=host.limit,
            lockable_bytes=lockable_bytes,
            lockable_limit=lockable_limit,
            physical_cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
            affinity_cores=cores_of(cpus),
            numa_cores=cores_of(numa_cpus),
            cpu_quota=cpu_quota(),
            torch_threads=torch.get_num_threads(),
            omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        )

    @classmethod
    def described(
        cls,
        *,
        name: str,
        device_type: str,
        host_gib: float,
        cores: int,
        rates: Rates,
        device_gib: float | None = None,
        link: str = "host memory",
    ) -> Machine:
        """A machine that need not be here, with nothing else running on it.

        Args:
            name: Of the hardware, for messages.
            device_type: ``"cuda"`` or ``"cpu"``.
            host_gib: Host memory, all of it free and lockable.
            cores: Physical cores.
            rates: How fast it is.
            device_gib: Memory that the driver reports; not for the CPU, whose memory is the host's.
            link: What joins device and host.

        Raises:
            ValueError: A value that no machine has, by its name in a hardware file.
        """
        if device_type not in ("cuda", "cpu"):
            raise ValueError(f"`hardware.device_type` must be 'cuda' or 'cpu', got {device_type!r}")
        on_cpu = device_type == "cpu"
        host = _bytes("hardware.host_gib", host_gib)
        memory = host if on_cpu else _bytes("hardware.device_gib", device_gib)
        if isinstance(cores, bool) or not isinstance(cores, int) or cores < 1:
            raise ValueError(f"`hardware.cores` must be an integer >= 1, got {cores!r}")
        limit = f"all host memory of hardware={name}"
        return cls(
            name=name,
            device_type=device_type,
            device_name=name,
            device_total_bytes=memory,
            device_free_bytes=memory,
            device_budget_bytes=memory,
            context_bytes=0 if on_cpu else CONTEXT_BYTES,
            is_integrated=False,
            link=link,
            numa_node=None,
            numa_cpus=(),
            host_total_bytes=host,
            host_available_bytes=host,
            host_limit=limit,
            lockable_bytes=host,
            lockable_limit=limit,
            physical_cores=cores,
            affinity_cores=cores,
            numa_cores=0,
            cpu_quota=None,
            torch_threads=cores,
            omp_num_threads=None,
            rates=rates,
        )

    def shared_by(self, ranks: int) -> Machine:
        """What there is for each of so many processes of one training."""
        if ranks == 1:
            return self
        return replace(
            self,
            host_available_bytes=self.host_available_bytes // ranks,
            host_limit=f"{self.host_limit}, shared by {ranks} ranks",
            lockable_bytes=self.lockable_bytes // ranks,
            lockable_limit=f"{self.lockable_limit}, shared by {ranks} ranks",
            physical_cores=max(1, self.physical_cores // ranks),
            affinity_cores=max(1, self.affinity_cores // ranks),
            numa_cores=max(1, self.numa_cores // ranks),
            torch_threads=max(1, self.torch_threads // ranks),
        )

    def capped(self, *, device_bytes: int | None = None, host_bytes: int | None = None) -> Machine:
        """The same machine as if it had no more than this; what it has less of stays as it is.

        Args:
            device_bytes: Of a CUDA device, the context and what this process already holds included. The CPU has the
                host's memory, and ``host_bytes`` of it.
            host_bytes: Of the host, for what is still to be allocated.
        """
        machine = self
        device_bytes = host_bytes if self.device_type == "cpu" else device_bytes
        if device_bytes is not None:
            held = self.device_budget_bytes - self.device_free_bytes
            machine = replace(
                machine,
                device_total_bytes=min(self.device_total_bytes, device_bytes),
                device_budget_bytes=min(self.device_budget_bytes, device_bytes),
                device_free_bytes=max(0, min(self.device_free_bytes, device_bytes - held)),
            )
        if host_bytes is not None and host_bytes < self.host_total_bytes:
            cap = f"max_host_gib={host_bytes / GIB:.4g}"
            binds = host_bytes < self.host_available_bytes
            machine = replace(
                machine,
                host_total_bytes=host_bytes,
                host_available_bytes=min(self.host_available_bytes, host_bytes),
                host_limit=cap if binds else f"{self.host_limit}, {cap}",
                lockable_bytes=min(self.lockable_bytes, host_bytes),
                lockable_limit=cap if host_bytes < self.lockable_bytes else self.lockable_limit,
            )
        return machine

    @property
    def host_threads(self) -> int:
        """Threads for host arithmetic: the physical cores at hand, less one that launches kernels."""
        return max(1, self._cores - 1)

    @property
    def host_threads_reason(self) -> str:
        """Why ``host_threads`` is what it is, for the log."""
        if self._cores < self._near_cores:
            source = f"the cgroup's quota of {self.cpu_quota:g} CPUs"
        elif self._cores < self.affinity_cores:
            source = f"{self._cores} of {self.affinity_cores} physical cores are on the device's NUMA node"
            source += f" {self.numa_node}"
        else:
            source = f"{self.affinity_cores} of {self.physical_cores} physical cores in the affinity"
        why = f"{source}, less one for the main thread" if self._cores > 1 else f"{source}; at least one"
        ignored = self.omp_num_threads is not None and self.omp_num_threads != str(self.host_threads)
        return f"{why}; OMP_NUM_THREADS={self.omp_num_threads} is not followed" if ignored else why

    @property
    def _near_cores(self) -> int:
        """Cores beside the device's memory lane: memory of another node is slower by a tenth to a third."""
        return self.numa_cores or self.affinity_cores

    @property
    def _cores(self) -> int:
        return self._near_cores if self.cpu_quota is None else min(self._near_cores, math.floor(self.cpu_quota))

    def require_host(
        self, needed_bytes: int, *, what: str, freed_bytes: int = 0, on_misfit: Literal["error", "warn"] = "error"
    ) -> None:
        """Checks, before anything is allocated, that the host can hold ``needed_bytes`` more.

        Args:
            needed_bytes: What will be allocated.
            what: What it is for; the subject of the message.
            freed_bytes: What this process gives back meanwhile.
            on_misfit: Whether too little is an error, or a warning for those who know better (swap).

        Raises:
            HostMemoryError: The host has less, and ``on_misfit`` is ``"error"``.
        """
        at_hand = min(self.host_available_bytes + freed_bytes, self.host_total_bytes)
        if needed_bytes <= at_hand:
            return
        message = (
            f"{what} needs {needed_bytes / GIB:.2f} GiB of host memory, but {at_hand / GIB:.2f} GiB "
            f"is available ({self.host_limit}); use a smaller model or a method that keeps less on the host, "
            "free memory, or raise the limit"
        )
        if on_misfit == "error":
            raise HostMemoryError(f"{message}. on_misfit='warn' tries all the same.")
        warnings.warn(f"{message}. Trying all the same (on_misfit='warn').", stacklevel=2)


def machine_from(hardware: Mapping[str, Any], device: torch.device | str | None = None) -> Machine:
    """The machine that a hardware file means: as described where it gives rates, else this one, measured.

    Args:
        hardware: ``name``, ``device_type``, ``device_gib``, ``host_gib``, ``cores``, ``link``, ``rates``; what this
            machine is to be found out for may be None or left out.
        device: Where this machine would compute; by default the file's device type, else CUDA where there is one. Not
            looked at where the file describes a machine.

    Raises:
        ValueError: A description that is not complete, or not of a machine; a device that is not here.
    """
    given = {key: value for key, value in hardware.items() if value is not None and value != "???"}
    name = str(given.get("name", "auto"))
    rates = given.get("rates") or {}
    if any(rate is not None for rate in rates.values()):
        return _described(name, given, Rates.from_mapping(rates, of=f"hardware={name}"))
    device = _here(device or given.get("device_type") or ("cuda" if torch.cuda.is_available() else "cpu"), name)
    machine = Machine.detect(device)
    machine = replace(machine, name=name, rates=Rates.cached(machine, device))
    return machine.capped(
        device_bytes=_bytes("hardware.device_gib", given["device_gib"]) if "device_gib" in given else None,
        host_bytes=_bytes("hardware.host_gib", given["host_gib"]) if "host_gib" in given else None,
    )


def _here(asked: torch.device | str, name: str) -> torch.device:
    """The device, before CUDA is asked anything: it would answer with errors of its own."""
    kind, _, index = str(asked).partition(":")
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"`hardware.device_type` must be 'cuda' or 'cpu', got {str(asked)!r}")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and not there:
        raise ValueError(
            f"hardware={name} gives no rates, so its device ({str(asked)!r}) would be measured here, where CUDA cannot "
            f"be used (torch {torch.__version__}); give all rates, as the files of conf/hardware do, or use "
            "hardware=cpu (`lightning-offload doctor` says what is missing)"
        )
    if kind == "cuda" and index and not (index.isdecimal() and int(index) < there):
        raise ValueError(f"device={str(asked)!r} of hardware={name} is not here: cuda:0 to cuda:{there - 1} are")
    return torch.device(asked)


def _described(name: str, given: Mapping[str, Any], rates: Rates) -> Machine:
    needed = ["device_type", "host_gib", "cores"]
    if given.get("device_type") != "cpu":
        needed.append("device_gib")
    missing = [f"`hardware.{key}`" for key in needed if key not in given]
    if missing:
        raise ValueError(f"hardware={name} gives rates, but not {', '.join(missing)}; give all of them, or rates=null")
    known = ("device_type", "device_gib", "host_gib", "cores", "link")
    return Machine.described(name=name, rates=rates, **{key: given[key] for key in known if key in given})


def _bytes(name: str, gib: Any) -> int:
    number = isinstance(gib, int | float) and not isinstance(gib, bool)
    if not (number and math.isfinite(gib) and gib > 0):
        raise ValueError(f"`{name}` must be a positive number of GiB, got {gib!r}")
    return int(gib * GIB)
