"""The machine on a CUDA device: what is found, what is measured, and caps that hold.

``pytest -m gpu tests/gpu`` on any machine with a CUDA device and 3 GiB free on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_offload.doctor import diagnose
from lightning_offload.memory import rates
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.budget import GIB, Machine, cap_device, machine_from
from lightning_offload.memory.device_limits import CONTEXT_BYTES
from lightning_offload.memory.rates import Rates
from tests.lit import Lit, fit, offload

pytestmark = pytest.mark.gpu
MIB = 1024**2


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No memory of earlier tests is kept aside, and no cap outlasts a test."""
    torch.cuda.empty_cache()
    yield
    assert torch.cuda.get_per_process_memory_fraction() == 1.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "_measured_here", {})
    return tmp_path


def test_the_device_is_found() -> None:
    machine = Machine.detect("cuda")
    assert machine.device_type == "cuda"
    assert machine.device_name == torch.cuda.get_device_name()
    assert machine.device_free_bytes < machine.device_budget_bytes <= machine.device_total_bytes
    assert GIB // 10 <= machine.context_bytes <= GIB
    assert machine.numa_node is None or machine.numa_node >= 0
    assert machine.link.startswith("PCIe ") or machine.link == "not shown by the system"


def test_rates_are_of_this_order_and_nothing_stays_behind() -> None:
    torch.ones(1, device="cuda")
    random, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    found = Rates.measured("cuda")
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.memory_allocated() <= allocated + 128 * MIB, "cuBLAS keeps a workspace"
    assert 0.5 <= found.duplex <= 1
    assert max(found.h2d_gb_per_s, found.d2h_gb_per_s) < found.device_gb_per_s
    if torch.cuda.get_device_capability() >= (8, 0):
        assert found.bf16_tflops > found.fp32_tflops


def test_this_machine_is_measured_once_and_recalled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "host_is_busy", lambda: False)
    first = machine_from({"name": "auto", "rates": None}, "cuda").rates
    monkeypatch.setattr(rates, "_measured_here", {})
    monkeypatch.setattr(rates, "measure", lambda *_: pytest.fail("measured again"))
    assert machine_from({"name": "auto", "rates": None}, "cuda").rates == first


def test_allocations_stay_within_the_cap_until_it_is_lifted() -> None:
    cap = (CONTEXT_BYTES + 2 * GIB) / GIB
    before = torch.cuda.memory_reserved()
    undo = cap_device("cuda", cap)
    kept: list[torch.Tensor] = []
    try:
        with pytest.raises(torch.OutOfMemoryError):
            kept.extend(torch.empty(64 * MIB, dtype=torch.uint8, device="cuda") for _ in range(100))
        assert 1.5 * GIB < torch.cuda.memory_reserved() <= cap * GIB - CONTEXT_BYTES
        assert len(kept) * 64 * MIB + before > GIB, "and most of it can be used"
    finally:
        kept.clear()
        undo()
        torch.cuda.empty_cache()
    assert torch.empty(5 * GIB // 2, dtype=torch.uint8, device="cuda").is_cuda


def test_a_run_that_needs_more_than_its_cap_fails_as_on_a_smaller_device() -> None:
    class Wasteful(Lit):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            torch.empty(2 * GIB, dtype=torch.uint8, device=self.device)
            return super().training_step(batch, batch_idx)

    fit(Wasteful(), offload(), accelerator="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        fit(Wasteful(), offload(max_device_gib=2.0), accelerator="cuda")


def test_a_run_within_its_cap_takes_no_more() -> None:
    torch.cuda.reset_peak_memory_stats()
    fit(Lit(), offload(max_device_gib=2.0), accelerator="cuda")
    assert 0 < torch.cuda.max_memory_reserved() <= 2 * GIB - CONTEXT_BYTES


def test_locked_memory_stays_within_the_hosts_cap() -> None:
    memory = HostMemory(cap_bytes=64 * MIB)
    assert memory.region("a", 32 * MIB, pinned=True).pinned
    with pytest.raises(RuntimeError, match="max_host_gib"):
        memory.region("b", 33 * MIB, pinned=True)
    assert memory.report().locked_bytes == 32 * MIB
    memory.close()


def test_the_doctor_finds_it_in_working_order(cache: Path) -> None:
    diagnosis = diagnose("cuda")
    assert diagnosis.ok, str(diagnosis)
    found = {fact.what: fact for fact in diagnosis.facts}
    assert found["page-locking"].why == "works"
    assert torch.cuda.get_device_name() in found[f"cuda:{torch.cuda.current_device()}"].found
    assert found["driver"].found
