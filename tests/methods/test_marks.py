"""What the compute lane is said to do, from real steps: which unit, and whether forward, backward or step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch

from lightning_offload.memory.lanes import Lanes
from lightning_offload.memory.ledger import Span
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.timeline import step_starts_s
from tests.helpers import VOCAB, Net, adamw, assert_same, lanes_of, train
from tests.streams import thread_lanes

pytestmark = pytest.mark.timeout(60)

STEPS = 3
EMBED, BLOCKS, NORM, HEAD = 1, (2, 3, 4), 5, 6  # places in the order of execution


def steps(net: Net, lanes: Lanes, *, micro_batches: int = 1, late: bool = False, **settings: Any) -> list[Span]:
    """The trace of ``STEPS`` steps after one in which the order of the units is learned."""
    method = Full(FullSettings(**{"min_numel": 0, "accumulate": "device", **settings}))
    engine = Engine(net, adamw(net), method, lanes, DTypes())
    engine.gradients_visible = late
    for step in range(STEPS + 1):
        if step == 1:
            engine.flush()
            lanes.ledger.start_trace()
        for micro in range(micro_batches):
            tokens = torch.randint(0, VOCAB, (2, 6))
            with engine.micro_batch():
                loss = net.loss(tokens)
            engine.stepping = micro == micro_batches - 1
            loss.backward()
        engine.step()
    engine.flush()
    return lanes.ledger.stop_trace()


def phases(spans: list[Span]) -> list[tuple[str, list[int]]]:
    """Of the compute lane: each phase, and the units it went through."""
    compute = [span for span in spans if span.lane == "compute"]
    return [
        (kind, [order for order, _ in groupby(span.order for span in group)])
        for kind, group in groupby(compute, key=lambda span: span.kind)
    ]


@pytest.fixture(params=["inline", "async"])
def lanes(request: pytest.FixtureRequest) -> Iterator[Lanes]:
    if request.param == "inline":
        yield lanes_of("inline")
        return
    with thread_lanes() as made:
        yield made


FORWARD = ("forward", [EMBED, *BLOCKS, NORM, HEAD])
BACKWARD = ("backward", [HEAD, NORM, *reversed(BLOCKS), EMBED])
STEP = ("step", [-1])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_forward_backward_and_step_go_through_the_units(lanes: Lanes, micro_batches: int, late: bool) -> None:
    spans = steps(Net(), lanes, micro_batches=micro_batches, late=late)
    assert phases(spans) == ([FORWARD, BACKWARD] * micro_batches + [STEP]) * STEPS


def test_a_unit_s_backward_ends_with_its_last_gradient() -> None:
    spans = steps(Net(), lanes_of("inline"))
    bounds = [spans[0].start_s, *step_starts_s(spans), spans[-1].end_s]
    for begun_s, ended_s in pairwise(bounds):
        step = [span for span in spans if begun_s <= span.start_s < ended_s]
        for order in (EMBED, *BLOCKS, NORM, HEAD):
            last_s = max(span.end_s for span in step if span.kind == "gradients" and span.order == order)
            below = [span for span in step if span.kind == "backward" and span.order < order]
            assert all(span.start_s >= last_s for span in below)


@pytest.mark.parametrize("recompute", ["reentrant", "non_reentrant"])
def test_recomputation_is_backward(lanes: Lanes, recompute: str) -> None:
    assert phases(steps(Net(recompute=recompute), lanes)) == [FORWARD, BACKWARD, STEP] * STEPS


def test_units_without_offloaded_gradients_are_counted_with_the_next(lanes: Lanes) -> None:
    spans = steps(Net(frozen=True), lanes, min_numel=60)  # the norm stays on the device, one block has no gradients
    assert phases(spans) == [FORWARD, ("backward", [HEAD, 4, 2]), STEP] * STEPS


def test_a_unit_whose_place_nobody_knows_changes_nothing(lanes: Lanes) -> None:
    kinds = [kind for kind, _ in phases(steps(Net(functional_head=True), lanes))]
    assert kinds == ["forward", "backward", "step"] * STEPS


def test_each_operation_follows_what_it_needs() -> None:
    """Gradients are down before the host steps, weights up before the next forward of their unit."""
    with thread_lanes(seed=3) as lanes:
        spans = steps(Net(), lanes)
    begins_s = list(step_starts_s(spans))
    assert len(begins_s) == STEPS - 1
    for order in (EMBED, *BLOCKS, NORM, HEAD):
        own = [span for span in spans if span.order == order]
        down, host, up = (
            [span for span in own if (span.lane, span.kind) == key]
            for key in (("d2h", "gradients"), ("host", "step"), ("h2d", "weights"))
        )
        forward = [span for span in own if span.kind == "forward"]
        assert len(host) == len(up) == STEPS
        pieces, rest = divmod(len(down), STEPS)
        assert (pieces > 0, rest) == (True, 0)
        for step in range(STEPS):
            assert max(span.end_s for span in down[step * pieces : (step + 1) * pieces]) <= host[step].start_s
            assert host[step].end_s <= up[step].start_s
        for begun_s, last in zip(begins_s, up, strict=False):
            assert min(span.start_s for span in forward if span.start_s >= begun_s) >= last.end_s


def test_a_trace_changes_no_bit(lanes: Lanes) -> None:
    expected = train(Net(dropout=0.1), lanes_of("inline"))
    run = train(Net(dropout=0.1), lanes, after_attach=lambda engine: engine.lanes.ledger.start_trace())
    assert_same(run, expected)
    assert any(span.lane == "compute" for span in lanes.ledger.stop_trace())
