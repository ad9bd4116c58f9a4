"""``CheckedLanes``: every missing dependency is an error that names the buffer and both operations."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_offload.errors import RaceError
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import Event
from tests.memory.programs import Op, first_race, programs, run


class Case:
    """Lanes with a device and a host buffer; ``need`` is a dependency that the broken version leaves out."""

    def __init__(self, complete: bool) -> None:
        self.lanes = CheckedLanes(HostMemory(pin=False))
        self.complete = complete
        self.device, self.device2 = self.lanes.buffers("weight", [6, 6], torch.float32, "device")
        self.home, self.home2 = self.lanes.buffers("wire", [6, 6], torch.float32, "pinned")
        for buffer in (self.device, self.device2):
            buffer.fill_(1)

    def need(self, *events: Event) -> list[Event]:
        return list(events) if self.complete else []

    def wait(self, event: Event) -> None:
        if self.complete:
            self.lanes.wait_compute(event)

    def down(self, *after: Event) -> Event:
        return self.lanes.copy([self.home], [self.device], "d2h", after=after, tag="gradient")

    def up(self, *after: Event) -> Event:
        return self.lanes.copy([self.device], [self.home], "h2d", after=after, tag="weights")

    def host(self, fn: Callable[[], object], *after: Event, tag: str = "step") -> Event:
        return self.lanes.host(fn, after=after, tag=tag)


def d2h_then_host_reads(case: Case) -> None:
    case.host(lambda: case.home.sum(), *case.need(case.down(case.lanes.compute())))


def d2h_then_host_reads_one_number(case: Case) -> None:
    case.host(lambda: float(case.home[2]), *case.need(case.down(case.lanes.compute())))


def host_writes_then_h2d(case: Case) -> None:
    case.up(case.lanes.compute(), *case.need(case.host(lambda: case.home.fill_(1))))


def h2d_then_compute_reads(case: Case) -> None:
    case.wait(case.up(case.lanes.compute()))
    case.device.sum()


def compute_writes_then_d2h(case: Case) -> None:
    case.device.fill_(1)
    case.down(*case.need(case.lanes.compute()))


def compute_writes_after_its_marker_then_d2h(case: Case) -> None:
    early = case.lanes.compute()
    case.device.fill_(1)
    case.down(early, *case.need(case.lanes.compute()))


def compute_reads_then_h2d(case: Case) -> None:
    case.device.sum()
    case.up(*case.need(case.lanes.compute()))


def two_copies_into_one_buffer(case: Case) -> None:
    first = case.down(case.lanes.compute())
    case.lanes.copy([case.home], [case.device2], "d2h", after=case.need(first), tag="other")


def h2d_reads_then_host_writes(case: Case) -> None:
    case.host(lambda: case.home.fill_(1), *case.need(case.up(case.lanes.compute())))


def d2h_reads_then_compute_writes(case: Case) -> None:
    case.wait(case.down(case.lanes.compute()))
    case.device.fill_(2)


def two_host_functions_write(case: Case) -> None:
    first = case.host(lambda: case.home.fill_(1), tag="first")
    case.host(lambda: case.home.fill_(2), *case.need(first))


def foreach_writes_a_list(case: Case) -> None:
    landed = case.down(case.lanes.compute())
    case.host(lambda: torch._foreach_mul_([case.home2, case.home], 2.0), *case.need(landed))


def fused_adamw_writes_a_list(case: Case) -> None:
    landed = case.down(case.lanes.compute())
    grad, first, second = (torch.zeros(6) for _ in range(3))

    def step() -> None:
        torch._fused_adamw_(
            [case.home], [grad], [first], [second], [], [torch.ones(())],
            lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    case.host(step, *case.need(landed))


def fused_adamw_reads_a_list(case: Case) -> None:
    landed = case.down(case.lanes.compute())
    weight, first, second = (torch.zeros(6) for _ in range(3))

    def step() -> None:
        torch._fused_adamw_(
            [weight], [case.home], [first], [second], [], [torch.ones(())],
            lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    case.host(step, *case.need(landed))


def out_argument_is_written(case: Case) -> None:
    landed = case.down(case.lanes.compute())
    case.host(lambda: torch.add(torch.ones(6), 1, out=case.home), *case.need(landed))


def a_view_is_its_buffer(case: Case) -> None:
    landed = case.down(case.lanes.compute())
    case.host(lambda: case.home.view(2, 3)[1, 1:].detach().add_(1), *case.need(landed))


def a_part_overlaps_a_part(case: Case) -> None:
    landed = case.lanes.copy([case.home[1:4]], [case.device[1:4]], "d2h", after=[case.lanes.compute()], tag="gradient")
    case.host(lambda: case.home[3:].sum(), *case.need(landed))


def a_race_with_what_a_partial_write_left(case: Case) -> None:
    landed = case.down(case.lanes.compute())
    over = case.lanes.copy([case.home[:5]], [case.device2[:5]], "d2h", after=[landed, case.lanes.compute()], tag="over")
    # `over` covers all but the last element, which it therefore does not stand for
    case.host(lambda: case.home[5:].add_(1), *case.need(over))


def a_race_with_a_read_that_a_write_covered(case: Case) -> None:
    read = case.up(case.lanes.compute())
    written = case.host(lambda: case.home.fill_(1), read, tag="write")
    # only ordered after the read, not after the write that has taken its place
    case.host(lambda: case.home.fill_(2), read, *case.need(written))


def backward_reads_the_weight(case: Case) -> None:
    weight = case.device.view(2, 3).requires_grad_()
    loss = (torch.ones(4, 2, requires_grad=True) @ weight).sum()
    early = case.lanes.compute()
    if case.complete:
        loss.backward()
        early = case.lanes.compute()
    case.lanes.copy([weight.data], [case.home.view(2, 3)], "h2d", after=[early], tag="weights")  # autograd sees nothing
    if not case.complete:
        loss.backward()


def _recomputed(case: Case, *, use_reentrant: bool) -> None:
    weight = case.device.view(2, 3).requires_grad_()
    x = torch.ones(4, 2, requires_grad=True)
    # sin saves nothing of the weight: only the forward that is run again reads it
    loss = checkpoint(lambda x: x[:, :1] * weight.detach().sum(), x, use_reentrant=use_reentrant).sum()
    early = case.lanes.compute()
    if case.complete:
        loss.backward()
        early = case.lanes.compute()
    case.lanes.copy([weight.data], [case.home.view(2, 3)], "h2d", after=[early], tag="weights")  # autograd sees nothing
    if not case.complete:
        loss.backward()


def recompute_reads_the_weight(case: Case) -> None:
    _recomputed(case, use_reentrant=False)


def reentrant_recompute_reads_the_weight(case: Case) -> None:
    _recomputed(case, use_reentrant=True)


def native_code_that_says_so(case: Case) -> None:
    landed = case.down(case.lanes.compute())
    case.host(lambda: case.lanes.touch(case.home, write=True), *case.need(landed))


CASES = {  # what the message must name: the earlier operation, the later one, the buffer
    d2h_then_host_reads: ("d2h gradient", "host step", "wire[0]"),
    d2h_then_host_reads_one_number: ("d2h gradient", "host step", "wire[0]"),
    host_writes_then_h2d: ("host step", "h2d weights", "wire[0]"),
    h2d_then_compute_reads: ("h2d weights", "compute", "weight[0]"),
    compute_writes_then_d2h: ("compute", "d2h gradient", "weight[0]"),
    compute_writes_after_its_marker_then_d2h: ("compute", "d2h gradient", "weight[0]"),
    compute_reads_then_h2d: ("compute", "h2d weights", "weight[0]"),
    two_copies_into_one_buffer: ("d2h gradient", "d2h other", "wire[0]"),
    h2d_reads_then_host_writes: ("h2d weights", "host step", "wire[0]"),
    d2h_reads_then_compute_writes: ("d2h gradient", "compute", "weight[0]"),
    two_host_functions_write: ("host first", "host step", "wire[0]"),
    foreach_writes_a_list: ("d2h gradient", "host step", "wire[0]"),
    fused_adamw_writes_a_list: ("d2h gradient", "host step", "wire[0]"),
    fused_adamw_reads_a_list: ("d2h gradient", "host step", "wire[0]"),
    out_argument_is_written: ("d2h gradient", "host step", "wire[0]"),
    a_view_is_its_buffer: ("d2h gradient", "host step", "wire[0]"),
    a_part_overlaps_a_part: ("d2h gradient", "host step", "wire[0]"),
    a_race_with_what_a_partial_write_left: ("d2h gradient", "host step", "wire[0]"),
    a_race_with_a_read_that_a_write_covered: ("host write", "host step", "wire[0]"),
    backward_reads_the_weight: ("h2d weights", "compute", "weight[0]"),
    recompute_reads_the_weight: ("h2d weights", "compute", "weight[0]"),
    reentrant_recompute_reads_the_weight: ("h2d weights", "compute", "weight[0]"),
    native_code_that_says_so: ("d2h gradient", "host step", "wire[0]"),
}


@pytest.mark.parametrize("program", CASES, ids=lambda program: program.__name__)
def test_a_missing_dependency_names_the_buffer_and_both_operations(program: Callable[[Case], None]) -> None:
    earlier, later, buffer = CASES[program]
    case = Case(complete=False)
    expected = rf"`{re.escape(later)}` (reads|writes) buffer `{re.escape(buffer)}`, which `{re.escape(earlier)}` "
    with case.lanes.checking(), pytest.raises(RaceError, match=expected):
        program(case)


@pytest.mark.parametrize("program", CASES, ids=lambda program: program.__name__)
def test_the_declared_dependency_is_enough(program: Callable[[Case], None]) -> None:
    case = Case(complete=True)
    with case.lanes.checking():
        program(case)


def test_copies_and_host_work_are_checked_outside_of_checking_too() -> None:
    case = Case(complete=False)
    with pytest.raises(RaceError, match="host step"):
        d2h_then_host_reads(case)


def test_weights_of_the_module_are_checked_once_declared() -> None:
    lanes = CheckedLanes(HostMemory(pin=False))
    layer = nn.Linear(3, 2, bias=False)
    (home,) = lanes.buffers("wire", [6], torch.float32, "pinned")
    lanes.watch("layer.weight", layer.weight)
    with lanes.checking():
        layer(torch.ones(1, 3))
        with pytest.raises(RaceError, match=r"`layer\.weight`"):
            lanes.copy([layer.weight.detach()], [home.view(2, 3)], "h2d", tag="weights")


def test_no_race_where_nothing_conflicts() -> None:
    case = Case(complete=True)
    with case.lanes.checking():
        start = case.lanes.compute()
        case.lanes.copy([case.home[:3]], [case.device[:3]], "d2h", after=[start])
        case.lanes.copy([case.home[3:]], [case.device[3:]], "d2h", after=[start])  # the other half
        case.lanes.copy([case.home2], [case.device], "d2h", after=[start])  # reads what the others read
        case.device.sum()


def test_synchronize_orders_everything_before_it_and_everything_after() -> None:
    case = Case(complete=True)
    with case.lanes.checking():
        case.down(case.lanes.compute())
        case.lanes.synchronize()
        case.host(lambda: case.home.add_(1))  # follows nothing: the main thread has waited
        case.lanes.synchronize()
        case.home.sum()
        case.lanes.synchronize()
        case.up()
        with pytest.raises(RaceError, match="compute"):
            case.device.sum()


@pytest.mark.parametrize("layout", [lambda t: t.to_sparse(), lambda t: t[:0]], ids=["sparse", "empty"])
def test_what_has_no_bytes_in_a_buffer_is_no_access(layout: Callable[[Tensor], Tensor]) -> None:
    case = Case(complete=True)
    made = layout(case.home)
    with case.lanes.checking():
        case.down(case.lanes.compute())
        made.clone()


def test_a_failed_operation_leaves_later_accesses_to_compute() -> None:
    case = Case(complete=True)
    with case.lanes.checking():
        with pytest.raises(ZeroDivisionError):
            case.host(lambda: 1 / 0)
        case.device.fill_(1)
        with pytest.raises(RaceError, match="which `compute` writes"):
            case.down()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs(complete=False))
def test_races_are_found_exactly_where_comparing_everything_with_everything_finds_them(program: list[Op]) -> None:
    """What is forgotten of old accesses is never missed."""
    done: list[int] = []
    try:
        run(program, CheckedLanes(HostMemory(pin=False)), done)
        found = None
    except RaceError:
        found = len(done)
    assert found == first_race(program)


def test_what_is_remembered_does_not_grow_with_the_run() -> None:
    """Thousands of steps: reads that nothing overwrites, and buffers that are written piece by piece."""
    case = Case(complete=True)
    lengths = []
    with case.lanes.checking():
        for _ in range(300):
            case.device2.sum()  # never overwritten
            start = case.lanes.compute()
            pieces = [
                case.lanes.copy([case.home[at : at + 2]], [case.device[at : at + 2]], "d2h", after=[start])
                for at in (0, 2, 4)
            ]
            stepped = case.host(lambda: case.home.add_(1), *pieces)
            case.lanes.wait_compute(case.up(stepped, start))
            case.device.sum()
            lengths.append(sum(len(watched.accesses) for watched in case.lanes._watched))
    assert lengths[-1] == lengths[2] < 20
