"""Traces of a CUDA device: one clock for all lanes, the order of what depends on each other, and nobody waits."""

from __future__ import annotations

from itertools import groupby, pairwise

import pytest
import torch

from lightning_offload.memory.asynchronous import AsyncLanes
from lightning_offload.memory.ledger import Ledger, Span
from lightning_offload.timeline import step_starts_s
from tests.gpu.test_full_gpu import (
    AGES,
    MOMENT,
    Case,
    attach,
    cuda,
    device,
    offloaded,
    one_step,
    synchronization_is_an_error,
)

__all__ = ["device"]  # a fixture

gpu = pytest.mark.gpu
TRACED = 3
CLOCKS_S = 1e-3  # how far device and host clocks may be apart: both ends of a wait are seen late
TICK_S = 5e-6  # device times are told in fp32 milliseconds


def trace(case: Case, lanes: AsyncLanes, where: torch.device) -> list[Span]:
    """The spans of ``TRACED`` steps, after two that warm up, issued without waiting for the device."""
    batches = case.batches(where)
    engine = attach(case.module(), case, lanes)
    for step in range(2):
        one_step(engine, case, batches[step])
    engine.flush()
    lanes.ledger.start_trace()
    with synchronization_is_an_error():
        for step in range(2, 2 + TRACED):
            one_step(engine, case, batches[step])
    engine.flush()
    return lanes.ledger.stop_trace()


def of(spans: list[Span], lane: str, kind: str, order: int | None = None) -> list[Span]:
    return [s for s in spans if (s.lane, s.kind) == (lane, kind) and order in (None, s.order)]


@gpu
@pytest.mark.parametrize("case", [Case(), Case(clip="norm", narrow=True)], ids=str)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_lanes_share_a_clock(case: Case, seed: int | None, device: torch.device) -> None:
    began_s = Ledger.clock()
    with cuda(device, seed=seed) as lanes:
        spans = trace(case, lanes, device)
    assert began_s - CLOCKS_S < spans[0].start_s
    assert max(span.end_s for span in spans) < Ledger.clock() + CLOCKS_S
    weights = of(spans, "h2d", "weights")
    parameters = sum(p.numel() for p in case.module().parameters())
    assert sum(span.bytes for span in weights) == TRACED * parameters * case.dtype.itemsize
    for lane in ("compute", "d2h", "h2d", "host"):
        own = [span for span in spans if span.lane == lane]
        assert all(before.end_s <= after.start_s + TICK_S for before, after in pairwise(own)), lane
    begins_s = list(step_starts_s(spans))
    assert len(begins_s) == TRACED - 1
    for order in {span.order for span in weights}:
        down, host, up = (of(spans, *key, order) for key in PROGRAM)
        pieces = len(down) // TRACED
        for step in range(TRACED):
            landed_s = max(span.end_s for span in down[step * pieces : (step + 1) * pieces])
            assert landed_s <= host[step].start_s + CLOCKS_S
            assert host[step].end_s <= up[step].start_s + CLOCKS_S
        for begun_s, last in zip(begins_s, up, strict=False):
            first_s = min(s.start_s for s in of(spans, "compute", "forward", order) if s.start_s >= begun_s)
            assert last.end_s <= first_s + TICK_S  # both on the device


PROGRAM = (("d2h", "gradients"), ("host", "step"), ("h2d", "weights"))


@gpu
def test_compute_goes_forward_backward_and_steps(device: torch.device) -> None:
    with cuda(device) as lanes:
        compute = [span for span in trace(Case(), lanes, device) if span.lane == "compute"]
    assert [kind for kind, _ in groupby(s.kind for s in compute)] == ["forward", "backward", "step"] * TRACED
    backward = [s.order for s in compute if s.kind == "backward"]
    assert {*backward} == {s.order for s in compute if s.kind == "forward"} - {0}


@gpu
def test_a_mark_shows_when_the_device_was_there_and_not_when_it_was_issued(device: torch.device) -> None:
    with cuda(device) as lanes:
        torch.cuda._sleep(MOMENT)  # compiled, if need be
        torch.cuda.synchronize(device)
        lanes.ledger.start_trace()
        issued_s = Ledger.clock()
        lanes.mark("forward", 1)
        torch.cuda._sleep(AGES)
        lanes.mark("")
        returned_s = Ledger.clock()
        lanes.synchronize()
        (span,) = lanes.ledger.stop_trace()
    assert issued_s - CLOCKS_S < span.start_s < span.end_s
    assert span.end_s > returned_s


@gpu
def test_a_trace_changes_no_bit(device: torch.device) -> None:
    case = Case(clip="norm")
    with cuda(device) as lanes:
        expected = offloaded(case, lanes, device)
    with cuda(device) as lanes:
        lanes.ledger.start_trace()
        traced = offloaded(case, lanes, device)
        assert lanes.ledger.stop_trace()
    assert traced.losses == expected.losses
    for name, weight in expected.weights.items():
        assert torch.equal(weight, traced.weights[name]), name
