"""Random programs give the same buffers on every back end; ``ShuffledLanes`` shows what a forgotten dependency does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes, ShuffledLanes
from lightning_offload.memory.lanes import Event, InlineLanes
from tests.memory.programs import Op, programs, run
from tests.streams import thread_lanes

pytestmark = pytest.mark.timeout(120)
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def inline(program: list[Op]) -> list[list[float]]:
    return run(program, InlineLanes(HostMemory(pin=False)))


@settings(relaxed, max_examples=200)
@given(program=programs(complete=True), seed=st.integers(0, 1 << 20))
def test_shuffled_orders_give_the_bits_of_inline(program: list[Op], seed: int) -> None:
    assert run(program, ShuffledLanes(HostMemory(pin=False), seed=seed)) == inline(program)


@settings(relaxed, max_examples=100)
@given(program=programs(complete=True))
def test_a_complete_program_has_no_race(program: list[Op]) -> None:
    assert run(program, CheckedLanes(HostMemory(pin=False))) == inline(program)


@settings(relaxed, max_examples=80)
@given(program=programs(complete=True), seed=st.integers(0, 1 << 20), pinned=st.booleans())
def test_threads_give_the_bits_of_inline_and_never_hang(program: list[Op], seed: int, pinned: bool) -> None:
    with thread_lanes(seed, pinned=pinned) as lanes:
        assert run(program, lanes) == inline(program)


def outcomes(program: object, seeds: int = 40) -> set[tuple[float, ...]]:
    """What a program may leave in the host buffer."""
    found = set()
    for seed in range(seeds):
        lanes = ShuffledLanes(HostMemory(pin=False), seed=seed)
        (device,) = lanes.buffers("device", [2], torch.float32, "device")
        (home,) = lanes.buffers("home", [2], torch.float32, "pinned")
        device.fill_(1)
        program(lanes, device, home)
        found.add(tuple(home.nan_to_num(-1).tolist()))
    return found


@pytest.mark.parametrize("complete", [True, False])
def test_a_forgotten_dependency_changes_the_result(complete: bool) -> None:
    def program(lanes: ShuffledLanes, device: Tensor, home: Tensor) -> None:
        landed: Event = lanes.copy([home], [device], "d2h", after=[lanes.compute()])
        lanes.host(lambda: home.add_(1), after=[landed] if complete else [])
        lanes.synchronize()

    assert (outcomes(program) == {(2.0, 2.0)}) is complete


def test_the_target_of_a_copy_is_nan_from_the_moment_it_may_start() -> None:
    """Compute that forgets to wait reads NaN even when the copy would not have happened yet."""

    def program(lanes: ShuffledLanes, device: Tensor, home: Tensor) -> None:
        lanes.copy([home], [device], "d2h", after=[lanes.compute()])

    assert outcomes(program) == {(-1.0, -1.0), (1.0, 1.0)}


def test_the_target_of_a_copy_is_left_alone_before_it_may_start() -> None:
    def program(lanes: ShuffledLanes, device: Tensor, home: Tensor) -> None:
        home.fill_(3)
        kept: list[Tensor] = []
        read = lanes.host(lambda: kept.append(home.clone()))
        lanes.copy([home], [device], "d2h", after=[read])
        lanes.synchronize()
        home.copy_(kept[0])

    assert outcomes(program) == {(3.0, 3.0)}


def test_wait_compute_runs_what_it_waits_for_and_not_all_the_rest() -> None:
    rest = set()
    for seed in range(40):
        lanes, ran = ShuffledLanes(HostMemory(pin=False), seed=seed), []
        first = lanes.host(lambda ran=ran: ran.append("first"))
        second = lanes.host(lambda ran=ran: ran.append("second"), after=[first])
        lanes.host(lambda ran=ran: ran.append("other"))
        lanes.wait_compute(second)
        assert [name for name in ran if name != "other"] == ["first", "second"]
        rest.add("other" in ran)
    assert rest == {True, False}
