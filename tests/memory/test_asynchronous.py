"""``AsyncLanes`` on streams made of threads: what runs when, what happens after a failure, and what is left over."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_offload.memory.asynchronous import AsyncLanes
from lightning_offload.memory.lanes import Event
from tests.streams import ThreadStreams, thread_lanes

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def lanes() -> Iterator[AsyncLanes]:
    with thread_lanes() as made:
        yield made


def streams_of(lanes: AsyncLanes) -> ThreadStreams:
    assert isinstance(lanes.streams, ThreadStreams)
    return lanes.streams


def buffer(lanes: AsyncLanes, name: str = "home", numel: int = 4) -> Tensor:
    return lanes.buffers(name, [numel], torch.float32, "pinned")[0].zero_()


class Gate:
    """Host work that says when it has begun and goes on when it is let."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        self.go.wait()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.go.set()


def open_when_main_waits(lanes: AsyncLanes, gate: Gate) -> None:
    timed = lanes.ledger.timed

    def opening(lane: str, *args: Any) -> AbstractContextManager[None]:
        if lane == "wait":
            gate.go.set()
        return timed(lane, *args)

    lanes.ledger.timed = opening


# What runs when.


def test_ready_host_work_runs_lowest_priority_first_and_in_order_among_equals(lanes: AsyncLanes, gate: Gate) -> None:
    ran: list[str] = []
    lanes.host(gate)
    gate.begun.wait()
    for name, priority in [("b1", 2), ("c", 3), ("a", -1), ("b2", 2), ("b3", 2)]:
        lanes.host(lambda name=name: ran.append(name), priority=priority)
    gate.go.set()
    lanes.synchronize()
    assert ran == ["a", "b1", "b2", "b3", "c"]


def test_ready_work_does_not_wait_for_work_of_lower_priority_that_is_not(lanes: AsyncLanes) -> None:
    ran: list[str] = []
    home = buffer(lanes)
    first = threading.Event()
    with streams_of(lanes).held("d2h"):
        landed = lanes.copy([home], [torch.ones(4)], "d2h")

        def quick() -> None:
            ran.append("ready")
            first.set()

        lanes.host(quick, priority=9)
        lanes.host(lambda: ran.append("waits"), priority=0, after=[landed])
        assert first.wait(30)
    lanes.synchronize()
    assert ran == ["ready", "waits"]


def test_host_work_waits_for_the_copy_it_follows(lanes: AsyncLanes) -> None:
    home, seen = buffer(lanes), []
    with streams_of(lanes).held("d2h"):
        landed = lanes.copy([home], [torch.ones(4)], "d2h")
        lanes.host(lambda: seen.append(home.tolist()), after=[landed])
    lanes.synchronize()
    assert seen == [[1.0] * 4]


def test_a_copy_waits_for_a_copy_on_the_other_lane(lanes: AsyncLanes) -> None:
    home, device = buffer(lanes), buffer(lanes, "device")
    with streams_of(lanes).held("d2h"):
        landed = lanes.copy([home], [torch.ones(4)], "d2h")
        lanes.copy([device], [home], "h2d", after=[landed])
    lanes.synchronize()
    assert device.tolist() == [1.0] * 4


def test_a_copy_that_follows_host_work_is_issued_by_the_worker_when_that_is_done(lanes: AsyncLanes, gate: Gate) -> None:
    issuers: list[str] = []
    streams = streams_of(lanes)
    plain = streams.copy

    def copy(*args: object) -> object:
        issuers.append(threading.current_thread().name)
        return plain(*args)

    streams.copy = copy
    home = buffer(lanes)
    done = lanes.host(gate)
    arrived = lanes.copy([home], [torch.ones(4)], "h2d", after=[done])
    assert issuers == []
    gate.go.set()
    lanes.wait_compute(arrived)
    assert issuers == ["offload-host"]
    assert home.tolist() == [1.0] * 4


def test_copies_that_become_issuable_together_go_shallow_layers_first(lanes: AsyncLanes, gate: Gate) -> None:
    homes = {priority: buffer(lanes, f"home{priority}") for priority in (3, 1, 2)}
    done = lanes.host(gate)
    for priority, home in homes.items():
        lanes.copy([home], [torch.ones(4)], "h2d", after=[done], priority=priority)
    gate.go.set()
    lanes.synchronize()
    issued = [next(p for p, home in homes.items() if dst[0] is home) for _, dst in streams_of(lanes).issued]
    assert issued == [1, 2, 3]


def test_a_chain_of_copies_behind_host_work_is_issued_whole_whatever_the_priorities(
    lanes: AsyncLanes, gate: Gate
) -> None:
    """A copy of lower priority value that follows another used to be passed over and never issued."""
    one, other, third = (buffer(lanes, name) for name in "abc")
    event: Event = lanes.host(gate)
    for dst, src, lane, priority in [(one, torch.ones(4), "h2d", 5), (other, one, "d2h", 3), (third, other, "h2d", 1)]:
        event = lanes.copy([dst], [src], lane, after=[event], priority=priority)
    gate.go.set()
    lanes.wait_compute(event)
    assert third.tolist() == [1.0] * 4


def test_waiting_for_host_work_sees_its_result(lanes: AsyncLanes) -> None:
    home = buffer(lanes)
    lanes.wait_compute(lanes.host(lambda: home.fill_(1)))
    assert home.tolist() == [1.0] * 4


def test_wait_compute_blocks_only_until_the_copy_is_issued(lanes: AsyncLanes, gate: Gate) -> None:
    """The rest is the compute stream's wait; the time until the issue is a row of the ledger."""
    waited: list[str] = []
    streams = streams_of(lanes)

    def compute_wait(marker: object) -> None:
        waited.append("device" if not marker.done() else "nothing")

    streams.compute_wait = compute_wait
    home = buffer(lanes)
    done = lanes.host(gate)
    arrived = lanes.copy([home], [torch.ones(4)], "h2d", after=[done])
    open_when_main_waits(lanes, gate)
    with streams.held("h2d"):
        lanes.wait_compute(arrived)
        assert waited == ["device"]
    assert lanes.ledger.snapshot()["wait"].operations == 1
    lanes.wait_compute(arrived)
    assert lanes.ledger.snapshot()["wait"].operations == 1


def test_synchronize_returns_when_nothing_is_in_flight(lanes: AsyncLanes) -> None:
    home, device = buffer(lanes), buffer(lanes, "device")
    event: Event = lanes.compute()
    for _ in range(5):
        event = lanes.host(lambda: home.add_(1), after=[event])
        event = lanes.copy([device], [home], "h2d", after=[event])
    lanes.synchronize()
    assert device.tolist() == [5.0] * 4


def test_a_copy_keeps_its_tensors_until_it_is_done(lanes: AsyncLanes) -> None:
    home = buffer(lanes)
    with streams_of(lanes).held("d2h"):
        lanes.copy([home], [torch.ones(4)], "d2h")
        (held,) = lanes._in_flight
        assert held.src[0].tolist() == [1.0] * 4
    lanes.synchronize()
    assert not lanes._in_flight


def test_the_worker_runs_in_its_own_modes_with_its_own_threads() -> None:
    seen: dict[str, object] = {}

    def look() -> None:
        made = torch.ones(2, 2, dtype=torch.float32)
        seen.update(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=(made @ made).dtype,
            threads=torch.get_num_threads(),
            scratch=lanes.scratch(3, torch.float32).dtype,
            name=threading.current_thread().name,
        )

    torch.set_default_dtype(torch.bfloat16)
    mine = torch.get_num_threads()
    try:
        with thread_lanes(threads=3) as lanes, torch.inference_mode(), torch.autocast("cpu"):
            lanes.host(look)
            lanes.synchronize()
            assert streams_of(lanes).entered == ["offload-host"]
    finally:
        torch.set_default_dtype(torch.float32)
    f32 = torch.float32
    expected = {"grad": False, "inference": False, "autocast": f32, "scratch": f32, "name": "offload-host"}
    assert seen == expected | {"threads": 3}
    assert torch.get_num_threads() == mine


# Threads.


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "offload-host"]


def test_no_worker_before_the_first_host_work_and_none_after_close(lanes: AsyncLanes) -> None:
    """Data loader workers that are forked before it copy no locked lock."""
    home = buffer(lanes)
    lanes.wait_compute(lanes.copy([home], [torch.ones(4)], "d2h", after=[lanes.compute()]))
    lanes.synchronize()
    assert workers() == []
    lanes.host(lambda: None)
    lanes.host(lambda: None)
    assert [worker.daemon for worker in workers()] == [True]
    lanes.close()
    assert workers() == []


def test_close_drops_what_was_not_synchronized_and_releases_who_waits_for_it(lanes: AsyncLanes, gate: Gate) -> None:
    home, released = buffer(lanes), threading.Event()
    arrived = lanes.copy([home], [torch.ones(4)], "h2d", after=[lanes.host(lambda: None, after=[lanes.host(gate)])])

    def wait() -> None:
        lanes.wait_compute(arrived)
        released.set()

    waiter, closer = threading.Thread(target=wait), threading.Thread(target=lanes.close)
    gate.begun.wait()
    waiter.start()
    closer.start()
    with lanes._changed:  # close has begun, and waits for the work that runs
        assert lanes._changed.wait_for(lambda: lanes._stop, 30)
    gate.go.set()
    assert released.wait(30)
    closer.join(30)
    waiter.join(30)
    assert home.tolist() == [0.0] * 4
    assert workers() == []


def test_close_waits_for_the_work_that_runs(lanes: AsyncLanes, gate: Gate) -> None:
    """It writes host memory that is about to be given back."""
    lanes.host(gate)
    gate.begun.wait()
    (worker,) = workers()
    join = worker.join

    def opens_the_gate() -> None:
        gate.go.set()
        join()

    worker.join = opens_the_gate
    lanes.close()
    assert not worker.is_alive()


def test_close_frees_host_memory_even_if_the_device_is_broken(lanes: AsyncLanes) -> None:
    buffer(lanes)
    streams_of(lanes).failing["h2d"] = ("copy", OSError("the device is lost"))
    lanes.copy([torch.zeros(4)], [torch.ones(4)], "h2d")
    with pytest.raises(OSError, match="device is lost"):
        lanes.close()
    assert lanes.memory.report().requested_bytes == 0
    lanes.close()


def test_many_threads_at_once_lose_nothing(lanes: AsyncLanes) -> None:
    each, callers = 25, 8
    homes = [buffer(lanes, f"home{caller}") for caller in range(callers)]
    together = threading.Barrier(callers)

    def call(home: Tensor) -> None:
        device = torch.zeros(4)
        event: Event = lanes.compute()
        together.wait()
        for count in range(1, each + 1):
            device = torch.full((4,), float(count))
            down = lanes.copy([home], [device], "d2h", after=[event], tag="down")
            event = lanes.host(lambda: home.mul_(2), after=[down], tag="double", traffic_bytes=32)
            lanes.wait_compute(lanes.copy([device], [home], "h2d", after=[event], tag="up"))
            assert device.tolist() == [2.0 * count] * 4

    errors: list[BaseException] = []
    threads = [threading.Thread(target=_collecting(call, errors), args=(home,)) for home in homes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lanes.synchronize()
    assert errors == []
    count = each * callers
    totals = {lane: (total.operations, total.bytes) for lane, total in lanes.ledger.snapshot().items()}
    assert {lane: totals[lane] for lane in ("d2h", "host", "h2d")} == {
        "d2h": (count, 16 * count),
        "host": (count, 32 * count),
        "h2d": (count, 16 * count),
    }


def _collecting(call: Callable[[Tensor], None], errors: list[BaseException]) -> Callable[[Tensor], None]:
    def run(home: Tensor) -> None:
        try:
            call(home)
        except BaseException as error:
            errors.append(error)

    return run


# Failures.


def break_here() -> None:
    raise OSError("the host function failed")


def fail(lanes: AsyncLanes) -> Event:
    """A failed operation whose error nobody has seen yet."""
    failed = lanes.host(break_here)
    with lanes._changed:
        lanes._changed.wait_for(lambda: lanes._error is not None)
    return failed


CALLS: dict[str, Callable[[AsyncLanes], object]] = {
    "copy": lambda lanes: lanes.copy([torch.zeros(4)], [torch.ones(4)], "h2d"),
    "host": lambda lanes: lanes.host(lambda: None),
    "compute": lambda lanes: lanes.compute(),
    "wait_compute": lambda lanes: lanes.wait_compute(),
    "read": lambda lanes: lanes.read(torch.zeros(()), 0.0),
    "synchronize": lambda lanes: lanes.synchronize(),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_next_call_raises_what_the_worker_raised_and_only_that_one(lanes: AsyncLanes, call: str) -> None:
    fail(lanes)
    with pytest.raises(OSError, match="host function failed") as raised:
        CALLS[call](lanes)
    assert "break_here" in "".join(traceback.format_tb(raised.value.__traceback__))
    for later in CALLS.values():
        later(lanes)


def test_nobody_waits_for_ever_for_an_operation_that_failed(lanes: AsyncLanes) -> None:
    """The next step follows the report of the last one, which is what fails when too many steps are skipped."""
    failed = fail(lanes)
    with pytest.raises(OSError, match="host function failed"):
        lanes.synchronize()
    home = buffer(lanes)
    after = lanes.host(lambda: home.fill_(1), after=[failed])
    lanes.wait_compute(failed, after)
    lanes.synchronize()
    assert home.tolist() == [1.0] * 4


def test_a_waiting_main_thread_is_told(lanes: AsyncLanes, gate: Gate) -> None:
    begun = lanes.host(gate)
    failed = lanes.host(break_here, after=[begun])
    arrived = lanes.copy([torch.zeros(4)], [torch.ones(4)], "h2d", after=[failed])
    open_when_main_waits(lanes, gate)
    with pytest.raises(OSError, match="host function failed"):
        lanes.wait_compute(arrived)


def test_of_several_errors_the_first_is_raised(lanes: AsyncLanes, gate: Gate) -> None:
    lanes.host(gate)
    lanes.host(break_here)
    lanes.host(lambda: 1 / 0)
    gate.go.set()
    with pytest.raises(OSError, match="host function failed"):
        lanes.synchronize()
    lanes.synchronize()


def test_work_that_runs_while_the_error_is_raised_still_brings_its_weights_up(lanes: AsyncLanes, gate: Gate) -> None:
    """A unit whose master was stepped must not be left with its old weight."""
    home, first = buffer(lanes), Gate()
    lanes.host(first)
    lanes.host(break_here)
    arrived = lanes.copy([home], [torch.ones(4)], "h2d", after=[lanes.host(gate)])
    first.go.set()
    gate.begun.wait()
    with pytest.raises(OSError, match="host function failed"):
        lanes.compute()
    gate.go.set()
    lanes.wait_compute(arrived)
    assert home.tolist() == [1.0] * 4


def test_the_worker_outlives_an_error_that_is_no_exception(lanes: AsyncLanes) -> None:
    def leave() -> None:
        raise SystemExit(3)

    lanes.host(leave)
    with pytest.raises(SystemExit):
        lanes.synchronize()
    home = buffer(lanes)
    lanes.wait_compute(lanes.host(lambda: home.fill_(1)))
    assert home.tolist() == [1.0] * 4


def test_a_copy_that_cannot_be_issued_raises_where_it_is_asked_for(lanes: AsyncLanes) -> None:
    streams_of(lanes).failing["h2d"] = ("issue", OSError("no more streams"))
    with pytest.raises(OSError, match="no more streams"):
        lanes.copy([torch.zeros(4)], [torch.ones(4)], "h2d")
    lanes.synchronize()


def test_a_copy_that_the_worker_cannot_issue_raises_later_and_its_followers_never_happen(
    lanes: AsyncLanes, gate: Gate
) -> None:
    home, other = buffer(lanes), buffer(lanes, "other")
    streams_of(lanes).failing["h2d"] = ("issue", OSError("no more streams"))
    arrived = lanes.copy([home], [torch.ones(4)], "h2d", after=[lanes.host(gate)])
    lanes.copy([other], [torch.ones(4)], "d2h", after=[arrived], priority=-1)
    lanes.host(lambda: other.fill_(2), after=[arrived])
    gate.go.set()
    with pytest.raises(OSError, match="no more streams"):
        lanes.synchronize()
    lanes.wait_compute(arrived)
    assert [home.tolist(), other.tolist()] == [[0.0] * 4] * 2


@pytest.mark.parametrize("waiting", [True, False])
def test_a_copy_that_fails_on_the_device_is_told_by_the_host_work_that_follows_it(
    lanes: AsyncLanes, waiting: bool
) -> None:
    """Asking its marker raises then, and so does waiting for it; the worker must hand that on and live."""
    home = buffer(lanes)
    with streams_of(lanes).held("d2h"):
        streams_of(lanes).failing["d2h"] = ("copy", OSError("the device is lost"))
        landed = lanes.copy([home], [torch.ones(4)], "d2h")
        if waiting:
            _fill_twice(lanes, home, landed)
            assert landed.marker.awaited.wait(30)
    if not waiting:
        with pytest.raises(OSError, match="device is lost"):
            landed.marker.wait()
        _fill_twice(lanes, home, landed)
    with lanes._changed:
        assert lanes._changed.wait_for(lambda: lanes._error is not None, 30)
    with pytest.raises(OSError, match="device is lost"):
        lanes.synchronize()
    assert home.tolist() == [0.0] * 4
    lanes.wait_compute(lanes.host(lambda: home.fill_(4)))
    assert home.tolist() == [4.0] * 4


def _fill_twice(lanes: AsyncLanes, home: Tensor, landed: Event) -> None:
    first = lanes.host(lambda: home.fill_(2), after=[landed])
    lanes.host(lambda: home.fill_(3), after=[first])


def test_synchronize_raises_what_the_device_raises(lanes: AsyncLanes) -> None:
    streams_of(lanes).failing["d2h"] = ("copy", OSError("the device is lost"))
    lanes.copy([buffer(lanes)], [torch.ones(4)], "d2h")
    with pytest.raises(OSError, match="device is lost"):
        lanes.synchronize()
    lanes.synchronize()


def test_close_from_an_error_that_nobody_has_seen(lanes: AsyncLanes) -> None:
    fail(lanes)
    lanes.close()
    assert workers() == []
    with pytest.raises(OSError, match="host function failed"):
        lanes.synchronize()


# Pageable memory.


def test_a_pageable_copy_is_made_by_the_worker_on_its_lane_and_holds_up_nobody() -> None:
    with thread_lanes(pinned=False) as lanes:
        home = buffer(lanes)
        streams = streams_of(lanes)
        with streams.held("d2h"):
            landed = lanes.copy([home], [torch.ones(4)], "d2h", after=[lanes.compute()], tag="down")
            assert streams.copying.wait(30)  # the worker has begun it
            lanes.copy([torch.zeros(4)], [home.clone()], "h2d", after=[lanes.compute()], tag="up")
        lanes.wait_compute(landed)
        assert home.tolist() == [1.0] * 4
        lanes.synchronize()
        totals = {lane: (total.operations, total.bytes) for lane, total in lanes.ledger.lanes.items()}
        assert (totals["d2h"], totals["h2d"]) == ((1, 16), (1, 16))
