"""Sparse adapters on a GPU beside those on the CPU: ``pytest -m gpu tests/gpu/test_adapter_gpu.py``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_offload.numerics.adapter import Gate, Scope, adapter, route, select
from tests.adapter import picked

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["token", "union"])
@pytest.mark.parametrize("gate", ["logit", "none"])
def test_the_same_bits_on_integers(gate: Gate, scope: Scope, dtype: torch.dtype) -> None:
    host, device = (_everything(where, dtype, gate, scope) for where in ("cpu", "cuda"))
    for mine, theirs in zip(device, host, strict=True):
        assert torch.equal(mine.cpu(), theirs)
        assert theirs.any() or gate == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["logit", "none"])
def test_the_host_selects_what_the_device_would(gate: Gate, dtype: torch.dtype) -> None:
    """Of normal data, among the experts that the device has chosen; sums in other orders may swap two that are near."""
    tokens, width, group, top_k, size = 512, 4096, 64, 64, 1024
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, size, generator=generator).to("cuda", dtype)
    keys = (0.02 * torch.randn(width, size, generator=generator)).to("cuda", dtype)
    router = 50 * keys.float().unflatten(0, (-1, group)).mean(1)
    chosen = route(x, router, 8)
    logits = chosen.logits if gate == "logit" else None
    here = select(x, keys, chosen.experts, logits, group=group, top_k=top_k).cpu()
    told = [t.cpu() if t is not None else None for t in (x, keys, chosen.experts, logits)]
    there = select(*told, group=group, top_k=top_k, by_expert=True)  # type: ignore[arg-type]
    both = _used(here, width) & _used(there, width)
    assert both.sum() >= 0.999 * tokens * top_k


def _used(picks: Tensor, width: int) -> Tensor:
    """Which rows each token uses, (T, r)."""
    return torch.zeros(len(picks), width, dtype=torch.bool).scatter_(1, picks, True)


def _everything(device: str, dtype: torch.dtype, gate: Gate, scope: Scope) -> list[Tensor]:
    """Rows, places, output and gradients, of small integers; on the host it selects by expert."""
    generator = torch.Generator().manual_seed(0)
    shapes = (50, 16), (96, 16), (96, 16), (12, 16), (50, 16)
    drawn = [torch.randint(-2, 3, shape, generator=generator).to(device, dtype) for shape in shapes]
    inputs = [t.requires_grad_() for t in (*drawn[:3], drawn[3].float())]
    x, keys, values, router = inputs
    picks = picked(x, keys, router, active=3, top_k=5, gate=gate, by_expert=device == "cpu")
    y = adapter(x, keys[picks.rows], values[picks.rows], router, picks, width=96, gate=gate, scope=scope)
    gradients = torch.autograd.grad(y, inputs, drawn[4], materialize_grads=True)
    return [t.detach() for t in (picks.rows, picks.places, y, *gradients)]
