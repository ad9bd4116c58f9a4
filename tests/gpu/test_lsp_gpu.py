"""Method ``lsp`` on a CUDA device: the bits of inline lanes on that device, under random delays on every stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import InlineLanes, Lanes
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.lsp import LSP, LSPSettings
from tests.gpu.test_full_gpu import STEPS, Case, adamw, cuda, device, one_step

__all__ = ["device"]  # a fixture
CASES = [
    (Case(narrow=True), {"projector": "block", "moments": "paper"}),
    (Case(narrow=True, micro_batches=3, accumulate="host"), {"projector": "learned", "form": "activations"}),
    (Case(clip="norm", tied=True), {"projector": "learned", "others": "adamw"}),
    (Case(clip="norm", narrow=True, micro_batches=3), {"projector": "pca", "share": "type"}),
    (Case(narrow=True, pin=False), {"projector": "block", "moments": "reset", "skip_nonfinite": False}),
]


def trained(case: Case, changes: dict[str, Any], lanes: Lanes, device: torch.device) -> tuple[list[float], Any, int]:
    """Losses, weights with moments, and bytes of deltas; projectors are replaced in every step."""
    settings = {"dim": 64, "refit_every": 1, "bias_threshold": 0.0, "fit_steps": 10, "seed": 3, "min_numel": 200}
    method = LSP(LSPSettings(**{**settings, "accumulate": case.accumulate, **changes}))
    module = case.module()
    rounding = "stochastic" if case.narrow else "nearest"
    dtypes = DTypes(compute=case.dtype, rounding=rounding)
    engine = Engine(module, adamw(module.parameters()), method, lanes, dtypes, expects_clip=case.limit is not None)
    losses: list[Tensor] = []
    torch.manual_seed(7)
    for step, batches in enumerate(case.batches(device)):
        losses += one_step(engine, case, batches, step)
    owned = {f"{name}.{key}": engine.extras()["state"][name][key].clone() for name in _names(engine) for key in MOMENTS}
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    numbers, moved = [loss.item() for loss in losses], lanes.ledger.moved("h2d", "deltas")
    engine.detach()
    return numbers, weights | owned, moved


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _names(engine: Engine) -> list[str]:
    assert engine.own is not None
    return [t.name for t in engine.own.trained]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "changes"), CASES, ids=lambda value: str(value))
def test_the_bits_of_inline_under_random_delays(case: Case, changes: dict[str, Any], device: torch.device) -> None:
    losses, held, moved = trained(case, changes, InlineLanes(HostMemory(pin=False), device), device)
    assert moved == STEPS * 8 * 64 * 64 * (2 if case.narrow else 4)
    for seed in (None, 1, 2, 3):
        with cuda(device, pin=case.pin, seed=seed) as lanes:
            again, found, count = trained(case, changes, lanes, device)
        assert (again, count) == (losses, moved)
        for name, tensor in held.items():
            assert torch.equal(tensor.cpu(), found[name].cpu()), name


@pytest.mark.parametrize(("case", "changes"), CASES, ids=lambda value: str(value))
def test_the_cases_train_on_the_cpu(case: Case, changes: dict[str, Any]) -> None:
    cpu = torch.device("cpu")
    losses, _, moved = trained(case, changes, InlineLanes(HostMemory(pin=False)), cpu)
    assert losses[-1] < losses[0]
    assert moved == STEPS * 8 * 64 * 64 * (2 if case.narrow else 4)
