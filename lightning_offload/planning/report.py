"""A plan as text: what a person wants to know first, first."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping

from lightning_offload.planning.methods import SPARSE, SUBSPACE, ZEROTH
from lightning_offload.planning.result import THE_RUN_ITSELF, Advice, Memory, Plan
from lightning_offload.words import (
    count,
    flop_rate,
    gigabytes,
    in_unit,
    memory_unit,
    seconds,
    size,
    size_of_limit,
)

_LANES = {
    "compute": "forward, backward, steps on device",
    "d2h": "gradients, device to host",
    "host": "the host's optimizer step",
    "h2d": "weights, host to device",
}
_LSP = {
    "compute": "forward, backward, updates of weights",
    "d2h": "compressed gradients, device to host",
    "h2d": "deltas and weights, host to device",
}
_ZO2 = {
    "compute": "forwards, noise, updates",
    "d2h": "weights, device to host",
    "host": "copies of what is not page-locked",
    "h2d": "weights, host to device",
}
_ZO2_ON_CPU = {"compute": _ZO2["compute"], "d2h": "copies of weights back"}
_MEFT = {
    "compute": "forward, backward, choosing rows",
    "d2h": "what is chosen, gradient rows",
    "host": "rows chosen, gathered, stepped",
    "h2d": "rows, host to device",
}
_OF_METHOD = {
    (SUBSPACE, False): _LSP,
    (ZEROTH, False): _ZO2,
    (ZEROTH, True): _ZO2_ON_CPU,
    (SPARSE, False): _MEFT,
    (SPARSE, True): {**_MEFT, "d2h": "copies of gradient rows", "h2d": "copies of rows"},
}
"""By method, and whether the CPU is the device."""
_ON_CPU = {
    "compute": "forward, backward, steps in place",
    "d2h": "copies of gradients",
    "host": "optimizer step",
    "h2d": "copies of weights",
}
_WIDTH, _LABEL = 110, 13
_SMALL = 0.005  # share below which a row tells nothing


def report(plan: Plan, *, brief: bool = False) -> str:
    """The plan as text.

    Args:
        plan: Of one configuration.
        brief: Only whether it fits, how fast it is, what it waits for, and what to change.
    """
    parts: list[Iterable[str]] = [_headline(plan), _verdict(plan, brief=brief)]
    if not plan.fits:
        parts.append(_way_out(plan))
    if plan.others:
        parts.append(_compared(plan))
    if not brief:
        parts += [_memory(plan), _time(plan), _notes(plan)]
    return "\n\n".join(text for part in parts if (text := "\n".join(part)))


def _headline(plan: Plan) -> Iterator[str]:
    trained = f" ({count(plan.trained)} trained)" if plan.trained != plan.parameters else ""
    per_step = f"{plan.tokens:,} {plan.unit} per step"
    if plan.micro_batches > 1:
        per_step += f", in {plan.micro_batches} micro-batches"
    yield f"{plan.model}{trained} on {plan.hardware}"
    yield f"method {plan.method}, {plan.precision}, {per_step}"


def _verdict(plan: Plan, *, brief: bool) -> Iterator[str]:
    if plan.fits:
        yield from _line("fits", ", ".join(f"{size_of_limit(m.bytes, m.limit_bytes)} {n}" for n, m in _places(plan)))
    else:
        short = [
            f"{size(m.bytes - (m.limit_bytes or 0))} of {name} missing (takes {size_of_limit(m.bytes, m.limit_bytes)})"
            for name, m in _places(plan)
            if not m.fits
        ]
        yield from _line("does NOT fit", ", ".join(short))
    rates = f"{plan.tokens_per_s:,.0f} {plan.unit}/s, {flop_rate(plan.flops / plan.step_s)}"
    bound = f"; no schedule takes less than {seconds(plan.bound_s)} ({plan.step_s / plan.bound_s:.2f} x)"
    yield from _line("one step", f"{seconds(plan.step_s)}: {rates}{'' if _on_cpu(plan) else bound}")
    yield from _line("waits for", plan.bottleneck)
    if brief and plan.union is not None:
        yield from _line("reckons with", f"a union of {100 * plan.union:.0f} % of a layer's rows, which only data tell")


def _way_out(plan: Plan) -> Iterator[str]:
    if not plan.advice:
        yield from _line("", _hopeless(plan))
        return
    for advice in plan.advice:
        yield from _line("fits with", f"{' and '.join(advice.changes)}: {_effect(advice)}")
        yield f"{'':<{_LABEL}}  {' '.join(advice.overrides)}"


def _effect(advice: Advice) -> str:
    places = (("device memory", advice.device_bytes_saved), ("host memory", advice.host_bytes_saved))
    saved = [f"{size(nbytes)} less {name}" for name, nbytes in places if nbytes > 0]
    return ", ".join([*saved, f"{seconds(advice.step_s)} per step"])


def _hopeless(plan: Plan) -> str:
    weights = sum(nbytes for kind, nbytes in plan.device.holds.items() if kind.startswith("weights"))
    limit = plan.device.limit_bytes
    if limit is not None and weights > limit:
        return (
            f"no setting helps: the weights alone are {size(weights)}, and method `{plan.method}` keeps them on the "
            "device; use a smaller model, a larger device, or method=zo2, which streams them (forwards alone: it needs "
            "a pretrained model and thousands of steps)"
        )
    if not plan.host.fits:
        return "no setting helps: use a smaller model or a machine with more host memory"
    return "no setting tried here helps: use shorter sequences, a smaller model or a larger device"


def _compared(plan: Plan) -> Iterator[str]:
    plans = (plan, *plan.others)
    unit = memory_unit(max(memory.bytes for each in plans for _, memory in _places(each)))
    names = [name.removesuffix(" memory") for name, _ in _places(plan)]
    yield " ".join([f"{'method':<14}", *(f"{f'{n} {unit}':>11}" for n in names), f"{'step':>9} {plan.unit + '/s':>10}"])
    for each in plans:
        sizes = [f"{in_unit(memory.bytes, unit):>11}" for _, memory in _places(each)]
        speed = f"{seconds(each.step_s):>9} {each.tokens_per_s:>10,.0f}  "
        yield " ".join([f"{each.method:<14}", *sizes, speed, "fits" if each.fits else "does NOT fit"])


def _memory(plan: Plan) -> Iterator[str]:
    places = list(_places(plan))
    unit = memory_unit(max(memory.bytes for _, memory in places))
    for name, memory in places:
        if not memory.bytes:
            continue
        whole = f"{in_unit(memory.bytes, unit):>9} {unit}"
        limit = f" of {size(memory.limit_bytes)}" if memory.limit_bytes else ""
        yield f"{name:<38} {whole}{limit}{'' if memory.fits else ': too much'}"
        for kind, nbytes in _telling(memory.holds):
            yield f"  {kind:<36} {in_unit(nbytes, unit):>9} {100 * nbytes / memory.bytes:>9.0f} %"
    if plan.pinned.bytes:
        yield f"  {'page-locked of it':<36} {in_unit(plan.pinned.bytes, unit):>9}"
    if _copies_pageable(plan):
        most = "" if plan.pinned.limit_bytes is None else f" ({size(plan.pinned.limit_bytes)} at most)"
        yield f"  not all that is copied is page-locked{most}: the host's worker copies the rest, slower"


def _copies_pageable(plan: Plan) -> bool:
    """Whether the host's worker has copies to make beside its steps."""
    by_worker = any(span.lane == "host" and span.kind.endswith(" pageable") for span in plan.spans)
    return by_worker or not plan.pinned.fits


def _telling(holds: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Rows from the largest; the smallest ones as one."""
    least = _SMALL * sum(holds.values())
    yield from sorted(((kind, n) for kind, n in holds.items() if n >= least), key=lambda row: -row[1])
    rest = sum(n for n in holds.values() if n < least)
    if rest >= least:
        yield "the rest", rest


def _time(plan: Plan) -> Iterator[str]:
    labels = (_ON_CPU if _on_cpu(plan) else _LANES) | _OF_METHOD.get((plan.method, _on_cpu(plan)), {})
    yield f"{'time of one step':<38} {seconds(plan.step_s):>13}"
    for lane, label in labels.items():
        use = plan.lanes.get(lane)
        if use is None or not use.busy_s:
            continue
        moved = (
            f"   {gigabytes(use.bytes)}{' moved through host memory' if lane == 'host' else ''}" if use.bytes else ""
        )
        yield f"  {label:<36} {seconds(use.busy_s):>13} {100 * use.busy_s / plan.step_s:>5.0f} %{moved}"


def _notes(plan: Plan) -> Iterator[str]:
    for note in plan.notes:
        yield from textwrap.wrap(note, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False)


def _places(plan: Plan) -> Iterator[tuple[str, Memory]]:
    """Device and host; one memory where the CPU is both."""
    if not _on_cpu(plan):
        yield "device memory", plan.device
        yield "host memory", plan.host
        return
    arenas = {kind: nbytes for kind, nbytes in plan.host.holds.items() if kind != THE_RUN_ITSELF}
    yield "memory", Memory({**plan.device.holds, **arenas}, plan.host.limit_bytes)


def _on_cpu(plan: Plan) -> bool:
    return THE_RUN_ITSELF in plan.host.holds


def _line(label: str, text: str) -> list[str]:
    indent = f"{label:<{_LABEL}}"
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=" " * _LABEL, break_long_words=False)
