"""The doctor, on machines of all kinds: nothing here needs a GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_offload import doctor
from lightning_offload.doctor import Diagnosis, Fact, diagnose
from lightning_offload.memory import device_limits, host_limits
from lightning_offload.memory.budget import GIB
from lightning_offload.memory.rates import Rates

RATES = Rates(**{field.name: 0.5 for field in fields(Rates)})


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A healthy machine of 64 GiB and eight cores without a GPU, already measured."""
    for module, name in (
        (host_limits, "_PROC"),
        (host_limits, "_CGROUP"),
        (host_limits, "_CPUS"),
        (host_limits, "_NODES"),
        (device_limits, "_PCI"),
        (doctor, "_DEV"),
    ):
        monkeypatch.setattr(module, name, tmp_path / name)
    monkeypatch.setattr(doctor, "_WSL_DRIVER", tmp_path / "wsl")
    monkeypatch.setattr(doctor, "_DRIVER", (tmp_path / "driver", tmp_path / "driver2"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=48 * GIB))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Rates, "cached", classmethod(lambda cls, machine, device=None: RATES))
    monkeypatch.setattr(Rates, "is_cached", classmethod(lambda cls, machine: True))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(diagnosis: Diagnosis, what: str) -> Fact:
    return next(fact for fact in diagnosis.facts if fact.what == what)


def set_gpu(
    monkeypatch: pytest.MonkeyPatch,
    *,
    capability: tuple[int, int] = (8, 9),
    free: int = 23 * GIB,
    integrated: bool = False,
    pins: bool = True,
    kernel: Callable[[], None] = lambda: None,
) -> None:
    """Two cards, the first of them used; kernels run on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(
        total_memory=24 * GIB, is_integrated=integrated, pci_domain_id=0, pci_bus_id=1, pci_device_id=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    ones = torch.ones

    def on_cpu(*size: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        kernel()
        return ones(*size, dtype=dtype)

    monkeypatch.setattr(torch, "ones", on_cpu)
    cudart = SimpleNamespace(
        cudaHostRegister=lambda *_: 0 if pins else 2,
        cudaHostUnregister=lambda *_: 0,
        cudaGetErrorString=lambda code: "out of memory",
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr("lightning_offload.memory.arena._clear_error", lambda: None)


def test_a_healthy_machine_without_a_gpu() -> None:
    diagnosis = diagnose()
    assert diagnosis.ok
    assert diagnosis.warnings == ()
    assert found(diagnosis, "device").found.startswith("CPU: ")
    assert found(diagnosis, "host memory") == Fact(
        "host memory", "48.0 of 64.0 GiB available", "free memory of the machine"
    )
    assert found(diagnosis, "cores").found == "8 of 8 physical"
    assert found(diagnosis, "torch").found == torch.__version__
    assert found(diagnosis, "lightning").found == metadata.version("lightning")
    assert found(diagnosis, "copy rate").found == "0.5 GB/s"
    assert str(diagnosis).endswith("Training can work here.")


def test_a_healthy_machine_with_gpus(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpu(monkeypatch)
    (tree / "driver2").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release\n")
    card = tree / "_PCI/0000:01:00.0"
    card.mkdir(parents=True)
    for name, value in {
        "current_link_speed": "16.0 GT/s PCIe",
        "current_link_width": "16",
        "numa_node": "1",
    }.items():
        (card / name).write_text(f"{value}\n")
    (tree / "_NODES/node1").mkdir(parents=True)
    (tree / "_NODES/node1/cpulist").write_text("4-7\n")
    diagnosis = diagnose()
    assert diagnosis.ok
    assert diagnosis.warnings == ()
    assert found(diagnosis, "cuda:0") == Fact("cuda:0", "RTX, 23.0 of 24.0 GiB free", "used")
    assert found(diagnosis, "cuda:1") == Fact("cuda:1", "RTX, 24.0 GiB", "not used: a run takes one device")
    assert found(diagnosis, "capability") == Fact("capability", "8.9", "bf16 in hardware")
    assert found(diagnosis, "link").found == "PCIe 4.0 x16"
    assert found(diagnosis, "link").why == "NUMA node 1: 4 of the CPUs at hand are on it"
    assert found(diagnosis, "page-locking").why == "works"
    assert found(diagnosis, "driver").found == "580.159.04"
    assert found(diagnosis, "host worker").found == "3 threads"
    assert "NUMA node 1" in found(diagnosis, "host worker").why
    assert found(diagnosis, "link rate").found == "0.5 up, 0.5 down GB/s"


def test_the_card_that_was_asked_for_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpu(monkeypatch)
    assert found(diagnose("cuda:1"), "cuda:1").why == "used"
    assert found(diagnose("cpu"), "device").found.startswith("CPU: ")


def test_a_device_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="device='meta' is not supported"):
        diagnose("meta")


@pytest.mark.parametrize(
    ("gpu", "warning"),
    [
        ({"capability": (7, 5)}, "RTX has no bf16: use precision=32-true"),
        ({"integrated": True}, "the GPU shares the host's memory"),
        ({"free": 5 * GIB}, "more than half of the GPU's memory is taken"),
        ({"pins": False}, "host memory cannot be page-locked.*cudaHostRegister failed: out of memory"),
    ],
)
def test_a_gpu_that_is_less_than_it_could_be(
    monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any], warning: str
) -> None:
    set_gpu(monkeypatch, **gpu)
    diagnosis = diagnose()
    assert diagnosis.ok
    assert len(diagnosis.warnings) == 1
    with pytest.raises(RuntimeError, match=warning):
        raise RuntimeError(diagnosis.warnings[0])


def test_a_kernel_that_fails_is_a_problem_and_the_rest_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_image() -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand much more")

    set_gpu(monkeypatch, kernel=no_image)
    diagnosis = diagnose()
    assert not diagnosis.ok
    assert diagnosis.problems == (
        "cuda does not work: CUDA error: no kernel image is available for execution on the device. "
        f"torch {torch.__version__} is built for CUDA 13.0: update the driver, or install a torch that is built for "
        "this device and driver",
    )
    assert found(diagnosis, "device").why == "not usable"
    assert found(diagnosis, "host memory").found == "48.0 of 64.0 GiB available"
    assert "cannot work here until" in str(diagnosis)


def test_cuda_that_was_asked_for_and_is_not_in_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "ones", refuse)
    monkeypatch.setattr(torch.version, "cuda", None)
    (problem,) = diagnose("cuda").problems
    assert problem.startswith("cuda does not work: Torch not compiled with CUDA enabled. Install a CUDA build of torch")


@pytest.mark.parametrize("node", ["_DEV/nvidia0", "wsl"])
def test_a_gpu_that_torch_cannot_use_is_a_problem(tree: Path, monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    (tree / "_DEV").mkdir()
    (tree / node).touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)
    (problem,) = diagnose().problems
    assert problem.startswith(
        "a GPU is here, but torch cannot use it: The NVIDIA driver on your system is too old (found version 11040). "
    )
    assert "update the driver" in problem
    assert diagnose("cpu").ok, "asking for the CPU is no mistake"


def test_a_gpu_that_the_user_hides_is_a_warning(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "_DEV").mkdir()
    (tree / "_DEV/nvidia0").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    diagnosis = diagnose()
    assert diagnosis.ok
    assert "CUDA_VISIBLE_DEVICES='' hides it" in diagnosis.warnings[0]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in diagnose().warnings[0]


def test_control_devices_alone_are_no_gpu(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "_DEV").mkdir()
    (tree / "_DEV/nvidiactl").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert diagnose() == diagnose("cpu")


def test_too_little_host_memory_is_a_problem_that_names_what_binds(tree: Path) -> None:
    for path, content in {
        "_PROC/self/cgroup": "0::/job",
        "_CGROUP/job/memory.max": 4 * GIB,
        "_CGROUP/job/memory.current": 4 * GIB - GIB // 2,
    }.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(f"{content}\n")
    diagnosis = diagnose()
    assert not diagnosis.ok
    assert diagnosis.problems[0].startswith("0.50 GiB of host memory is available (cgroup limit ")
    assert found(diagnosis, "host memory").found == "0.5 of 4.0 GiB available"


def test_torch_on_one_of_many_cores_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    diagnosis = diagnose()
    assert found(diagnosis, "torch threads") == Fact("torch threads", "1", "OMP_NUM_THREADS=1")
    assert diagnosis.warnings == (
        "torch computes with 1 of 8 cores: unset OMP_NUM_THREADS, or call torch.set_num_threads",
    )


def test_wsl_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.15.167-microsoft-standard-WSL2")
    diagnosis = diagnose()
    assert found(diagnosis, "system").found.startswith("WSL2")
    assert "page-locks about 1 GiB" in diagnosis.warnings[0]


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package == "transformers":
            raise metadata.PackageNotFoundError
        return real(package)

    monkeypatch.setattr(metadata, "version", version)
    assert diagnose().problems == ("transformers is not installed: pip install transformers",)


def test_folders_that_cannot_be_written_or_are_full_are_said(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(doctor.tempfile, "TemporaryFile", refuse)
        diagnosis = diagnose()
    assert diagnosis.ok
    working, cache = diagnosis.warnings
    assert working == f"the working folder {tree} cannot be written: set runs_dir=<another folder>"
    assert cache.endswith("cannot be written: rates are measured anew in each run; set XDG_CACHE_HOME")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=GIB))
    assert diagnose().warnings == (f"the working folder {tree} has 1.00 GiB free: set runs_dir=<another folder>",)


@pytest.mark.parametrize("answer", [None, OSError("gone"), subprocess.CalledProcessError(1, "c++"), "clang 19.1\nmore"])
def test_the_compiler_is_named_and_needed_for_nothing(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def run(command: list[str], **_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if answer and name == "clang++" else None)
    monkeypatch.setattr(subprocess, "run", run)
    diagnosis = diagnose()
    assert found(diagnosis, "compiler").found == ("clang 19.1" if isinstance(answer, str) else "none")
    assert diagnosis.ok


WORDS = st.text(st.characters(codec="ascii", exclude_categories=["Cc", "Zs"]), min_size=1, max_size=30)


@given(st.lists(st.builds(Fact, WORDS, WORDS, WORDS), min_size=1, max_size=9), st.lists(WORDS), st.lists(WORDS))
def test_one_aligned_line_per_fact_and_every_note_in_full(
    facts: list[Fact], problems: list[str], notes: list[str]
) -> None:
    diagnosis = Diagnosis(tuple(facts), tuple(problems), tuple(notes))
    lines = str(diagnosis).splitlines()
    second = max(len(fact.what) for fact in facts) + 2
    third = second + max(len(fact.found) for fact in facts) + 2
    for fact, line in zip(facts, lines, strict=False):
        assert (line[:second].rstrip(), line[second:third].rstrip(), line[third:]) == (fact.what, fact.found, fact.why)
    for problem in problems:
        assert f"problem: {problem}" in lines
    for note in notes:
        assert f"warning: {note}" in lines
    assert diagnosis.ok == (not problems)
    assert replace(diagnosis, problems=()).ok
