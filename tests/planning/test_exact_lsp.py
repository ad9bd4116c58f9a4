"""What is predicted of lsp is what a real run on the CPU does; and what that is, by its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_offload.methods.base import Clip
from lightning_offload.methods.drivers import EngineDriver
from lightning_offload.methods.lsp import LSP, LSPSettings
from lightning_offload.methods.subspace import SubspaceOptimizer
from lightning_offload.planning.methods import SUBSPACE
from lightning_offload.planning.scenario import Dry, Scenario
from tests.helpers import every, pairwise, row_id
from tests.planning.machines import cpu, gpu
from tests.planning.test_exact import STEPS, predicted_and_measured, run_for_real, sized
from tests.zoo import ZOO

QUICK: dict[str, Any] = {"seed": 0, "fit_steps": 3, "accumulate": "device"}

ROWS = pairwise(
    {
        "family": ["llama", "gpt2", "opt", "qwen3", "phi"],
        "precision": ["32-true", "bf16-true"],
        "micro_batches": [1, 2, 4],
        "accumulate": ["device", "host"],
        "clip": [None, Clip(1.0), Clip(0.1, "value")],
        "projector": ["learned", "pca", "block"],
        "others": ["adamw", "frozen"],
        "share": ["matrix", "type"],
        "skip_nonfinite": [True, False],
        "checkpointing": [False, True],
        "form": ["gradient", "activations"],
    },
    seed=1,
)


@pytest.mark.parametrize("row", every(2, ROWS), ids=row_id)
def test_bytes_of_every_lane_and_arenas(row: dict[str, Any]) -> None:
    module, batch = ZOO[row["family"]]()
    if row["checkpointing"] and module.supports_gradient_checkpointing:  # type: ignore[union-attr]
        module.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    of_lsp = ("accumulate", "projector", "others", "share", "skip_nonfinite", "form")
    settings = LSPSettings(**{**QUICK, "nnz": 4, "min_numel": 0, **{name: row[name] for name in of_lsp}})
    dry = Dry(
        Scenario(
            module=module,
            batch=batch,
            machine=cpu(),
            method=SUBSPACE,
            settings=settings,
            precision=row["precision"],
            micro_batches=row["micro_batches"],
            clip=row["clip"],
            optimizer=torch.optim.AdamW(module.parameters(), fused=True),
        )
    )
    real = run_for_real(module, batch, LSP(settings), row["precision"], row["micro_batches"], row["clip"])
    predicted = {kind: (t.operations * STEPS, t.bytes * STEPS) for kind, t in dry.timing.kinds.items()}
    assert predicted == {kind: (total.operations, total.bytes) for kind, total in real.ledger.kinds.items()}
    assert predicted[("h2d", "deltas")][1]
    assert dry.run.lanes.memory.report() == real.report


@pytest.mark.parametrize("projector", ["learned", "pca", "block"])
@pytest.mark.parametrize(
    ("family", "precision", "form"),
    [
        ("llama", "32-true", "gradient"),
        ("opt", "bf16-true", "activations"),
        pytest.param("llama", "32-true", "activations", marks=pytest.mark.slow),
        pytest.param("opt", "bf16-true", "gradient", marks=pytest.mark.slow),
    ],
)
def test_the_peak_on_the_device_is_within_five_percent(family: str, precision: str, projector: Any, form: Any) -> None:
    """The fit at the first step included."""
    make, batch = sized(family, precision)
    method = LSP(LSPSettings(**QUICK, projector=projector, form=form))
    predicted, measured = predicted_and_measured(make, batch, precision, method)
    assert predicted == pytest.approx(measured, rel=0.05)


NNZ_BYTES = {("learned", 2): 4, ("learned", 4): 6, ("pca", 2): 2, ("block", 2): 2, ("block", 4): 4}
"""Per nonzero of a projector, by its kind and the bytes of a weight: its value, and its place where that is random."""


@pytest.mark.parametrize(("projector", "wire"), NNZ_BYTES)
@pytest.mark.parametrize("others", ["adamw", "frozen"])
def test_traffic_and_projectors_by_their_formulas(projector: Any, wire: int, others: Any) -> None:
    """2 d^2 bytes per matrix each way at 16 bits (4 at 32), whole others, and the numbers that decide a step."""
    module, batch = ZOO["llama"]()
    settings = LSPSettings(**QUICK, projector=projector, others=others, nnz=4, min_numel=100)
    precision = {2: "bf16-true", 4: "32-true"}[wire]
    dry = Dry(Scenario(module, batch, gpu(), method=SUBSPACE, settings=settings, precision=precision, clip=Clip(1.0)))
    matrices = [p for name, p in module.named_parameters() if "layers" in name and p.ndim == 2]
    whole = [p for p in module.parameters() if p.numel() >= 100 and all(p is not m for m in matrices)]
    squares = [(min(p.shape) // 2 // 4 * 4) ** 2 for p in matrices]
    projected, full = wire * sum(squares), wire * sum(p.numel() for p in whole) * (others == "adamw")
    moved = {kind: total.bytes for kind, total in dry.timing.kinds.items() if kind[0] != "host"}
    decisions = moved.pop(("d2h", "verdict"))
    assert 0 < decisions <= 4 * (3 + len(list(module.parameters())))
    expected = {("d2h", "compressed gradients"): projected, ("h2d", "deltas"): projected}
    expected |= {("d2h", "gradients"): full, ("h2d", "weights"): full} if full else {}
    assert moved == expected
    nonzeros = 4 * sum(sum(p.shape) for p in matrices)
    driver = dry.run.driver
    assert isinstance(driver, EngineDriver)
    assert isinstance(driver.engine.own, SubspaceOptimizer)
    assert driver.engine.own.projector_bytes == NNZ_BYTES[projector, wire] * nonzeros
