"""The host optimizer: gradients go down during backward, the host steps, weights come up for the next forward.

It is the whole of method ``full``, and the common path beside every other method (embeddings, heads, whatever a
method does not claim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_offload.errors import OffloadError
from lightning_offload.memory.lanes import Event, Lanes, nbytes
from lightning_offload.memory.slots import Ring
from lightning_offload.methods.base import DTypes, Groups, Trained, Verdict
from lightning_offload.methods.homes import CHUNK_NUMEL, Home, UnitHomes, host_step, load_state, settle, weight_dtype
from lightning_offload.methods.rules import Rule
from lightning_offload.numerics.norms import adopt_, gradient_norm

SLOT_NUMEL = 1 << 25
"""Most elements of one gradient piece on its way down (64 MiB in bf16)."""

CPU_SLOT_NUMEL = 1 << 20
"""The same where the device is the host: there the ring takes the memory that the arenas are counted in."""


CAST_BYTES = 12
"""What the casts of a 16-bit wire cost, as memory traffic: they stay in cache but take time.

The step then takes 1.46 (1.27 to 1.53) times the fused fp32 one, whose 28 bytes run at the rate of memory.
"""


class HostOptimizer:
    """See the module docstring.

    Args:
        trained: What it steps; the parameters are moved to the lanes' device as their masters are taken.
        rule: The update rule of the user's optimizer.
        lanes: Where it runs.
        dtypes: Dtypes of weights, masters and moments; the wire has the dtype of each weight.
        accumulate_on_host: Sum micro-batches on the host in fp32 instead of in ``p.grad``.
        wants_norms: Whether steps are decided by norms.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        rule: Rule,
        lanes: Lanes,
        dtypes: DTypes,
        *,
        accumulate_on_host: bool,
        wants_norms: bool,
    ) -> None:
        self.trained = sorted(trained, key=lambda t: (t.unit.index, t.group, t.position))
        self._rule = rule
        self._lanes = lanes
        self._dtypes = dtypes
        self._on_host = accumulate_on_host
        self._wants_norms = wants_norms
        self._units = [
            UnitHomes(index, self._make_homes(list(members)))
            for index, members in groupby(self.trained, key=lambda t: t.unit.index)
        ]
        self._home = {home.trained.name: home for unit in self._units for home in unit.homes}
        self._unit = {home.trained.name: unit for unit in self._units for home in unit.homes}
        self._rings = {dtype: self._make_ring(dtype) for dtype in {home.wire.dtype for home in self._home.values()}}

    @staticmethod
    def bytes_per_element(weight: torch.dtype, rule: Rule, *, accumulate_on_host: bool) -> int:
        """Host bytes per trained element: master, state, wire, and the sum over micro-batches if it is here."""
        return 4 + 4 * len(rule.states) + weight.itemsize + 4 * accumulate_on_host

    def gradient_ready(self, trained: Trained, group_now: Groups | None) -> None:
        """See ``Part.gradient_ready``."""
        home = self._home[trained.name]
        if home.late:
            return
        if home.taken and not self._on_host:
            self._recall(home)
            return
        self._take(home)
        unit = self._unit[trained.name]
        if group_now is not None:
            home.final = True
            if all(other.final for other in unit.homes):
                unit.stepped = self._step(unit, group_now, Verdict(None, False, 0))

    def collect(self) -> None:
        """See ``Part.collect``."""
        for home in self._home.values():
            if home.trained.parameter.grad is not None:
                self._take(home)

    def has_gradient(self, trained: Trained) -> bool:
        """See ``Part.has_gradient``."""
        return self._home[trained.name].taken

    def host_norms(self) -> list[tuple[Trained, Tensor, list[Event]]]:
        """Sums over micro-batches on the host, and the events after which they may be read."""
        homes = [home for home in self._home.values() if home.taken and home.total is not None]
        return [(home.trained, home.total, home.events) for home in homes if home.total is not None]

    def update(self, groups: Groups, verdict: Verdict, backward_done: Event) -> list[Event]:
        """See ``Part.update``."""
        readers = []
        for unit in self._units:
            taken = unit.taken
            if not taken:
                continue
            stepped = unit.stepped if unit.stepped is not None else self._step(unit, groups, verdict)
            readers.append(stepped)
            taken[0].trained.flight.launch(
                self._lanes.copy(
                    [home.trained.parameter.detach() for home in taken],
                    [home.source for home in taken],
                    "h2d",
                    after=[stepped, backward_done],  # backward still reads the old weights
                    priority=taken[0].trained.flight.order,
                    tag="weights",
                )
            )
        self._forget()
        return readers

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
        narrow = [home for home in self._home.values() if home.rounded and home.total is None]
        return max((min(CHUNK_NUMEL, h.wire.numel()) * h.master.element_size() for h in narrow), default=0)

    @property
    def ring_bytes(self) -> int:
        """Device bytes of the rings in which gradients leave."""
        return sum(ring.nbytes for ring in self._rings.values())

    def free_rings(self) -> None:
        """Give the rings back to the device; nothing is in flight, and nothing will be sent any more."""
        self._rings = {}

    def drop(self) -> None:
        """See ``Part.drop``."""
        self._forget()

    def step_all(self, groups: Groups, verdict: Verdict) -> None:
        """The host work of one step without any copy, for measuring it: whatever is on the wire is the gradient."""
        for unit in self._units:
            host_step(self._rule, unit.homes, groups, verdict, self._lanes)

    def adopt(self) -> None:
        """See ``Part.adopt``."""
        for unit in self._units:
            weights = [home.trained.parameter.detach() for home in unit.homes]
            landed = self._lanes.copy(
                [home.source for home in unit.homes], weights, "d2h", after=[self._lanes.compute()], tag="adopt"
            )
            for home in unit.homes:
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
        load_state(self._rule, self._home[trained.name].step, self._home[trained.name].states, trained, state)

    def master_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.master_of``."""
        home = self._home[trained.name]
        return home.master.view(trained.parameter.shape) if home.rounded else None

    def weight_of(self, trained: Trained) -> Tensor:
        """The weight in host memory, valid while nothing is in flight and no gradient is here.

        Rounded again where it comes up rounded: the wire may hold an old gradient.
        """
        home = self._home[trained.name]
        if home.rounded:
            home.wire.copy_(home.master)
        return home.source

    def pending_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.pending_of``."""
        home = self._home[trained.name]
        return home.total.view(trained.parameter.shape) if home.total is not None and home.taken else None

    def load_pending_of(self, trained: Trained, gradient: Tensor) -> None:
        """The inverse of ``pending_of``."""
        home = self._home[trained.name]
        assert home.total is not None
        home.total.copy_(gradient.reshape(-1))
        home.taken = True

    def _make_homes(self, members: list[Trained]) -> list[Home]:
        weights = {t.name: weight_dtype(t.parameter, self._dtypes) for t in members}
        name, masters = members[0].unit.name or "model", self._dtypes.master
        wires = self._carve(f"{name}.wire", members, [(weights[t.name], "pinned") for t in members])
        # a master that is the weight itself comes up directly, so it is page-locked
        places = [(masters, "pinned" if weights[t.name] == masters else "host") for t in members]
        owned = self._carve(f"{name}.master", members, places)
        states = {
            state: self._carve(f"{name}.{state}", members, [(self._dtypes.moments, "host")] * len(members))
            for state in self._rule.states
        }
        totals: list[Tensor | None] = [None] * len(members)
        if self._on_host:
            totals = [*self._carve(f"{name}.total", members, [(torch.float32, "host")] * len(members))]
        homes = []
        for at, t in enumerate(members):
            own = {state: tensors[at] for state, tensors in states.items()}
            step = torch.zeros((), dtype=torch.float32, device="cpu")  # whatever the defaults are
            homes.append(Home(t, wires[at], owned[at], own, step, totals[at]))
            with torch.no_grad():
                owned[at].copy_(t.parameter.detach().reshape(-1))
            settle(t.parameter, self._lanes.device, weights[t.name])
            self._lanes.watch(t.name, t.parameter)
        return homes

    def _carve(self, label: str, members: list[Trained], kinds: list[tuple[torch.dtype, Any]]) -> list[Tensor]:
        """One flat buffer per member; those of one dtype and place share one exact region."""
        made: dict[int, Tensor] = {}
        for kind in dict.fromkeys(kinds):
            chosen = [at for at, other in enumerate(kinds) if other == kind]
            sizes = [members[at].parameter.numel() for at in chosen]
            name = ".".join([label, *(str(part) for part in kind)])
            made |= dict(zip(chosen, self._lanes.buffers(name, sizes, *kind), strict=True))
        return [made[at] for at in range(len(members))]

    def _make_ring(self, dtype: torch.dtype) -> Ring:
        """Device buffers for about one block's gradients, so that compute never waits for the link within a block."""
        homes = [home for home in self._home.values() if home.wire.dtype == dtype]
        bound = min(SLOT_NUMEL, CPU_SLOT_NUMEL) if self._lanes.shares_memory else SLOT_NUMEL
        slot = min(max(home.wire.numel() for home in homes), bound)
        largest = max(sum(home.wire.numel() for home in unit.homes) for unit in self._units)
        return Ring(self._lanes, f"gradients.{dtype}", slot, dtype, min(max(-(-largest // slot), 2), 8))

    def _take(self, home: Home) -> None:
        """Send the gradient down, piece by piece through the ring, and free it."""
        trained = home.trained
        gradient = trained.gradient().reshape(-1)
        if self._wants_norms and not self._on_host:
            trained.norm = gradient_norm(gradient)
        ring = self._rings[home.wire.dtype]
        # the wire is free: the last weight has gone up from it, the last micro-batch has been added
        before = [event for event in (trained.flight.arrived, home.added) if event is not None]
        home.landed = []
        for start in range(0, gradient.numel(), ring.numel):
            piece = gradient[start : start + ring.numel]
            slot = ring.take()
            buffer = slot.buffer[: piece.numel()]
            buffer.copy_(piece)
            slot.free = self._lanes.copy(
                [home.wire[start : start + piece.numel()]],
                [buffer],
                "d2h",
                after=[self._lanes.compute(), *before],
                priority=trained.flight.order,
                tag="gradients",
            )
            home.landed.append(slot.free)
        trained.parameter.grad = None
        if home.total is not None:
            self._add(home, home.total)
        home.taken = True

    def _add(self, home: Home, total: Tensor) -> None:
        first, wire = not home.taken, home.wire
        home.added = self._lanes.host(
            lambda: total.copy_(wire) if first else total.add_(wire),
            after=home.landed,  # which came after the last addition
            priority=home.trained.flight.order,
            tag="accumulate",
            traffic_bytes=total.numel() * (8 + wire.element_size()),
        )

    def _recall(self, home: Home) -> None:
        """A second gradient in one step: bring the first back, and from now on wait for the step.

        Happens with several backwards per step, and with tied weights under reentrant checkpointing.
        """
        trained, unit = home.trained, self._unit[home.trained.name]
        if unit.stepped is not None:
            raise OffloadError(
                f"`{trained.name}` received a second gradient in one step after its update had started. Set "
                "`skip_nonfinite=True`, or clip gradients, so that updates wait for the end of backward."
            )
        self._lanes.synchronize()
        first = home.wire.view(trained.parameter.shape).to(trained.parameter.device)
        trained.parameter.grad = first.add_(trained.gradient())
        home.taken, home.late, home.landed = False, True, []

    def _step(self, unit: UnitHomes, groups: Groups, verdict: Verdict) -> Event:
        homes = unit.taken
        elements = sum(home.wire.numel() for home in homes)
        flight = homes[0].trained.flight
        after = [event for home in homes for event in home.events]
        after += [verdict.host_ready] if verdict.host_ready is not None else []
        return self._lanes.host(
            lambda: host_step(self._rule, homes, groups, verdict, self._lanes),
            after=after,
            priority=flight.order,
            tag="step",
            traffic_bytes=elements * self._step_bytes(homes[0]),
        )

    def _step_bytes(self, home: Home) -> int:
        """Host memory traffic of one element's step: gradient read, master and states read and written."""
        states = 4 + 8 + 8 * len(self._rule.states)
        return states + CAST_BYTES if home.rounded and home.total is None else states

    def _forget(self) -> None:
        for home in self._home.values():
            home.taken, home.final, home.landed, home.added, home.trained.norm = False, False, [], None, None
        for unit in self._units:
            unit.stepped = None
