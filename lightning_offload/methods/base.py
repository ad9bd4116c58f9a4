"""What methods share: the dtypes they are given, the parameters they hold, what a step is decided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_offload.errors import OffloadError
from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.lanes import Event

Groups = Sequence[Mapping[str, Any]]
"""Hyper-parameters per optimizer group, as they were when the work was issued."""

Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class DTypes:
    """Which dtype lives where; decided by ``OffloadPrecision``.

    Attributes:
        compute: The weights on the device; ``None`` leaves each parameter as it is.
        master: The truth about a trained weight, on the host.
        wire: What crosses the link (and is kept, where there is no master); ``None``: the compute weight's dtype.
        moments: Optimizer state.
        rounding: How a 16-bit weight takes what is finer: a master, or a step where it has no master.
    """

    compute: torch.dtype | None = None
    master: torch.dtype = torch.float32
    wire: torch.dtype | None = None
    moments: torch.dtype = torch.float32
    rounding: Rounding = "nearest"

    @classmethod
    def of(cls, precision: str, rounding: Rounding = "nearest") -> DTypes:
        """The dtypes of a precision by Lightning's name: 16 bits compute in them, the others as weights are."""
        narrow = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
        return cls(compute=narrow.get(precision), rounding=rounding)


@dataclass(frozen=True)
class Clip:
    """A gradient clipping to be done by the step, as Lightning's ``clip_gradients`` was called with it."""

    value: float
    algorithm: Literal["norm", "value"] = "norm"


@dataclass(frozen=True)
class StepReport:
    """What one step did; known once the host has seen the norms.

    Attributes:
        step: Number of the optimizer step, from 1.
        grad_norm: Norm of all gradients before clipping; NaN when no norm was needed.
        clip_coefficient: What gradients were multiplied by.
        skipped: Whether the step changed nothing because ``grad_norm`` is not finite.
        skipped_in_a_row: How many steps up to this one did.
        skipped_total: Skipped steps since the start.
    """

    step: int = 0
    grad_norm: float = float("nan")
    clip_coefficient: float = 1.0
    skipped: bool = False
    skipped_in_a_row: int = 0
    skipped_total: int = 0


@dataclass(eq=False)
class Flight:
    """What is in flight for one unit.

    Attributes:
        order: Its place in the order of execution, as far as it is known: who needs its weights first comes first.
    """

    order: int
    _landings: list[Callable[[], None]] = field(default_factory=list)

    def launch(self, landing: Callable[[], None]) -> None:
        """New weights are on their way; ``landing`` makes compute see them."""
        self._landings.append(landing)

    def land(self) -> None:
        """Compute issued from here on sees the new weights."""
        landings, self._landings = self._landings, []
        for landing in landings:
            landing()


@dataclass(eq=False)
class Trained:
    """One trained parameter: where it stands in the model and in the optimizer.

    Attributes:
        name: Full name in the module.
        parameter: The module's own ``Parameter``; never replaced.
        unit: The unit that owns it.
        flight: The unit's weights in flight.
        group: Index of its group in the optimizer.
        position: Place in optimizer order, over all groups.
        owner: The rank that steps it on its host.
        norm: Device scalar, the norm of this step's gradient, once known.
    """

    name: str
    parameter: nn.Parameter
    unit: Unit
    flight: Flight
    group: int
    position: int
    owner: int = 0
    norm: Tensor | None = None

    def gradient(self) -> Tensor:
        """The gradient in ``p.grad``.

        Raises:
            OffloadError: It is sparse.
        """
        grad = self.parameter.grad
        assert grad is not None
        if grad.layout is not torch.strided:
            raise OffloadError(
                f"The gradient of `{self.name}` is sparse ({grad.layout}), which cannot be offloaded. Build the layer "
                "with dense gradients (`nn.Embedding(..., sparse=False)`)."
            )
        return grad.detach()


@dataclass(eq=False)
class Verdict:
    """What a step is decided by: the total norm and the clip coefficient, known on both sides of the link.

    A *local* verdict is none: each parameter is stepped as soon as its own gradient has landed, and skipped where
    that is not finite.

    Attributes:
        clip: The clipping that was asked for.
        skip_nonfinite: Whether a non-finite norm makes the step change nothing.
        step: Number of this optimizer step.
        names: The parameters that have a gradient, in optimizer order.
        local: Whether every parameter is decided by its own norm.
        own_norms: Of a local verdict: the norms that the host has seen, by name; for host functions.
        on_device: ``[total norm, coefficient, found_inf]``, fp32; the compute lane may read it after ``device_ready``.
        on_host: The same, then the norm of each of ``names``; the host may read it after ``host_ready``.
    """

    clip: Clip | None
    skip_nonfinite: bool
    step: int
    names: list[str] = field(default_factory=list)
    local: bool = False
    own_norms: dict[str, float] = field(default_factory=dict)
    on_device: Tensor | None = None
    on_host: Tensor | None = None
    device_ready: Event | None = None
    host_ready: Event | None = None

    @property
    def clips_norm(self) -> bool:
        """Whether gradients are multiplied by a coefficient."""
        return self.clip is not None and self.clip.algorithm == "norm"

    @property
    def clamp(self) -> float | None:
        """Bound of each gradient element."""
        return self.clip.value if self.clip is not None and self.clip.algorithm == "value" else None

    @property
    def skip(self) -> bool:
        """Whether the step changes nothing. For host functions, after ``host_ready``."""
        return self.on_host is not None and float(self.on_host[2]) != 0.0

    @property
    def coefficient(self) -> Tensor | None:
        """Scalar to multiply gradients by, ``None`` where that is one. For host functions, after ``host_ready``."""
        if not self.clips_norm or self.on_host is None or float(self.on_host[1]) == 1.0:
            return None
        return self.on_host[1]


@dataclass(frozen=True)
class Moment:
    """When a gradient is taken.

    Attributes:
        step: Number of the optimizer step that it is for.
        last: Whether it is of the last micro-batch of that step.
        early: Hyper-parameters and verdict, if a unit may be stepped as soon as its last gradient is taken.
    """

    step: int
    last: bool
    early: tuple[Groups, Verdict] | None = None


class Part(Protocol):
    """Something that holds trained parameters and steps them: a method, or the common path beside it."""

    @property
    def trained(self) -> Sequence[Trained]:
        """What it steps."""
        ...

    def gradient_ready(self, trained: Trained, moment: Moment) -> None:
        """Take the gradient out of ``p.grad``."""
        ...

    def collect(self, step: int) -> None:
        """Take every gradient that is still in ``p.grad``, for this optimizer step."""
        ...

    def has_gradient(self, trained: Trained) -> bool:
        """Whether the step will change ``trained``."""
        ...

    def update(self, groups: Groups, verdict: Verdict, backward_done: Event) -> list[Event]:
        """Issue the step of everything that has a gradient; returns events after which the verdict was read."""
        ...

    def drop(self) -> None:
        """Forget the gradients taken since the last update; nothing is in flight."""
        ...

    def adopt(self) -> None:
        """Masters follow weights that somebody else wrote; nothing is in flight, nor when it returns."""
        ...

    def state_of(self, trained: Trained) -> dict[str, Tensor]:
        """Optimizer state under torch's names, as CPU tensors shaped like the weight; empty before the first step."""
        ...

    def load_state_of(self, trained: Trained, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_of``."""
        ...

    def master_of(self, trained: Trained) -> Tensor | None:
        """The master, shaped like the weight, where it is not the weight itself."""
        ...

    def pending_of(self, trained: Trained) -> Tensor | None:
        """The part of an accumulation window's gradient that is not in ``p.grad``; nothing is in flight."""
        ...


class Attached(Protocol):
    """An engine, as whoever attaches it knows it: it may hold weights in flight, and lets go of them."""

    closed: bool

    def flush(self) -> None:
        """Wait until nothing is in flight: every weight of the module is its latest."""
        ...

    def adopt(self) -> None:
        """Take over weights that somebody else wrote."""
        ...

    def drop(self) -> None:
        """After an exception: forget the unfinished step."""
        ...

    def detach(self) -> None:
        """Remove everything it hung on the module; weights keep their latest values, state stays readable."""
        ...

    def weights(self) -> Sequence[tuple[Any, Tensor]]:
        """Offloaded parameters, each with a CPU tensor that shares the arenas' memory."""
        ...
