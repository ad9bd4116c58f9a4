"""What a method is: the settings it has, the dtypes it is given, the parameters it holds, the protocol it follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_offload.errors import OffloadError
from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.budget import GIB
from lightning_offload.memory.lanes import Event, Lanes


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """Settings that every method has.

    Attributes:
        min_numel: Smaller parameters stay on the device with their optimizer state.
        blocks: Module paths or classes that are the model's blocks, when discovery is wrong.
        pin_memory: Page-lock the host memory that crosses the link; ``"auto"`` does so as far as the machine allows.
        host_threads: Threads of the host worker; ``"auto"`` is the physical cores less one.
        skip_nonfinite: Leave everything as it is in a step whose gradient norm is not finite; ``False`` is exact
            parity with plain AdamW on NaN.
        max_skips: Skipped steps in a row that are put up with; one more is an error.
        on_misfit: What to do when the host arenas cannot fit: ``"error"`` or ``"warn"``.
        max_device_gib: Device memory to stay within, CUDA's own part included, as if the device had no more.
        max_host_gib: Host memory that the arenas stay within, as if the machine had no more.
    """

    min_numel: int = 4096
    blocks: Sequence[str | type[nn.Module]] | None = None
    pin_memory: bool | Literal["auto"] = "auto"
    host_threads: int | Literal["auto"] = "auto"
    skip_nonfinite: bool = True
    max_skips: int = 10
    on_misfit: Literal["error", "warn"] = "error"
    max_device_gib: float | None = None
    max_host_gib: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the setting."""
        require(isinstance(self.min_numel, int) and self.min_numel >= 0, "min_numel", self.min_numel, "an integer >= 0")
        require(self.pin_memory in (True, False, "auto"), "pin_memory", self.pin_memory, "true, false or 'auto'")
        threads = self.host_threads
        require(
            threads == "auto" or (isinstance(threads, int) and threads >= 1),
            "host_threads",
            threads,
            "an integer >= 1 or 'auto'",
        )
        require(isinstance(self.skip_nonfinite, bool), "skip_nonfinite", self.skip_nonfinite, "true or false")
        require(isinstance(self.max_skips, int) and self.max_skips >= 0, "max_skips", self.max_skips, "an integer >= 0")
        require(self.on_misfit in ("error", "warn"), "on_misfit", self.on_misfit, "'error' or 'warn'")
        for name, gib in (("max_device_gib", self.max_device_gib), ("max_host_gib", self.max_host_gib)):
            holds = gib is None or (isinstance(gib, int | float) and not isinstance(gib, bool) and 0 < gib < math.inf)
            require(holds, name, gib, "a positive number of GiB, or None")

    @property
    def max_device_bytes(self) -> int | None:
        """``max_device_gib`` in bytes."""
        return None if self.max_device_gib is None else int(self.max_device_gib * GIB)

    @property
    def max_host_bytes(self) -> int | None:
        """``max_host_gib`` in bytes."""
        return None if self.max_host_gib is None else int(self.max_host_gib * GIB)


Groups = Sequence[Mapping[str, Any]]
"""Hyper-parameters per optimizer group, as they were when the work was issued."""


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise a ``ValueError`` that names the setting, what it was, and what it may be."""
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, got {value!r}")


@dataclass(frozen=True)
class DTypes:
    """Which dtype lives where; decided by ``OffloadPrecision``.

    Attributes:
        compute: The weights on the device; ``None`` leaves each parameter as it is.
        master: The truth about a trained weight, on the host.
        wire: What crosses the link; ``None`` is the dtype of the compute weight.
        moments: Optimizer state.
        rounding: How a master becomes a compute weight.
    """

    compute: torch.dtype | None = None
    master: torch.dtype = torch.float32
    wire: torch.dtype | None = None
    moments: torch.dtype = torch.float32
    rounding: Literal["nearest", "stochastic"] = "nearest"

    @classmethod
    def of(cls, precision: str) -> DTypes:
        """The dtypes of a precision by Lightning's name: ``bf16-true`` computes in bf16, the others as weights are."""
        return cls(compute=torch.bfloat16 if precision == "bf16-true" else None)


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
        arrived: The copy that brings its new weights.
        waited: Whether compute already waits for it.
        order: Its place in the order of execution, as far as it is known: who needs its weights first comes first.
    """

    order: int
    arrived: Event | None = None
    waited: bool = True

    def launch(self, event: Event) -> None:
        """New weights are on their way."""
        self.arrived, self.waited = event, False

    def land(self, lanes: Lanes) -> None:
        """Compute issued from here on sees the new weights."""
        if not self.waited and self.arrived is not None:
            self.waited = True
            lanes.wait_compute(self.arrived)


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
        norm: Device scalar, the norm of this step's gradient, once known.
    """

    name: str
    parameter: nn.Parameter
    unit: Unit
    flight: Flight
    group: int
    position: int
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

    Attributes:
        clip: The clipping that was asked for.
        skip_nonfinite: Whether a non-finite norm makes the step change nothing.
        step: Number of this optimizer step.
        names: The parameters that have a gradient, in optimizer order.
        on_device: ``[total norm, coefficient, found_inf]``, fp32; the compute lane may read it after ``device_ready``.
        on_host: The same, then the norm of each of ``names``; the host may read it after ``host_ready``.
    """

    clip: Clip | None
    skip_nonfinite: bool
    step: int
    names: list[str] = field(default_factory=list)
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


class Part(Protocol):
    """Something that holds trained parameters and steps them: a method, or the common path beside it."""

    @property
    def trained(self) -> Sequence[Trained]:
        """What it steps."""
        ...

    def gradient_ready(self, trained: Trained, group_now: Groups | None) -> None:
        """Take the gradient out of ``p.grad``.

        Given the optimizer's groups, the unit's host step may start as soon as its last gradient is taken.
        """
        ...

    def collect(self) -> None:
        """Take every gradient that is still in ``p.grad``."""
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
