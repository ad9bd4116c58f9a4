"""Rows in host memory against plain ``torch.optim`` on the same adapters held by the model, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.sparse_adapter import SparseAdapter
from lightning_offload.numerics.norms import clip_coefficient, gradient_norm, total_norm
from tests.helpers import VOCAB, Run, assert_same, lanes_of, pairwise, product, row_id, train
from tests.meft import (
    PLACEMENTS,
    FFNNet,
    adamw,
    adapted,
    adapters_in,
    make_engine,
    masked,
    meft,
    step,
    three_groups,
    tokens_of,
    trained_in,
    undecayed,
)

CLIPS = {"none": None, "norm": Clip(0.05), "value": Clip(1e-3, "value")}
OPTIMIZERS = {
    "adamw": adamw,
    "undecayed": undecayed,
    "groups": three_groups,
    "adam": lambda m: torch.optim.Adam(trained_in(m), lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda m: torch.optim.SGD(trained_in(m), lr=0.1, weight_decay=0.1, fused=True),
    "momentum": lambda m: torch.optim.SGD(trained_in(m), lr=0.1, momentum=0.9, nesterov=True, fused=True),
}
SHAPES: dict[str, dict[str, int]] = {
    "pruned": {},
    "unpruned": {"top_k": 12},
    "wide": {"width": 240, "experts": 24, "active_experts": 2, "top_k": 3},
    "one": {"width": 1, "experts": 1, "active_experts": 1, "top_k": 1},
}
FACTORS: dict[str, list[Any]] = {
    "placement": PLACEMENTS,
    "gate": ["logit", "none"],
    "scope": ["token", "union"],
    "shape": list(SHAPES),
    "optimizer": list(OPTIMIZERS),
    "clip": list(CLIPS),
    "micro_batches": [1, 2],
    "schedule": [False, True],
    "skip_nonfinite": [True, False],
    "recompute": ["no", "non_reentrant", "reentrant"],
    "sometimes": [False, True],
    "late": [False, True],
    "lanes": ["inline", "checked", "shuffled"],
}


def run_row(row: dict[str, Any], *, steps: int = 6, seed: int = 0) -> tuple[Run, Run]:
    if row["sometimes"] and row["optimizer"] == "momentum":
        row = {**row, "sometimes": False}  # torch's fused SGD fails on buffers of which only some exist
    of_adapters = {**SHAPES[row["shape"]], "gate": row["gate"], "scope": row["scope"]}
    net = adapted(FFNNet(recompute=row["recompute"], sometimes=row["sometimes"]), **of_adapters)
    common = {
        "steps": steps,
        "micro_batches": row["micro_batches"],
        "clip": CLIPS[row["clip"]],
        "make_optimizer": OPTIMIZERS[row["optimizer"]],
        "schedule": row["schedule"],
    }
    method = meft(row["placement"], skip_nonfinite=row["skip_nonfinite"], **of_adapters)
    ours = train(net, lanes_of(row["lanes"], seed), method=method, late=row["late"], **common)
    return train(net, None, **common), ours


def assert_moved(run: Run) -> None:
    assert run.engine is not None
    assert run.engine.lanes.ledger.moved("d2h", "row gradients") > 0
    assert run.engine.lanes.ledger.moved("h2d", "rows") > 0


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=row_id)
def test_equals_torch(row: dict[str, Any]) -> None:
    plain, ours = run_row(row)
    assert_same(plain, ours)
    assert_moved(ours)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(300))
def test_equals_torch_on_random_rows(index: int) -> None:
    rows = list(itertools.islice(itertools.product(*FACTORS.values()), index * 97 % 9973, None, 9973))
    row = dict(zip(FACTORS, rows[index % len(rows)], strict=True))
    assert_same(*run_row(row, seed=index))


@pytest.mark.filterwarnings("ignore:Each micro-batch has used more than")
@pytest.mark.parametrize(
    ("placement", "scope", "gate"), product(placement=PLACEMENTS, scope=["token", "union"], gate=["logit", "none"])
)
def test_twenty_steps_of_two_micro_batches(gate: str, scope: str, placement: str) -> None:
    """Bits of torch on the adapters; and of the dense masked oracle what another order of sums leaves.

    The oracle multiplies with all r rows, zeros among them, so its products add up in other blocks: each number is
    off by some 1e-7 of itself. AdamW's ``eps`` is large here, for else the sign of a gradient that is all rounding
    would move a weight by lr.
    """
    of_adapters = {"gate": gate, "scope": scope}
    net = adapted(**of_adapters)
    common = {"steps": 20, "micro_batches": 2, "clip": Clip(0.05), "make_optimizer": lambda m: adamw(m, eps=1e-3)}
    ours = train(net, lanes_of("inline"), method=meft(placement, **of_adapters), **common)
    assert_same(train(net, None, **common), ours)
    assert_moved(ours)
    oracle = train(masked(net, **of_adapters), None, **common)
    torch.testing.assert_close(ours.losses, oracle.losses, rtol=1e-5, atol=0)
    for name, weight in ours.weights.items():
        torch.testing.assert_close(weight, oracle.weights[name], rtol=1e-4, atol=2e-6, msg=name)
    moved = [float((ours.weights[n] - p.detach()).abs().max()) for n, p in net.named_parameters() if ".meft." in n]
    assert min(moved) > 1e-3 if gate == "logit" else max(moved) > 1e-3
    if gate == "none":
        routers = {n: p for n, p in net.named_parameters() if n.endswith(".router")}
        assert routers
        assert all(torch.equal(ours.weights[n], p) for n, p in routers.items()), "nothing trains them"


class DenseParallel(nn.Module):
    """The parallel adapter of the paper's section 2, held by the model: ``ReLU(x W_A) W_B``."""

    def __init__(self, adapter: SparseAdapter) -> None:
        super().__init__()
        self.keys = nn.Parameter(adapter.keys.detach().clone())
        self.values = nn.Parameter(adapter.values.detach().clone())

    def add(self, module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        return y + torch.relu(args[0].flatten(0, 1) @ self.keys.T).mm(self.values).view(y.shape)


@pytest.mark.filterwarnings("ignore:Each micro-batch has used more than")
@pytest.mark.parametrize(
    ("placement", "scope", "clip"), product(placement=PLACEMENTS, scope=["token", "union"], clip=["none", "norm"])
)
def test_all_rows_one_expert_no_gate_is_the_dense_parallel_adapter(scope: str, placement: str, clip: str) -> None:
    whole = {"width": 48, "experts": 1, "active_experts": 1, "top_k": 48, "gate": "none", "scope": scope}
    net, plain = adapted(**whole), FFNNet().requires_grad_(False)
    for block, adapter in zip(plain.blocks, adapters_in(net), strict=True):
        block.mlp.add_module("dense", DenseParallel(adapter))
        block.mlp.register_forward_hook(block.mlp.dense.add)
    common = {"steps": 50, "clip": CLIPS[clip], "make_optimizer": without_routers}
    ours = train(net, lanes_of("inline"), method=meft(placement, **whole), **common)
    expected = train(plain, None, **common)
    assert ours.losses == expected.losses
    assert ours.losses[-1] != ours.losses[0]
    for name, weight in expected.weights.items():
        assert torch.equal(ours.weights[name.replace(".dense.", ".meft.")], weight), name


def without_routers(module: nn.Module) -> torch.optim.Optimizer:
    """No gate gives them no gradient."""
    return torch.optim.AdamW([p for n, p in module.named_parameters() if n.endswith(("keys", "values"))], fused=True)


@pytest.mark.parametrize(
    ("placement", "clip", "meaning"),
    product(placement=PLACEMENTS, clip=list(CLIPS), meaning=[("logit", "token"), ("none", "union")]),
)
def test_bf16_equals_masters_stepped_by_hand(placement: str, clip: str, meaning: tuple[str, str]) -> None:
    """Rows and their gradients travel in bf16; sums over micro-batches, masters and moments are fp32."""
    of_adapters = dict(zip(("gate", "scope"), meaning, strict=True))
    ours = train(
        adapted(**of_adapters),
        lanes_of("inline"),
        steps=6,
        micro_batches=2,
        clip=CLIPS[clip],
        method=meft(placement, **of_adapters),
        dtypes=DTypes.of("bf16-true"),
        make_optimizer=adamw,
    )
    losses, masters = by_hand(adapted(**of_adapters), CLIPS[clip])
    assert ours.losses == losses
    for name, master in masters.items():
        shown = master.bfloat16() if name.endswith("router") else master
        assert torch.equal(ours.weights[name], shown), name
    assert_moved(ours)


def by_hand(net: nn.Module, clip: Clip | None) -> tuple[list[float], dict[str, Tensor]]:
    masters = {n: nn.Parameter(p.detach().clone()) for n, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, weight_decay=0.1, fused=True)
    weights = dict(net.bfloat16().named_parameters())
    data, losses = torch.Generator().manual_seed(11), []
    for _ in range(6):
        for _ in range(2):
            loss = net.loss(torch.randint(0, VOCAB, (2, 6), generator=data)) / 2
            loss.backward()
            losses.append(loss.item())
            for name, master in masters.items():
                grad = weights[name].grad
                if grad is not None and not name.endswith("router"):  # a router's adds up in bf16, where it is
                    master.grad = grad.float() if master.grad is None else master.grad + grad.float()
                    weights[name].grad = None
        step_by_hand(masters, weights, optimizer, clip)
    return losses, {name: master.detach() for name, master in masters.items()}


def step_by_hand(
    masters: dict[str, nn.Parameter], weights: dict[str, nn.Parameter], optimizer: Any, clip: Clip | None
) -> None:
    grads = {name: masters[name].grad if masters[name].grad is not None else weights[name].grad for name in masters}
    grads = {name: grad for name, grad in grads.items() if grad is not None}
    if clip is not None and clip.algorithm == "norm":
        coefficient = clip_coefficient(total_norm([gradient_norm(grad) for grad in grads.values()]), clip.value)
        grads = {name: (grad.float() * coefficient).to(grad.dtype) for name, grad in grads.items()}
    elif clip is not None:
        grads = {name: grad.clamp(-clip.value, clip.value) for name, grad in grads.items()}
    for name, grad in grads.items():
        masters[name].grad = grad.float()
    optimizer.step()
    optimizer.zero_grad()
    for name, master in masters.items():
        weights[name].data.copy_(master)
        weights[name].grad = None


@pytest.mark.parametrize("dtypes", [DTypes(), DTypes.of("bf16-true")])
@pytest.mark.parametrize("shape", ["pruned", "unpruned"])
def test_placements_agree_to_the_bit(shape: str, dtypes: DTypes) -> None:
    results = []
    for placement in PLACEMENTS:
        engine = make_engine(adapted(**SHAPES[shape]), placement, dtypes=dtypes, **SHAPES[shape])
        losses = [step(engine, tokens_of(seed), tokens_of(seed + 50)) for seed in range(5)]
        engine.flush()
        results.append((losses, dict(engine.module.named_parameters())))
    (expected, weights), *others = results
    for losses, found in others:
        assert losses == expected
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
