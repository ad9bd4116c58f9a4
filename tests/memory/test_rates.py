from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_offload.memory import kept, rates
from lightning_offload.memory.budget import GIB, Machine, machine_from
from lightning_offload.memory.kept import KeptJson, cache_folder
from lightning_offload.memory.rates import Rates

NAMES = [field.name for field in fields(Rates)]
GIVEN: dict[str, Any] = {name: 2.0 + index for index, name in enumerate(NAMES)} | {"duplex": 0.75}
CARD: dict[str, Any] = {"name": "card", "device_type": "cuda", "device_gib": 23.5, "host_gib": 64, "cores": 8}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "_measured_here", {})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path / "lightning_offload"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """What was measured: every time something else."""
    calls: list[tuple[Any, int]] = []

    def measure(device: Any, host_threads: int) -> dict[str, float]:
        calls.append((device, host_threads))
        return GIVEN | {"op_us": float(len(calls))}

    monkeypatch.setattr(rates, "measure", measure)
    return calls


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the next process."""
    monkeypatch.setattr(rates, "_measured_here", {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "fast", None, True])
def test_what_is_no_rate_is_refused_by_its_dotted_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`rates\.{name}` must be a positive number, got "):
        Rates(**GIVEN | {name: value})


@given(st.floats(1.0, 100.0, exclude_min=True))
def test_both_directions_at_once_are_never_faster(duplex: float) -> None:
    with pytest.raises(ValueError, match=r"`rates\.duplex` must be a share, above 0 and at most 1"):
        Rates(**GIVEN | {"duplex": duplex})


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sampled_from(["absent", None, "???"]))
def test_every_missing_rate_is_named(missing: set[str], how: str | None) -> None:
    some: dict[str, Any] = {name: value for name, value in GIVEN.items() if name not in missing}
    if how != "absent":
        some |= dict.fromkeys(missing, how)
    with pytest.raises(ValueError, match="hardware=card gives some rates, but not") as caught:
        Rates.from_mapping(some, of="hardware=card")
    for name in NAMES:
        assert (f"`rates.{name}`" in str(caught.value)) == (name in missing)


def test_an_unknown_rate_is_named() -> None:
    with pytest.raises(ValueError, match=r"`rates\.h2d_gbps` of hardware is not a rate; there are fp32_tflops, "):
        Rates.from_mapping(GIVEN | {"h2d_gbps": 1.0})


def test_this_machine_is_measured_and_left_as_it_was() -> None:
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    found = Rates.measured("cpu", host_threads=2)
    assert found.h2d_gb_per_s == found.d2h_gb_per_s == found.pageable_gb_per_s, "on the CPU all are host copies"
    assert found.duplex == 0.5, "and they take turns"
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    assert found.fp32_tflops > 1e-4  # no machine that runs torch multiplies at less than 0.1 GFLOP/s
    assert found.host_gb_per_s > 0.01


def test_a_machine_is_measured_once(
    folder: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = replace(Machine.detect(), torch_threads=3)
    assert not Rates.is_cached(machine)
    with caplog.at_level(logging.INFO):
        first = Rates.cached(machine)
        forget(monkeypatch)
        assert Rates.is_cached(machine)
        assert Rates.cached(machine) == first
    assert measured == [("cpu", 3)]
    assert caplog.messages == [f"measuring this machine, about 2 s; kept in {folder / 'rates.json'}"]
    assert list(json.loads((folder / "rates.json").read_text()).values()) == [asdict(first)]


@pytest.mark.parametrize("other", [{"torch_threads": 7}, {"device_name": "another"}, {"device_type": "cuda"}])
def test_another_machine_is_measured_by_itself_and_kept_beside(
    folder: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    machine = Machine.detect()
    first, second = Rates.cached(machine), Rates.cached(replace(machine, **other))
    assert len(measured) == 2
    forget(monkeypatch)
    assert (Rates.cached(machine), Rates.cached(replace(machine, **other))) == (first, second)
    assert len(measured) == 2


def test_beside_a_gpu_the_workers_threads_sweep(folder: Path, measured: list[Any]) -> None:
    machine = replace(Machine.detect(), device_type="cuda", affinity_cores=9, numa_cores=0, cpu_quota=None)
    Rates.cached(machine, "cuda:1")
    assert measured == [("cuda:1", 8)]


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "null", b"\xff\xfe\x00", '{"KEY": 3}', '{"KEY": {"duplex": 2}}', '{"KEY": []}']
)
def test_a_damaged_cache_is_said_and_mended(
    folder: Path,
    measured: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: str | bytes,
) -> None:
    machine = Machine.detect()
    folder.mkdir()
    if isinstance(content, str):
        content = content.replace("KEY", rates._key(machine)).encode()
    (folder / "rates.json").write_bytes(content)
    first = Rates.cached(machine)
    assert Rates.cached(machine) == first
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "measuring again" in caplog.text
    forget(monkeypatch)
    assert Rates.cached(machine) == first
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_is_said_once(
    folder: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # what a user gets; root may write anywhere

    monkeypatch.setattr(kept.tempfile, "mkstemp", refuse)
    machine = Machine.detect()
    assert Rates.cached(machine) == Rates.cached(machine)
    assert len(measured) == 1
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
    assert "cannot be kept" in caplog.text
    assert "Permission denied" in caplog.text


def test_what_a_busy_machine_leaves_is_not_kept(
    folder: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0 * (os.cpu_count() or 1), 0.0, 0.0))
    machine = Machine.detect()
    assert Rates.cached(machine) == Rates.cached(machine)
    assert len(measured) == 1
    assert "not kept" in caplog.text
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_no_error(folder: Path, measured: list[Any]) -> None:
    folder.write_text("a file where the folder should be")
    assert Rates.cached(Machine.detect()).op_us == 1.0


def test_a_failed_write_leaves_the_old_file_and_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = KeptJson("x.json")
    file.add("a", 1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        file.add("b", 2)
    assert file.read() == {"a": 1}
    assert [path.name for path in folder.iterdir()] == ["x.json"]


def test_processes_that_write_at_once_leave_a_whole_file(folder: Path) -> None:
    code = (
        "import sys; from lightning_offload.memory.kept import KeptJson; file = KeptJson('x.json')\n"
        "for i in range(200): file.add(sys.argv[1] + str(i), 'long' * 2000); assert file.read()"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    content = KeptJson("x.json").read()
    assert "a199" in content or "b199" in content
    assert set(content.values()) == {"long" * 2000}
    assert [path.name for path in folder.iterdir()] == ["x.json"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == tmp_path / ".cache" / "lightning_offload"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/lightning_offload")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user unknown to the system
    assert cache_folder().is_absolute()


def test_a_hardware_file_with_rates_is_a_described_machine(folder: Path, measured: list[Any]) -> None:
    machine = machine_from(CARD | {"link": "PCIe 4.0 x16", "rates": GIVEN}, "cpu")
    assert machine == Machine.described(**CARD, link="PCIe 4.0 x16", rates=Rates(**GIVEN))
    assert measured == []


def test_a_hardware_file_without_rates_is_this_machine_measured(folder: Path, measured: list[Any]) -> None:
    nothing = dict.fromkeys(["device_gib", "host_gib", "cores", "link"]) | {"rates": dict.fromkeys(NAMES)}
    machine = machine_from({"name": "cpu", "device_type": "cpu"} | nothing)
    assert (machine.name, machine.device_type, machine.link) == ("cpu", "cpu", "host memory")
    assert machine.rates == Rates(**GIVEN | {"op_us": 1.0})
    assert machine.host_total_bytes == Machine.detect().host_total_bytes
    small = machine_from({"name": "auto", "rates": None, "host_gib": 0.5, "device_gib": None}, "cpu")
    assert small.host_total_bytes == GIB // 2
    assert len(measured) == 1


@pytest.mark.parametrize("key", ["device_type", "device_gib", "host_gib", "cores"])
def test_a_description_without_a_size_names_it(key: str) -> None:
    with pytest.raises(ValueError, match=rf"hardware=card gives rates, but not `hardware\.{key}`"):
        machine_from(CARD | {"rates": GIVEN, key: None})


def test_a_description_with_some_rates_names_the_others() -> None:
    with pytest.raises(ValueError, match=r"hardware=card gives some rates, but not `rates\.h2d_gb_per_s`, `rates\.d2h"):
        machine_from(CARD | {"rates": GIVEN | {"h2d_gb_per_s": "???", "d2h_gb_per_s": None}})
