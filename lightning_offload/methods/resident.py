"""The device optimizer: small parameters (norms, biases) step where they are. The exception is designed.

Thousands of tiny copies would cost more than the few bytes they save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_offload.memory.lanes import Event, Lanes
from lightning_offload.methods.base import DTypes, Groups, Moment, Trained, Verdict
from lightning_offload.methods.homes import load_state, settle, weight_dtype
from lightning_offload.methods.rules import Rule
from lightning_offload.numerics.norms import adopt_, gradient_norm


@dataclass(eq=False)
class _Seat:
    """A small parameter on the device; 16-bit weights have an fp32 master here too."""

    trained: Trained
    master: Tensor
    states: dict[str, Tensor]
    step: Tensor

    @property
    def rounded(self) -> bool:
        return self.trained.parameter.dtype != self.master.dtype


class ResidentOptimizer:
    """See the module docstring.

    Args:
        trained: What it steps; the parameters are moved to the lanes' device.
        rule: The update rule of the user's optimizer.
        lanes: Where it runs.
        dtypes: Dtypes of weights, masters and moments.
        mean_: Makes tensors their means over ranks.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        rule: Rule,
        lanes: Lanes,
        dtypes: DTypes,
        mean_: Callable[[Sequence[Tensor], str], None] = lambda tensors, what: None,
    ) -> None:
        self._mean_ = mean_
        self.trained = sorted(trained, key=lambda t: (t.group, t.position))
        self._rule = rule
        self._lanes = lanes
        self._seats = {t.name: self._make_seat(t, dtypes) for t in self.trained}

    def gradient_ready(self, trained: Trained, moment: Moment) -> None:
        """See ``Part.gradient_ready``: it stays in ``p.grad`` until the step."""

    def collect(self, step: int) -> None:
        """See ``Part.collect``."""
        present = [trained for trained in self.trained if trained.parameter.grad is not None]
        self._mean_([trained.gradient() for trained in present], "gradients")
        for trained in present:
            trained.norm = gradient_norm(trained.gradient())

    def has_gradient(self, trained: Trained) -> bool:
        """See ``Part.has_gradient``."""
        return trained.parameter.grad is not None

    @torch.no_grad()
    def update(self, groups: Groups, verdict: Verdict, backward_done: Event) -> list[Event]:
        """See ``Part.update``."""
        seats = [seat for seat in self._seats.values() if seat.trained.parameter.grad is not None]
        if seats and verdict.device_ready is not None:
            self._lanes.wait_compute(verdict.device_ready)  # the coefficient comes from the host
        for group, members in groupby(seats, key=lambda seat: seat.trained.group):
            self._step(list(members), groups[group], verdict)
        self.drop()
        return []

    def drop(self) -> None:
        """See ``Part.drop``."""
        for trained in self.trained:
            trained.norm = None

    @torch.no_grad()
    def adopt(self) -> None:
        """See ``Part.adopt``."""
        for seat in self._seats.values():
            if seat.rounded:
                adopt_(seat.master, seat.trained.parameter)

    def state_of(self, trained: Trained) -> dict[str, Tensor]:
        """See ``Part.state_of``."""
        seat = self._seats[trained.name]
        if float(seat.step) == 0:
            return {}
        state = {"step": seat.step.cpu().clone()} if self._rule.has_step else {}
        return state | {name: tensor.cpu() for name, tensor in seat.states.items()}

    def load_state_of(self, trained: Trained, state: Mapping[str, Any]) -> None:
        """See ``Part.load_state_of``."""
        seat = self._seats[trained.name]
        load_state(self._rule, seat.step, seat.states, trained, state)

    def master_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.master_of``."""
        seat = self._seats[trained.name]
        return seat.master if seat.rounded else None

    def pending_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.pending_of``: all of it is in ``p.grad``."""
        return None

    @property
    def nbytes(self) -> int:
        """Device bytes beside the weights."""
        seats = self._seats.values()
        held = [t for seat in seats for t in (*seat.states.values(), *([seat.master] if seat.rounded else []))]
        return sum(t.numel() * t.element_size() for t in held)

    def _make_seat(self, trained: Trained, dtypes: DTypes) -> _Seat:
        parameter, device = trained.parameter, self._lanes.device
        dtype = weight_dtype(parameter, dtypes)
        with torch.inference_mode(False), torch.no_grad():
            # the master is taken before the weight is rounded
            master = parameter.detach() if dtype == dtypes.master else parameter.detach().to(device, dtypes.master)
            settle(parameter, device, dtype)
            states = {
                name: torch.zeros_like(parameter, dtype=dtypes.moments, memory_format=torch.preserve_format)
                for name in self._rule.states
            }
            step = torch.zeros((), dtype=torch.float32, device=device)
        return _Seat(trained, parameter.detach() if dtype == dtypes.master else master, states, step)

    def _step(self, seats: Sequence[_Seat], group: Mapping[str, Any], verdict: Verdict) -> None:
        grads = [seat.trained.gradient() for seat in seats]
        if verdict.on_device is not None and verdict.clips_norm:
            for grad in grads:  # in fp32, then rounded, as on the host: some kernels round the coefficient first
                grad.copy_(grad.float() * verdict.on_device[1])
        if verdict.clamp is not None:
            torch._foreach_clamp_min_(grads, -verdict.clamp)
            torch._foreach_clamp_max_(grads, verdict.clamp)
        found_inf = verdict.on_device[2] if verdict.on_device is not None else None
        self._rule.step_(
            [seat.master for seat in seats],
            [grad.to(seat.master.dtype) for grad, seat in zip(grads, seats, strict=True)],
            {name: [seat.states[name] for seat in seats] for name in self._rule.states},
            [seat.step for seat in seats],
            group,
            found_inf=found_inf,
        )
        for seat in seats:
            if seat.rounded:
                seat.trained.parameter.copy_(seat.master)
            seat.trained.parameter.grad = None
