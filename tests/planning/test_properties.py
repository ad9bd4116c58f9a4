"""Faster never predicts slower, more never fits less, and what fits a cap runs within it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_offload import FullOffloadStrategy
from lightning_offload.errors import HostMemoryError
from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.methods.base import Clip
from lightning_offload.methods.full import FullSettings
from lightning_offload.planning import Plan, plan
from lightning_offload.planning.methods import NATIVE, SERIAL
from lightning_offload.planning.result import THE_RUN_ITSELF
from lightning_offload.planning.scenario import Dry, Scenario
from tests.helpers import every
from tests.lit import Lit, trainer
from tests.planning.machines import RATES, cpu, gpu
from tests.zoo import ZOO

# Monotony.

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, clipped, twice": {"clip": Clip(1.0), "micro_batches": 2},
    "full, at once": {"settings": FullSettings(min_numel=0, skip_nonfinite=False)},
    "full, sums on the host": {"micro_batches": 3, "settings": FullSettings(min_numel=0, accumulate="host")},
    "serial": {"method": SERIAL},
    "native": {"method": NATIVE, "precision": "32-true"},
}
SLOW = {
    "the link": {"h2d_gb_per_s": 0.5, "d2h_gb_per_s": 0.5, "duplex": 0.6},
    "the host": {"host_gb_per_s": 0.5},
    "the device": {"op_us": 50.0, "bf16_tflops": 0.001, "fp32_tflops": 0.001},
}


def step(module: nn.Module, batch: Any) -> torch.Tensor:
    output = module(**batch)
    return output.float().square().mean() if isinstance(output, torch.Tensor) else output.loss


def planned(family: str, machine: Machine, **settings: Any) -> Plan:
    module, batch = ZOO[family]()
    settings = {"settings": FullSettings(min_numel=0), "precision": "bf16-true", "step": step, **settings}
    return Dry(Scenario(module=module, batch=batch, machine=machine, **settings)).plan()


def faster(name: str, rates: dict[str, float]) -> dict[str, float]:
    changed = min(1.0, 1.5 * rates[name]) if name == "duplex" else rates[name] / 1.5 if name == "op_us" else None
    return {**rates, name: 1.5 * rates[name] if changed is None else changed}


@pytest.mark.parametrize(
    ("settings", "slow"),
    every(2, [(name, list(SLOW)[at % len(SLOW)]) for at, name in enumerate(SETTINGS)])
    + every(2, [("full", slow) for slow in SLOW][1:]),
)
def test_neither_bound_nor_step_grows_with_a_rate(settings: str, slow: str) -> None:
    rates = {**RATES, **SLOW[slow]}
    before = planned("sequential", gpu(**rates), **SETTINGS[settings])
    assert before.step_s >= before.lanes["compute"].busy_s
    assert before.step_s >= before.bound_s * (1 - 1e-9)
    for name in rates:
        after = planned("sequential", gpu(**faster(name, rates)), **SETTINGS[settings])
        assert after.bound_s <= before.bound_s * (1 + 1e-9), name
        assert after.step_s <= before.step_s * (1 + 1e-9), name
        assert after.device == before.device, "memory is no matter of rates"


@pytest.mark.parametrize("family", ["opt", "albert", "t5"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_no_step_beats_its_bound_or_its_compute(family: str, device: str) -> None:
    for slow in SLOW.values() if device == "gpu" else [{}]:
        made = planned(family, gpu(**slow) if device == "gpu" else cpu())
        assert made.step_s >= made.bound_s * (1 - 1e-9) > 0
        assert made.step_s >= made.lanes["compute"].busy_s > 0


def test_a_machine_as_fast_in_all_takes_its_share_of_the_time() -> None:
    """Twice as fast in everything is twice as fast."""
    rates = {**RATES, **SLOW["the host"]}
    twice = {
        name: rate if name == "duplex" else rate / 2 if name == "op_us" else 2 * rate for name, rate in rates.items()
    }
    slow, fast = planned("sequential", gpu(**rates)), planned("sequential", gpu(**twice))
    assert fast.step_s == pytest.approx(slow.step_s / 2)
    assert fast.bound_s == pytest.approx(slow.bound_s / 2)


@pytest.mark.parametrize(
    ("accumulate", "micro_batches"),
    [
        ("auto", 4),
        ("device", 1),
        ("host", 4),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in [("auto", 1), ("device", 4), ("host", 1)]),
    ],
)
def test_more_memory_never_fits_less(accumulate: Any, micro_batches: int) -> None:
    settings = {"settings": FullSettings(min_numel=0, accumulate=accumulate), "micro_batches": micro_batches}
    whole = planned("sequential", gpu(), **settings)
    for machine in (gpu(), cpu()):
        fits = [
            planned("sequential", machine.capped(host_bytes=int(share * whole.host.bytes)), **settings).host.fits
            for share in (0.5, 0.9, 1.0, 1.1, 2.0, 10.0)
        ]
        assert fits == sorted(fits)
        assert fits[0] is False
        assert fits[-1] is True


# Caps.


def lit(**net: Any) -> Lit:
    return Lit(samples=4, make_optimizer=lambda module: torch.optim.AdamW(module.parameters(), fused=True), **net)


def arenas(precision: Any, micro_batches: int = 1, **settings: Any) -> int:
    """What the plan says of the arenas alone."""
    module = lit()
    batch = next(iter(module.train_dataloader()))
    scenario = Scenario(
        module=module,
        batch=batch,
        machine=cpu(),
        settings=FullSettings(min_numel=0, **settings),
        precision=precision,
        micro_batches=micro_batches,
    )
    return Dry(scenario).run.lanes.memory.report().allocated_bytes


def train(cap_bytes: int, precision: Any, micro_batches: int = 1, **settings: Any) -> L.Trainer:
    strategy = FullOffloadStrategy(min_numel=0, max_host_gib=cap_bytes / GIB, **settings)
    run = trainer(strategy, max_epochs=1, precision=precision, accumulate_grad_batches=micro_batches)
    run.fit(lit())
    return run


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_exactly_enough_trains_and_a_byte_less_is_refused(precision: Any, micro_batches: int) -> None:
    needed = arenas(precision, micro_batches, accumulate="host")
    done = train(needed, precision, micro_batches, accumulate="host")
    assert done.strategy.engine.lanes.ledger.moved("h2d", "weights") > 0
    assert done.strategy.engine.lanes.memory.report().allocated_bytes in (0, needed)  # given back at the end
    with pytest.raises(HostMemoryError, match=r"max_host_gib"):
        train(needed - 1, precision, micro_batches, accumulate="host")


def test_a_cap_binds_whoever_wants_to_try_all_the_same() -> None:
    needed = arenas("32-true")
    with pytest.warns(UserWarning, match="Trying all the same"), pytest.raises(HostMemoryError, match="max_host_gib"):
        train(needed // 2, "32-true", on_misfit="warn")


@pytest.mark.parametrize(
    ("precision", "micro_batches"),
    [
        ("32-true", 1),
        ("bf16-true", 3),
        ("bf16-mixed", 1),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in [("32-true", 3), ("bf16-true", 1), ("bf16-mixed", 3)]),
    ],
)
def test_a_run_stays_within_the_cap_that_its_plan_says_it_fits(precision: Any, micro_batches: int) -> None:
    """Caps around all that the plan counts, and around its arenas alone, below which the run is refused too."""

    def said(cap_bytes: int | None) -> Plan:
        module = lit()
        machine = cpu() if cap_bytes is None else cpu().capped(host_bytes=cap_bytes)
        return plan(
            module,
            next(iter(module.train_dataloader())),
            hardware=machine,
            settings=FullSettings(min_numel=0),
            precision=precision,
            accumulate_grad_batches=micro_batches,
        )

    need_bytes = said(None).host.bytes
    arenas_bytes = need_bytes - said(None).host.holds[THE_RUN_ITSELF]
    assert [said(cap).fits for cap in (arenas_bytes, need_bytes - 1, need_bytes)] == [False, False, True]
    for cap_bytes in (need_bytes, need_bytes + 1, 2 * need_bytes):
        assert train(cap_bytes, precision, micro_batches).global_step > 0
    with pytest.raises(HostMemoryError, match="max_host_gib"):
        train(arenas_bytes // 2, precision, micro_batches)
