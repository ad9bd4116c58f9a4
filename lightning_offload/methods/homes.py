"""Where one trained parameter lives on the host, and the step of one unit there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_offload.errors import CheckpointError
from lightning_offload.memory.lanes import Event, Lanes
from lightning_offload.methods.base import DTypes, Flight, Groups, Trained, Verdict
from lightning_offload.methods.rules import Rule
from lightning_offload.numerics.native import Kernels
from lightning_offload.numerics.norms import gradient_norm

CHUNK_NUMEL = 1 << 20
"""Elements that are cast and stepped at a time where the wire is 16-bit; a multiple of every vector width."""


@dataclass(eq=False, kw_only=True)
class Home:
    """Where one trained parameter lives on the host; all tensors are flat.

    Attributes:
        trained: The parameter.
        wire: Brings the gradient (or what a method sends of it) down, and what is made of it up.
        states: Optimizer state by torch's name.
        step: Its own step count, fp32 scalar.
        total: fp32 sum over micro-batches, where they accumulate on the host.
        landed: Copies down of the gradient in ``wire``.
        idle: Copies down of what was no gradient.
        added: The last addition to ``total``.
        taken: Whether this step has a gradient here.
        final: Whether that gradient is complete and the unit may step under backward.
        late: Gradient stays in ``p.grad`` until the step, because it arrived twice in one step before.
    """

    trained: Trained
    wire: Tensor
    states: dict[str, Tensor]
    step: Tensor
    total: Tensor | None
    landed: list[Event] = field(default_factory=list)
    idle: list[Event] = field(default_factory=list)
    added: Event | None = None
    taken: bool = False
    final: bool = False
    late: bool = False

    @property
    def events(self) -> list[Event]:
        """After these the gradient is there."""
        return [self.added] if self.added is not None else self.landed

    @property
    def gradient(self) -> Tensor:
        """What the host steps with."""
        return self.wire if self.total is None else self.total

    @property
    def shows(self) -> bool:
        """Whether what comes up is made on the wire."""
        return True


@dataclass(eq=False, kw_only=True)
class WeightHome(Home):
    """The home of a parameter that comes up whole.

    Attributes:
        master: The truth about the weight.
    """

    master: Tensor

    @property
    def rounded(self) -> bool:
        """Whether the weight is a rounded copy of the master."""
        return self.wire.dtype != self.master.dtype

    @property
    def shows(self) -> bool:
        """See ``Home.shows``."""
        return self.rounded

    @property
    def source(self) -> Tensor:
        """What comes up as the new weight, shaped like it."""
        return (self.wire if self.rounded else self.master).view(self.trained.parameter.shape)


AnyHome = TypeVar("AnyHome", bound=Home)


@dataclass(eq=False)
class UnitHomes(Generic[AnyHome]):
    """The homes of one unit, in (group, position) order: one call of the update rule per group.

    Attributes:
        index: The unit's.
        homes: See above.
        stepped: The host's step, if it has been issued.
        arrived: The last copy up from the wires.
    """

    index: int
    homes: list[AnyHome]
    stepped: Event | None = None
    arrived: Event | None = None

    @property
    def taken(self) -> list[AnyHome]:
        """Those that have a gradient."""
        return [home for home in self.homes if home.taken]

    @property
    def flight(self) -> Flight:
        """The unit's weights in flight."""
        return self.homes[0].trained.flight


def host_step(rule: Rule, homes: Sequence[WeightHome], groups: Groups, verdict: Verdict, lanes: Lanes) -> None:
    """The step of one unit, on the host lane: clip, update rule, and the new weights onto the wire."""
    kept = []
    for home in homes:
        if not skips(home, verdict, rule.kernels):
            kept.append(home)
        elif home.rounded:
            home.wire.copy_(home.master)
    for group, members in groupby(kept, key=lambda home: home.trained.group):
        if rule.fused is not None:
            step_fused(rule, list(members), groups[group], verdict)
            continue
        ready = []
        for home in members:
            if home.total is None and home.rounded:
                _step_narrow(rule, home, groups[group], verdict, lanes)
            else:
                ready.append(home)
        if ready:
            _step_wide(rule, ready, groups[group], verdict)


def step_fused(rule: Rule, homes: Sequence[Home], group: Mapping[str, Any], verdict: Verdict) -> None:
    """Clipped, cast, stepped and rounded in one pass over all tensors of a kind; homes without a master: to a delta."""
    assert rule.fused is not None
    kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[Home]] = {}
    for home in homes:
        kinds.setdefault((home.gradient.dtype, home.wire.dtype, home.shows), []).append(home)
    for (*_, shows), some in kinds.items():
        grads = [home.gradient for home in some]
        rule.fused.adam_(
            [home.master for home in some if isinstance(home, WeightHome)],
            grads,
            [home.states["exp_avg"] for home in some],
            [home.states["exp_avg_sq"] for home in some],
            [home.step for home in some],
            [home.wire for home in some] if shows else [],
            coefficient=clamp_(grads, verdict),
            **rule.hyper(group),
        )


def _step_wide(rule: Rule, homes: Sequence[WeightHome], group: Mapping[str, Any], verdict: Verdict) -> None:
    """fp32 gradients: one call for all tensors of the span."""
    grads = [home.gradient for home in homes]
    clip_(grads, verdict)
    states = {name: [home.states[name] for home in homes] for name in rule.states}
    rule.step_([home.master for home in homes], grads, states, [home.step for home in homes], group)
    for home in homes:
        if home.rounded:
            home.wire.copy_(home.master)


def _step_narrow(rule: Rule, home: WeightHome, group: Mapping[str, Any], verdict: Verdict, lanes: Lanes) -> None:
    """16-bit gradients: clipped and rounded in their own dtype, then cast and stepped a chunk at a time."""
    clip_([home.wire], verdict)
    scratch = lanes.scratch(min(CHUNK_NUMEL, home.wire.numel()), home.master.dtype)
    count = home.step.clone()
    for part in chunks(home.wire.numel()):
        wide = scratch[: part.stop - part.start]
        wide.copy_(home.wire[part])
        home.step.copy_(count)  # every chunk is the same step
        states = {name: [tensor[part]] for name, tensor in home.states.items()}
        rule.step_([home.master[part]], [wide], states, [home.step], group)
        home.wire[part].copy_(home.master[part])


def chunks(numel: int) -> Iterator[slice]:
    """Slices of at most ``CHUNK_NUMEL`` elements."""
    for start in range(0, numel, CHUNK_NUMEL):
        yield slice(start, min(start + CHUNK_NUMEL, numel))


def skips(home: Home, verdict: Verdict, kernels: Kernels | None) -> bool:
    """Whether this step leaves the parameter as it is; a local verdict is told the norm."""
    if not verdict.local:
        return verdict.skip
    if kernels is not None and home.gradient.dtype != torch.float32:  # there torch is ten times slower
        norm = kernels.norm(home.gradient)
    else:
        norm = float(gradient_norm(home.gradient))
    verdict.own_norms[home.trained.name] = norm
    return not math.isfinite(norm)


def clip_(grads: list[Tensor], verdict: Verdict) -> None:
    """Clips in place on the host as torch does on the device: ``g * coefficient``, rounded; or clamped."""
    if (coefficient := verdict.coefficient) is not None:
        torch._foreach_mul_(grads, coefficient)
    clamp_(grads, verdict)


def clamp_(grads: list[Tensor], verdict: Verdict) -> float:
    """Clips by value alone, in place; the coefficient is returned, for kernels that multiply as they step."""
    if verdict.clamp is not None:
        torch._foreach_clamp_min_(grads, -verdict.clamp)
        torch._foreach_clamp_max_(grads, verdict.clamp)
    return 1.0 if verdict.coefficient is None else float(verdict.coefficient)


def weight_dtype(parameter: torch.nn.Parameter, dtypes: DTypes) -> torch.dtype:
    """The dtype of a parameter's compute weight."""
    return dtypes.compute or parameter.dtype


def settle(parameter: torch.nn.Parameter, device: torch.device, dtype: torch.dtype) -> None:
    """Bring one weight to its device and compute dtype; the ``Parameter`` object stays."""
    if parameter.device != device or parameter.dtype != dtype:
        parameter.data = parameter.data.to(device, dtype)


def load_state(
    rule: Rule, step: Tensor, states: Mapping[str, Tensor], trained: Trained, state: Mapping[str, Any]
) -> None:
    """Copy torch's optimizer state of one parameter into its own buffers, which keep their dtype.

    Raises:
        CheckpointError: The state has another shape.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape != trained.parameter.shape:
            raise CheckpointError(
                f"Optimizer state `{key}` of `{trained.name}` has shape {tuple(value.shape)} in the checkpoint, the "
                f"parameter has {tuple(trained.parameter.shape)}: the checkpoint is of another model."
            )
    held = {name: state[name] for name in rule.states if state.get(name) is not None}
    for name, tensor in states.items():
        if name in held:
            tensor.copy_(held[name].reshape(tensor.shape))
        else:
            tensor.zero_()
    step.fill_(float(state["step"]) if "step" in state else float(bool(held)))
