"""A part of which something leaves for the host: what an engine asks of it beside ``Part``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from lightning_offload.memory.lanes import Event, nbytes
from lightning_offload.methods.base import Groups, Moment, Trained, Verdict

FactorsArrived = Callable[[Trained, Tensor, Tensor], None]
"""Told of (tokens, m) and (tokens, n), whose product is the gradient (m, n) of a parameter that gets none."""


class Sender(ABC):
    """See the module docstring, and ``Part``.

    Attributes:
        trained: What it steps, by unit.
        sums_on_host: Whether micro-batches add up on the host.
        leaves: Whether it is gradients in ``p.grad`` that leave.
    """

    trained: list[Trained]
    sums_on_host: bool
    leaves: ClassVar[bool] = True

    # Part.

    @abstractmethod
    def gradient_ready(self, trained: Trained, moment: Moment) -> None:
        """See ``Part.gradient_ready``."""

    @abstractmethod
    def collect(self, step: int) -> None:
        """See ``Part.collect``."""

    @abstractmethod
    def has_gradient(self, trained: Trained) -> bool:
        """See ``Part.has_gradient``."""

    @abstractmethod
    def update(self, groups: Groups, verdict: Verdict, backward_done: Event) -> list[Event]:
        """See ``Part.update``."""

    @abstractmethod
    def drop(self) -> None:
        """See ``Part.drop``."""

    @abstractmethod
    def adopt(self) -> None:
        """See ``Part.adopt``."""

    @abstractmethod
    def state_of(self, trained: Trained) -> dict[str, Tensor]:
        """See ``Part.state_of``."""

    @abstractmethod
    def load_state_of(self, trained: Trained, state: Mapping[str, Any]) -> None:
        """See ``Part.load_state_of``."""

    @abstractmethod
    def master_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.master_of``."""

    @abstractmethod
    def pending_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.pending_of``."""

    # Beside the protocol.

    @abstractmethod
    def load_pending_of(self, trained: Trained, gradient: Tensor) -> None:
        """The inverse of ``pending_of``."""

    @abstractmethod
    def host_norms(self) -> list[tuple[Trained, Tensor, list[Event]]]:
        """Sums over micro-batches on the host, and the events after which they may be read."""

    @abstractmethod
    def waits(self, trained: Trained) -> bool:
        """Whether there is a gradient that has not been taken."""

    @abstractmethod
    def install(self, arrived: Callable[[Trained], None], factors: FactorsArrived) -> list[Callable[[], Any]]:
        """Hang on the module what tells of gradients; returns how to take it off."""

    @abstractmethod
    def free_rings(self) -> None:
        """Give device buffers back; nothing is in flight, and nothing will be sent any more."""

    @abstractmethod
    def step_all(self, groups: Groups, verdict: Verdict) -> None:
        """The host work of one step without any copy, for measuring it."""

    @abstractmethod
    def take_back(self, trained: Trained) -> None:
        """What has been sent of this parameter is no gradient: no rank has had one."""

    @abstractmethod
    def meet(self) -> None:
        """Backward is over on every rank: what they have sent to their hosts becomes what all have together."""

    def describe(self) -> str:
        """What it trains, and how, in words."""
        return f"trains {len(self.trained)} weights"

    def label(self, trained: Sequence[Trained]) -> str:
        """What a table calls these of its parameters."""
        return "host"

    @property
    @abstractmethod
    def holdings(self) -> dict[str, int]:
        """Bytes in host memory by what they hold."""

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """What it holds on the device."""

    def device_bytes_of(self, trained: Sequence[Trained]) -> int:
        """Of these of its parameters, what is on the device between steps."""
        return nbytes(t.parameter for t in trained)

    @property
    def scratch_bytes(self) -> int:
        """Host memory in which it works, beside the arenas."""
        return 0

    def forward(self) -> AbstractContextManager[None]:
        """Around one forward of training."""
        return nullcontext()

    @abstractmethod
    def catch_up(self) -> None:
        """Issue what has been put off: weights at rest are the latest once nothing is in flight."""

    def factors_ready(self, trained: Trained, left: Tensor, right: Tensor, moment: Moment) -> None:
        """Take the two factors of a gradient; that they are all is said apart."""
        raise NotImplementedError

    def calibration_due(self, step: int) -> bool:
        """Whether this optimizer step needs a calibration before it."""
        return False

    def calibrations(self, step: int) -> Iterator[Callable[[Trained], None]]:
        """What to do with every gradient of a calibration batch, once per backward over it; nothing is in flight."""
        yield from ()

    def extras(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the optimizer's state, by parameter name; nothing is in flight."""
        return {}

    @abstractmethod
    def load_extras(self, extras: Mapping[str, Any]) -> None:
        """The inverse of ``extras``.

        Raises:
            CheckpointError: They do not fit the settings of this run.
        """
