"""A plan as text: what a person wants to know first, first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_offload.memory.budget import GIB
from lightning_offload.planning.result import Memory, Plan

_LANES = {"compute": "device", "d2h": "link down", "host": "host", "h2d": "link up"}


def report(plan: Plan) -> str:
    """The whole plan."""
    lines = [_headline(plan), ""]
    if plan.others:
        lines += [*_compared(plan), ""]
    lines += [*_memory("device", plan.device), *_memory("host", plan.host)]
    if plan.pinned.bytes:
        lines.append(f"  of which page-locked {_size(plan.pinned)}")
    lines += ["", *_time(plan)]
    lines += ["", *_verdict(plan)]
    if plan.notes:
        lines += ["", *(f"- {note}" for note in plan.notes)]
    return "\n".join(lines)


def _headline(plan: Plan) -> str:
    frozen = "" if plan.trained == plan.parameters else f" ({plan.trained / 1e9:.3g} B trained)"
    batches = (
        f"{plan.micro_batches} x {plan.tokens // plan.micro_batches:,}"
        if plan.micro_batches > 1
        else f"{plan.tokens:,}"
    )
    return f"{plan.model}{frozen}, {plan.method}, {plan.precision}, {plan.hardware}; {batches} {plan.unit} per step"


def _memory(name: str, memory: Memory) -> Iterator[str]:
    yield f"{name} memory, {_size(memory)}"
    for kind, count in sorted(memory.holds.items(), key=lambda item: -item[1]):
        if count >= GIB // 10_000:
            yield f"  {kind:<36} {count / GIB:>9.3f} GiB"


def _size(memory: Memory) -> str:
    if memory.limit_bytes is None:
        return f"{memory.bytes / GIB:.2f} GiB"
    return f"{memory.bytes / GIB:.2f} of {memory.limit_bytes / GIB:.2f} GiB" + ("" if memory.fits else ": too much")


def _time(plan: Plan) -> Iterator[str]:
    yield (
        f"step {plan.step_s:.3g} s, {plan.tokens_per_s:,.0f} {plan.unit}/s, "
        f"{plan.flops / plan.step_s / 1e12:.3g} TFLOP/s; bound {plan.bound_s:.3g} s "
        f"({plan.step_s / plan.bound_s:.2f} x)"
    )
    for lane, label in _LANES.items():
        use = plan.lanes.get(lane)
        if use is not None and use.busy_s:
            moved = f"{use.bytes / 1e9:>10.3f} GB" if lane != "compute" else ""
            yield f"  {label:<12} {use.busy_s:>9.3f} s busy  {100 * use.busy_s / plan.step_s:>4.0f} %  {moved}".rstrip()
    yield f"the step waits for {plan.bottleneck}"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.fits:
        yield "fits"
        return
    short = [
        f"{(memory.bytes - (memory.limit_bytes or 0)) / GIB:.2f} GiB of {name} memory"
        for name, memory in (("device", plan.device), ("host", plan.host))
        if not memory.fits
    ]
    yield f"does NOT fit: {' and '.join(short)} missing"
    if not plan.advice:
        yield _hopeless(plan)
    for advice in plan.advice:
        saved = [
            f"{nbytes / GIB:.2f} GiB of {name} memory"
            for name, nbytes in (("device", advice.device_bytes_saved), ("host", advice.host_bytes_saved))
            if nbytes > 0
        ]
        yield f"  fits with {'; '.join(advice.changes)}: saves {', '.join(saved)}, step {advice.step_s:.3g} s"
        yield f"    {' '.join(advice.overrides)}"


def _hopeless(plan: Plan) -> str:
    weights = sum(count for kind, count in plan.device.holds.items() if kind.startswith("weights"))
    limit = plan.device.limit_bytes
    if limit is not None and weights > limit:
        return (
            f"  no setting helps: the weights alone are {weights / GIB:.1f} GiB, and method `{plan.method}` keeps them "
            "on the device; use a smaller model or a larger device"
        )
    if not plan.host.fits:
        return "  no setting helps: use a smaller model or a machine with more host memory"
    return "  no setting tried here helps: use shorter sequences, a smaller model or a larger device"


def _compared(plan: Plan) -> Iterator[str]:
    plans: Sequence[Plan] = (plan, *plan.others)
    yield f"{'method':<16} {'device GiB':>10} {'host GiB':>10} {'step s':>8} {plan.unit + '/s':>10} {'x bound':>8}  "
    for each in plans:
        yield (
            f"{each.method:<16} {each.device.bytes / GIB:>10.2f} {each.host.bytes / GIB:>10.2f} {each.step_s:>8.3g} "
            f"{each.tokens_per_s:>10,.0f} {each.step_s / each.bound_s:>8.2f}  {'fits' if each.fits else 'does NOT fit'}"
        )
