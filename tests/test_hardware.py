"""Every hardware file is a machine, and a run stays within what it describes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_offload.conf import schema
from omegaconf import DictConfig, OmegaConf

from lightning_offload import FullOffloadStrategy
from lightning_offload.errors import HostMemoryError
from lightning_offload.memory.budget import GIB, Machine, machine_from
from lightning_offload.memory.rates import Rates
from lightning_offload.strategies import OneDevice
from tests.lit import Lit, fit, offload

FOLDER = Path(schema.__file__).parent / "hardware"
FILES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
CARDS = [name for name in FILES if name not in ("auto", "cpu")]
RATES = Rates(**{field.name: 0.5 for field in fields(Rates)})


@pytest.fixture(autouse=True)
def _hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Rates, "cached", classmethod(lambda cls, machine, device=None: RATES))
    schema.register()
    OmegaConf.register_new_resolver("run_folder", lambda *names: f"runs/{names[2]}-1", replace=True)
    with initialize_config_module("lightning_offload.conf", version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


def composed(*overrides: str) -> DictConfig:
    return compose("train", list(overrides))


def machine_of(*overrides: str) -> Machine:
    content = OmegaConf.to_container(composed(*overrides).hardware)
    assert isinstance(content, dict)
    return machine_from(content)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", FILES)
def test_every_file_is_a_machine_of_its_name(option: str) -> None:
    machine = machine_of(f"hardware={option}")
    assert machine.name == option
    assert machine.rates is not None
    assert (machine.rates is RATES) == (option in ("auto", "cpu")), "this machine, measured"


def test_the_schema_has_what_machine_from_takes() -> None:
    assert [f.name for f in fields(schema.Rates)] == [f.name for f in fields(Rates)]


@pytest.mark.parametrize("option", CARDS)
def test_a_card_is_described_with_its_sources(option: str) -> None:
    lines = (FOLDER / f"{option}.yaml").read_text().splitlines()
    assert lines[1].startswith("# "), "what it is, and where its figures come from"
    cfg = composed(f"hardware={option}")
    assert cfg.precision.precision == "bf16-true"
    machine, rates = machine_of(f"hardware={option}"), machine_of(f"hardware={option}").rates
    assert rates is not None
    assert machine.device_type == "cuda"
    assert rates.pageable_gb_per_s < rates.h2d_gb_per_s < rates.device_gb_per_s
    assert rates.fp32_tflops < rates.bf16_tflops
    assert 0.5 <= rates.duplex <= 1


def test_the_laptops_rate_is_that_of_its_published_iteration() -> None:
    rates = machine_of("hardware=laptop_4gb").rates
    assert rates is not None
    flops = 6 * 1.346e9 * 384  # model and batch of the paper's plot
    assert rates.bf16_tflops == pytest.approx(flops / 0.52 / 1e12, rel=0.02)


@pytest.mark.parametrize("option", CARDS)
def test_a_run_is_told_to_stay_within_the_card(option: str) -> None:
    cfg = composed(f"hardware={option}")
    strategy = instantiate(cfg.trainer.strategy, precision_plugin=None, _convert_="all")
    assert isinstance(strategy, OneDevice)
    assert strategy.settings.max_device_bytes == int(cfg.hardware.device_gib * GIB)
    assert strategy.settings.max_host_bytes == int(cfg.hardware.host_gib * GIB)


@pytest.mark.parametrize("option", FILES)
def test_a_trainer_is_built_where_the_device_is(option: str) -> None:
    node = composed(f"hardware={option}", "logger=none", "callbacks=none", "method=none").trainer
    if option in CARDS and not torch.cuda.is_available():
        with pytest.raises(Exception, match="can not run on your system since the accelerator is not available") as e:
            instantiate(node, default_root_dir=".", _convert_="all")
        assert isinstance(e.value.__cause__, MisconfigurationException)
        return
    assert instantiate(node, default_root_dir=".", _convert_="all").num_devices == 1


def test_without_a_cap_nothing_is_capped() -> None:
    node = composed("hardware=auto").trainer.strategy
    assert (node.max_device_gib, node.max_host_gib) == (None, None)


def test_a_cap_on_the_command_line_makes_this_machine_smaller() -> None:
    assert machine_of("hardware=cpu", "hardware.host_gib=0.25").host_total_bytes == GIB // 4


@pytest.mark.parametrize("key", ["hardware.vram=3", "hardware.rates.h2d=3"])
def test_a_misspelt_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigCompositionException, match=key.split("=")[0]):
        composed("hardware=rtx4090", key)


def test_a_rate_taken_away_is_named() -> None:
    with pytest.raises(ValueError, match=r"^hardware=rtx4090 gives some rates, but not `rates\.duplex`; give all"):
        machine_of("hardware=rtx4090", "hardware.rates.duplex=null")
    with pytest.raises(ValueError, match=r"^hardware=auto gives some rates, but not `rates\.fp32_tflops`, "):
        machine_of("hardware.rates.op_us=3")


def test_a_described_machine_can_be_measured_instead() -> None:
    assert machine_of("hardware=laptop_4gb", "hardware.rates=null", "hardware.device_type=cpu").rates is RATES


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hardware=rtx4090", "hardware.rates=null"], r"hardware=rtx4090 gives no rates, .*CUDA cannot be used .*=cpu"),
        (["hardware.device_type=cuda"], "hardware=auto gives no rates, so its device .'cuda'. would be measured here"),
        (["hardware.device_type=gpu"], "`hardware.device_type` must be 'cuda' or 'cpu', got 'gpu'"),
    ],
)
def test_a_device_that_is_not_here_cannot_be_measured(
    overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=said):
        machine_of(*overrides)


@pytest.mark.parametrize("device", ["cuda:2", "cuda:-1", "cuda:x"])
def test_a_device_beyond_those_here_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=f"device='{device}' of hardware=auto is not here: cuda:0 to cuda:1 are"):
        machine_from({"name": "auto"}, device)


@pytest.mark.parametrize("setting", ["max_device_gib", "max_host_gib"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "4", True])
def test_what_is_no_size_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{setting}` must be a positive number of GiB, or None, got "):
        FullOffloadStrategy(**{setting: value})


def test_arenas_beyond_the_cap_are_refused_before_anything_is_allocated() -> None:
    with (
        mock.patch("lightning_offload.memory.arena.HostMemory.region", side_effect=AssertionError("allocated")),
        pytest.raises(HostMemoryError, match=r"0\.00 GiB is available \(max_host_gib=9\.99\d+e-07\)"),
    ):
        fit(Lit(), offload(max_host_gib=1e-6))


def test_a_cap_holds_where_a_misfit_is_only_warned_about() -> None:
    with (
        pytest.warns(UserWarning, match="on_misfit='warn'"),
        pytest.raises(HostMemoryError, match="raise max_host_gib"),
    ):
        fit(Lit(), offload(max_host_gib=1e-6, on_misfit="warn"))


def test_a_run_within_its_cap_trains_and_takes_no_more() -> None:
    strategy = offload(max_host_gib=1.0)
    fit(Lit(), strategy)
    assert strategy.engine is not None
    memory = strategy.engine.lanes.memory
    assert memory._cap_bytes == GIB
    with pytest.raises(HostMemoryError, match="max_host_gib keeps the run within 1"):
        memory.region("more", GIB + 1, pinned=False)


def test_a_device_cap_on_the_cpu_is_said_to_have_no_effect() -> None:
    with pytest.warns(UserWarning, match="`max_device_gib=2` has no effect: the CPU is the device"):
        fit(Lit(), offload(max_device_gib=2.0))


@pytest.mark.parametrize("fails", [False, True])
def test_the_devices_cap_lasts_from_setup_to_teardown(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    events: list[object] = []

    def cap(device: torch.device, gib: float | None) -> Any:
        events.append((device.type, gib))
        return lambda: events.append("undone")

    class Watched(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            events.append("step")
            if fails:
                raise RuntimeError("stops here")
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr("lightning_offload.behaviour.cap_device", cap)
    strategy = offload(max_device_gib=None)
    with pytest.raises(RuntimeError, match="stops here") if fails else nullcontext():
        fit(Watched(), strategy)
    assert (events[0], events[1], events[-1]) == (("cpu", None), "step", "undone")
    assert events.count("undone") == 1
