"""What every method that has gradients shares: something goes down during backward, the host steps with it.

What goes down, what the step is and what comes up again is the method's: whole gradients and weights in ``host.py``,
projected ones in ``subspace.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import torch
from torch import Tensor

from lightning_offload.errors import OffloadError
from lightning_offload.memory.lanes import Event, shared_buffers
from lightning_offload.memory.slots import Ring
from lightning_offload.methods.base import Groups, Moment, Trained, Verdict
from lightning_offload.methods.homes import AnyHome, UnitHomes
from lightning_offload.methods.sender import FactorsArrived, Sender
from lightning_offload.numerics.norms import gradient_norm

if TYPE_CHECKING:
    from lightning_offload.methods.method import Site

SLOT_NUMEL = 1 << 25
"""Most elements of one gradient piece on its way down (64 MiB in bf16)."""

CPU_SLOT_NUMEL = 1 << 20
"""The same where the device is the host: there the ring takes the memory that the arenas are counted in."""

CAST_BYTES = 12
"""What the casts of a 16-bit wire cost, as memory traffic: they stay in cache but take time.

The step then takes 1.46 (1.27 to 1.53) times the fused fp32 one, whose 28 bytes run at the rate of memory.
"""


def _telling(arrived: Callable[[Trained], None], trained: Trained) -> Callable[[Tensor], None]:
    return lambda _: arrived(trained)


def form_gradient(trained: Trained, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` to ``p.grad``, as autograd would have."""
    parameter = trained.parameter
    with torch.no_grad():
        gradient = (left.t() @ right).to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class HostPart(Sender, Generic[AnyHome]):
    """See the module docstring.

    Attributes:
        trained: What it steps, by unit.

    Args:
        trained: The same; the parameters are moved to the lanes' device.
        site: Where and with what; the wire has the dtype of each weight.
    """

    def __init__(self, trained: Sequence[Trained], site: Site) -> None:
        self.trained = sorted(trained, key=lambda t: (t.unit.index, t.group, t.position))
        self._rule, self._lanes, self._dtypes = site.rule, site.lanes, site.dtypes
        self._peers, self._mean_ = site.peers, site.mean_
        self.sums_on_host = site.accumulate_on_host
        self._wants_norms = site.wants_norms
        self._units = [
            UnitHomes(index, self._make_homes(list(members)))
            for index, members in groupby(self.trained, key=lambda t: t.unit.index)
        ]
        self._home = {home.trained.name: home for unit in self._units for home in unit.homes}
        self._unit = {home.trained.name: unit for unit in self._units for home in unit.homes}
        self._rings = {dtype: self._make_ring(dtype) for dtype in {home.wire.dtype for home in self._home.values()}}

    # What a method fills in, or does otherwise.

    _what: ClassVar[str] = "gradients"
    """What goes down, as the ledger calls it."""

    @abstractmethod
    def _make_homes(self, members: list[Trained]) -> list[AnyHome]:
        """The homes of one unit."""

    def _payload(self, home: AnyHome, moment: Moment) -> Tensor:
        """What of ``p.grad`` goes down, flat, in the wire's dtype or wider, as the mean over ranks: here all of it.

        ``p.grad`` is dropped afterwards.
        """
        gradient = home.trained.gradient().reshape(-1)
        self._mean_([gradient], self._what)
        return gradient

    def _recall(self, home: AnyHome) -> None:
        """Take back into ``p.grad`` what has gone down, for a second gradient has come; nothing is in flight.

        It is a mean over ranks, of which the owner's share is all of it.
        """
        parameter = home.trained.parameter
        if home.trained.owner != self._peers.rank:
            return
        first = home.wire.view(parameter.shape).to(parameter.device, copy=True).mul_(self._peers.world)
        parameter.grad = first.add_(home.trained.gradient())

    @abstractmethod
    def _host_step(self, homes: list[AnyHome], groups: Groups, verdict: Verdict) -> None:
        """The step, on the host lane: from what is on the wires (or in the totals) to what comes up from them."""

    @abstractmethod
    def _step_bytes(self, home: AnyHome) -> int:
        """Host memory traffic of one element's step."""

    @abstractmethod
    def _launch(self, unit: UnitHomes[AnyHome], backward_done: Event) -> None:
        """Send up what the unit's step has made."""

    def _step_after(self, unit: UnitHomes[AnyHome]) -> list[Event]:
        """What else the unit's step comes after, beside its gradients and the verdict."""
        return []

    def _stepped_early(self, unit: UnitHomes[AnyHome]) -> None:
        """The unit steps under backward."""

    # Part.

    def gradient_ready(self, trained: Trained, moment: Moment) -> None:
        """See ``Part.gradient_ready``."""
        home = self._home[trained.name]
        if home.late:
            return
        if home.taken:
            self._refuse_stepped(home)
        if home.taken and not self.sums_on_host:
            self._lanes.synchronize()
            self._recall(home)
            home.taken, home.late, home.landed = False, True, []
            return
        self._take(home, moment)
        if moment.early is not None:
            home.final = True
            self._step_if_complete(self._unit[trained.name], *moment.early)

    def collect(self, step: int) -> None:
        """See ``Part.collect``."""
        for home in self._home.values():
            if self._waits(home):
                self._take(home, Moment(step, last=True))

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
            if unit.taken:
                if unit.stepped is None:
                    unit.stepped = self._step(unit, groups, verdict)
                readers.append(unit.stepped)
                self._launch(unit, backward_done)
        self._forget()
        return readers

    def drop(self) -> None:
        """See ``Part.drop``."""
        self._forget()

    def pending_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.pending_of``."""
        home = self._home[trained.name]
        return home.total if home.total is not None and home.taken else None

    def load_pending_of(self, trained: Trained, gradient: Tensor) -> None:
        """The inverse of ``pending_of``."""
        home = self._home[trained.name]
        assert home.total is not None
        home.total.copy_(gradient.reshape(-1))
        home.taken = True

    # Beside the protocol.

    @property
    def device_bytes(self) -> int:
        """What it holds on the device: here the rings in which gradients leave."""
        return sum(ring.nbytes for ring in self._rings.values())

    def install(self, arrived: Callable[[Trained], None], factors: FactorsArrived) -> list[Callable[[], Any]]:
        """Hang on the module what tells of gradients; returns how to take it off."""
        return [t.parameter.register_post_accumulate_grad_hook(_telling(arrived, t)).remove for t in self.trained]

    def waits(self, trained: Trained) -> bool:
        """Whether there is a gradient that has not been taken."""
        return self._waits(self._home[trained.name])

    def take_back(self, trained: Trained) -> None:
        """See ``Sender.take_back``."""
        home = self._home[trained.name]
        home.idle, home.landed, home.taken, home.trained.norm = home.landed, [], False, None

    def meet(self) -> None:
        """See ``Sender.meet``: each gradient has met those of the others as it left."""

    def catch_up(self) -> None:
        """See ``Sender.catch_up``: nothing is put off."""

    def load_extras(self, extras: Mapping[str, Any]) -> None:
        """See ``Sender.load_extras``: there are none."""

    def free_rings(self) -> None:
        """Give the rings back to the device; nothing is in flight, and nothing will be sent any more."""
        self._rings = {}

    def step_all(self, groups: Groups, verdict: Verdict) -> None:
        """The host work of one step without any copy, for measuring it: whatever is on the wire is the gradient."""
        for unit in self._units:
            self._host_step(self._mine(unit.homes), groups, verdict)

    # Ranks: a parameter has its host memory on one of them.

    def _mine(self, homes: Iterable[AnyHome]) -> list[AnyHome]:
        """Those that are stepped on this rank's host."""
        return [home for home in homes if home.trained.owner == self._peers.rank]

    def _numel_here(self, trained: Trained, numel: int) -> int:
        """Elements in this rank's host memory."""
        return numel if trained.owner == self._peers.rank else 0

    # Buffers.

    def _carve(self, label: str, sizes: Sequence[int], kinds: Sequence[tuple[torch.dtype, Any]]) -> list[Tensor]:
        """One flat buffer per size; those of one dtype and place share one exact region."""
        return shared_buffers(self._lanes, label, sizes, kinds)

    def _carve_states(self, label: str, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """Optimizer state, by member."""
        kinds = [(self._dtypes.moments, "host")] * len(sizes)
        states = {name: self._carve(f"{label}.{name}", sizes, kinds) for name in self._rule.states}
        return [{name: tensors[at] for name, tensors in states.items()} for at in range(len(sizes))]

    def _carve_totals(self, label: str, sizes: Sequence[int]) -> Sequence[Tensor | None]:
        """Sums over micro-batches, where they are on the host."""
        if not self.sums_on_host:
            return [None] * len(sizes)
        return self._carve(f"{label}.total", sizes, [(torch.float32, "host")] * len(sizes))

    def _make_ring(self, dtype: torch.dtype) -> Ring:
        """Device buffers for about one block's gradients, so that compute never waits for the link within a block."""
        homes = [home for home in self._home.values() if home.wire.dtype == dtype]
        bound = min(SLOT_NUMEL, CPU_SLOT_NUMEL) if self._lanes.shares_memory else SLOT_NUMEL
        slot = max(min(max(home.wire.numel() for home in homes), bound), 1)
        largest = max(sum(home.wire.numel() for home in unit.homes) for unit in self._units)
        return Ring(self._lanes, f"{self._what}.{dtype}", slot, dtype, min(max(-(-largest // slot), 2), 8))

    # Taking.

    def _waits(self, home: AnyHome) -> bool:
        """Whether there is a gradient that has not been taken."""
        return home.trained.parameter.grad is not None

    def _take(self, home: AnyHome, moment: Moment) -> None:
        """Send the gradient down, and free it."""
        payload = self._payload(home, moment)
        home.trained.parameter.grad = None
        if self._wants_norms and not self.sums_on_host:
            home.trained.norm = gradient_norm(payload)
        if home.trained.owner == self._peers.rank:
            self._send(home, payload)
        if home.total is not None:
            self._add(home, home.total)
        home.taken = True

    def _send(self, home: AnyHome, payload: Tensor) -> None:
        """Piece by piece through the ring."""
        ring = self._rings[home.wire.dtype]
        # the wire is free: what went up from it has arrived, the last micro-batch has been added
        before = [event for event in (self._unit[home.trained.name].arrived, home.added) if event is not None]
        before += home.idle
        home.landed, home.idle = [], []
        for start in range(0, payload.numel(), ring.numel):
            piece = payload[start : start + ring.numel]
            slot = ring.take()
            buffer = slot.buffer[: piece.numel()]
            buffer.copy_(piece)
            slot.free = self._lanes.copy(
                [home.wire[start : start + piece.numel()]],
                [buffer],
                "d2h",
                after=[self._lanes.compute(), *before],
                priority=home.trained.flight.order,
                tag=self._what,
            )
            home.landed.append(slot.free)

    def _add(self, home: AnyHome, total: Tensor) -> None:
        first, wire = not home.taken, home.wire
        home.added = self._lanes.host(
            lambda: total.copy_(wire) if first else total.add_(wire),
            after=home.landed,  # which came after the last addition
            priority=home.trained.flight.order,
            tag="accumulate",
            traffic_bytes=total.numel() * (8 + wire.element_size()),
        )

    def _refuse_stepped(self, home: AnyHome) -> None:
        """A second gradient in one step: with several backwards, or tied weights under reentrant checkpointing."""
        trained = home.trained
        if self._unit[trained.name].stepped is not None:
            raise OffloadError(
                f"`{trained.name}` received a second gradient in one step after its update had started. Clip gradients "
                "(under `full_offload` `skip_nonfinite=True` will do), so that updates wait for the end of backward."
            )

    # Stepping.

    def _step_if_complete(self, unit: UnitHomes[AnyHome], groups: Groups, verdict: Verdict) -> None:
        if all(home.final for home in unit.homes):
            unit.stepped = self._step(unit, groups, verdict)
            self._stepped_early(unit)

    def _step(self, unit: UnitHomes[AnyHome], groups: Groups, verdict: Verdict) -> Event:
        homes = self._mine(unit.taken)
        after = [event for home in homes for event in home.events] + self._step_after(unit)
        after += [verdict.host_ready] if verdict.host_ready is not None else []
        return self._lanes.host(
            lambda: self._host_step(homes, groups, verdict),
            after=after,
            priority=unit.flight.order,
            tag="step",
            traffic_bytes=sum(home.wire.numel() * self._step_bytes(home) for home in homes),
        )

    def _forget(self) -> None:
        for home in self._home.values():
            home.taken, home.final, home.landed, home.added, home.trained.norm = False, False, [], None, None
        for unit in self._units:
            unit.stepped = None
