"""What was found on this machine, what will be used of it and why, and what stands in the way."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.memory.host_limits import cpu_model, is_wsl, text
from lightning_offload.memory.kept import cache_folder
from lightning_offload.memory.rates import Rates

MIB = 1024**2

_DEV = Path("/dev")
_DRIVER = (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version"))
_WSL_DRIVER = Path("/usr/lib/wsl/lib/libcuda.so.1")
_LEAST_HOST_BYTES = GIB
_LEAST_DISK_BYTES = 2 * GIB


@dataclass(frozen=True)
class Fact:
    """One line: what was looked at, what was found, what of it is used and why."""

    what: str
    found: str
    why: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found.

    Attributes:
        facts: In the order in which they are worth reading.
        problems: What keeps training from working, each with what to do.
        warnings: What makes it slower or smaller than it could be, each with what to do.
    """

    facts: tuple[Fact, ...]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether training can work."""
        return not self.problems

    def __str__(self) -> str:
        """A table for a terminal, then what to do something about."""
        what, found = (max((len(getattr(fact, name)) for fact in self.facts), default=0) for name in ("what", "found"))
        lines = [f"{fact.what:<{what}}  {fact.found:<{found}}  {fact.why}".rstrip() for fact in self.facts]
        said = [f"warning: {w}" for w in self.warnings] + [f"problem: {p}" for p in self.problems]
        end = "Training can work here." if self.ok else "Training cannot work here until the problems above are solved."
        return "\n".join([*lines, "", *said, *([""] if said else []), end])


@dataclass
class _Notes:
    facts: list[Fact] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def fact(self, what: str, found: str, why: str = "") -> None:
        self.facts.append(Fact(what, found, why))


def diagnose(device: torch.device | str | None = None) -> Diagnosis:
    """Looks at everything that training depends on; takes about two seconds where rates were not measured before.

    Args:
        device: Where training would compute; by default the first GPU, or the CPU where torch can use none.

    Raises:
        ValueError: A device that is neither CUDA nor the CPU.
    """
    notes = _Notes()
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:  # lists two dozen types
        raise ValueError(f"`device` must be 'cpu', 'cuda' or 'cuda:<number>', got {device!r}") from error
    if chosen.type == "cpu" and device is None:
        _why_no_gpu(notes)
    usable = chosen.type != "cuda" or _cuda_works(notes, chosen)
    machine = Machine.detect(chosen if usable else "cpu")
    if usable:
        _device(notes, machine, chosen)
    _host(notes, machine)
    if usable and chosen.type == "cuda":
        _pinning(notes, machine)
    _threads(notes, machine)
    if usable:
        _rates(notes, machine, chosen)
    _software(notes)
    _disks(notes)
    return Diagnosis(tuple(notes.facts), tuple(notes.problems), tuple(notes.warnings))


def _why_no_gpu(notes: _Notes) -> None:
    """A GPU that is there and cannot be used is a mistake of the installation, not a machine without one."""
    present = any(_DEV.glob("nvidia[0-9]*")) or _WSL_DRIVER.exists()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present:
        return
    if torch.version.cuda is None:
        notes.warnings.append(
            f"a GPU is here, but torch {torch.__version__} is built without CUDA: training runs on the CPU. Install a "
            "CUDA build of torch (pytorch.org/get-started)"
        )
    elif hidden is not None and hidden.strip() in ("", "-1"):
        notes.warnings.append(
            f"a GPU is here, but CUDA_VISIBLE_DEVICES={hidden!r} hides it: training runs on the CPU. Unset the variable"
        )
    else:
        notes.problems.append(f"a GPU is here, but torch cannot use it: {_cuda_error()}. {_update()}")


def _cuda_works(notes: _Notes, device: torch.device) -> bool:
    """Whether a kernel runs there: a driver or a build that does not fit shows only then."""
    try:
        torch.ones(2, dtype=torch.float32, device=device).add_(1.0).sum().item()
    except (RuntimeError, AssertionError) as error:
        notes.fact("device", str(device), "not usable")
        notes.problems.append(f"{device} does not work: {_first_line(error)}. {_update()}")
        return False
    return True


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return "CUDA finds no device"


def _update() -> str:
    if torch.version.cuda is None:
        return "Install a CUDA build of torch (pytorch.org/get-started), or use the CPU"
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}: update the driver, or install a torch that "
        "is built for this device and driver"
    )


def _device(notes: _Notes, machine: Machine, device: torch.device) -> None:
    if device.type == "cpu":
        why = "torch is built without CUDA" if torch.version.cuda is None else "no GPU was asked for, or none is found"
        notes.fact("device", f"CPU: {cpu_model()}", why)
        return
    chosen = torch.cuda.current_device() if device.index is None else device.index
    for index in range(torch.cuda.device_count()):
        if index == chosen:
            sizes = f"{machine.device_free_bytes / GIB:.1f} of {machine.device_total_bytes / GIB:.1f} GiB free"
        else:  # asking what is free would start CUDA there
            sizes = f"{torch.cuda.get_device_properties(index).total_memory / GIB:.1f} GiB"
        why = "used" if index == chosen else "not used: a run takes one device"
        notes.fact(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {sizes}", why)
    major, minor = torch.cuda.get_device_capability(device)
    bf16 = major >= 8
    notes.fact("capability", f"{major}.{minor}", "bf16 in hardware" if bf16 else "no bf16: emulated, and slow")
    if not bf16:
        notes.warnings.append(f"{machine.device_name} has no bf16: use precision=32-true")
    if machine.is_integrated:
        notes.warnings.append("the GPU shares the host's memory: what is offloaded does not make room for more")
    if machine.device_free_bytes < machine.device_total_bytes // 2:
        notes.warnings.append("more than half of the GPU's memory is taken: see nvidia-smi for what else runs there")
    notes.fact("link", machine.link, _node(machine))


def _node(machine: Machine) -> str:
    if machine.numa_node is None:
        return "one NUMA node, or the system does not tell which"
    return f"NUMA node {machine.numa_node}: {len(machine.numa_cpus)} of the CPUs at hand are on it"


def _host(notes: _Notes, machine: Machine) -> None:
    available, total = machine.host_available_bytes, machine.host_total_bytes
    notes.fact("host memory", f"{available / GIB:.1f} of {total / GIB:.1f} GiB available", machine.host_limit)
    if available < _LEAST_HOST_BYTES:
        notes.problems.append(
            f"{available / GIB:.2f} GiB of host memory is available ({machine.host_limit}), and at least "
            f"{_LEAST_HOST_BYTES / GIB:.0f} GiB is needed: end other programs, or raise the limit"
        )
    if is_wsl():
        notes.fact("system", f"WSL2, {platform.release()}", "page-locked memory is scarce here")
        notes.warnings.append("WSL2 page-locks about 1 GiB in all: larger arenas are pageable, and copies slower")


def _pinning(notes: _Notes, machine: Machine) -> None:
    notes.fact("lockable memory", f"{machine.lockable_bytes / GIB:.1f} GiB", machine.lockable_limit)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        memory = HostMemory(machine=machine)
        pinned = memory.region("doctor", 64 * MIB, pinned=True).pinned
        memory.close()
    notes.fact("page-locking", "64 MiB tried", "works" if pinned else "refused: copies go through pageable memory")
    if not pinned:
        reason = str(said[0].message) if said else "refused"
        notes.warnings.append(f"host memory cannot be page-locked, so copies are slow: {reason}")


def _threads(notes: _Notes, machine: Machine) -> None:
    cores = f"{machine.affinity_cores} of {machine.physical_cores} physical"
    quota = "no quota" if machine.cpu_quota is None else f"a quota of {machine.cpu_quota:g} CPUs"
    notes.fact("cores", cores, f"{cpu_model()}; {quota}")
    omp = machine.omp_num_threads
    notes.fact("torch threads", str(machine.torch_threads), f"OMP_NUM_THREADS={omp}" if omp else "torch's own choice")
    if machine.device_type == "cpu":
        if machine.torch_threads < machine.affinity_cores:
            notes.warnings.append(
                f"torch computes with {machine.torch_threads} of {machine.affinity_cores} cores: unset "
                "OMP_NUM_THREADS, or call torch.set_num_threads"
            )
        return
    notes.fact("host worker", f"{machine.host_threads} threads", machine.host_threads_reason)


def _rates(notes: _Notes, machine: Machine, device: torch.device) -> None:
    source = f"measured before, kept in {cache_folder()}" if Rates.is_cached(machine) else "measured now"
    rates = Rates.cached(machine, device)
    notes.fact("compute", f"bf16 {rates.bf16_tflops:.3g}, fp32 {rates.fp32_tflops:.3g} TFLOP/s", source)
    found = f"device {rates.device_gb_per_s:.3g}, host {rates.host_gb_per_s:.3g} GB/s"
    notes.fact("memory rate", found, f"in place; {rates.op_us:.2g} us from one operation to the next")
    if device.type == "cpu":
        notes.fact("copy rate", f"{rates.h2d_gb_per_s:.3g} GB/s", "within host memory: there is no link")
        return
    both = f"{rates.duplex:.0%} of each when both run; pageable {rates.pageable_gb_per_s:.3g} GB/s"
    notes.fact("link rate", f"{rates.h2d_gb_per_s:.3g} up, {rates.d2h_gb_per_s:.3g} down GB/s", both)


def _software(notes: _Notes) -> None:
    notes.fact("python", platform.python_version())
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    notes.fact("torch", torch.__version__, cuda)
    if (driver := _driver()) is not None:
        notes.fact("driver", driver)
    for package in ("lightning", "transformers", "hydra-core"):
        try:
            notes.fact(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            notes.fact(package, "not installed")
            notes.problems.append(f"{package} is not installed: pip install {package}")
    notes.fact("compiler", _compiler() or "none", "needed for nothing today")


def _driver() -> str | None:
    found = (re.search(r"\d+\.\d+(\.\d+)?", text(path)) for path in _DRIVER)
    return next((match[0] for match in found if match), None)


def _compiler() -> str | None:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            try:
                said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
            except (OSError, subprocess.SubprocessError):
                continue
            return said.stdout.partition("\n")[0].strip()
    return None


def _disks(notes: _Notes) -> None:
    for what, folder, why in (
        ("working folder", Path.cwd(), "for runs and checkpoints"),
        ("cache folder", cache_folder(), "keeps the measured rates"),
        ("/dev/shm", _DEV / "shm", "data loader workers pass batches through it; the engine does not"),
    ):
        existing = next((above for above in (folder, *folder.parents) if above.exists()), None)
        if existing is None or (what == "/dev/shm" and existing != folder):
            continue
        free = shutil.disk_usage(existing).free
        notes.fact(what, f"{free / GIB:.1f} GiB free", why if what == str(folder) else f"{why}: {folder}")
        if not _is_writable(existing):
            notes.warnings.append(f"the {what} {folder} cannot be written: {_instead(what)}")
        elif what == "working folder" and free < _LEAST_DISK_BYTES:
            notes.warnings.append(f"the working folder {folder} has {free / GIB:.2f} GiB free: {_instead(what)}")


def _instead(what: str) -> str:
    ways = {
        "working folder": "set runs_dir=<another folder>",
        "cache folder": "rates are measured anew in each run; set XDG_CACHE_HOME",
    }
    return ways.get(what, "data loaders need data.num_workers=0")


def _is_writable(folder: Path) -> bool:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(". ")
