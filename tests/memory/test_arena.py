from __future__ import annotations

import gc
import io
import mmap
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_offload.errors import HostMemoryError
from lightning_offload.memory import arena
from lightning_offload.memory.arena import HostMemory, Region, aligned, region_bytes
from lightning_offload.memory.budget import GIB, Machine

MIB = 1024**2
PAGE = mmap.PAGESIZE
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


class FakeCudart:
    """What ``torch.cuda.cudart()`` gives, on a machine that locks what `answer` allows."""

    def __init__(self, answer: object = 0) -> None:
        self.answer = answer
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert address % PAGE == 0
        assert flags == 1
        if isinstance(self.answer, Exception):
            raise self.answer
        if not self.answer:
            self.locked[address] = nbytes
        return int(self.answer)

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.locked.pop(address, None) else 1

    def cudaGetErrorString(self, code: int) -> str:
        return {2: "out of memory"}[code]


@pytest.fixture
def cleared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    calls: list[None] = []
    monkeypatch.setattr(arena, "_clear_error", lambda: calls.append(None))
    return calls


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch, cleared: list[None]) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


def machine(lockable_bytes: int = GIB) -> Machine:
    return replace(Machine.detect(), lockable_bytes=lockable_bytes, lockable_limit="the test says so")


def rss_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@given(st.integers(0, 10**12), st.sampled_from([1, 2, 64, 256, 4096]))
def test_aligned_is_the_least_multiple_that_holds(nbytes: int, align: int) -> None:
    assert aligned(nbytes, align) % align == 0
    assert 0 <= aligned(nbytes, align) - nbytes < align


@given(st.lists(st.tuples(st.integers(0, 700), st.sampled_from(DTYPES)), max_size=8), st.sampled_from([8, 64, 256]))
def test_a_region_of_the_computed_size_holds_its_tensors_and_not_one_byte_more(
    specs: list[tuple[int, torch.dtype]], align: int
) -> None:
    memory = HostMemory(pin=False)
    region = memory.region("r", region_bytes(specs, align), pinned=False)
    tensors = [region.carve(numel, dtype, align) for numel, dtype in specs]
    for tensor, (numel, dtype) in zip(tensors, specs, strict=True):
        assert (tensor.numel(), tensor.dtype, tensor.dim()) == (numel, dtype, 1)
        assert tensor.untyped_storage().nbytes() == numel * dtype.itemsize
        assert tensor.data_ptr() % align == 0 or not numel
        assert not tensor.any()
    requested = sum(numel * dtype.itemsize for numel, dtype in specs)
    report = memory.report()
    assert report.requested_bytes == report.by_name["r"].requested_bytes == requested
    assert report.allocated_bytes == aligned(region.nbytes, PAGE)
    with pytest.raises(AssertionError, match="region 'r' of"):
        region.carve(1, torch.uint8, 1)


def test_tensors_of_a_region_do_not_overlap() -> None:
    specs = [(100, torch.float32), (3, torch.bfloat16), (77, torch.float32)]
    region = HostMemory(pin=False).region("r", region_bytes(specs), pinned=False)
    tensors = [region.carve(numel, dtype) for numel, dtype in specs]
    for value, tensor in enumerate(tensors, start=1):
        tensor.fill_(value)
    for value, tensor in enumerate(tensors, start=1):
        assert torch.equal(tensor, torch.full_like(tensor, value))


def test_the_report_sums_regions_and_counts_pages() -> None:
    memory = HostMemory(pin=False)
    memory.region("a", PAGE + 1, pinned=True).carve(10, torch.float32)
    memory.region("b", 100, pinned=False)
    memory.region("empty", 0, pinned=True)
    report = memory.report()
    assert (report.requested_bytes, report.allocated_bytes, report.locked_bytes) == (40, 3 * PAGE, 0)
    assert list(report.by_name) == ["a", "b", "empty"]
    with pytest.raises(AssertionError, match="called 'a'"):
        memory.region("a", 1, pinned=False)


def test_saved_files_hold_only_the_tensor(tmp_path: Path) -> None:
    region = Region("r", 4 * MIB)
    tensors = {"a": region.carve(25, torch.float32), "b": region.carve(1 << 18, torch.float32)}
    tensors["a"].copy_(torch.arange(25))
    buffer = io.BytesIO()
    torch.save(tensors["a"], buffer)
    assert buffer.tell() < 4096
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), tensors["a"])
    save_file(tensors, tmp_path / "both.safetensors")
    assert torch.equal(load_file(tmp_path / "both.safetensors")["a"], tensors["a"])


def test_memory_lives_as_long_as_its_last_tensor_and_then_goes_back() -> None:
    memory = HostMemory(pin=False)
    before = rss_bytes()
    region = memory.region("r", 64 * MIB, pinned=False)
    first, second = region.carve(8 * MIB, torch.float32), region.carve(MIB, torch.float32)
    assert rss_bytes() - before < 8 * MIB, "mapped memory costs nothing until it is written"
    first.fill_(1.0)
    second.fill_(2.0)
    memory.close()
    del region, memory, first
    assert rss_bytes() - before > 30 * MIB
    assert second.eq(2.0).all()
    del second
    assert rss_bytes() - before < 8 * MIB


def test_tensors_are_on_the_cpu_whatever_the_default_device_and_dtype() -> None:
    with torch.device("meta"):
        region = Region("r", 16)
        assert region.carve(4, torch.float32).device.type == "cpu"
        assert region.carve(0, torch.float32).device.type == "cpu"


@pytest.mark.skipif(sys.platform == "win32", reason="fork is POSIX")
def test_a_forked_worker_shares_the_memory_instead_of_copying_it() -> None:
    code = (
        "import os, torch; from lightning_offload.memory.arena import Region\n"
        "t = Region('r', 4).carve(1, torch.int32); t.fill_(1)\n"
        "child = os.fork()\n"
        "if child == 0: t.fill_(7); os._exit(0)\n"
        "os.waitpid(child, 0); assert t.item() == 7"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_refused_mapping_says_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(pin=False)
    memory.region("first", GIB, pinned=False)

    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(HostMemoryError, match=r"2\.00 GiB.*'second', beside 1\.00 GiB held.*Cannot allocate"):
        memory.region("second", 2 * GIB, pinned=False)
    assert list(memory.report().by_name) == ["first"]


class Earlier:
    """Holds a region in a reference cycle, as a Trainer does; `mmap` says at each call whether it is still there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, refuses: bool) -> None:
        self.seen: list[bool] = []
        cycle: list[object] = [Region("earlier", PAGE)]
        cycle.append(cycle)
        held, real = weakref.ref(cycle[0]), mmap.mmap

        def map_it(*arguments: int) -> mmap.mmap:
            self.seen.append(held() is not None)
            if refuses and self.seen[-1]:
                raise OSError(12, "Cannot allocate memory")
            return real(*arguments)

        monkeypatch.setattr(mmap, "mmap", map_it)


@pytest.fixture
def _no_collection_by_chance() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection_by_chance")
def test_where_the_system_refuses_what_earlier_runs_held_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = Earlier(monkeypatch, refuses=True)
    region = HostMemory(pin=False).region("r", PAGE, pinned=False)
    assert earlier.seen == [True, False]
    assert region.carve(PAGE, torch.uint8).eq(0).all()


@pytest.mark.usefixtures("_no_collection_by_chance")
def test_before_a_memory_becomes_large_what_earlier_runs_held_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "LARGE_BYTES", 4 * PAGE)
    earlier = Earlier(monkeypatch, refuses=False)
    memory = HostMemory(pin=False)
    for index in range(5):
        memory.region(f"r{index}", PAGE, pinned=False)
    assert earlier.seen == [True, True, True, False, False]


def test_pinning_locks_whole_pages_of_what_asks_for_it(cudart: FakeCudart) -> None:
    memory = HostMemory(machine=machine())
    pinned = memory.region("pinned", PAGE + 1, pinned=True)
    pageable = memory.region("pageable", PAGE, pinned=False)
    memory.region("empty", 0, pinned=True)
    tensor = pinned.carve(3, torch.float32)
    assert cudart.locked == {tensor.data_ptr(): 2 * PAGE}
    assert (pinned.pinned, pageable.pinned) == (True, False)
    assert memory.report().locked_bytes == memory.report().by_name["pinned"].locked_bytes == 2 * PAGE
    memory.close()
    memory.close()
    assert not cudart.locked
    assert not pinned.pinned
    assert tensor.eq(0).all()
    assert memory.report().allocated_bytes == 0


def test_pins_are_released_when_the_owner_is_collected(cudart: FakeCudart) -> None:
    memory = HostMemory(machine=machine())
    tensor = memory.region("r", PAGE, pinned=True).carve(1, torch.float32)
    assert cudart.locked
    del memory
    gc.collect()
    assert not cudart.locked
    assert tensor.item() == 0


def test_short_lockable_memory_is_pageable_with_one_warning(cudart: FakeCudart) -> None:
    memory = HostMemory(machine=machine(lockable_bytes=GIB))
    ring = memory.region("ring", GIB // 4, pinned=True)
    with pytest.warns(UserWarning, match=r"1\.25 GiB .* asked, 1\.00 GiB lockable: the test says so") as caught:
        homes = [memory.region(f"home{index}", GIB, pinned=True) for index in range(3)]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert ring.pinned
    assert not any(home.pinned for home in homes)
    assert memory.report().locked_bytes == GIB // 4
    assert memory.region("small", GIB // 4, pinned=True).pinned


@pytest.mark.parametrize(
    ("answer", "reason"), [(2, "out of memory"), (RuntimeError("operation not supported"), "operation not supported")]
)
def test_a_refused_registration_is_pageable_and_its_error_cleared(
    cudart: FakeCudart, cleared: list[None], answer: object, reason: str
) -> None:
    cudart.answer = answer
    memory = HostMemory(machine=machine())
    with pytest.warns(UserWarning, match=f"0.50 GiB .* asked, 1.00 GiB lockable: cudaHostRegister failed: {reason}"):
        region = memory.region("r", GIB // 2, pinned=True)
    assert not region.pinned
    assert len(cleared) == 1
    assert region.carve(4, torch.float32).eq(0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.region("as large", GIB // 2, pinned=True)
    assert len(cleared) == 1, "what was refused once is not asked again"
    cudart.answer = 0
    assert memory.region("smaller", GIB // 4, pinned=True).pinned


def test_an_error_at_unregistering_is_cleared(cudart: FakeCudart, cleared: list[None]) -> None:
    memory = HostMemory(machine=machine())
    memory.region("r", PAGE, pinned=True)
    cudart.locked.clear()
    memory.close()
    assert len(cleared) == 1


def test_clearing_swallows_the_pending_error_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", launch)
    arena._clear_error()


@pytest.mark.parametrize("pin", [False, "auto"])
def test_without_cuda_nothing_is_pinned_and_nothing_said(monkeypatch: pytest.MonkeyPatch, pin: object) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not HostMemory(pin=pin).region("r", 8, pinned=True).pinned


def test_pin_false_pins_nothing_with_cuda(cudart: FakeCudart) -> None:
    assert not HostMemory(pin=False, machine=machine()).region("r", 8, pinned=True).pinned
    assert not cudart.locked


def test_pin_true_without_cuda_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="pin_memory=True, but CUDA is not available"):
        HostMemory(pin=True)


@given(st.lists(st.integers(0, 20 * PAGE), max_size=12), st.integers(0, 100 * PAGE))
def test_regions_never_take_more_than_the_cap(sizes: list[int], cap: int) -> None:
    memory = HostMemory(pin=False, cap_bytes=cap)
    for index, size in enumerate(sizes):
        held = memory.report().allocated_bytes
        fits = held + aligned(size, PAGE) <= cap
        with nullcontext() if fits else pytest.raises(HostMemoryError, match=f"'r{index}' needs"):
            memory.region(f"r{index}", size, pinned=False)
        assert memory.report().allocated_bytes == (held + aligned(size, PAGE) if fits else held)
        assert memory.report().allocated_bytes <= cap


def test_a_region_beyond_the_cap_is_refused_before_it_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(pin=False, cap_bytes=GIB)
    memory.region("a", GIB // 2, pinned=False)
    monkeypatch.setattr(arena.mmap, "mmap", lambda *_: pytest.fail("mapped"))
    message = r"'b' needs 0\.75 GiB .* beside 0\.50 GiB held already, but max_host_gib .* within 1\.00 GiB"
    with pytest.raises(HostMemoryError, match=message):
        memory.region("b", 3 * GIB // 4, pinned=False)
    assert list(memory.report().by_name) == ["a"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_region_is_pinned_where_it_lies_and_a_refusal_leaves_no_error() -> None:
    memory = HostMemory()
    tensor = memory.region("r", MIB, pinned=True).carve(1000, torch.float32)
    assert tensor.is_pinned()
    assert torch.equal(tensor.fill_(3.0).to("cuda", non_blocking=True).cpu(), tensor)
    pins = arena._Pins(torch.cuda.cudart())
    assert "cudaHostRegister failed" in pins.lock(tensor.data_ptr(), PAGE), "registered twice"
    assert torch.ones(1, device="cuda").add_(1).item() == 2
    memory.close()
    assert not tensor.is_pinned()
