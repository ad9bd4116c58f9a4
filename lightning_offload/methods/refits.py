"""When the projectors of ``lsp`` are replaced, by what gradient, and how moments follow them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_offload.memory.lanes import Event, Lanes, lane_context, nbytes
from lightning_offload.memory.peers import Peers
from lightning_offload.methods.base import Moment, Trained
from lightning_offload.methods.deltas import DeltaHome
from lightning_offload.methods.projections import HostPairs, Pair, Projections
from lightning_offload.numerics.projector import transfer, transition

if TYPE_CHECKING:
    from lightning_offload.methods.lsp import LSPSettings


@dataclass(eq=False, kw_only=True)
class SubspaceHome(DeltaHome):
    """The home of a projected weight; ``wire``, ``states`` and ``total`` are d x d.

    Attributes:
        projections: Where its projectors come from; several homes may share them.
        pair: The projectors in use.
        next: Those that follow once the delta under way has been applied.
        transferred: The last transfer of its moments.
        held: Sum of compressed gradients on the device, where several come in a step.
    """

    projections: Projections
    pair: Pair
    next: Pair | None = None
    transferred: Event | None = None
    held: Tensor | None = None

    @property
    def delta(self) -> tuple[int, torch.dtype]:
        """Elements and dtype of what comes up; the wire is on its owner's host alone."""
        return self.pair.left.dim * self.pair.right.dim, self.wire.dtype

    def like(self, what: str, *beside: Hashable) -> Hashable:
        """What it costs to do this with it depends on nothing else."""
        weight = self.trained.parameter
        return what, weight.shape, weight.dtype, self.pair.left.dim, *beside


class Refits:
    """See the module docstring.

    Args:
        lanes: Where it runs.
        settings: Of the method, resolved.
        peers: The other ranks: rank 0's projectors are those of all.
    """

    def __init__(self, lanes: Lanes, settings: LSPSettings, peers: Peers) -> None:
        self._lanes, self._settings, self._peers = lanes, settings, peers
        self._all: dict[str, Projections] = {}
        self._homes: dict[str, SubspaceHome] = {}

    @property
    def device_bytes(self) -> int:
        """Of the projectors."""
        return sum(projections.pair.nbytes for projections in self._all.values())

    @property
    def host_tensors(self) -> list[Tensor]:
        """Copies of projectors, where moments are carried over."""
        return [tensor for p in self._all.values() if p.on_host is not None for tensor in p.on_host.tensors]

    def projections_of(self, trained: Trained, dim: int, dtype: torch.dtype) -> Projections:
        """Those of this weight, made at the first call; several weights may share them."""
        key, (rows, columns) = sharing_key(trained, self._settings), trained.parameter.shape
        if key not in self._all:
            with lane_context(self._lanes.device):
                self._all[key] = Projections(key, (rows, columns), dim, self._settings, self._lanes, dtype)
        return self._all[key]

    def add(self, home: SubspaceHome) -> None:
        """A home that uses ``projections_of`` its parameter."""
        self._homes[home.trained.name] = home
        home.projections.members.append(home.trained.name)

    def take_turns(self) -> None:
        """Unit by unit (or those that are shared), so that no step waits for more than one; a batch serves all."""
        every = self._settings.refit_every
        if self._settings.calibration == "batch" or not isinstance(every, int):
            return
        units = list(dict.fromkeys(home.trained.unit.index for home in self._homes.values()))
        for place, projections in enumerate(self._all.values()):
            turns, own = len(self._all), place
            if self._settings.share == "matrix":
                turns, own = len(units), units.index(self._homes[projections.members[0]].trained.unit.index)
            projections.offset = own * every // turns

    def is_due(self, home: SubspaceHome, moment: Moment) -> bool:
        """Whether this gradient of training decides on the projectors."""
        at_hand = moment.last and self._settings.calibration == "train"
        return at_hand and home.projections.is_due(home.trained.name, moment.step)

    def first_fit(self, projections: Projections, gradient: Tensor) -> None:
        """At once: nothing has been made in the random subspace yet."""
        projections.first_fit(gradient)
        self._share(projections.pair)
        for name in projections.members:
            self._homes[name].pair = projections.pair

    def judge(self, projections: Projections, gradient: Tensor) -> None:
        """New projectors, if these miss too much; in use once the delta under way has been applied."""
        threshold = self._settings.bias_threshold
        if not threshold or self._peers.first(projections.bias(gradient)) > threshold:
            self._replace(projections, gradient)

    def _replace(self, projections: Projections, gradient: Tensor) -> None:
        projections.judged = projections.replaced(gradient)
        self._share(projections.judged)

    def _share(self, pair: Pair) -> None:
        scale = [pair.scale] if pair.scale is not None else []
        self._peers.share_([*pair.tensors, *scale], 0, "projectors")

    def calibration_due(self, step: int) -> bool:
        """See ``HostPart.calibration_due``."""
        return self._settings.calibration == "batch" and bool(self._due(step))

    def calibrations(self, step: int) -> Iterator[Callable[[Trained], None]]:
        """See ``HostPart.calibrations``: the paper's threshold over all needs a look at all of them first."""
        judge, threshold = self.judge, self._settings.bias_threshold
        if threshold and self._settings.threshold_over == "all" and any(p.fitted for p in self._due(step)):
            biases: list[float] = []
            yield lambda trained: self._with_gradient(trained, step, lambda p, g: biases.append(p.bias(g)))
            if sum(biases) <= threshold * len(biases):
                return
            judge = self._replace

        def fit(projections: Projections, gradient: Tensor) -> None:
            (judge if projections.fitted else self.first_fit)(projections, gradient)

        yield lambda trained: self._with_gradient(trained, step, fit)
        self.carry_moments_over()

    def _due(self, step: int) -> list[Projections]:
        """What has no gradient in the first batch is fitted to its first one of training."""
        return [
            projections
            for projections in self._all.values()
            if (step == 1 and not projections.fitted)
            or any(projections.is_due(name, step) for name in projections.members)
        ]

    def _with_gradient(self, trained: Trained, step: int, use: Callable[[Projections, Tensor], object]) -> None:
        if trained.name not in self._homes:
            return
        projections = self._homes[trained.name].projections
        if not projections.fitted or projections.is_due(trained.name, step):
            with lane_context(self._lanes.device):
                use(projections, trained.gradient())

    def carry_moments_over(self) -> None:
        """After this step and before the next, moments follow the new projectors."""
        for projections in self._all.values():
            homes = [self._homes[name] for name in projections.members]
            old, new, on_host = homes[0].pair, projections.judged, projections.on_host
            if new is None:
                continue
            projections.judged = None
            arrived = [on_host.send_down(old, new)] if on_host is not None else []
            for home in homes:
                home.transferred = self._lanes.host(
                    partial(self._transfer, home, on_host),
                    after=[*arrived, *(event for event in (home.stepped, home.transferred) if event is not None)],
                    priority=home.trained.flight.order,
                    tag="moments",
                    traffic_bytes=4 * nbytes(home.states.values()),
                )
                if home.under_way:
                    home.next = new
                else:
                    home.pair = new
            if on_host is not None:
                on_host.readers = [home.transferred for home in homes if home.transferred is not None]

    def _transfer(self, home: SubspaceHome, on_host: HostPairs | None) -> None:
        if not home.wire.numel():  # another rank's
            return
        if on_host is None:
            home.start_anew()
            return
        old, new = on_host.both
        left, right = transition(new.left, old.left), transition(old.right, new.right)
        rule: Any = self._settings.moments
        mean, square = (home.states[name].view(new.left.dim, -1) for name in ("exp_avg", "exp_avg_sq"))
        carried = transfer(mean, square, left, right, rule=rule)
        mean.copy_(carried[0])
        square.copy_(carried[1])


def sharing_key(trained: Trained, settings: LSPSettings) -> str:
    """What has projectors of its own: a matrix, or all of one name (below its block) and shape."""
    if settings.share == "matrix":
        return trained.name
    rows, columns = trained.parameter.shape
    return f"{trained.name.removeprefix(trained.unit.name)} {rows} x {columns}"
