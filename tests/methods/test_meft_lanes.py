"""The rows of meft in any order that their dependencies allow, and on lanes that really run side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import ShuffledLanes
from lightning_offload.memory.lanes import Event, Lanes
from lightning_offload.methods.base import Clip, DTypes
from tests.helpers import Run, assert_same, lanes_of, mostly_slow, train
from tests.meft import PLACEMENTS, FFNNet, adamw, adapted, make_engine, meft, rows_of, step, tokens_of, undecayed
from tests.streams import thread_lanes

pytestmark = pytest.mark.timeout(120)

WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "not pruned, stepped at once": {"top_k": 12, "skip_nonfinite": False, "clip": None},
    "deferred": {"row_optimizer": "deferred"},
    "auto": {"row_optimizer": "auto", "width": 480, "experts": 60},
    "lazy": {"row_optimizer": "lazy", "gate": "none", "scope": "union"},
    "bf16": {"dtypes": DTypes.of("bf16-true")},
    "recomputed": {"recompute": "non_reentrant"},
    "late": {"late": True},
}
CASES = [(placement, way) for placement in PLACEMENTS for way in WAYS if (placement, way) != ("device", "deferred")]


def diagonal(shift: int) -> list[Any]:
    """Of ``CASES`` each way under one placement; the others are slow."""
    ways = list(WAYS)
    return mostly_slow(CASES, lambda at, row: (PLACEMENTS.index(row[0]) + ways.index(row[1])) % 3 == shift)


def trained(placement: str, way: str, lanes: Lanes) -> Run:
    how = dict(WAYS[way])
    dtypes, late, clip = how.pop("dtypes", None), how.pop("late", False), how.pop("clip", Clip(0.05))
    net = FFNNet(recompute=how.pop("recompute", "no"), sometimes=True)
    run = train(
        adapted(net, **how),
        lanes,
        steps=4,
        micro_batches=2,
        clip=clip,
        method=meft(placement, **how),
        make_optimizer=undecayed if way == "lazy" else adamw,
        dtypes=dtypes,
        late=late,
    )
    assert lanes.ledger.moved("d2h", "row gradients") > 0
    return run


@cache
def inline(placement: str, way: str) -> Run:
    return trained(placement, way, lanes_of("inline"))


def same_as_inline(placement: str, way: str, lanes: Lanes) -> None:
    expected = inline(placement, way)
    run = trained(placement, way, lanes)
    assert_same(expected, run)
    assert run.reports[-1] == expected.reports[-1]
    share = rows_of(run.engine).take_union_share()
    assert 0 < share < 1


@pytest.mark.parametrize(("placement", "way"), diagonal(1))
def test_any_order_gives_the_same_bits(placement: str, way: str) -> None:
    for seed in range(3):
        same_as_inline(placement, way, lanes_of("shuffled", seed))


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "way"), CASES)
def test_any_of_three_hundred_orders(placement: str, way: str) -> None:
    for seed in range(300):
        same_as_inline(placement, way, lanes_of("shuffled", seed))


@pytest.mark.parametrize(("placement", "way"), diagonal(2))
def test_with_nothing_undeclared(placement: str, way: str) -> None:
    same_as_inline(placement, way, lanes_of("checked"))


@pytest.mark.parametrize(("placement", "way"), diagonal(0))
def test_threads_give_the_same_bits(placement: str, way: str) -> None:
    for seed in range(2):
        with thread_lanes(seed, pinned=seed == 0, pauses=12) as lanes:
            same_as_inline(placement, way, lanes)


class Hasty(ShuffledLanes):
    """Compute does not wait for the host to say how many rows there are."""

    def __init__(self, seed: int) -> None:
        super().__init__(HostMemory(pin=False), seed=seed)
        self.chosen = set[Event]()

    def host(self, fn: Callable[[], object], *, tag: str = "", **kwargs: Any) -> Event:
        event = super().host(fn, tag=tag, **kwargs)
        if tag in ("select", "gather"):
            self.chosen.add(event)
        return event

    def wait_compute(self, *events: Event) -> None:
        super().wait_compute(*(event for event in events if event not in self.chosen))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_whoever_does_not_wait_for_the_number_of_rows_is_wrong(placement: str) -> None:
    """``CheckedLanes`` knows buffers, and this is a number."""

    def is_right(seed: int) -> bool:
        try:
            same_as_inline(placement, "dense", Hasty(seed))
        except (AssertionError, RuntimeError, IndexError):
            return False
        return True

    assert not any(is_right(seed) for seed in range(3))


def test_an_evaluation_in_other_modes_leaves_nothing_behind() -> None:
    """A forward under ``inference_mode`` and autocast leaves tensors that training can use."""
    with thread_lanes(3) as lanes:
        engine, plain = (make_engine(adapted(), "host", held) for held in (lanes, lanes_of("inline")))
        results = []
        for one in (engine, plain):
            losses = step(one, tokens_of(0), tokens_of(1))
            if one is engine:
                with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                    one.module.loss(tokens_of(9))
            losses += step(one, tokens_of(2))
            one.flush()
            results.append(losses)
        assert results[0] == results[1]
        engine.detach()
