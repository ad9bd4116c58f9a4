"""Rows stepped one by one: put off until they are touched (``deferred``), by their number (``auto``), as SparseAdam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.methods.base import Clip, DTypes, Flight, Trained, Verdict
from lightning_offload.methods.row_tables import MOSTLY, RowTable
from lightning_offload.methods.rules import rule_for
from tests.helpers import assert_same, lanes_of, train
from tests.meft import (
    adamw,
    adapted,
    adapters_in,
    make_engine,
    meft,
    micro_batch,
    rows_of,
    step,
    tokens_of,
    trained_in,
    undecayed,
)

ROWS, WIDTH = 200, 19
GROUP: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SPARSE = {"width": 480, "experts": 60, "active_experts": 2, "top_k": 3}
"""A step touches some 0.1 of the rows."""


def table_of(steps: str, *, rounded: bool = False) -> RowTable:
    start = 0.02 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))  # as keys begin
    parameter = nn.Parameter(start)
    master = parameter.data
    return RowTable(
        name="keys",
        trained=Trained("keys", parameter, None, Flight(0), 0, 0),
        master=master,
        states={"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)},
        total=torch.zeros_like(master),
        shadow=master.bfloat16() if rounded else master,
        steps=steps,
    )


def stream(steps: int, *, touched: float | Callable[[int], float] = 0.05) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(2)
    found = []
    for at in range(steps):
        share = touched(at) if callable(touched) else touched
        rows = (torch.rand(ROWS, generator=random) < share).nonzero().flatten()
        found.append((rows, torch.randn(len(rows), WIDTH, generator=random)))
    return found


def rate(at: int) -> float:
    """Warm-up from zero, then decay."""
    return GROUP["lr"] * min(1.0, at / 20) * (1 - at / 400)


def fed(table: RowTable, gradients: list[tuple[Tensor, Tensor]], clip: Clip | None = None, **group: Any) -> RowTable:
    rule = rule_for(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    for at, (rows, gradient) in enumerate(gradients):
        half = len(rows) // 2  # in two micro-batches
        table.add(rows[:half], gradient[:half])
        table.add(rows[half:], gradient[half:])
        table.make_step(rule, {**GROUP, "lr": rate(at), **group}, Verdict(clip, True, at + 1))
        assert not table.total.any()
        assert not table.touched.any()
    table.catch_up()
    return table


def difference(one: RowTable, other: RowTable) -> float:
    start = table_of("dense").master
    return float((one.master - other.master).norm() / (other.master - start).norm())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rounded", [False, True])
def test_deferred_is_dense_on_a_fixed_stream(rounded: bool, weight_decay: float) -> None:
    gradients = stream(300)
    ours = fed(table_of("deferred", rounded=rounded), gradients, weight_decay=weight_decay)
    dense = fed(table_of("dense", rounded=rounded), gradients, weight_decay=weight_decay)
    assert difference(ours, dense) < 1e-5
    assert float(ours.step) == float(dense.step) == 300
    assert torch.equal(ours.shadow, ours.master.to(ours.shadow.dtype))


def test_auto_changes_over_and_back() -> None:
    """Few rows, then most of them, then few: rows that are behind catch up before all are stepped."""
    gradients = stream(150, touched=lambda at: 0.5 if 50 <= at < 70 or at == 100 else 0.05)
    shares = [len(rows) / ROWS > MOSTLY for rows, _ in gradients]
    assert any(shares[50:70])
    assert not any(shares[70:100])
    ours, dense = fed(table_of("auto"), gradients), fed(table_of("dense"), gradients)
    assert difference(ours, dense) < 1e-5


def test_auto_decides_by_the_share_of_rows() -> None:
    table = table_of("auto")
    fed_once = [(torch.arange(int(MOSTLY * ROWS)), torch.ones(int(MOSTLY * ROWS), WIDTH))]
    rule = rule_for(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    table.add(*fed_once[0])
    table.make_step(rule, GROUP, Verdict(None, True, 1))
    assert table.history is not None  # rows are behind
    before = table.master.clone()
    table.catch_up()
    assert not torch.equal(table.master, before)  # they decay
    more = int(MOSTLY * ROWS) + 1
    table.add(torch.arange(more), torch.ones(more, WIDTH))
    table.make_step(rule, GROUP, Verdict(None, True, 2))
    assert table.history is None


@pytest.mark.parametrize("changes", [{"betas": (0.8, 0.99)}, {"eps": 1e-4}])
def test_betas_that_change_on_the_way_are_followed(changes: dict[str, Any]) -> None:
    """As a one-cycle schedule changes them: steps that were missed before had the old ones."""
    ours, dense = table_of("deferred"), table_of("dense")
    rule = rule_for(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    for at, (rows, gradient) in enumerate(stream(120)):
        group = {**GROUP, **(changes if at % 40 >= 20 else {})}
        for table in (ours, dense):
            table.add(rows, gradient)
            table.make_step(rule, group, Verdict(None, True, at + 1))
    ours.catch_up()
    assert difference(ours, dense) < 1e-5


def slow(module: nn.Module) -> torch.optim.Optimizer:
    return adamw(module, lr=1e-4)  # no row falls below zero


def every_row(net: nn.Module) -> nn.Module:
    """Each token uses all rows, and all are above zero: every row has a gradient in every step."""
    for block, adapter in zip(net.blocks, adapters_in(net), strict=True):
        nn.init.constant_(block.norm.bias, 2.0)
        adapter.keys.data.abs_()
    return net


@pytest.mark.parametrize("dtypes", [DTypes(), DTypes.of("bf16-true")])
@pytest.mark.parametrize("clip", [None, Clip(0.05)])
def test_with_every_row_in_every_step_deferred_has_the_bits_of_dense(clip: Clip | None, dtypes: DTypes) -> None:
    whole = {"width": 24, "experts": 1, "active_experts": 1, "top_k": 24, "gate": "none"}
    runs = []
    for row_optimizer in ("dense", "deferred"):
        method = meft("host", row_optimizer=row_optimizer, **whole)
        net = every_row(adapted(**whole))
        common = {"steps": 6, "micro_batches": 2, "clip": clip, "dtypes": dtypes, "make_optimizer": slow}
        runs.append(train(net, lanes_of("inline"), method=method, schedule=True, **common))
    assert_same(*runs)
    engine = make_engine(every_row(adapted(**whole)), row_optimizer="deferred", **whole)
    for seed in range(2):
        micro_batch(engine, tokens_of(seed))
    assert all(table.touched.all() for table in rows_of(engine)._table.values())


@pytest.mark.parametrize("placement", ["host", "keys"])
@pytest.mark.parametrize("row_optimizer", ["deferred", "auto"])
@pytest.mark.parametrize("top_k", [3, 16])
def test_deferred_is_dense_through_the_engine(top_k: int, row_optimizer: str, placement: str) -> None:
    settings = {**SPARSE, "top_k": top_k}
    net, ours, dense = (
        adapted(**settings),
        *(
            train(
                adapted(**settings),
                lanes_of("inline"),
                steps=12,
                micro_batches=2,
                method=meft(placement, row_optimizer=steps, **settings),
                make_optimizer=adamw,
                schedule=True,
            )
            for steps in (row_optimizer, "dense")
        ),
    )
    torch.testing.assert_close(ours.losses, dense.losses, rtol=0, atol=2e-6)
    for name, start in net.named_parameters():
        if ".meft." in name:
            expected = dense.weights[name]
            assert float((ours.weights[name] - expected).norm() / (expected - start).norm()) < 1e-5, name
    steps = [{float(state["step"]) for state in run.state["state"].values()} for run in (ours, dense)]
    assert steps == [{12.0}, {12.0}]
    used = [table for table in rows_of(ours.engine)._table.values() if table.steps == row_optimizer]
    assert used


@pytest.mark.parametrize("placement", ["host", "keys", "device"])
def test_lazy_is_sparse_adam_through_the_engine(placement: str) -> None:
    """Against `torch.optim.SparseAdam` on the adapters' own rows, fed the rows that have gradients."""
    net, seen = adapted(**SPARSE), []
    engine = make_engine(net, placement, row_optimizer="lazy", make_optimizer=undecayed, **SPARSE)
    plain = adapted(**SPARSE)
    tables = [p for adapter in adapters_in(plain) for p in (adapter.keys, adapter.values)]
    sparse = torch.optim.SparseAdam(tables, lr=1e-2)
    routers = torch.optim.AdamW([a.router for a in adapters_in(plain)], lr=1e-2, weight_decay=0.0, fused=True)
    for seed in range(8):
        batches = tokens_of(seed), tokens_of(seed + 50)
        losses = step(engine, *batches)
        expected = [plain.loss(tokens) for tokens in batches]
        for loss in expected:
            loss.backward()
        assert losses == [loss.item() for loss in expected]
        for table in tables:
            rows = table.grad.any(1).nonzero().flatten()
            seen.append(len(rows))
            table.grad = torch.sparse_coo_tensor(rows[None], table.grad[rows], table.shape, check_invariants=True)
        sparse.step()
        routers.step()
        plain.zero_grad()
    engine.flush()
    weights = dict(plain.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    assert 0 < min(seen) <= max(seen) < SPARSE["width"] / 2


@pytest.mark.parametrize(
    ("row_optimizer", "make_optimizer", "message"),
    [
        ("lazy", adamw, r"weight_decay=0\.1 .* row_optimizer='deferred'"),
        ("deferred", lambda m: adamw(m, betas=(0.99, 0.95)), r"betas\[0\]\*\*2 < betas\[1\].*row_optimizer='dense'"),
        ("auto", lambda m: adamw(m, betas=(0.99, 0.95)), r"row_optimizer='auto'"),
    ],
)
def test_groups_that_rows_cannot_be_stepped_with(row_optimizer: str, make_optimizer: Any, message: str) -> None:
    engine = make_engine(adapted(), row_optimizer=row_optimizer, make_optimizer=make_optimizer)
    with pytest.raises(ValueError, match=message):
        step(engine, tokens_of(0))


@pytest.mark.parametrize("row_optimizer", ["deferred", "lazy"])
def test_an_optimizer_that_rows_cannot_be_stepped_with(row_optimizer: str) -> None:
    with pytest.raises(ValueError, match=rf"`row_optimizer='{row_optimizer}'` .* not by `SGD`.*'dense'"):
        make_engine(
            adapted(), row_optimizer=row_optimizer, make_optimizer=lambda m: torch.optim.SGD(trained_in(m), lr=0.1)
        )


def test_all_rows_are_stepped_where_auto_has_no_decoupled_rule() -> None:
    for make in (lambda m: torch.optim.SGD(trained_in(m), lr=0.1), lambda m: torch.optim.Adam(trained_in(m))):
        engine = make_engine(adapted(), row_optimizer="auto", make_optimizer=make)
        assert {table.steps for table in rows_of(engine)._table.values()} == {"dense"}
    dense_betas = make_engine(
        adapted(), "device", row_optimizer="auto", make_optimizer=lambda m: adamw(m, betas=(0.99, 0.95))
    )
    step(dense_betas, tokens_of(0))  # what stays on the device is stepped whole


def test_a_skipped_step_is_not_made_up_for() -> None:
    engines = [make_engine(adapted(**SPARSE), row_optimizer="deferred", **SPARSE) for _ in range(2)]
    for place, engine in enumerate(engines):
        for seed in range(6):
            step(engine, tokens_of(seed))
            with engine.micro_batch():  # in both, because it catches up the rows that it uses
                loss = engine.module.loss(tokens_of(9)) * float("nan" if place else 0.0)
            if place and seed == 3:
                loss.backward()
                engine.step()
        engine.flush()
    assert [engine.report.skipped_total for engine in engines] == [0, 1]
    weights = dict(engines[0].module.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in engines[1].module.named_parameters())
