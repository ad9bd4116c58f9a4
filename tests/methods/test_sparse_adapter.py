"""Sparse adapters on models of many families: what they change, what they leave alone, and what padding may not do."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_offload.methods.ffn import find_ffns
from lightning_offload.methods.sparse_adapter import Fetched, SparseAdapter, attach_parameters, detach
from lightning_offload.numerics.adapter import Picks
from tests.families import FAMILIES
from tests.zoo import HIDDEN, LAYERS, VOCAB, ZOO, first_tensor

BUILD = ZOO | FAMILIES
DECODERS = ["opt", "opt_350m_like", "gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "mixtral", "phi", "falcon"]
DECODERS += ["bloom", "mpt", "gptj"]
MORE = ["rwkv", "granitemoe", "xglm", "albert", "t5", "bart"]
SETTINGS: dict[str, Any] = {"width": 24, "experts": 6, "active_experts": 2, "top_k": 5}


def build(name: str, **settings: Any) -> tuple[nn.Module, dict[str, Tensor], list[SparseAdapter]]:
    model, inputs = BUILD[name]()
    return model, inputs, attach_parameters(model, **SETTINGS | settings)


def awake(adapters: list[SparseAdapter]) -> None:
    """Values that are not zero, so that the adapters do something."""
    for index, adapter in enumerate(adapters):
        nn.init.normal_(adapter.values, std=0.5, generator=torch.Generator().manual_seed(index))


def gradients(adapters: list[SparseAdapter]) -> list[Tensor | None]:
    return [p.grad for adapter in adapters for p in adapter.parameters()]


@contextmanager
def recorded(adapters: list[SparseAdapter]) -> Iterator[list[tuple[str, Picks]]]:
    """Every selection that is made, by path."""
    seen: list[tuple[str, Picks]] = []

    class Recording:
        def __init__(self, adapter: SparseAdapter) -> None:
            self.adapter = adapter

        def start(self, x: Tensor, padding: Tensor | None) -> None:
            self.adapter.start(x, padding)

        def rows(self) -> Fetched:
            fetched = self.adapter.rows()
            seen.append((self.adapter.path, fetched.picks))
            return fetched

        def again(self, picks: Picks) -> Fetched:
            return self.adapter.again(picks)

    for adapter in adapters:
        adapter.source = Recording(adapter)
    yield seen
    for adapter in adapters:
        adapter.source = None


@pytest.mark.parametrize("name", DECODERS + MORE)
def test_untouched_at_first_and_one_step_lowers_the_loss(name: str) -> None:
    model, inputs = BUILD[name]()
    with torch.no_grad():
        expected = model(**inputs)
    adapters = attach_parameters(model, **SETTINGS)
    assert [adapter.path for adapter in adapters] == [ffn.path for ffn in find_ffns(model)]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{a.path}.meft.{n}" for a in adapters for n in ("keys", "values", "router")
    }
    before = model(**inputs)
    assert torch.equal(before.logits.view(torch.int32), expected.logits.view(torch.int32))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before.loss.backward()
    assert all(not a.keys.grad.any() and not a.router.grad.any() for a in adapters)
    assert all(a.values.grad.any() for a in adapters)
    optimizer.step()
    with torch.no_grad():
        assert first_tensor(model(**inputs)) < before.loss
