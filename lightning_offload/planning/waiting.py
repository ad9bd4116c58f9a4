"""What a step waits for, and what no schedule of its method could do without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_offload.memory.ledger import Span, Total
from lightning_offload.methods.dryrun import Timing
from lightning_offload.planning import rows
from lightning_offload.planning.methods import NATIVE, SPARSE, SUBSPACE, ZEROTH
from lightning_offload.planning.streamed import bottleneck, bound_s
from lightning_offload.words import seconds

if TYPE_CHECKING:
    from lightning_offload.planning.scenario import Scenario

_NAMES = {"host": "the host's work", "d2h": "the link down", "h2d": "the link up"}


@dataclass(frozen=True)
class Waiting:
    """See the module docstring.

    Attributes:
        scenario: What was planned.
        timing: What came out.
        decides_late: Whether all gradients together decide a step.
    """

    scenario: Scenario
    timing: Timing
    decides_late: bool

    @property
    def bound_s(self) -> float:
        """See ``targets.md``: what all gradients decide together waits for the end of backward, else the last alone.

        Of lsp also the way of the unit that is needed first, which is whole where others are (embeddings).
        """
        timing, lanes = self.timing, self.timing.lanes
        busy = {lane: lanes.get(lane, Total()).seconds for lane in ("d2h", "h2d", "host")}
        if self.scenario.machine.device_type == "cpu" or self.scenario.method == NATIVE:
            return timing.compute_s + sum(busy.values())
        if self.scenario.method == ZEROTH:
            rates = self.scenario.machine.rates
            assert rates is not None
            return bound_s(timing, rates)
        if not self.decides_late:
            return max(timing.compute_s + self._tail_s(), *busy.values())
        forward_s = timing.forward_s + timing.apply_s
        if self.scenario.method == SUBSPACE:
            forward_s += self._tail_s("host", "h2d")
        hidden = max(forward_s, self._of_lane("host", "step"), self._up_s)
        late = timing.module_s - timing.forward_s + timing.compress_s + hidden
        return max(timing.compute_s, late, *busy.values())

    @property
    def _up_s(self) -> float:
        return sum(self._of_lane("h2d", kind) for kind in ("weights", "deltas", "rows that stay"))

    def _tail_s(self, *lanes: str) -> float:
        """The way of the unit that is needed first, whose last gradient comes last: down, stepped, up."""
        first = min((span.order for span in self.timing.spans if span.lane == "h2d" and span.order > 0), default=0)
        last = {span.lane: span for span in sorted(self.timing.spans, key=_end) if span.order == first}
        return sum(last[lane].end_s - last[lane].start_s for lane in lanes or ("d2h", "host", "h2d") if lane in last)

    def _of_lane(self, lane: str, kind: str) -> float:
        return self.timing.kinds.get((lane, kind), Total()).seconds

    @property
    def bottleneck(self) -> str:
        """In words, and what would change that."""
        timing, machine = self.timing, self.scenario.machine
        if machine.device_type == "cpu":
            return "the CPU, which does everything in turn: nothing to overlap"
        if self.scenario.method == ZEROTH:
            return bottleneck(self.scenario, timing, count_of(self.scenario.batch))
        stall_s = timing.step_s - timing.compute_s
        if stall_s < 0.05 * timing.step_s:
            return f"the device's compute ({100 * timing.compute_s / timing.step_s:.0f} % of the step)"
        if self.scenario.method == SPARSE:
            return rows.bottleneck(timing)
        down_s = timing.lanes.get("d2h", Total()).seconds
        if down_s > max(self._of_lane("host", "step"), self._up_s, timing.backward_s):
            return f"the link down: gradients take {seconds(down_s)}"
        if self.scenario.waits:
            return f"the schedule: the device waits {seconds(stall_s)} for gradients, host and weights in turn"
        hides = max(self._of_lane("host", "step"), self._up_s) <= timing.forward_s
        return self._late_bottleneck() if self.decides_late and not hides else self._early_bottleneck()

    def _early_bottleneck(self) -> str:
        """Of units that are stepped under backward, or under the next forward but for the first."""
        lane, slow_s = max(((lane, total.seconds) for lane, total in self.timing.lanes.items()), key=lambda x: x[1])
        if slow_s > self.timing.compute_s:
            return f"{_NAMES[lane]}, {seconds(slow_s)}, longer than the device computes"
        return f"the way down, through the host and up of what backward reaches last, {seconds(self._tail_s())}"

    def _late_bottleneck(self) -> str:
        """Of a step that follows backward."""
        timing, step_s = self.timing, self._of_lane("host", "step")
        what, slow_s = ("the host's step", step_s) if step_s >= self._up_s else ("the link up", self._up_s)
        text = f"{what}, {seconds(slow_s)}, of which the next forward hides {seconds(min(timing.forward_s, slow_s))}"
        if timing.forward_s > 0 and slow_s > timing.forward_s:
            tokens, unit = count_of(self.scenario.batch)
            text += f"; it would hide from about {round(tokens * slow_s / timing.forward_s):,} {unit} per micro-batch"
        return text if self.scenario.method == SUBSPACE else f"{text}; method=lsp moves and steps less"


def _end(span: Span) -> float:
    return span.end_s


def count_of(batch: Any) -> tuple[int, str]:
    """Tokens of a batch, or its samples."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return batch["input_ids"].numel(), "tokens"
    first = next((t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), None)
    return (1 if first is None else first.shape[0]), "samples"
