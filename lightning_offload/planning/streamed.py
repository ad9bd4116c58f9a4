"""What a step of ``zo2`` waits for, the least that it can take, and what would use the time that it waits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_offload.memory.budget import GIB
from lightning_offload.memory.ledger import Total
from lightning_offload.memory.rates import Rates
from lightning_offload.methods.dryrun import Timing
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2Settings
from lightning_offload.words import gigabytes, seconds

if TYPE_CHECKING:
    from lightning_offload.planning.result import Memory
    from lightning_offload.planning.scenario import Scenario

NAMES = {
    "h2d": "the link up",
    "d2h": "the link down",
    "host": "the host's worker, which copies what is not page-locked",
}


def bound_s(timing: Timing, rates: Rates) -> float:
    """No schedule takes less: compute, or both directions of the link, which slow each other where they overlap."""
    up_s, down_s, host_s = (timing.lanes.get(lane, Total()).seconds for lane in ("h2d", "d2h", "host"))
    return max(timing.compute_s, rates.both_ways_s(up_s, down_s), host_s)


def bottleneck(scenario: Scenario, timing: Timing, counted: tuple[int, str]) -> str:
    """In words, and from how many tokens on it would be another.

    Args:
        scenario: What was planned.
        timing: What came out.
        counted: Tokens or samples of a micro-batch, and which of the two.
    """
    share = timing.compute_s / timing.step_s
    if share > 0.95:
        return f"the device's compute ({100 * share:.0f} % of the step)"
    slow_s, lane = max((timing.lanes[lane].seconds, lane) for lane in NAMES if lane in timing.lanes)
    if slow_s <= timing.compute_s:
        return f"each unit's weights in turn, {seconds(timing.step_s - timing.compute_s)} in all: pass more slots"
    tokens, unit = counted
    fixed_s = timing.compute_s - timing.module_s  # noise and updates do not grow with tokens
    hides = tokens * max(timing.step_s - fixed_s, 0.0) / timing.module_s
    moved = gigabytes(sum(timing.lanes[way].bytes for way in (("h2d", "d2h") if lane == "host" else (lane,))))
    return f"{NAMES[lane]}, {seconds(slow_s)} for {moved}; compute would hide it from about {round(hides):,} {unit}"


def tips(scenario: Scenario, timing: Timing, device: Memory, engine: ZerothEngine) -> Iterator[str]:
    """What the device could do while it waits for the link, and what would shorten the wait.

    Args:
        scenario: What was planned.
        timing: What came out.
        device: What of it is taken.
        engine: That ran dry.
    """
    settings = scenario.settings
    assert isinstance(settings, ZO2Settings)
    idle_s = timing.step_s - timing.compute_s
    if scenario.machine.device_type == "cpu" or idle_s < 0.05 * timing.step_s:
        return
    more = int(timing.step_s / timing.compute_s)
    text = (
        f"the device computes {100 * timing.compute_s / timing.step_s:.0f} % of a step: more tokens per step are free"
    )
    if more > 1 and settings.noise == "philox":
        text += f", or directions={settings.directions * more}"
    yield f"{text}; with micro_batches the parts of a larger batch share a visit of the weights, and its memory"
    free_gib = 0.0 if device.limit_bytes is None else 0.9 * (device.limit_bytes - device.bytes) / GIB
    held_gib = 0.0 if settings.resident == "auto" else settings.resident
    streamed_gib = engine.streaming.host_bytes / GIB
    if free_gib > 0.5 and isinstance(held_gib, int | float):
        asked = math.floor(10 * (held_gib + min(free_gib, streamed_gib + 0.1))) / 10
        kept = "all" if streamed_gib < free_gib else f"{100 * (asked - held_gib) / streamed_gib:.0f} %"
        yield f"weights that stay do not cross the link: resident={asked:.1f} keeps {kept} of what does"
    if scenario.precision in ("32-true", "bf16-mixed") and engine.dtypes.wire is None and settings.noise == "philox":
        yield "precision.wire=float16 halves what crosses the link, and host memory"
