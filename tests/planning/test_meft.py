"""What a plan of meft says beside its bytes: the union it reckons with, what waits, what would make it fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_offload.memory.budget import GIB
from lightning_offload.methods.meft import MEFTSettings
from lightning_offload.methods.sparse_adapter import attach_parameters
from lightning_offload.planning import Plan, plan
from lightning_offload.planning.report import report
from tests.planning.machines import cpu, gpu
from tests.planning.test_exact import sized

ROWS: dict[str, Any] = {"width": 1024, "experts": 64, "active_experts": 4, "top_k": 32, "seed": 0}


def planned(machine: Any = None, *, union: float = 0.25, micro_batches: int = 1, **settings: Any) -> Plan:
    make, batch = sized("llama", "bf16-true")
    return plan(
        make(),
        batch,
        method="meft",
        settings=MEFTSettings(**{**ROWS, "placement": "keys", **settings}),
        precision="bf16-true",
        hardware=machine or gpu(),
        union=union,
        accumulate_grad_batches=micro_batches,
    )


def note(made: Plan, start: str) -> str:
    return next(text for text in made.notes if text.startswith(start))


def gradient_rows(made: Plan) -> int:
    """Of a table of one layer."""
    moved = [span for span in made.spans if span.kind == "row gradients"]
    return moved[0].bytes // (192 * 2)


@pytest.mark.parametrize(
    ("union", "rows"), [(0.25, 256), (1.0, 1024), (0.001, 32)], ids=["asked", "all", "at least those of a token"]
)
def test_the_union_is_that_which_was_asked_for(union: float, rows: int) -> None:
    made = planned(union=union)
    assert gradient_rows(made) == rows
    assert made.union == made.prediction.union == rows / 1024
    said = f"a union of {100 * rows / 1024:.0f} % of a layer's rows"
    assert said in note(made, "reckons with")
    assert said in " ".join(report(made, brief=True).split())


def test_few_tokens_do_not_use_more_rows_than_they_can() -> None:
    make, batch = sized("llama", "bf16-true")
    few = {name: value[:1, :4] for name, value in batch.items()}
    settings = MEFTSettings(**ROWS, placement="keys")
    made = plan(make(), few, method="meft", settings=settings, precision="bf16-true", hardware=gpu(), union=1.0)
    assert gradient_rows(made) == 4 * ROWS["top_k"]


@pytest.mark.parametrize("union", [0, -0.5, 1.5])
def test_a_union_that_is_no_share_is_refused(union: float) -> None:
    with pytest.raises(ValueError, match=rf"`union` must be a share, above 0 and at most 1, got {union}"):
        planned(union=union)


def test_the_link_carries_a_share_of_what_a_dense_adapter_would() -> None:
    """Values up and two gradients down of each row in use, every key up once per step; 2 P each way is dense."""
    made = planned(union=0.25, micro_batches=4)
    numel = 4 * 1024 * 192  # keys of all layers
    rows = 4 * 4 * 256  # in use, over layers and micro-batches
    assert made.lanes["h2d"].bytes == pytest.approx(2 * numel + rows * (2 * 192 + 4), abs=1000)
    assert made.lanes["d2h"].bytes == pytest.approx(2 * rows * 2 * 192 + 4 * 4 * 1024, abs=1000)
    dense = 2 * 4 * 2 * 2 * numel
    moved = made.lanes["h2d"].bytes + made.lanes["d2h"].bytes
    assert f"{100 * moved / dense:.0f} % of what a dense adapter would move" in note(made, "the link carries")


def test_choosing_on_the_host_is_said_to_be_reckoned_by_its_bytes() -> None:
    made = planned(placement="host")
    gflop = 2e-9 * 4 * 96 * 4 * (4 * 16) * 192  # tokens, layers, candidates, hidden size
    assert f"products of {gflop:,.1f} GFLOP a micro-batch" in note(made, "the host chooses")
    assert not any(text.startswith("the host chooses") for text in planned().notes)


def test_what_is_waited_for_is_named() -> None:
    assert planned(gpu(host_gb_per_s=1)).bottleneck.startswith("the host, which steps and gathers rows: ")
    assert planned(gpu(host_gb_per_s=1), placement="host").bottleneck.startswith("the host, which steps, chooses")
    slow = planned(gpu(h2d_gb_per_s=0.01), placement="device")
    assert slow.bottleneck.startswith("the link up, by which rows come: ")
    assert planned(gpu(fp32_tflops=0.01, bf16_tflops=0.01)).bottleneck.startswith("the device's compute")
    assert "rows chosen, gathered, stepped" in str(planned())


@pytest.mark.parametrize("placement", ["host", "keys", "device"])
def test_no_schedule_takes_less_than_the_bound(placement: Any) -> None:
    for machine in (gpu(), gpu(host_gb_per_s=2), gpu(h2d_gb_per_s=0.5, d2h_gb_per_s=0.5), cpu()):
        made = planned(machine, placement=placement)
        assert made.bound_s <= made.step_s * (1 + 1e-9)


def test_adapters_are_multiplied_in_16_bits_on_a_gpu() -> None:
    """Whose sums are fp32; on a CPU the operands are."""
    for machine, same in ((gpu, True), (cpu, False)):
        slow, fast = (planned(machine(fp32_tflops=tflops)).forward_s for tflops in (0.01, 50))
        assert (slow == fast) is same


def test_rows_are_in_host_memory_and_nowhere_else() -> None:
    on_host, on_device = (planned(placement=placement) for placement in ("host", "device"))
    numel = 2 * 4 * 1024 * 192
    assert on_host.host.holds["masters"] == on_host.host.holds["sums over micro-batches"] == 4 * numel
    assert "resident weights" not in on_host.device.holds
    assert on_device.device.holds["resident weights"] == 2 * numel
    assert sum(n for kind, n in on_host.device.holds.items() if kind.startswith("weights")) == pytest.approx(
        2 * (on_host.parameters - numel), abs=10
    )


def test_a_module_that_has_its_adapters_is_planned_as_one_that_gets_them() -> None:
    make, batch = sized("llama", "bf16-true")
    settings = MEFTSettings(**ROWS, placement="keys")
    attached = make()
    attach_parameters(attached, **settings.of_adapters())
    asked: dict[str, Any] = {"method": "meft", "settings": settings, "precision": "bf16-true", "hardware": gpu()}
    assert replace(plan(attached, batch, **asked), model="") == replace(plan(make(), batch, **asked), model="")


def test_advice_takes_rows_off_a_device_or_halves_them() -> None:
    def overrides(made: Plan) -> list[str]:
        assert not made.fits
        return [override for advice in made.advice for override in advice.overrides]

    wide: dict[str, Any] = {"width": 65536, "union": 0.01}
    whole, away = planned(**wide, placement="device"), planned(**wide, placement="host")
    between = (whole.device.bytes + away.device.bytes) / 2 / GIB
    short = planned(gpu(device_gib=between), **wide, placement="device")
    assert "trainer.strategy.placement=host" in overrides(short)
    little = planned(gpu(host_gib=0.9 * whole.host.bytes / GIB), **wide)
    assert overrides(little) == ["trainer.strategy.width=32768"]
