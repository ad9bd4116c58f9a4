"""What of rows in host memory is saved, and that a run goes on from it to the bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_offload.errors import CheckpointError
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import Engine
from tests.helpers import lanes_of, mostly_slow
from tests.meft import (
    PLACEMENTS,
    adamw,
    adapted,
    adapter_weights,
    adapters_in,
    make_engine,
    meft,
    micro_batch,
    rows_of,
    step,
    three_groups,
    tokens_of,
    undecayed,
)
from tests.streams import thread_lanes

SPARSE = {"width": 480, "experts": 60, "active_experts": 2, "top_k": 3}
DTYPES = {"fp32": DTypes(), "bf16": DTypes.of("bf16-true")}
BATCHES = 7
"""Micro-batches of a run, two to a step: the last window is not finished."""


def saved(engine: Engine) -> dict[str, Any]:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    state = {
        "weights": engine.module.state_dict(),
        "optimizer": engine.optimizer_state(),
        "extras": engine.extras(),
    }
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def resumed(state: dict[str, Any], engine: Engine) -> Engine:
    engine.module.load_state_dict(state["weights"], strict=True)
    engine.load_optimizer_state(copy.deepcopy(state["optimizer"]))
    engine.load_extras(copy.deepcopy(state["extras"]))
    return engine


def go_on(engine: Engine, first: int, last: int) -> None:
    for place in range(first, last):
        ends = place % 2 == 1
        micro_batch(engine, tokens_of(place), last=ends)
        if ends:
            engine.step()


def assert_equal(one: Any, other: Any) -> None:
    leaves, shape = tree_flatten(one)
    others, other_shape = tree_flatten(other)
    assert shape == other_shape
    for place, (left, right) in enumerate(zip(leaves, others, strict=True)):
        assert type(left) is type(right), place
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right, place


ROW_OPTIMIZERS = ["dense", "deferred", "auto", "lazy"]
RESUMED = [
    (placement, row_optimizer, dtypes)
    for placement in PLACEMENTS
    for row_optimizer in ROW_OPTIMIZERS
    for dtypes in DTYPES
    if (placement, row_optimizer) != ("device", "deferred")
]


def in_turn(at: int, row: tuple[str, str, str]) -> bool:
    placement, row_optimizer, dtypes = row
    return (PLACEMENTS.index(placement) + ROW_OPTIMIZERS.index(row_optimizer) + list(DTYPES).index(dtypes)) % 2 == 0


@pytest.mark.parametrize(("placement", "row_optimizer", "dtypes"), mostly_slow(RESUMED, in_turn))
def test_exact_resume_after_every_micro_batch(placement: str, row_optimizer: str, dtypes: str) -> None:
    """Saving brings rows up to date that were behind: the run that was saved, and goes on, is what is equalled."""
    make_optimizer = undecayed if row_optimizer == "lazy" else three_groups

    def new() -> Engine:
        common = {"make_optimizer": make_optimizer, "row_optimizer": row_optimizer}
        return make_engine(adapted(**SPARSE), placement, dtypes=DTYPES[dtypes], **common, **SPARSE)

    for stop in range(BATCHES) if dtypes == "fp32" else (2, 3):
        whole = new()
        go_on(whole, 0, stop)
        state = saved(whole)
        assert bool(state["extras"]["gradients"]) == (stop % 2 == 1)
        go_on(whole, stop, BATCHES)
        other = resumed(state, new())
        go_on(other, stop, BATCHES)
        assert_equal(saved(other), saved(whole))


@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize("second", PLACEMENTS)
@pytest.mark.parametrize("first", PLACEMENTS)
def test_the_placement_may_be_another_one(first: str, second: str, stop: int) -> None:
    whole = make_engine(adapted(), first)
    go_on(whole, 0, stop)
    other = resumed(saved(whole), make_engine(adapted(), second))
    for engine in (whole, other):
        go_on(engine, stop, BATCHES)
    assert_equal(saved(other), saved(whole))
    assert "placement" not in meft(first).decisive()


def test_saving_dense_rows_changes_nothing() -> None:
    quiet, watched = make_engine(adapted()), make_engine(adapted())
    go_on(quiet, 0, BATCHES)
    for place in range(BATCHES):
        go_on(watched, place, place + 1)
        saved(watched)
    assert_equal(saved(watched), saved(quiet))


@pytest.mark.parametrize("row_optimizer", ["deferred", "auto"])
def test_saving_moves_rows_that_are_behind_by_rounding_alone(row_optimizer: str) -> None:
    quiet, watched = (make_engine(adapted(**SPARSE), row_optimizer=row_optimizer, **SPARSE) for _ in range(2))
    go_on(quiet, 0, BATCHES)
    for place in range(BATCHES):
        go_on(watched, place, place + 1)
        saved(watched)
    start, one, other = (adapter_weights(e) for e in (adapted(**SPARSE), saved_module(quiet), saved_module(watched)))
    for name, weight in one.items():
        assert float((other[name] - weight).norm() / (weight - start[name]).norm()) < 1e-5, name


def saved_module(engine: Engine) -> torch.nn.Module:
    engine.flush()
    return engine.module


def test_a_flush_right_after_a_step_leaves_no_row_behind() -> None:
    """Also while the worker has not begun the step: rows without a gradient decay with it."""
    expected = make_engine(adapted(**SPARSE), **SPARSE)
    step(expected, tokens_of(0))
    expected.flush()
    for seed in range(3):
        with thread_lanes(seed) as lanes:
            engine = make_engine(adapted(**SPARSE), lanes=lanes, row_optimizer="deferred", **SPARSE)
            step(engine, tokens_of(0))
            engine.flush()
            torch.testing.assert_close(
                adapter_weights(engine.module), adapter_weights(expected.module), rtol=1e-6, atol=1e-9
            )
            engine.detach()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_state_dict_is_contiguous_and_loads_into_a_plain_module(placement: str) -> None:
    engine = make_engine(adapted(), placement, lanes_of("shuffled", 3))
    step(engine, tokens_of(0))
    state = engine.module.state_dict()  # flushes
    names = [f"blocks.{at}.mlp.meft.{what}" for at in range(3) for what in ("keys", "values", "router")]
    assert sorted(name for name in state if ".meft." in name) == sorted(names)
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in state.values())
    plain = adapted()
    plain.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(plain(tokens_of(9)), engine.module(tokens_of(9)))


def test_the_optimizers_state_is_torchs() -> None:
    engine, plain = make_engine(adapted()), adapted()
    optimizer = adamw(plain)
    for seed in range(3):
        step(engine, tokens_of(seed))
        plain.loss(tokens_of(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(engine.optimizer_state(), optimizer.state_dict())
    other = adamw(adapted())
    other.load_state_dict(engine.optimizer_state())
    back = make_engine(adapted())
    back.load_optimizer_state(optimizer.state_dict())
    assert_equal(back.optimizer_state()["state"], optimizer.state_dict()["state"])


def test_no_state_before_the_first_step() -> None:
    engine = make_engine(adapted())
    assert engine.optimizer_state()["state"] == {}
    micro_batch(engine, tokens_of(0))
    assert engine.optimizer_state()["state"] == {}


def test_a_pending_gradient_is_that_of_the_whole_table() -> None:
    """Under the name of the parameter, as a plain run has it in ``p.grad``."""
    engine, plain = make_engine(adapted()), adapted()
    micro_batch(engine, tokens_of(0))
    plain.loss(tokens_of(0)).backward()
    gradients: dict[str, Tensor] = engine.extras()["gradients"]
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert_equal(gradients, expected)
    assert len(gradients) == 3 * len(adapters_in(plain))


def test_a_state_of_another_width_is_refused() -> None:
    engine, other = make_engine(adapted(width=24), width=24), make_engine(adapted())
    step(engine, tokens_of(0))
    with pytest.raises(CheckpointError, match=r"shape \(24, 19\) in the checkpoint, the parameter has \(48, 19\)"):
        other.load_optimizer_state(engine.optimizer_state())


def test_state_stays_readable_after_the_engine_is_closed() -> None:
    engine = make_engine(adapted(**SPARSE), row_optimizer="deferred", **SPARSE)
    go_on(engine, 0, 4)
    engine.close()
    state = saved(engine)
    assert {float(held["step"]) for held in state["optimizer"]["state"].values()} == {2.0}
    assert all(table.history is None for table in rows_of(engine)._table.values())
    assert_equal(saved(resumed(state, make_engine(adapted(**SPARSE), row_optimizer="deferred", **SPARSE))), state)
