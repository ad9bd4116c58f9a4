"""What every back end promises, and what is special about ``InlineLanes``."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes, ShuffledLanes
from lightning_offload.memory.lanes import Event, InlineLanes, Lanes
from lightning_offload.memory.ledger import Span
from tests.streams import thread_lanes

pytestmark = pytest.mark.timeout(60)

KINDS = ["inline", "checked", "shuffled", "async", "pageable"]


@pytest.fixture(params=KINDS)
def lanes(request: pytest.FixtureRequest) -> Iterator[Lanes]:
    if request.param in ("async", "pageable"):
        with thread_lanes(pinned=request.param == "async") as made:
            yield made
        return
    makers: dict[str, Callable[[HostMemory], Lanes]] = {
        "inline": InlineLanes,
        "checked": CheckedLanes,
        "shuffled": ShuffledLanes,
    }
    yield makers[request.param](HostMemory(pin=False))


def buffers(lanes: Lanes, *names: str, numel: int = 6) -> list[Tensor]:
    return [lanes.buffers(name, [numel], torch.float32, "host")[0] for name in names]


def round_trip(lanes: Lanes, start: float, name: str) -> Tensor:
    """Compute writes, down, host doubles, up, compute adds one."""
    device, result = (lanes.buffers(f"{name}.{at}", [6], torch.float32, "device")[0] for at in range(2))
    (home,) = lanes.buffers(f"{name}.home", [6], torch.float32, "pinned")
    device.fill_(start)
    landed = lanes.copy([home], [device], "d2h", after=[lanes.compute()], tag="down")
    doubled = lanes.host(lambda: home.mul_(2), after=[landed], tag="double", traffic_bytes=48)
    arrived = lanes.copy([device], [home], "h2d", after=[doubled], tag="up")
    lanes.wait_compute(arrived)
    result.copy_(device + 1)
    return result


def test_down_through_the_host_and_up_again(lanes: Lanes) -> None:
    results = [round_trip(lanes, start, f"trip{start}") for start in (1.0, 2.0, 3.0)]
    assert [result.unique().item() for result in results] == [3.0, 5.0, 7.0]


def test_ledger_counts_every_byte_once(lanes: Lanes) -> None:
    for trip in range(3):
        round_trip(lanes, 1.0, f"trip{trip}")
    lanes.synchronize()
    kinds = {key: (total.operations, total.bytes) for key, total in lanes.ledger.kinds.items() if key[0] != "wait"}
    pageable = {("host", "down pageable"): (3, 0), ("host", "up pageable"): (3, 0)}
    streams = getattr(lanes, "streams", None)
    expected = {("d2h", "down"): (3, 72), ("host", "double"): (3, 144), ("h2d", "up"): (3, 72)}
    assert kinds == expected | (pageable if streams is not None and not streams.pinned else {})


def test_buffers_have_the_sizes_and_dtype_asked_for_whatever_the_default(lanes: Lanes) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            for place in ("device", "host", "pinned"):
                made = lanes.buffers(place, [3, 0, 5], torch.float32, place)
                assert [tensor.numel() for tensor in made] == [3, 0, 5]
                assert {tensor.dtype for tensor in made} == {torch.float32}
                assert not any(tensor.is_inference() for tensor in made)
            assert lanes.scratch(4, torch.float16).dtype == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    assert {usage.requested_bytes for usage in lanes.memory.report().by_name.values()} == {32}


def test_scratch_is_on_the_host_and_large_enough(lanes: Lanes) -> None:
    with torch.device("meta"):
        small, large, again = (lanes.scratch(numel, torch.float32) for numel in (2, 7, 3))
    assert [tensor.numel() for tensor in (small, large, again)] == [2, 7, 3]
    assert large.device.type == "cpu"
    assert again.data_ptr() == large.data_ptr()


def test_host_functions_run_without_autograd_autocast_and_inference_mode(lanes: Lanes) -> None:
    seen: list[object] = []

    def look() -> None:
        made = torch.ones(2, 2, dtype=torch.float32)
        seen.extend([torch.is_grad_enabled(), torch.is_inference_mode_enabled(), (made @ made).dtype])

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        lanes.host(look)
        lanes.synchronize()
    with torch.enable_grad():
        lanes.host(look)
        lanes.synchronize()
    assert seen == [False, False, torch.float32] * 2


def test_a_copy_writes_a_leaf_that_requires_grad_and_bumps_no_graph(lanes: Lanes) -> None:
    weight = torch.zeros(6, requires_grad=True)
    (home,) = buffers(lanes, "home")
    home.fill_(3)
    lanes.wait_compute(lanes.copy([weight], [home], "h2d", after=[lanes.compute()]))
    assert weight.tolist() == [3.0] * 6
    assert weight.grad_fn is None


@pytest.mark.parametrize("wrong", [torch.zeros(6, dtype=torch.float64), torch.zeros(3), torch.zeros(2, 3)])
def test_a_copy_never_converts_nor_reshapes(lanes: Lanes, wrong: Tensor) -> None:
    (home,) = buffers(lanes, "home")
    with pytest.raises(AssertionError, match=r"torch\.float32"):
        _copy_and_wait(lanes, [home], [wrong])


def _copy_and_wait(lanes: Lanes, dst: list[Tensor], src: list[Tensor]) -> None:
    lanes.copy(dst, src, "d2h", after=[lanes.compute()])
    lanes.synchronize()


def test_a_copy_takes_as_many_sources_as_targets(lanes: Lanes) -> None:
    one, other = buffers(lanes, "one", "other")
    with pytest.raises(ValueError, match="zip"):
        _copy_and_wait(lanes, [one, other], [torch.zeros(6)])


def break_here() -> None:
    raise OSError("the host function failed")


def test_an_error_of_a_host_function_is_raised_once_with_its_traceback_and_its_followers_never_happen(
    lanes: Lanes,
) -> None:
    one, other = buffers(lanes, "one", "other")
    one.fill_(1)
    other.fill_(2)
    with pytest.raises(OSError, match="host function failed") as raised:
        _fail_and_follow(lanes, one, other)
    assert "break_here" in "".join(traceback.format_tb(raised.value.__traceback__))
    lanes.synchronize()
    assert one.tolist() == [1.0] * 6
    assert round_trip(lanes, 4.0, "afterwards").unique().item() == 9.0


def _fail_and_follow(lanes: Lanes, one: Tensor, other: Tensor) -> None:
    failed = lanes.host(break_here, after=[lanes.compute()])
    arrived = lanes.copy([one], [other], "h2d", after=[failed])
    lanes.host(lambda: one.fill_(5), after=[arrived])
    lanes.synchronize()


def test_what_does_not_follow_a_failed_operation_happens(lanes: Lanes) -> None:
    (home,) = buffers(lanes, "home")
    lanes.host(lambda: home.fill_(1))
    with pytest.raises(OSError, match="host function failed"):
        _fail_alone(lanes)
    lanes.synchronize()
    assert home.tolist() == [1.0] * 6


def _fail_alone(lanes: Lanes) -> None:
    lanes.host(break_here)
    lanes.synchronize()


def test_close_twice_and_host_memory_stays_readable(lanes: Lanes) -> None:
    (home,) = buffers(lanes, "home")
    lanes.host(lambda: home.fill_(7))
    lanes.synchronize()
    lanes.close()
    lanes.close()
    lanes.synchronize()
    assert home.tolist() == [7.0] * 6
    assert lanes.memory.report().requested_bytes == 0


def test_lanes_work_after_close_and_can_be_closed_again(lanes: Lanes) -> None:
    """Weights that are loaded after teardown still reach their masters."""
    (home,) = buffers(lanes, "home")
    lanes.close()
    before = threading.active_count()
    lanes.host(lambda: home.fill_(7))
    lanes.synchronize()
    assert home.tolist() == [7.0] * 6
    lanes.close()
    assert threading.active_count() == before


def test_an_event_of_other_lanes_is_refused(lanes: Lanes) -> None:
    if type(lanes) is InlineLanes:
        pytest.skip("InlineLanes has nothing to wait for")
    (home,) = buffers(lanes, "home")
    foreign = Event()
    calls: list[Callable[[], object]] = [
        lambda: lanes.host(lambda: None, after=[foreign]),
        lambda: lanes.copy([home], [home.clone()], "d2h", after=[foreign]),
        lambda: lanes.wait_compute(foreign),
    ]
    for call in calls:
        with pytest.raises(AssertionError, match="other lanes"):
            call()


def test_read_gives_a_number(lanes: Lanes) -> None:
    assert lanes.read(torch.tensor(2.5), 0.0) == 2.5


def test_after_may_be_any_iterable(lanes: Lanes) -> None:
    one, other = buffers(lanes, "one", "other")
    filled = lanes.host(lambda: one.fill_(1))
    lanes.host(lambda: other.copy_(one), after=(event for event in [filled]))
    lanes.synchronize()
    assert other.tolist() == [1.0] * 6


def test_inline_runs_each_operation_before_it_returns() -> None:
    lanes = InlineLanes(HostMemory(pin=False))
    one, other = buffers(lanes, "one", "other")
    lanes.host(lambda: one.fill_(1))
    lanes.copy([other], [one], "d2h")
    assert other.tolist() == [1.0] * 6


# Traces.


def traced(lanes: Lanes, trips: int = 3) -> list[Span]:
    """Round trips with marks around what compute does; the order of a trip is its priority."""
    lanes.synchronize()
    lanes.ledger.start_trace()
    for trip in range(1, trips + 1):
        device, result = (lanes.buffers(f"{trip}.{at}", [6], torch.float32, "device")[0] for at in range(2))
        (home,) = lanes.buffers(f"{trip}.home", [6], torch.float32, "pinned")
        lanes.mark("forward", trip)
        device.fill_(trip)
        landed = lanes.copy([home], [device], "d2h", after=[lanes.compute()], priority=trip, tag="down")
        doubled = lanes.host(partial(home.mul_, 2), after=[landed], priority=trip, tag="double", traffic_bytes=48)
        arrived = lanes.copy([device], [home], "h2d", after=[doubled], priority=trip, tag="up")
        lanes.mark("backward", trip)
        lanes.wait_compute(arrived)
        result.copy_(device + 1)
        lanes.mark("")
    lanes.synchronize()
    return lanes.ledger.stop_trace()


def test_a_trace_has_what_happened_in_its_order(lanes: Lanes) -> None:
    round_trip(lanes, 1.0, "before")
    spans = traced(lanes)
    for trip in (1, 2, 3):
        down, double, up = (
            next(span for span in spans if (span.kind, span.order) == (kind, trip)) for kind in ("down", "double", "up")
        )
        assert [(span.lane, span.bytes) for span in (down, double, up)] == [("d2h", 24), ("host", 48), ("h2d", 24)]
        assert down.start_s <= down.end_s <= double.start_s <= double.end_s <= up.start_s <= up.end_s
        waiting = [span for span in spans if (span.kind, span.order) == ("backward", trip)]
        assert not any(span.start_s < up.end_s and up.start_s < span.end_s for span in waiting)
        assert any(span.start_s >= up.end_s for span in waiting)
    assert {span.order for span in spans if span.lane == "compute"} == {1, 2, 3}
    assert [span.start_s for span in spans] == sorted(span.start_s for span in spans)


def test_no_lane_does_two_things_at_once(lanes: Lanes) -> None:
    spans = traced(lanes)
    for lane in ("compute", "d2h", "host", "h2d"):
        own = [span for span in spans if span.lane == lane]
        assert len(own) >= 3
        assert all(before.end_s <= after.start_s for before, after in pairwise(own)), lane


def test_totals_are_the_sums_of_the_spans(lanes: Lanes) -> None:
    spans = traced(lanes)
    assert {span.lane for span in spans} == lanes.ledger.snapshot().keys()
    for lane, total in lanes.ledger.snapshot().items():
        own = [span for span in spans if span.lane == lane]
        assert (total.operations, total.bytes) == (len(own), sum(span.bytes for span in own))
        assert total.seconds == pytest.approx(sum(span.end_s - span.start_s for span in own))


def test_without_a_trace_marks_leave_nothing(lanes: Lanes) -> None:
    lanes.mark("forward", 1)
    round_trip(lanes, 1.0, "trip")
    lanes.mark("")
    lanes.synchronize()
    assert lanes.ledger.spans is None
    assert lanes.ledger.marked == ("", -1)
    assert "compute" not in lanes.ledger.lanes
