"""The host optimizer: gradients go down during backward, the host steps, weights come up for the next forward.

It is the whole of method ``full``, and the common path beside every other method (embeddings, heads, whatever a
method does not claim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_offload.memory.lanes import Event, nbytes
from lightning_offload.memory.promises import bring
from lightning_offload.methods.base import Groups, Trained, Verdict
from lightning_offload.methods.homes import (
    CHUNK_NUMEL,
    UnitHomes,
    WeightHome,
    host_step,
    load_state,
    settle,
    weight_dtype,
)
from lightning_offload.methods.part import CAST_BYTES, HostPart
from lightning_offload.methods.rules import Rule
from lightning_offload.numerics.norms import adopt_


class HostOptimizer(HostPart[WeightHome]):
    """See the module docstring, and ``HostPart``; masters are taken from the parameters as they come."""

    @staticmethod
    def bytes_per_element(weight: torch.dtype, rule: Rule, *, accumulate_on_host: bool) -> int:
        """Host bytes per trained element: master, state, wire, and the sum over micro-batches if it is here."""
        return 4 + 4 * len(rule.states) + weight.itemsize + 4 * accumulate_on_host

    @property
    def holdings(self) -> dict[str, int]:
        """Bytes in host memory by what they hold."""
        homes = self._home.values()
        held = {
            "masters": [home.master for home in homes],
            "optimizer state": [state for home in homes for state in home.states.values()],
            "wire (gradients down, weights up)": [home.wire for home in homes],
            "sums over micro-batches": [home.total for home in homes if home.total is not None],
        }
        return {name: nbytes(tensors) for name, tensors in held.items() if tensors}

    @property
    def scratch_bytes(self) -> int:
        """Host memory in which 16-bit gradients are cast, beside the arenas."""
        narrow = [home for home in self._home.values() if self._casts(home)]
        return max((min(CHUNK_NUMEL, h.wire.numel()) * h.master.element_size() for h in narrow), default=0)

    def adopt(self) -> None:
        """See ``Part.adopt``."""
        for unit in self._units:
            homes = self._mine(unit.homes)
            weights = [home.trained.parameter.detach() for home in homes]
            landed = self._lanes.copy(
                [home.source for home in homes], weights, "d2h", after=[self._lanes.compute()], tag="adopt"
            )
            for home in homes:
                if home.rounded:
                    self._lanes.host(partial(adopt_, home.master, home.wire), after=[landed], tag="adopt")
        self._lanes.synchronize()

    def state_of(self, trained: Trained) -> dict[str, Tensor]:
        """See ``Part.state_of``; the tensors are the arenas' own memory."""
        home = self._home[trained.name]
        if float(home.step) == 0:
            return {}
        state = {"step": home.step.clone()} if self._rule.has_step else {}
        return state | {name: tensor.view(trained.parameter.shape) for name, tensor in home.states.items()}

    def load_state_of(self, trained: Trained, state: Mapping[str, Any]) -> None:
        """See ``Part.load_state_of``."""
        if trained.owner == self._peers.rank:
            home = self._home[trained.name]
            load_state(self._rule, home.step, home.states, trained, state)

    def master_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.master_of``."""
        home = self._home[trained.name]
        mine = trained.owner == self._peers.rank
        return home.master.view(trained.parameter.shape) if home.rounded and mine else None

    def pending_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.pending_of``."""
        pending = super().pending_of(trained)
        return None if pending is None else pending.view(trained.parameter.shape)

    def weight_of(self, trained: Trained) -> Tensor:
        """The weight in host memory, valid while nothing is in flight and no gradient is here.

        Rounded again where it comes up rounded: the wire may hold an old gradient.
        """
        home = self._home[trained.name]
        if home.rounded:
            home.wire.copy_(home.master)
        return home.source

    def _make_homes(self, members: list[Trained]) -> list[WeightHome]:
        label, masters = members[0].unit.name or "model", self._dtypes.master
        sizes = [self._numel_here(t, t.parameter.numel()) for t in members]
        weights = [weight_dtype(t.parameter, self._dtypes) for t in members]
        wires = self._carve(f"{label}.wire", sizes, [(dtype, "pinned") for dtype in weights])
        # a master that is the weight itself comes up directly, so it is page-locked
        places = [(masters, "pinned" if dtype == masters else "host") for dtype in weights]
        owned = self._carve(f"{label}.master", sizes, places)
        states, totals = self._carve_states(label, sizes), self._carve_totals(label, sizes)
        homes = []
        for at, t in enumerate(members):
            step = torch.zeros((), dtype=torch.float32, device="cpu")  # whatever the defaults are
            homes.append(
                WeightHome(trained=t, wire=wires[at], master=owned[at], states=states[at], step=step, total=totals[at])
            )
            bring(t.parameter)
            with torch.no_grad():
                owned[at].copy_(t.parameter.detach().reshape(-1)[: sizes[at]])
            settle(t.parameter, self._lanes.device, weights[at])
            self._lanes.watch(t.name, t.parameter)
        return homes

    def _host_step(self, homes: list[WeightHome], groups: Groups, verdict: Verdict) -> None:
        host_step(self._rule, homes, groups, verdict, self._lanes)

    def _step_bytes(self, home: WeightHome) -> int:
        """Gradient read, master and states read and written."""
        states = 4 + 8 + 8 * len(self._rule.states)
        return states + CAST_BYTES if self._casts(home) else states

    def _casts(self, home: WeightHome) -> bool:
        """Whether 16-bit gradients are widened in memory."""
        return home.rounded and home.total is None and self._rule.fused is None

    def _launch(self, unit: UnitHomes[WeightHome], backward_done: Event) -> None:
        taken, mine = unit.taken, self._mine(unit.taken)
        assert unit.stepped is not None
        if mine:
            unit.arrived = self._lanes.copy(
                [home.trained.parameter.detach() for home in mine],
                [home.source for home in mine],
                "h2d",
                after=[unit.stepped, backward_done],  # backward still reads the old weights
                priority=unit.flight.order,
                tag="weights",
            )
        unit.flight.launch(partial(self._arrive, taken, unit.arrived if mine else None))

    def _arrive(self, homes: Sequence[WeightHome], arrived: Event | None) -> None:
        if arrived is not None:
            self._lanes.wait_compute(arrived)
        for home in homes:
            self._peers.share_([home.trained.parameter.detach()], home.trained.owner, "weights")
