from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_offload.errors import HostMemoryError
from lightning_offload.memory import device_limits, host_limits
from lightning_offload.memory.budget import GIB, Machine, cap_device
from lightning_offload.memory.device_limits import CONTEXT_BYTES
from lightning_offload.memory.rates import Rates

RAM = SimpleNamespace(total=64 * GIB, available=48 * GIB)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB with nothing in /proc and /sys but what a test puts there."""
    monkeypatch.setattr(host_limits, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host_limits, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host_limits, "_CPUS", tmp_path / "cpus")
    monkeypatch.setattr(host_limits, "_NODES", tmp_path / "nodes")
    monkeypatch.setattr(device_limits, "_PCI", tmp_path / "pci")
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


CARD = {"name": "card", "is_integrated": 0, "pci_domain_id": 0, "pci_bus_id": 0x41, "pci_device_id": 0}


def set_card(
    monkeypatch: pytest.MonkeyPatch, *, free: int, total: int, reserved: int = 0, **properties: object
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {torch.device(device).index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**CARD | properties))


def test_a_cuda_device_is_asked(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_card(monkeypatch, free=20 * GIB, total=24 * GIB, reserved=3 * GIB + GIB // 4)
    write(
        tree,
        {
            "pci/0000:41:00.0/numa_node": -1,
            "pci/0000:41:00.0/current_link_speed": "16.0 GT/s PCIe",
            "pci/0000:41:00.0/current_link_width": 8,
            "pci/0000:41:00.0/max_link_speed": "16.0 GT/s PCIe",
            "pci/0000:41:00.0/max_link_width": 8,
        },
    )
    machine = Machine.detect("cuda:1")
    assert (machine.device_name, machine.device_type) == ("card 1", "cuda")
    assert (machine.device_free_bytes, machine.device_total_bytes) == (20 * GIB, 24 * GIB)
    assert machine.context_bytes == 3 * GIB // 4
    assert machine.device_budget_bytes == 24 * GIB
    assert (machine.link, machine.numa_node, machine.numa_cpus) == ("PCIe 4.0 x8", None, ())
    assert not machine.is_integrated


def test_memory_of_other_processes_is_not_taken_for_the_context(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_card(monkeypatch, free=10 * GIB, total=24 * GIB, reserved=GIB)
    machine = Machine.detect("cuda:0")
    assert machine.context_bytes == CONTEXT_BYTES
    assert machine.device_budget_bytes == 11 * GIB + CONTEXT_BYTES


@pytest.mark.parametrize(
    ("now", "best", "said"),
    [
        (("2.5 GT/s PCIe", 16), ("32.0 GT/s PCIe", 16), "PCIe 1.0 x16 now, 5.0 x16 at most"),
        (("16.0 GT/s PCIe", 8), ("16.0 GT/s PCIe", 16), "PCIe 4.0 x8 now, 4.0 x16 at most"),
        (("8.0 GT/s PCIe", 16), ("Unknown", ""), "PCIe 3.0 x16"),
        (("Unknown", 0), ("Unknown", 255), "not shown by the system"),
    ],
)
def test_the_link_as_it_is_and_as_it_could_be(
    tree: Path, monkeypatch: pytest.MonkeyPatch, now: tuple[str, int], best: tuple[str, object], said: str
) -> None:
    set_card(monkeypatch, free=1, total=1)
    for which, (speed, width) in {"current": now, "max": best}.items():
        card = f"pci/0000:41:00.0/{which}_link"
        write(tree, {f"{card}_speed": speed, f"{card}_width": width})
    assert Machine.detect("cuda:0").link == said


def test_without_a_pci_address_nothing_is_known_of_the_link(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_card(monkeypatch, free=1, total=1, is_integrated=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=1))
    machine = Machine.detect("cuda:0")
    assert (machine.link, machine.numa_node, machine.is_integrated) == ("not shown by the system", None, True)


def set_two_nodes(tree: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int]) -> Machine:
    """Eight cores on two nodes, the card on the second."""
    set_cores(tree, monkeypatch, {cpu: str(cpu) for cpu in range(8)}, allowed)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    set_card(monkeypatch, free=1, total=1)
    nodes = {"nodes/node0/cpulist": "0-1,4-5", "nodes/node1/cpulist": "2,3,6-7"}
    write(tree, {"pci/0000:41:00.0/numa_node": 1} | nodes)
    return Machine.detect("cuda:0")


def test_threads_stay_on_the_node_of_the_device(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = set_two_nodes(tree, monkeypatch, set(range(8)))
    assert (machine.numa_node, machine.numa_cpus, machine.numa_cores) == (1, (2, 3, 6, 7), 4)
    assert machine.host_threads == 3
    reason = "4 of 8 physical cores are on the device's NUMA node 1, less one for the main thread"
    assert machine.host_threads_reason == reason


def test_a_quota_below_the_nodes_cores_binds(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tree, {"proc/self/cgroup": "0::/", "cgroup/cpu.max": "300000 100000"})
    machine = set_two_nodes(tree, monkeypatch, set(range(8)))
    assert machine.host_threads == 2
    assert machine.host_threads_reason.startswith("the cgroup's quota of 3 CPUs")


@pytest.mark.parametrize(("allowed", "threads"), [({2, 3, 6}, 2), ({0, 1, 4}, 2)])
def test_an_affinity_within_one_node_is_all_there_is(
    tree: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], threads: int
) -> None:
    machine = set_two_nodes(tree, monkeypatch, allowed)
    assert machine.host_threads == threads
    assert machine.host_threads_reason.startswith("3 of 8 physical cores in the affinity")


RATES = Rates(
    fp32_tflops=1,
    bf16_tflops=2,
    device_gb_per_s=3,
    h2d_gb_per_s=4,
    d2h_gb_per_s=5,
    duplex=0.75,
    pageable_gb_per_s=2,
    host_gb_per_s=8,
    op_us=9,
)


def described(device_type: str = "cuda", **other: Any) -> Machine:
    given = {"name": "a card", "device_gib": 23.5, "host_gib": 64.0, "cores": 8, "link": "PCIe 4.0 x16", "rates": RATES}
    return Machine.described(device_type=device_type, **given | other)


@given(st.floats(0.001, 1e4), st.floats(0.001, 1e5), st.integers(1, 512))
def test_a_described_machine_is_what_was_said(device_gib: float, host_gib: float, cores: int) -> None:
    machine = described(device_gib=device_gib, host_gib=host_gib, cores=cores)
    device, host = int(device_gib * GIB), int(host_gib * GIB)
    assert {machine.device_total_bytes, machine.device_free_bytes, machine.device_budget_bytes} == {device}
    assert {machine.host_total_bytes, machine.host_available_bytes, machine.lockable_bytes} == {host}
    assert (machine.name, machine.rates, machine.link) == ("a card", RATES, "PCIe 4.0 x16")
    assert machine.host_threads == max(1, cores - 1)
    assert machine.context_bytes == CONTEXT_BYTES
    assert machine.capped(device_bytes=device, host_bytes=host) == machine


def test_a_described_cpu_has_the_hosts_memory_only() -> None:
    machine = described("cpu", link="host memory")
    assert machine.device_total_bytes == machine.device_free_bytes == 64 * GIB
    assert machine.context_bytes == 0
    small = machine.capped(device_bytes=1, host_bytes=3 * GIB)
    assert small.device_total_bytes == small.device_free_bytes == small.host_total_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("device_type", "tpu", "'cuda' or 'cpu', got 'tpu'"),
        ("device_gib", None, "a positive number of GiB, got None"),
        ("device_gib", float("inf"), "a positive number of GiB, got inf"),
        ("host_gib", -1, "a positive number of GiB, got -1"),
        ("host_gib", "64", "a positive number of GiB, got '64'"),
        ("cores", 0, "an integer >= 1, got 0"),
        ("cores", 1.5, "an integer >= 1, got 1.5"),
    ],
)
def test_a_description_of_no_machine_names_the_key(setting: str, value: object, named: str) -> None:
    with pytest.raises(ValueError, match=f"`hardware.{setting}` must be {named}"):
        described(**{setting: value})


SIZES = st.integers(0, 80 * GIB)


@given(SIZES, SIZES, SIZES, SIZES)
def test_a_cap_only_takes_and_a_smaller_one_takes_more(device: int, more: int, host: int, more_host: int) -> None:
    machine = replace(described(), device_free_bytes=20 * GIB, host_available_bytes=48 * GIB)
    small = machine.capped(device_bytes=device, host_bytes=host)
    large = machine.capped(device_bytes=device + more, host_bytes=host + more_host)
    sizes = [name for name in vars(machine) if name.endswith("_bytes")]
    for name in sizes:
        assert 0 <= getattr(small, name) <= getattr(large, name) <= getattr(machine, name)
    assert small.device_budget_bytes <= device
    assert small.host_available_bytes <= small.host_total_bytes <= host
    assert small.capped(device_bytes=device, host_bytes=host) == small


def test_a_cap_says_so_where_it_binds() -> None:
    machine = replace(described(), host_available_bytes=10 * GIB, host_limit="free memory")
    assert machine.capped(host_bytes=64 * GIB).host_limit == "free memory"
    assert machine.capped(host_bytes=20 * GIB).host_limit == "free memory, max_host_gib=20"
    assert machine.capped(host_bytes=5 * GIB).host_limit == "max_host_gib=5"
    assert machine.capped(host_bytes=5 * GIB).lockable_limit == "max_host_gib=5"
    with pytest.raises(HostMemoryError, match=r"needs 6\.00 GiB.* 5\.00 GiB is available \(max_host_gib=5\)"):
        machine.capped(host_bytes=5 * GIB).require_host(6 * GIB, what="it")


def test_the_devices_cap_counts_what_this_process_holds_there() -> None:
    machine = replace(described(), device_free_bytes=20 * GIB, device_budget_bytes=23 * GIB)
    capped = machine.capped(device_bytes=8 * GIB)
    assert (capped.device_total_bytes, capped.device_budget_bytes, capped.device_free_bytes) == (
        8 * GIB,
        8 * GIB,
        5 * GIB,
    )
    assert machine.capped(device_bytes=2 * GIB).device_free_bytes == 0


def test_memory_given_back_meanwhile_counts_but_never_beyond_the_total() -> None:
    machine = replace(described(), host_available_bytes=10 * GIB, host_total_bytes=12 * GIB)
    machine.require_host(11 * GIB, what="it", freed_bytes=GIB)
    with pytest.raises(HostMemoryError, match=r"needs 12\.50 GiB.* 12\.00 GiB is available"):
        machine.require_host(25 * GIB // 2, what="it", freed_bytes=5 * GIB)


@pytest.fixture
def fraction(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    return set_allocator(monkeypatch)


def set_allocator(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What torch's allocator was told, on a card of 16 GiB with a context of 0.75 GiB."""
    set_card(monkeypatch, free=14 * GIB, total=16 * GIB, reserved=5 * GIB // 4)
    told = {"now": 1.0}
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: told["now"])
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: told.update(now=fraction)
    )
    return told


def test_a_device_cap_leaves_out_the_context_and_is_undone(tree: Path, fraction: dict[str, float]) -> None:
    undo = cap_device("cuda:0", 4.75)
    assert fraction["now"] == 4 / 16
    undo()
    assert fraction["now"] == 1.0


@given(st.floats(0.76, 100.0))
def test_the_allocators_share_and_the_context_never_exceed_the_cap(gib: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        told = set_allocator(patch)
        cap_device("cuda:0", gib)
        assert int(told["now"] * 16 * GIB) + 3 * GIB // 4 <= max(gib * GIB, 16 * GIB if gib > 16.75 else 0)
        assert 0 < told["now"] <= 1


def test_a_cap_below_the_context_is_refused(tree: Path, fraction: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"`max_device_gib` must be more than the 0\.75 GiB that CUDA .*got 0\.5"):
        cap_device("cuda:0", 0.5)
    assert fraction["now"] == 1.0


@pytest.mark.parametrize(("device", "gib"), [("cpu", 1.0), ("cuda:0", None)])
def test_without_a_cap_or_a_gpu_nothing_is_told(fraction: dict[str, float], device: str, gib: float | None) -> None:
    cap_device(device, gib)()
    assert fraction["now"] == 1.0


def test_the_real_machine_is_plausible_and_cuda_stays_untouched() -> None:
    code = (
        "import torch; from lightning_offload.memory.budget import Machine; m = Machine.detect('cpu');"
        "assert 0 < m.lockable_bytes <= m.host_available_bytes <= m.host_total_bytes;"
        "assert 1 <= m.affinity_cores <= m.physical_cores and m.host_threads >= 1;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
