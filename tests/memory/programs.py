"""Random programs over lanes, the order their dependencies declare, and what happens when they run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import Event, Lanes

SIZE = 8
BUFFERS = 4  # the first half on the device, the rest on the host


@dataclass(frozen=True)
class Span:
    buffer: int
    start: int
    end: int

    def overlaps(self, other: Span) -> bool:
        return self.buffer == other.buffer and self.start < other.end and other.start < self.end


@dataclass
class Op:
    """``target <- f(source)``, of equal length; ``after`` are indices of earlier ops."""

    kind: str
    target: Span
    source: Span
    priority: int
    after: set[int] = field(default_factory=set)

    def conflicts(self, other: Op) -> bool:
        if "synchronize" in (self.kind, other.kind):
            return False
        touched = [(self.target, other.target), (self.target, other.source), (self.source, other.target)]
        return any(one.overlaps(two) for one, two in touched)


@st.composite
def spans(draw: st.DrawFn, device: bool, length: int) -> Span:
    half = BUFFERS // 2
    start = draw(st.integers(0, SIZE - length))
    return Span(draw(st.integers(0, half - 1)) + (0 if device else half), start, start + length)


@st.composite
def ops(draw: st.DrawFn) -> Op:
    kind = draw(st.sampled_from(["compute", "host", "d2h", "h2d"] * 4 + ["synchronize"]))
    length = draw(st.sampled_from([SIZE, SIZE, 1, 3, 5]))
    target = draw(spans(kind in ("compute", "h2d"), length))
    source = draw(spans(kind in ("compute", "d2h"), length))
    return Op(kind, target, source, draw(st.integers(-1, 3)))


@st.composite
def programs(draw: st.DrawFn, *, complete: bool, max_size: int = 24) -> list[Op]:
    """``complete`` programs declare every dependency; others forget some."""
    program = draw(st.lists(ops(), min_size=2, max_size=max_size))
    for index, op in enumerate(program):
        if op.kind != "synchronize":
            needed = [at for at in range(index) if op.conflicts(program[at])]
            op.after = {at for at in needed if complete or draw(st.integers(0, 5))}
            if index and draw(st.booleans()):
                op.after.add(draw(st.integers(0, index - 1)))
    return program


def first_race(program: list[Op]) -> int | None:
    """The first op that conflicts with an earlier one that it does not follow; compares everything with everything."""
    follows: list[set[int]] = []
    last_compute: int | None = None
    synchronized: set[int] = set()
    for index, op in enumerate(program):
        known = set(synchronized)
        for at in op.after | ({last_compute} if op.kind == "compute" and last_compute is not None else set()):
            known |= follows[at] | {at}
        follows.append(known)
        if any(op.conflicts(program[at]) for at in range(index) if at not in known):
            return index
        if op.kind == "compute":
            last_compute = index
        if op.kind == "synchronize":
            synchronized = set(range(index + 1))
    return None


_names = count()


def run(program: list[Op], lanes: Lanes, done: list[int] | None = None) -> list[list[float]]:
    """The buffers at the end; ``done`` receives the index of each op that was issued."""
    name, half = f"program{next(_names)}", BUFFERS // 2
    buffers = lanes.buffers(f"{name}.device", [SIZE] * half, torch.float64, "device")
    buffers += lanes.buffers(f"{name}.host", [SIZE] * half, torch.float64, "pinned")
    for index, buffer in enumerate(buffers):
        buffer.copy_(torch.arange(SIZE) + 100 * index)
    lanes.synchronize()
    events: list[Event] = []
    with lanes.checking() if isinstance(lanes, CheckedLanes) else nullcontext():
        for index, op in enumerate(program):
            events.append(_issue(index, op, lanes, buffers, [events[at] for at in sorted(op.after)]))
            if done is not None:
                done.append(index)
    lanes.synchronize()
    return [buffer.tolist() for buffer in buffers]


def _issue(index: int, op: Op, lanes: Lanes, buffers: list[Tensor], after: list[Event]) -> Event:
    target, source = (buffers[span.buffer][span.start : span.end] for span in (op.target, op.source))

    def work() -> None:
        target.copy_((target * 3 + source + index) % 1009)  # small integers: exact, and no two orders give the same

    if op.kind == "synchronize":
        lanes.synchronize()
        return lanes.compute()
    if op.kind == "compute":
        lanes.wait_compute(*after)
        work()
        return lanes.compute()
    if op.kind == "host":
        return lanes.host(work, after=after, priority=op.priority)
    lane = "d2h" if op.kind == "d2h" else "h2d"
    return lanes.copy([target], [source], lane, after=after, priority=op.priority)
