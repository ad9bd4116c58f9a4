from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lightning_offload.errors import HostMemoryError
from lightning_offload.memory import budget
from lightning_offload.memory.budget import GIB, Machine

RAM = SimpleNamespace(total=64 * GIB, available=48 * GIB)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB with nothing in /proc and /sys but what a test puts there."""
    monkeypatch.setattr(budget, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(budget, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(budget, "_CPUS", tmp_path / "cpus")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: RAM)
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def set_cores(tree: Path, monkeypatch: pytest.MonkeyPatch, siblings: dict[int, str], allowed: set[int]) -> None:
    write(tree, {f"cpus/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: allowed, raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: len(siblings) if logical else len(siblings) // 2)


def test_without_limits_the_machine_itself_binds(tree: Path) -> None:
    machine = Machine.detect()
    assert (machine.host_total_bytes, machine.host_available_bytes) == (RAM.total, RAM.available)
    assert machine.host_limit == "free memory of the machine"
    assert machine.device_type == "cpu"
    assert machine.device_free_bytes == RAM.available


def test_cgroup_v2_limit_less_usage_and_page_cache_is_free(tree: Path) -> None:
    write(
        tree,
        {
            "proc/self/cgroup": "0::/job",
            "cgroup/job/memory.max": 16 * GIB,
            "cgroup/job/memory.current": 10 * GIB,
            "cgroup/job/memory.stat": f"anon 1\nactive_file {GIB}\ninactive_file {3 * GIB}\nshmem 5",
        },
    )
    machine = Machine.detect()
    assert machine.host_total_bytes == 16 * GIB
    assert machine.host_available_bytes == 10 * GIB
    assert machine.host_limit == f"cgroup limit {tree / 'cgroup/job/memory.max'} of 16.00 GiB"
    assert machine.lockable_bytes == 10 * GIB


def test_cgroup_v2_max_is_no_limit(tree: Path) -> None:
    write(tree, {"proc/self/cgroup": "0::/", "cgroup/memory.max": "max", "cgroup/memory.current": 10 * GIB})
    assert Machine.detect().host_available_bytes == RAM.available


def test_nested_cgroups_the_tightest_of_all_levels_binds(tree: Path) -> None:
    write(
        tree,
        {
            "proc/self/cgroup": "0::/slice/user/job",
            "cgroup/slice/memory.max": 32 * GIB,
            "cgroup/slice/memory.current": 30 * GIB,
            "cgroup/slice/user/memory.high": 24 * GIB,
            "cgroup/slice/user/memory.current": 4 * GIB,
            "cgroup/slice/user/job/memory.max": "max",
            "cgroup/slice/user/job/memory.current": 4 * GIB,
        },
    )
    machine = Machine.detect()
    assert machine.host_available_bytes == 2 * GIB
    assert "slice/memory.max" in machine.host_limit
    assert machine.host_total_bytes == 24 * GIB


def test_in_a_container_whose_path_is_the_hosts_the_mount_holds_the_limit(tree: Path) -> None:
    limits = {"cgroup/memory.max": 8 * GIB, "cgroup/memory.current": 9 * GIB}
    for path in ("/docker/abc", "/../elsewhere"):
        write(tree, {"proc/self/cgroup": f"0::{path}"} | limits)
        assert Machine.detect().host_available_bytes == 0


def test_cgroup_v1(tree: Path) -> None:
    write(
        tree,
        {
            "proc/self/cgroup": "9:name=systemd:/x\n4:cpuset,memory:/job\n1:cpu:/job\n0::/",
            "cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
            "cgroup/memory/memory.usage_in_bytes": 9 * GIB,
            "cgroup/memory/job/memory.limit_in_bytes": 12 * GIB,
            "cgroup/memory/job/memory.usage_in_bytes": 9 * GIB,
            "cgroup/memory/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file 0",
            "cgroup/cpu/job/cpu.cfs_quota_us": 350_000,
            "cgroup/cpu/job/cpu.cfs_period_us": 100_000,
            "cgroup/cpu/cpu.cfs_quota_us": -1,
            "cgroup/cpu/cpu.cfs_period_us": 100_000,
        },
    )
    machine = Machine.detect()
    assert machine.host_available_bytes == 4 * GIB
    assert machine.host_total_bytes == 12 * GIB
    assert machine.cpu_quota == 3.5


@pytest.mark.parametrize(
    ("release", "system", "lockable", "reason"),
    [
        ("5.15.167-microsoft-standard-WSL2", "Linux", GIB, "WSL2"),
        ("10", "Windows", 32 * GIB, "half of the RAM"),
        ("6.8.0-generic", "Linux", 48 * GIB, "free memory of the machine"),
    ],
)
def test_lockable_memory(
    tree: Path, monkeypatch: pytest.MonkeyPatch, release: str, system: str, lockable: int, reason: str
) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(platform, "system", lambda: system)
    machine = Machine.detect()
    assert machine.lockable_bytes == lockable
    assert reason in machine.lockable_limit


def test_hyper_threads_are_not_cores(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    set_cores(tree, monkeypatch, siblings, {0, 1, 4, 5, 2})
    machine = Machine.detect()
    assert machine.physical_cores == 4
    assert machine.affinity_cores == 3
    assert machine.host_threads == 2
    assert machine.host_threads_reason == "3 of 4 physical cores in the affinity, less one for the main thread"


def test_without_topology_the_affinity_counts(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cores(tree, monkeypatch, {}, {0, 1, 2})
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4 if logical else 2)
    assert Machine.detect().affinity_cores == 2


def test_a_cpu_quota_binds_the_threads(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cores(tree, monkeypatch, {cpu: str(cpu) for cpu in range(8)}, set(range(8)))
    write(
        tree, {"proc/self/cgroup": "0::/a/b", "cgroup/a/cpu.max": "250000 100000", "cgroup/a/b/cpu.max": "max 100000"}
    )
    machine = Machine.detect()
    assert machine.host_threads == 1
    assert machine.host_threads_reason == "the cgroup's quota of 2.5 CPUs, less one for the main thread"


def test_one_core_still_gives_one_thread(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cores(tree, monkeypatch, {0: "0"}, {0})
    machine = Machine.detect()
    assert machine.host_threads == 1
    assert "at least one" in machine.host_threads_reason


def test_omp_num_threads_that_is_not_followed_is_said(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cores(tree, monkeypatch, {cpu: str(cpu) for cpu in range(8)}, set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    machine = Machine.detect()
    assert machine.omp_num_threads == "1"
    assert machine.host_threads == 7
    assert machine.host_threads_reason.endswith("OMP_NUM_THREADS=1 is not followed")


def test_too_little_host_memory_is_refused_with_both_numbers(tree: Path) -> None:
    machine = replace(Machine.detect(), host_available_bytes=3 * GIB, host_limit="cgroup limit X")
    machine.require_host(3 * GIB, what="arenas")
    with pytest.raises(HostMemoryError, match=r"arenas needs 4\.50 GiB.*3\.00 GiB is available \(cgroup limit X\)"):
        machine.require_host(9 * GIB // 2, what="arenas")


def test_on_misfit_warn_goes_on(tree: Path) -> None:
    machine = replace(Machine.detect(), host_available_bytes=0)
    with pytest.warns(UserWarning, match=r"1\.00 GiB.*0\.00 GiB.*all the same") as caught:
        machine.require_host(GIB, what="the arena", on_misfit="warn")
    assert caught[0].filename == __file__


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device='meta' is not supported"):
        Machine.detect("meta")


def test_a_cuda_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    machine = Machine.detect("cuda:1")
    assert (machine.device_name, machine.device_free_bytes, machine.device_total_bytes) == ("card 1", 5, 7)


def test_the_real_machine_is_plausible_and_cuda_stays_untouched() -> None:
    code = (
        "import torch; from lightning_offload.memory.budget import Machine; m = Machine.detect('cpu');"
        "assert 0 < m.lockable_bytes <= m.host_available_bytes <= m.host_total_bytes;"
        "assert 1 <= m.affinity_cores <= m.physical_cores and m.host_threads >= 1;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
