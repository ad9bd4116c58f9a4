"""What is predicted of meft is what a real run on the CPU does, where both use equally many rows."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from torch import nn

from lightning_offload.memory.ledger import Total
from lightning_offload.methods.base import Clip
from lightning_offload.methods.meft import MEFT, MEFTSettings
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.sparse_adapter import attach_parameters
from lightning_offload.planning import plan
from lightning_offload.planning.methods import SPARSE
from lightning_offload.planning.scenario import Dry, Scenario
from tests.helpers import every, pairwise, row_id
from tests.planning.machines import cpu
from tests.planning.test_exact import STEPS, allocated_peak, run_for_real, sized
from tests.zoo import ZOO

FIXED: dict[str, Any] = {
    "seed": 0,
    "key_std": 0.02,  # with which all rows of these nets are used
    "accumulate": "device",
    "row_optimizer": "dense",
    "width": 16,
    "experts": 4,
    "active_experts": 4,
}


class AllRows(MEFT):
    """Expects every row to be used; keeps what was moved before the first step."""

    before: dict[tuple[str, str], Total]

    def make_part(self, *args: Any) -> RowOptimizer:
        part = super().make_part(*args)
        assert isinstance(part, RowOptimizer)
        part.expect_union(1.0)
        self.before, self.part = deepcopy(args[1].lanes.ledger.kinds), part
        return part


ROWS = pairwise(
    {
        "family": ["llama", "gpt2", "opt", "qwen3", "phi"],
        "precision": ["32-true", "bf16-true"],
        "micro_batches": [1, 2, 4],
        "placement": ["host", "keys", "device"],
        "top_k": [8, 16],
        "variant": ["repro", "paper"],
        "clip": [None, Clip(1.0), Clip(0.1, "value")],
        "skip_nonfinite": [True, False],
        "checkpointing": [False, True],
    },
    seed=2,
)


@pytest.mark.parametrize("row", every(2, ROWS), ids=row_id)
def test_bytes_of_every_lane_and_arenas(row: dict[str, Any]) -> None:
    module, batch = ZOO[row["family"]]()
    if row["checkpointing"]:
        module.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    of_meft = ("placement", "top_k", "variant", "skip_nonfinite")
    settings = MEFTSettings(**FIXED, **{name: row[name] for name in of_meft})
    dry = Dry(
        Scenario(
            module=module,
            batch=batch,
            machine=cpu(),
            method=SPARSE,
            settings=settings,
            precision=row["precision"],
            micro_batches=row["micro_batches"],
            clip=row["clip"],
            union=1.0,
        )
    )
    method = AllRows(settings)
    attach_parameters(module, **settings.of_adapters())
    real = run_for_real(module, batch, method, row["precision"], row["micro_batches"], row["clip"])
    assert method.part.take_union_share() == 1.0
    predicted = {kind: (t.operations * STEPS, t.bytes * STEPS) for kind, t in dry.timing.kinds.items()}
    moved = {kind: total.since(method.before.get(kind, Total())) for kind, total in real.ledger.kinds.items()}
    assert predicted == {kind: (total.operations, total.bytes) for kind, total in moved.items()}
    assert predicted["d2h", "row gradients"][1]
    assert dry.run.lanes.memory.report() == real.report


SIZED: dict[str, Any] = {**FIXED, "width": 512, "experts": 16, "active_experts": 8, "top_k": 128}
"""Nearly all rows are used, in all steps."""


@pytest.mark.parametrize("placement", ["host", "keys", "device"])
@pytest.mark.parametrize(
    ("family", "precision", "variant"), [("llama", "bf16-true", "repro"), ("opt", "32-true", "paper")]
)
def test_the_peak_on_the_device(family: str, precision: Any, variant: Any, placement: Any) -> None:
    make, batch = sized(family, precision)
    settings = MEFTSettings(**SIZED, placement=placement, variant=variant)
    method = AllRows(settings)

    def made() -> nn.Module:
        module = make()
        attach_parameters(module, **settings.of_adapters())
        return module

    asked: dict[str, Any] = {"settings": settings, "precision": precision, "hardware": cpu(), "gradient_clip_val": 1.0}
    real = allocated_peak(lambda: run_for_real(made(), batch, method, precision, clip=Clip(1.0)))
    planned = plan(make(), batch, method=SPARSE, union=method.part.take_union_share(), **asked)
    assert planned.device.bytes == pytest.approx(real, rel=0.01)
