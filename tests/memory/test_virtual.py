"""``VirtualLanes`` beside a simulator of a page, which starts from nothing at every question."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.lanes import Event, host_buffers
from lightning_offload.memory.ledger import Span
from lightning_offload.memory.rates import Rates
from lightning_offload.memory.virtual import VirtualLanes
from tests.memory.test_arena import FakeCudart

pytestmark = pytest.mark.timeout(60)

RATES = Rates(
    fp32_tflops=1,
    bf16_tflops=2,
    device_gb_per_s=3,
    h2d_gb_per_s=4,
    d2h_gb_per_s=5,
    duplex=0.75,
    pageable_gb_per_s=2,
    host_gb_per_s=8,
    op_us=9,
)
LANES = ("d2h", "h2d", "host")  # of those that begin at one moment the earlier one is first


def machine(rates: Rates | None = RATES, device_type: str = "cuda") -> Machine:
    device_gib = 24.0 if device_type == "cuda" else None
    described = Machine.described(
        name="a card", device_type=device_type, device_gib=device_gib, host_gib=64.0, cores=8, rates=RATES
    )
    return replace(described, rates=rates)


def seconds(lane: str, nbytes: int, rates: Rates = RATES) -> float:
    return nbytes / getattr(rates, f"{lane}_gb_per_s") / 1e9


def bytes_of(nbytes: int) -> list[torch.Tensor]:
    return [torch.empty(nbytes, dtype=torch.uint8, device="meta")]


def submit(lanes: VirtualLanes, lane: str, nbytes: int, after: list[Event], priority: int, tag: str) -> Event:
    if lane == "host":
        return lanes.host(_never, after=after, priority=priority, tag=tag, traffic_bytes=nbytes)
    side = bytes_of(nbytes)
    return lanes.copy(side, side, "h2d" if lane == "h2d" else "d2h", after=after, priority=priority, tag=tag)


def _never() -> None:
    raise AssertionError("nothing runs on virtual lanes")


# The simulator.


@dataclass
class Operation:
    lane: str
    nbytes: int
    after: list[int]  # places of operations
    priority: int
    not_before_s: float  # the moment of compute it follows


Times = dict[int, tuple[float, float]]


def simulate(operations: list[Operation], rates: Rates = RATES) -> Times:
    """Start and end of every operation: from one moment at which something may begin to the next."""
    times: Times = {}
    while len(times) < len(operations):
        starts = {}
        for lane in LANES:
            open_here = [place for place, op in enumerate(operations) if op.lane == lane and place not in times]
            if lane == "d2h":
                open_here = open_here[:1]
            ready = {p: at for p in open_here if (at := _ready_s(operations[p], times)) is not None}
            if ready:
                starts[lane] = max(_free_s(lane, operations, times), min(ready.values())), ready
        lane = min(starts, key=lambda lane: (starts[lane][0], LANES.index(lane)))
        start_s, ready = starts[lane]
        place = min((p for p, at in ready.items() if at <= start_s), key=lambda p: (operations[p].priority, p))
        spent_s = seconds(lane, operations[place].nbytes, rates)
        other = {"d2h": "h2d", "h2d": "d2h"}.get(lane)
        if other is not None and any(
            start <= start_s < end for p, (start, end) in times.items() if operations[p].lane == other
        ):
            spent_s /= rates.duplex
        times[place] = start_s, start_s + spent_s
    return times


def _ready_s(operation: Operation, times: Times) -> float | None:
    if any(place not in times for place in operation.after):
        return None
    return max([operation.not_before_s, *(times[place][1] for place in operation.after)])


def _free_s(lane: str, operations: list[Operation], times: Times) -> float:
    return max((end for place, (_, end) in times.items() if operations[place].lane == lane), default=0.0)


# Programs: operations, each after some moment of compute; compute that is busy, and that waits.


@dataclass
class Step:
    lane: str = ""  # none: compute works, then waits
    nbytes: int = 0
    back: tuple[int, ...] = ()  # how many operations ago
    priority: int = 0
    busy_s: float = 0.0


SIZES = st.integers(1, 40).map(lambda n: n * 100_000_000)
BACK = st.lists(st.integers(1, 6), max_size=3).map(tuple)
OPERATIONS = st.builds(Step, lane=st.sampled_from(LANES), nbytes=SIZES, back=BACK, priority=st.integers(0, 4))
COMPUTE = st.builds(Step, back=st.lists(st.integers(1, 6), max_size=1).map(tuple), busy_s=st.floats(0, 2))
PROGRAMS = st.lists(st.one_of(OPERATIONS, OPERATIONS, OPERATIONS, COMPUTE), min_size=1, max_size=24)


@dataclass
class Ran:
    lanes: VirtualLanes
    operations: list[Operation]
    spans: list[Span]
    stalled_s: float
    now_s: float

    def times(self) -> Times:
        own = [span for span in self.spans if span.lane in LANES]
        return {int(span.kind): (span.start_s, span.end_s) for span in own}


def run(program: list[Step], rates: Rates = RATES) -> Ran:
    """On the lanes; what compute must see is asked of the simulator at every wait."""
    lanes = VirtualLanes(machine(rates))
    lanes.ledger.start_trace()
    operations: list[Operation] = []
    events: list[Event] = []
    now_s = stalled_s = 0.0
    for step in program:
        followed = [len(events) - back for back in step.back if back <= len(events)]
        if step.lane:
            operations.append(Operation(step.lane, step.nbytes, followed, step.priority, now_s))
            after = [lanes.compute(), *(events[place] for place in followed)]
            events.append(submit(lanes, step.lane, step.nbytes, after, step.priority, str(len(events))))
            continue
        lanes.advance(step.busy_s)
        now_s += step.busy_s
        for place in followed:
            lanes.wait_compute(events[place])
            end_s = simulate(operations, rates)[place][1]
            stalled_s += max(0.0, end_s - now_s)
            now_s = max(now_s, end_s)
        assert lanes.now_s == now_s
    lanes.synchronize()
    return Ran(lanes, operations, lanes.ledger.stop_trace(), stalled_s, now_s)


@given(PROGRAMS)
def test_every_operation_begins_and_ends_as_in_the_simulator(program: list[Step]) -> None:
    ran = run(program)
    assert ran.times() == simulate(ran.operations)
    assert ran.lanes.now_s == max([ran.now_s, *(end for _, end in ran.times().values())])
    stalls = sum(span.end_s - span.start_s for span in ran.spans if span.lane == "stall")
    assert stalls == pytest.approx(ran.stalled_s)


@given(PROGRAMS)
def test_lanes_do_one_thing_at_a_time_and_nothing_before_what_it_follows(program: list[Step]) -> None:
    ran = run(program)
    times = ran.times()
    for place, operation in enumerate(ran.operations):
        start_s, _ = times[place]
        assert start_s >= max([operation.not_before_s, *(times[before][1] for before in operation.after)])
    for lane in LANES:
        own = [span for span in ran.spans if span.lane == lane]
        assert all(before.end_s <= after.start_s for before, after in pairwise(own))
        asked = sum(operation.nbytes for operation in ran.operations if operation.lane == lane)
        assert ran.lanes.ledger.moved(lane) == asked == sum(span.bytes for span in own)
    down = [place for place, operation in enumerate(ran.operations) if operation.lane == "d2h"]
    assert sorted(down, key=lambda place: times[place]) == down


@given(PROGRAMS, st.sampled_from(["h2d_gb_per_s", "d2h_gb_per_s", "host_gb_per_s"]), st.floats(1, 4))
def test_no_chain_is_slower_on_a_faster_machine(program: list[Step], rate: str, factor: float) -> None:
    """A chain only: among operations side by side a faster one may begin first and hold the rest up."""
    chain = [replace(step, back=(1,)) for step in program]
    faster = replace(RATES, **{rate: getattr(RATES, rate) * factor})
    assert run(chain, faster).lanes.now_s <= run(chain).lanes.now_s * (1 + 1e-12)


# Known answers.


def test_what_is_urgent_goes_first_but_interrupts_nothing() -> None:
    lanes = VirtualLanes(machine())
    lanes.ledger.start_trace()
    submit(lanes, "host", 8_000_000_000, [lanes.compute()], 9, "begun")
    lanes.advance(0.5)
    for tag, priority in (("later", 3), ("sooner", 1), ("soon", 2)):
        submit(lanes, "host", 8_000_000_000, [lanes.compute()], priority, tag)
    lanes.synchronize()
    spans = [(span.kind, span.start_s) for span in lanes.ledger.stop_trace() if span.lane == "host"]
    assert spans == [("begun", 0.0), ("sooner", 1.0), ("soon", 2.0), ("later", 3.0)]


def test_what_becomes_ready_meanwhile_waits_its_turn() -> None:
    lanes = VirtualLanes(machine())
    lanes.ledger.start_trace()
    landed = submit(lanes, "d2h", 2_500_000_000, [], 0, "half a second")
    submit(lanes, "host", 8_000_000_000, [], 5, "began first")
    submit(lanes, "host", 8_000_000_000, [landed], 0, "urgent")
    submit(lanes, "host", 8_000_000_000, [], 1, "less urgent")
    lanes.synchronize()
    spans = [(span.kind, span.start_s) for span in lanes.ledger.stop_trace() if span.lane == "host"]
    assert spans == [("less urgent", 0.0), ("urgent", 1.0), ("began first", 2.0)]


def test_a_copy_is_slower_where_the_other_direction_is_busy_as_it_begins() -> None:
    lanes = VirtualLanes(machine())
    lanes.ledger.start_trace()
    down = submit(lanes, "d2h", 5_000_000_000, [], 0, "down")
    submit(lanes, "h2d", 3_000_000_000, [], 0, "both")
    submit(lanes, "h2d", 4_000_000_000, [down], 0, "alone")
    lanes.synchronize()
    spans = {span.kind: (span.start_s, span.end_s) for span in lanes.ledger.stop_trace()}
    assert spans == {"down": (0.0, 1.0), "both": (0.0, 1.0), "alone": (1.0, 2.0)}
    assert lanes.now_s == 2.0


def marked_spans(device_type: str) -> list[tuple[str, str, int, float, float]]:
    lanes = VirtualLanes(machine(device_type=device_type))
    lanes.ledger.start_trace()
    lanes.mark("backward", 2)
    lanes.advance(1.0)
    landed = submit(lanes, "d2h", 10_000_000_000, [lanes.compute()], 2, "gradients")
    lanes.mark("backward", 1)
    lanes.advance(0.5)
    lanes.wait_compute(landed)
    lanes.advance(0.25)
    lanes.wait_compute(landed)  # that it has ended is known
    lanes.mark("")
    spans = [span for span in lanes.ledger.stop_trace() if span.end_s > span.start_s]
    return [(span.lane, span.kind, span.order, span.start_s, span.end_s) for span in spans]


def test_marks_are_cut_where_compute_stalls() -> None:
    assert marked_spans("cuda") == [
        ("compute", "backward", 2, 0.0, 1.0),
        ("d2h", "gradients", 2, 1.0, 3.0),
        ("compute", "backward", 1, 1.0, 1.5),
        ("stall", "gradients", 2, 1.5, 3.0),
        ("compute", "backward", 1, 3.0, 3.25),
    ]


def test_where_the_device_is_the_cpu_all_is_one_after_the_other() -> None:
    assert marked_spans("cpu") == [
        ("compute", "backward", 2, 0.0, 1.0),
        ("d2h", "gradients", 2, 1.0, 3.0),
        ("compute", "backward", 1, 3.0, 3.75),
    ]


@given(PROGRAMS)
def test_a_serial_machine_takes_the_sum(program: list[Step]) -> None:
    lanes = VirtualLanes(machine(device_type="cpu"))
    events: list[Event] = []
    total_s = 0.0
    for step in program:
        if step.lane:
            events.append(submit(lanes, step.lane, step.nbytes, events[-1:], step.priority, "x"))
            total_s += seconds(step.lane, step.nbytes)
        else:
            lanes.advance(step.busy_s)
            lanes.wait_compute(*events)
            total_s += step.busy_s
        assert lanes.now_s == pytest.approx(total_s)
    assert "stall" not in lanes.ledger.lanes


def test_a_decision_is_the_default_and_an_event_of_other_lanes_is_refused() -> None:
    lanes = VirtualLanes(machine())
    assert lanes.read(torch.tensor(2.5), 7.0) == 7.0
    for call in (lambda: lanes.host(_never, after=[Event()]), lambda: lanes.wait_compute(Event())):
        with pytest.raises(AssertionError, match="other lanes"):
            call()


def test_a_machine_without_rates_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"`Machine\(name='a card'\)` has no rates; give them, or let them be measured"
    ):
        VirtualLanes(machine(None))


# Memory.

REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5000), min_size=1, max_size=4),
        st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
        st.sampled_from(["host", "pinned", "device"]),
    ),
    max_size=6,
)


@given(REQUESTS)
def test_buffers_are_counted_as_host_memory_counts_real_ones(requests: list[Any]) -> None:
    lanes = VirtualLanes(machine())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "cudart", FakeCudart)
        memory = HostMemory(machine=machine())
    for place, (sizes, dtype, where) in enumerate(requests):
        made = lanes.buffers(str(place), sizes, dtype, where)
        assert [(tensor.numel(), tensor.dtype) for tensor in made] == [(size, dtype) for size in sizes]
        if where != "device":
            host_buffers(memory, str(place), sizes, dtype, where)
    assert lanes.memory.report() == memory.report()
    memory.close()


def test_nothing_is_locked_where_the_device_is_the_cpu() -> None:
    lanes = VirtualLanes(machine(device_type="cpu"))
    lanes.buffers("wire", [100], torch.float32, "pinned")
    assert (lanes.memory.report().requested_bytes, lanes.memory.report().locked_bytes) == (400, 0)


def test_two_regions_of_one_name_are_refused_as_they_would_be_for_real() -> None:
    lanes = VirtualLanes(machine())
    lanes.buffers("wire", [100], torch.float32, "host")
    with pytest.raises(AssertionError, match="two regions are called 'wire'"):
        lanes.buffers("wire", [100], torch.float32, "host")


def test_who_counts_device_memory_is_told_what_each_buffer_is() -> None:
    told: list[str | None] = []

    @contextmanager
    def counting_as(kind: str | None) -> Iterator[None]:
        told.append(kind)
        yield

    lanes = VirtualLanes(machine(), counting_as)
    lanes.buffers("ring", [1], torch.float32, "device")
    lanes.buffers("home", [1], torch.float32, "pinned")
    lanes.scratch(1, torch.float32)
    assert told == ["slots", None, None]


@pytest.mark.parametrize("lane", ["d2h", "h2d"])
def test_pageable_memory_is_copied_by_the_hosts_worker(lane: Any) -> None:
    """As `AsyncLanes` does it: slower, and in turn with the host's own work."""
    made = machine()
    assert made.rates is not None
    for lanes in (VirtualLanes(made, pin=False), VirtualLanes(replace(made, lockable_bytes=100))):
        (wire,) = lanes.buffers("wire", [1000], torch.float32, "pinned")
        (slot,) = lanes.buffers("slot", [1000], torch.float32, "device")
        assert lanes.memory.report().locked_bytes == 0
        busy = lanes.host(_never, traffic_bytes=10**9)
        ends = (slot, wire) if lane == "h2d" else (wire, slot)
        lanes.wait_compute(lanes.copy([ends[0]], [ends[1]], lane, tag="gradients"), busy)
        expected = 1 / made.rates.host_gb_per_s + 4000 / made.rates.pageable_gb_per_s / 1e9
        assert lanes.now_s == pytest.approx(expected, rel=1e-12)
        assert lanes.asked[lane, "gradients"].bytes == 4000
        assert lanes.asked["host", "gradients pageable"].operations == 1
