"""`meft_offload` against plain Lightning with the same adapters resident, bit for bit, over what users combine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_offload import MEFTOffloadStrategy
from tests.helpers import adamw, pairwise, row_id
from tests.lit import Lit, assert_equal_modules, fit
from tests.meft import PLACEMENTS
from tests.meft_lit import MEFT, MLit, MManual, MOwn, by_part, meft, rows_moved, shuffled_meft, trained_alone
from tests.streams import thread_lanes

CLIPS: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.05},
    "value": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
}
OPTIMIZERS = {"adamw": adamw, "by part": by_part, "trained": trained_alone}
ADAPTERS: dict[str, dict[str, Any]] = {
    "repro": {},
    "paper": {"variant": "paper"},
    "all rows": {"top_k": 12},
    "two layers": {"layers": [0, -1]},
}
FACTORS: dict[str, list[Any]] = {
    "accumulate_grad_batches": [1, 2, 4],  # nine batches: the last window is ragged
    "clip": list(CLIPS),
    "optimizer": list(OPTIMIZERS),
    "schedule": [None, "step", "epoch"],
    "recompute": ["no", "non-reentrant", "reentrant"],
    "placement": PLACEMENTS,
    "adapters": list(ADAPTERS),
    "accumulate": ["device", "host"],
    "validate": [False, True],
    "kind": ["automatic", "shuffled", "manual", "own", "plain"],
    "skip_nonfinite": [True, False],
}


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=1), ids=row_id)
def test_equals_plain_lightning_with_resident_adapters(row: dict[str, Any]) -> None:
    build = {
        "make_optimizer": OPTIMIZERS[row["optimizer"]],
        "schedule": row["schedule"],
        "recompute": row["recompute"],
    }
    step = {"accumulate_grad_batches": row["accumulate_grad_batches"], **CLIPS[row["clip"]]}
    run = {"limit_val_batches": 2, "val_check_interval": 3} if row["validate"] else {}
    plain = MLit(attached=ADAPTERS[row["adapters"]], **build)
    done = fit(plain, **step, **run)
    settings = {name: row[name] for name in ("placement", "accumulate", "skip_nonfinite")} | ADAPTERS[row["adapters"]]
    ours, strategy = _ours(row["kind"], settings, step, build)
    assert fit(ours, strategy, **(step if isinstance(ours, MLit) else {}), **run).global_step == done.global_step
    assert_equal_modules(plain, ours)
    if not isinstance(strategy, str):
        assert rows_moved(strategy) > 0


def _ours(kind: str, settings: dict[str, Any], step: dict[str, Any], build: dict[str, Any]) -> tuple[Lit, Any]:
    if kind in ("automatic", "shuffled"):
        return MLit(**build), (meft if kind == "automatic" else shuffled_meft)(**settings)
    if kind == "manual":
        manual = MManual(**build)
        manual.offload = step
        return manual, meft(**settings)
    return MOwn({**settings, **step}, **build), "meft_offload" if kind == "own" else "auto"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_mixed_precision_equals_plain_lightning(placement: str) -> None:
    """Clipping stays out: stock Lightning refuses it with fused optimizers."""
    plain, ours, own = MLit(attached={}), MLit(), MOwn({"placement": placement, "accumulate_grad_batches": 2})
    run: dict[str, Any] = {"precision": "bf16-mixed"}
    fit(plain, accumulate_grad_batches=2, **run)
    fit(ours, shuffled_meft(placement=placement), accumulate_grad_batches=2, **run)
    assert_equal_modules(plain, ours)
    fit(own, **run)
    assert_equal_modules(plain, own)


@pytest.mark.parametrize("kind", [MLit, MOwn])
def test_bf16_has_the_same_bits_in_every_placement_and_order(kind: Any) -> None:
    modules = []
    for placement in PLACEMENTS:
        for make in (meft, shuffled_meft):
            module = kind()
            if kind is MOwn:
                module.offload = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
            step = {} if kind is MOwn else {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
            fit(module, make(placement=placement), precision="bf16-true", limit_val_batches=1, **step)
            modules.append(module)
    for module in modules[1:]:
        assert_equal_modules(modules[0], module)
    rows = modules[0].net.blocks[0].mlp.meft.values
    assert (rows.dtype, modules[0].net.head.weight.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(rows, rows.bfloat16().float())


class Threaded(MEFTOffloadStrategy):
    """On lanes of the test's choice."""

    lanes: Any

    def _make_lanes(self, machine: Any, settings: Any) -> Any:
        return self.lanes


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("clip", [None, 0.05])
def test_threads_with_delays_give_the_bits_of_plain_lightning(placement: str, seed: int, clip: float | None) -> None:
    step = {"accumulate_grad_batches": 2, "gradient_clip_val": clip, "limit_val_batches": 2, "val_check_interval": 4}
    plain, ours = MLit(attached={}, schedule="step"), MLit(schedule="step")
    fit(plain, **step)
    with thread_lanes(seed) as lanes:
        strategy = Threaded(**MEFT, placement=placement)
        strategy.lanes = lanes
        fit(ours, strategy, **step)
    assert_equal_modules(plain, ours)
