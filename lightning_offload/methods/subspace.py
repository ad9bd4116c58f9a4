"""The subspace optimizer of ``lsp``: compressed gradients go down, the host steps them, deltas come up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_offload.errors import CheckpointError
from lightning_offload.memory.lanes import Event, lane_context, nbytes
from lightning_offload.methods.activations import linear_modules, tap
from lightning_offload.methods.arrivals import is_compiled
from lightning_offload.methods.base import DTypes, Groups, Moment, Trained, Verdict
from lightning_offload.methods.deltas import DeltaPart
from lightning_offload.methods.dims import host_step_bytes
from lightning_offload.methods.homes import (
    CHUNK_NUMEL,
    UnitHomes,
    chunks,
    clip_,
    settle,
    skips,
    step_fused,
    weight_dtype,
)
from lightning_offload.methods.part import form_gradient
from lightning_offload.methods.projections import HostPairs, seed_for
from lightning_offload.methods.refits import Refits, SubspaceHome, sharing_key
from lightning_offload.methods.rules import Rule
from lightning_offload.methods.sender import FactorsArrived
from lightning_offload.numerics.projector import Projector, apply_, compress, compress_activations

if TYPE_CHECKING:
    from lightning_offload.methods.lsp import LSPSettings
    from lightning_offload.methods.method import Site

SKIPPED = float("nan")
"""First element of a delta that must change nothing, not even by weight decay."""


class SubspaceOptimizer(DeltaPart[SubspaceHome]):
    """See the module docstring, and ``DeltaPart``.

    Args:
        trained: The weights that it steps; moved to the lanes' device.
        site: Where and with what.
        settings: Of the method, resolved.
    """

    _what: ClassVar[str] = "compressed gradients"
    _kept: ClassVar[str] = "projectors"

    def __init__(self, trained: Sequence[Trained], site: Site, settings: LSPSettings) -> None:
        self._settings = settings
        self._refits = Refits(site.lanes, settings, site.peers)
        super().__init__(trained, site)
        self._noise = torch.Generator(self._lanes.device)
        self._refits.take_turns()

    @staticmethod
    def host_bytes(trained: Sequence[Trained], rule: Rule, dtypes: DTypes, settings: LSPSettings) -> int:
        """Exactly what the host arenas will hold."""
        total, keys = 0, set()
        for t in trained:
            rows, columns = t.parameter.shape
            wire, dim = weight_dtype(t.parameter, dtypes).itemsize, settings.dim_of(rows, columns)
            total += dim**2 * (wire + 4 * len(rule.states) + 4 * (settings.accumulate == "host"))
            key = sharing_key(t, settings)
            if settings.transfers and key not in keys:
                total += HostPairs.nbytes_for((rows, columns), wire, settings)
            keys.add(key)
        return total

    # Part.

    def update(self, groups: Groups, verdict: Verdict, backward_done: Event) -> list[Event]:
        """See ``Part.update``."""
        readers = super().update(groups, verdict, backward_done)
        self._refits.carry_moments_over()
        return readers

    def drop(self) -> None:
        """See ``Part.drop``."""
        super().drop()
        for home in self._home.values():
            home.held, home.projections.judged, home.projections.pair = None, None, home.pair

    def pending_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.pending_of``: a sum on the device takes in what is in ``p.grad``."""
        home = self._home[trained.name]
        if home.held is not None:
            with lane_context(self._lanes.device):
                home.held, trained.parameter.grad = self._compressed(home), None
        return super().pending_of(trained) if home.held is None else home.held

    def load_pending_of(self, trained: Trained, gradient: Tensor) -> None:
        """The inverse of ``pending_of``."""
        if self.sums_on_host:
            super().load_pending_of(trained, gradient)
        else:
            weight = trained.parameter
            self._home[trained.name].held = gradient.to(weight.device, weight.dtype, copy=True)

    # Beside the protocol.

    def describe(self) -> str:
        """See ``Sender.describe``."""
        return f"projects {len(self.trained)} linear weights to {self._dims(self.trained)}"

    def label(self, trained: Sequence[Trained]) -> str:
        """See ``Sender.label``."""
        return f"projected ({self._dims(trained)})"

    def _dims(self, trained: Sequence[Trained]) -> str:
        found = sorted({self._settings.dim_of(*t.parameter.shape) for t in trained})
        return f"dim {found[0]}" if len(found) == 1 else f"dim {found[0]} to {found[-1]}"

    @property
    def holdings(self) -> dict[str, int]:
        """Bytes in host memory by what they hold."""
        homes = self._home.values()
        held = {
            "optimizer state in subspaces": [state for home in homes for state in home.states.values()],
            "wire (subspaces, down and up)": [home.wire for home in homes],
            "sums over micro-batches": [home.total for home in homes if home.total is not None],
            "projectors, for moments": self._refits.host_tensors,
        }
        return {name: nbytes(tensors) for name, tensors in held.items() if tensors}

    @property
    def device_bytes(self) -> int:
        """Rings, slots of deltas, projectors."""
        return super().device_bytes + self.projector_bytes

    @property
    def projector_bytes(self) -> int:
        """Device bytes of the projectors."""
        return self._refits.device_bytes

    @property
    def scratch_bytes(self) -> int:
        """Host memory in which deltas are made, beside the arenas."""
        if self._rule.fused is not None:
            return 0
        return 2 * 4 * max(min(CHUNK_NUMEL, home.wire.numel()) for home in self._home.values())

    # Down.

    def _make_homes(self, members: list[Trained]) -> list[SubspaceHome]:
        label = members[0].unit.name or "model"
        dims = [self._settings.dim_of(*t.parameter.shape) for t in members]
        sizes = [self._numel_here(t, dim**2) for t, dim in zip(members, dims, strict=True)]
        dtypes = [weight_dtype(t.parameter, self._dtypes) for t in members]
        wires = self._carve(f"{label}.subspace wire", sizes, [(dtype, "pinned") for dtype in dtypes])
        states = self._carve_states(f"{label}.subspace", sizes)
        totals = self._carve_totals(f"{label}.subspace", sizes)
        homes = []
        for at, t in enumerate(members):
            settle(t.parameter, self._lanes.device, dtypes[at])
            self._lanes.watch(t.name, t.parameter)
            step = torch.zeros((), dtype=torch.float32, device="cpu")  # whatever the defaults are
            projections = self._refits.projections_of(t, dims[at], dtypes[at])
            homes.append(
                SubspaceHome(
                    trained=t,
                    wire=wires[at],
                    states=states[at],
                    step=step,
                    total=totals[at],
                    projections=projections,
                    pair=projections.pair,
                )
            )
            self._refits.add(homes[-1])
        return homes

    def _waits(self, home: SubspaceHome) -> bool:
        return super()._waits(home) or home.held is not None

    def _payload(self, home: SubspaceHome, moment: Moment) -> Tensor:
        """S; on the way, whether the projectors still serve."""
        home.trained.flight.land()  # without a forward since the last step its delta still lies on the wire
        with lane_context(self._lanes.device):
            gradient = home.trained.gradient() if home.trained.parameter.grad is not None else None
            fits, due = not home.projections.fitted, self._refits.is_due(home, moment)
            looks = (gradient is not None or self._peers.world > 1) and (fits or due)
            if looks and self._peers.world > 1:  # all ranks must find the same projectors, whatever each of them has
                if gradient is None:
                    home.trained.parameter.grad = torch.zeros_like(home.trained.parameter)
                    gradient = home.trained.gradient()
                if home.held is None:
                    home.held = gradient.new_zeros(home.delta[0])
                self._mean_([gradient], "gradients to fit to")
                self._mean_([home.held], self._what)
            if gradient is not None and fits:
                self._refits.first_fit(home.projections, gradient)
            compressed = self._compressed(home)
            if not looks:
                self._mean_([compressed], self._what)
            if gradient is not None and due:
                self._refits.judge(home.projections, gradient)
            return compressed

    def _compressed(self, home: SubspaceHome) -> Tensor:
        """Of what is in ``p.grad`` and what is held."""
        held, home.held = home.held, None
        if home.trained.parameter.grad is None:
            assert held is not None
            return held
        gradient = home.trained.gradient()
        made = self._lanes.run(home.like("compress"), lambda: compress(home.pair.left, home.pair.right, gradient))
        compressed = made.reshape(-1)
        return compressed if held is None else held.add_(compressed)

    def _recall(self, home: SubspaceHome) -> None:
        with lane_context(self._lanes.device):
            home.held = self._compressed(home)
            for mine in self._mine([home]):
                home.held.add_(mine.wire.to(self._lanes.device), alpha=self._peers.world)
        home.trained.parameter.grad = None

    # Without gradients.

    def install(self, arrived: Callable[[Trained], None], factors: FactorsArrived) -> list[Callable[[], Any]]:
        """See ``HostPart.install``; a weight that is used otherwise too still has a gradient from there."""
        undo = super().install(arrived, factors)
        if self._settings.form == "gradient":
            return undo
        mine = {id(t.parameter): t for t in self.trained}
        layers = [layer for unit in {t.unit for t in self.trained} for layer in linear_modules(unit.module)]
        for layer in layers:
            trained = mine.get(id(layer.weight))
            if trained is not None:
                if any(is_compiled(part) for part in trained.unit.module.modules()):
                    raise ValueError(
                        f"form='activations' changes what linear layers do in backward, which the compiled "
                        f"`{trained.unit.name}` would not see; use form='gradient', or do not compile it"
                    )
                ticket = torch.zeros((), device=self._lanes.device, dtype=torch.float32, requires_grad=True)
                ticket.register_post_accumulate_grad_hook(_collecting(arrived, trained))
                undo.append(tap(layer, ticket, partial(factors, trained)))
        return undo

    def factors_ready(self, trained: Trained, left: Tensor, right: Tensor, moment: Moment) -> None:
        """See ``HostPart.factors_ready``; the gradient is formed where projectors are to be fitted to it."""
        home = self._home[trained.name]
        if home.projections.fitted and not self._refits.is_due(home, moment):
            with lane_context(self._lanes.device):
                made = self._lanes.run(
                    home.like("activations", len(left)),
                    lambda: compress_activations(home.pair.left, home.pair.right, left, right),
                )
                compressed = made.to(trained.parameter.dtype).reshape(-1)
                home.held = compressed if home.held is None else home.held.add_(compressed)
        else:
            form_gradient(trained, left, right)

    # Calibration.

    def calibration_due(self, step: int) -> bool:
        """See ``HostPart.calibration_due``."""
        return self._refits.calibration_due(step)

    def calibrations(self, step: int) -> Iterator[Callable[[Trained], None]]:
        """See ``HostPart.calibrations``."""
        return self._refits.calibrations(step)

    # On the host.

    def _step_after(self, unit: UnitHomes[SubspaceHome]) -> list[Event]:
        return [home.transferred for home in unit.taken if home.transferred is not None]

    def _host_step(self, homes: list[SubspaceHome], groups: Groups, verdict: Verdict) -> None:
        kept = []
        for home in homes:
            if skips(home, verdict, self._rule.kernels):
                home.wire[0] = SKIPPED
            else:
                kept.append(home)
        for at, members in groupby(kept, key=lambda home: home.trained.group):
            group = {**groups[at], "weight_decay": 0.0}
            if self._rule.fused is not None:
                step_fused(self._rule, list(members), group, verdict)
                continue
            for home in members:
                clip_([home.gradient], verdict)
                self._make_delta(home, group)

    def _make_delta(self, home: SubspaceHome, group: Mapping[str, Any]) -> None:
        """The rule moves zeros by -lr times its direction: that is the delta."""
        numel, count = home.wire.numel(), home.step.clone()
        size = min(CHUNK_NUMEL, numel)
        deltas, wide = self._lanes.scratch(2 * size, torch.float32).split(size)
        for part in chunks(numel):
            delta, gradient = deltas[: part.stop - part.start].zero_(), home.gradient[part]
            if gradient.dtype != torch.float32:
                gradient = wide[: len(delta)].copy_(gradient)
            home.step.copy_(count)  # every chunk is the same step
            states = {name: [tensor[part]] for name, tensor in home.states.items()}
            self._rule.step_([delta], [gradient], states, [home.step], group)
            home.wire[part].copy_(delta)

    def _step_bytes(self, home: SubspaceHome) -> int:
        fused = self._rule.fused is not None
        return host_step_bytes(home.gradient.element_size(), home.wire.element_size(), fused=fused)

    # Up.

    def _apply(self, home: SubspaceHome, delta: Tensor) -> None:
        self._lanes.run(home.like("apply"), partial(self._apply_one, home, delta.view(home.pair.left.dim, -1)))
        if home.next is not None:
            home.pair, home.next = home.next, None

    def _apply_one(self, home: SubspaceHome, delta: Tensor) -> None:
        weight, pair, noise = home.trained.parameter.detach(), home.pair, None
        if self._dtypes.rounding == "stochastic" and weight.dtype == torch.bfloat16:
            seed = seed_for(self._settings.seed, home.trained.name, home.step_made)
            noise = self._noise.manual_seed(seed)
        skip = delta[0, 0].isnan() if self._settings.skip_nonfinite else None
        apply_(weight, pair.left, pair.right, delta, decay=home.decay, skip=skip, scale=pair.scale, generator=noise)

    # State.

    def _extras_of(self, home: SubspaceHome) -> dict[str, Any]:
        dim, pair = home.pair.left.dim, home.pair
        return {
            "dim": dim,
            "projector": self._settings.projector,
            "draws": home.projections.pair.draws,
            "fitted": home.projections.fitted,
            "left": {"values": pair.left.values.cpu(), "order": _cpu(pair.left.order)},
            "right": {"values": pair.right.values.cpu(), "order": _cpu(pair.right.order)},
            "step": home.step.clone(),
            **{name: tensor.view(dim, dim) for name, tensor in home.states.items()},
        }

    def _load_extras_of(self, home: SubspaceHome, saved: Mapping[str, Any]) -> None:
        dim, rows = home.pair.left.dim, home.trained.parameter.shape[0]
        values = saved["left"]["values"]
        if saved["dim"] != dim or values.shape != (rows, self._settings.nnz):
            raise CheckpointError(
                f"The checkpoint has projected `{home.trained.name}` to dim={saved['dim']} with nnz={values.shape[1]}, "
                f"this run to dim={dim} with nnz={self._settings.nnz}: continue with the settings of the checkpoint."
            )
        left, right = (Projector(saved[side]["values"], dim, saved[side]["order"]) for side in ("left", "right"))
        if home.projections.members[0] == home.trained.name:  # those that share it follow
            home.projections.restore(left, right, saved["draws"], kind=saved["projector"], fitted=saved["fitted"])
        home.pair = home.projections.pair
        super()._load_extras_of(home, saved)


def _collecting(arrived: Callable[[Trained], None], trained: Trained) -> Callable[[Tensor], None]:
    def hook(ticket: Tensor) -> None:
        ticket.grad = None
        arrived(trained)

    return hook


def _cpu(order: Tensor | None) -> Tensor | None:
    return None if order is None else order.cpu()
