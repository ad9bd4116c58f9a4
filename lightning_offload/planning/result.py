"""What a plan says: memory by place and by what it holds, time by lane, whether it fits, and what would make it fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning_offload.memory.ledger import Span
from lightning_offload.methods.uses import Uses
from lightning_offload.timeline import LaneUse, Prediction, StepUse, draw

THE_RUN_ITSELF = "the run itself (device rows)"
"""Where the CPU is the device, this row of the host's memory is what the device's rows say one by one."""


@dataclass(frozen=True)
class Memory:
    """One place's memory.

    Attributes:
        holds: Bytes by what they hold, at the moment of most.
        limit_bytes: What there is; ``None`` where that is not known.
    """

    holds: Mapping[str, int]
    limit_bytes: int | None

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.holds.values())

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.limit_bytes is None or self.bytes <= self.limit_bytes


@dataclass(frozen=True)
class Advice:
    """Changes that make a plan fit.

    Attributes:
        changes: In words.
        overrides: The same, each as the command line says it; what is of the environment comes before the command.
        device_bytes_saved: On the device, beside the plan as asked for.
        host_bytes_saved: In host memory.
        step_s: What a step then takes.
    """

    changes: tuple[str, ...]
    overrides: tuple[str, ...]
    device_bytes_saved: int
    host_bytes_saved: int
    step_s: float


@dataclass(frozen=True)
class Plan:
    """The prediction of one training step; ``print(plan)`` shows it.

    Attributes:
        model: Class and size.
        method: Name of the method.
        precision: Lightning's name of it.
        hardware: Name of the hardware file, or of the device that was found.
        parameters: How many there are.
        trained: How many of them are trained.
        micro_batches: Per step.
        tokens: Per step (samples, where batches have no ``input_ids``).
        unit: ``tokens`` or ``samples``.
        flops: Of the module in one step.
        device: Memory of the device; its peak.
        host: Host memory of the arenas.
        pinned: The part of it that is page-locked.
        step_s: From one step to the next.
        bound_s: What no schedule of this method can beat on this machine.
        forward_s: Compute of one micro-batch's forward.
        backward_s: Compute of one micro-batch's backward.
        lanes: Bytes and busy seconds of each lane in one step.
        bottleneck: What the step waits for, and what would change that.
        notes: What was chosen, what a real run will wait for, what is unusual about the model.
        advice: Where it does not fit: what would, the smallest change first.
        others: Other methods on the same model and machine (``compare=True``).
        device_expandable: ``device`` with ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
        union: Of meft: the part of a layer's rows for which bytes are predicted.
        uses: What the forward does with the weights.
        units: Names of the units, in the order in which they run.
        spans: Every operation of one step, and what it leaves to the next.
    """

    model: str
    method: str
    precision: str
    hardware: str
    parameters: int
    trained: int
    micro_batches: int
    tokens: int
    unit: str
    flops: int
    device: Memory
    host: Memory
    pinned: Memory
    step_s: float
    bound_s: float
    forward_s: float
    backward_s: float
    lanes: Mapping[str, LaneUse]
    bottleneck: str
    notes: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()
    others: tuple[Plan, ...] = ()
    device_expandable: Memory | None = field(default=None, repr=False)
    union: float | None = None
    uses: Uses = field(default_factory=Uses, repr=False)
    units: tuple[str, ...] = field(default=(), repr=False)
    spans: tuple[Span, ...] = field(default=(), repr=False)

    @property
    def fits(self) -> bool:
        """Whether device and host have what it takes."""
        return self.device.fits and self.host.fits

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the steady state."""
        return self.tokens / self.step_s

    @property
    def prediction(self) -> Prediction:
        """What a measurement is set against."""
        peak_bytes = self.device.bytes if self.device.limit_bytes is not None else None  # a CPU's is not measured
        return Prediction(self.spans, StepUse(self.lanes, self.step_s, peak_bytes), self.units, self.union)

    def __str__(self) -> str:
        """The plan as text."""
        from lightning_offload.planning.report import report

        return report(self)

    def brief(self) -> str:
        """The verdict as text: whether it fits, how fast it is, what it waits for, and what to change."""
        from lightning_offload.planning.report import report

        return report(self, brief=True)

    def to_json(self) -> str:
        """Every number as JSON; units in the names."""
        return json.dumps(_plain(self), indent=2)

    def plot(self, path: str | Path) -> Path:
        """Draw one predicted step and what it leaves to the next; the suffix of ``path`` gives the format.

        Returns:
            ``path``.
        """
        title = f"{self.model}, {self.method}, {self.precision}, {self.hardware}: predicted"
        return draw({"predicted": self.spans}, Path(path), units=self.units, title=title)


def _plain(plan: Plan) -> dict[str, object]:
    apart = {"device", "device_expandable", "host", "pinned", "lanes", "advice", "others", "uses", "units", "spans"}
    kept = {name: value for name, value in vars(plan).items() if name not in apart}
    places = {
        name: {"bytes": memory.bytes, "limit_bytes": memory.limit_bytes, "fits": memory.fits, "holds": memory.holds}
        for name, memory in (("device", plan.device), ("host", plan.host), ("pinned", plan.pinned))
    }
    return {
        **kept,
        "tokens_per_s": plan.tokens_per_s,
        "fits": plan.fits,
        **places,
        "lanes": {lane: asdict(use) for lane, use in plan.lanes.items()},
        "advice": [asdict(advice) for advice in plan.advice],
        "functional_uses": plan.uses.functional,
        "others": [_plain(other) for other in plan.others],
    }
