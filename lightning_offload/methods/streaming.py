"""Weights that live in host memory and visit the device: a unit's come up just before its forward.

Every unit has a *berth*. That of a streamed unit is in the host's arenas, and a few device *slots* are taken by the
units in turn; that of a resident unit is on the device for good. At rest a parameter's ``data`` is what its berth
holds, which is the truth about the weight; during a visit it is what the forward is to see. The next units come up
while the present one computes, also from one forward to the next, so that the link never drains.

What the forward sees is the weight itself, or what a *scratch* buffer has been filled with: the weight in another
dtype, and in a method that overrides ``_refresh``, ``_changes`` and ``_fill`` whatever it makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_offload.errors import OffloadError
from lightning_offload.memory.arena import aligned
from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.lanes import Event, Lanes, lane_context, nbytes
from lightning_offload.memory.promises import bring

DTypeOf = Callable[[nn.Parameter], torch.dtype]

_MOST_HEARD = 4096
"""Visits in which a unit that is waited for (it ran once, and never again) must come."""


@dataclass(eq=False)
class Leaf:
    """One parameter of a unit.

    Attributes:
        name: Full name in the module.
        parameter: The module's own ``Parameter``; never replaced.
        place: Among all parameters of the module, in ``named_parameters()`` order.
        group: Index of its optimizer group; ``None`` where it is frozen.
        compute: dtype in which the forward sees it.
        rest: The truth about it, flat: in host memory, or on the device where the unit is resident.
        own: dtype in which it came.
    """

    name: str
    parameter: nn.Parameter
    place: int
    group: int | None
    compute: torch.dtype
    rest: Tensor
    own: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        """Before it has moved."""
        self.own = self.parameter.dtype

    @property
    def widens(self) -> bool:
        """Whether it is kept in fewer bits than it came in, and forwards see it in."""
        kept = self.rest.dtype
        return self.compute == self.own != kept and torch.promote_types(kept, self.own) == self.own

    def show(self, data: Tensor) -> None:
        """Point the parameter at flat ``data``."""
        self.parameter.data = data.view(self.parameter.shape)


@dataclass(eq=False)
class Buffer:
    """Device memory in which the tensors of one unit lie one after the other.

    Attributes:
        buffer: Its bytes.
    """

    buffer: Tensor
    _views: dict[tuple[tuple[int, torch.dtype], ...], list[Tensor]] = field(default_factory=dict, kw_only=True)

    def carve(self, tensors: Iterable[tuple[int, torch.dtype]]) -> list[Tensor]:
        """See ``carved``; units of one layout share the views."""
        key = tuple(tensors)
        if key not in self._views:
            self._views[key] = carved(self.buffer, key)
        return self._views[key]


@dataclass(eq=False)
class Slot(Buffer):
    """A device buffer that streamed units take in turn.

    Attributes:
        free: After these it may be overwritten.
        holds: Whose weights are in it, or on their way.
        used: When it was last taken; larger is later.
    """

    free: list[Event] = field(default_factory=list)
    holds: Berth | None = None
    used: int = 0


@dataclass(eq=False)
class Scratch(Buffer):
    """A device buffer for what a forward sees of one unit.

    Attributes:
        holds: What it has been filled with.
    """

    holds: Hashable = None


@dataclass(eq=False)
class Berth:
    """Where the weights of one unit are.

    Attributes:
        unit: The unit.
        trained: Its trained parameters.
        frozen: The others.
        resident: Whether it is on the device for good.
        slot: Where it is on the device, if it is streamed and there.
        uploaded: The copy into that slot.
        written: The last copy back from one.
        host_seen: How many updates the weights at rest have seen.
        device_seen: How many those on the device have.
        own: Scratch buffers of its own, by what they are for; ``None`` where the common one will do.
    """

    unit: Unit
    trained: list[Leaf]
    frozen: list[Leaf]
    resident: bool
    slot: Slot | None = None
    uploaded: Event | None = None
    written: Event | None = None
    host_seen: int = 0
    device_seen: int = 0
    own: dict[Hashable, Scratch] | None = None

    @property
    def leaves(self) -> list[Leaf]:
        """All its parameters, trained ones first."""
        return self.trained + self.frozen

    @property
    def stored(self) -> list[Tensor]:
        """The weights at rest, flat, of each of ``leaves``."""
        return [leaf.rest for leaf in self.leaves]

    @property
    def on_device(self) -> list[Tensor]:
        """The weights on the device, flat, of each of ``leaves``."""
        if self.resident:
            return self.stored
        assert self.slot is not None
        return self.slot.carve((rest.numel(), rest.dtype) for rest in self.stored)


class Streaming:
    """See the module docstring.

    Attributes:
        order: Units in the order of the visits of a forward, as far as it is known; for what comes up next. Where
            nobody calls ``follow`` it is learned from the visits.

    Args:
        module: The model.
        units: Its units.
        lanes: Where it runs.
        stored: dtype in which a weight is kept and crosses the link.
        compute: dtype in which a forward sees it.
        group_of: The optimizer group of each trained parameter, by id.
        resident: Units that stay on the device.
        slots: Device buffers for the others.
        prefetch: How many units come up ahead.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        lanes: Lanes,
        *,
        stored: DTypeOf,
        compute: DTypeOf,
        group_of: Mapping[int, int],
        resident: set[int],
        slots: int,
        prefetch: int,
    ) -> None:
        self.order: tuple[int, ...] = ()
        self._lanes, self._prefetch = lanes, prefetch
        places = {id(p): at for at, p in enumerate(module.parameters())}
        self._berths: dict[int, Berth] = {}
        for unit in units:
            leaves = [
                Leaf(name, p, places[id(p)], group_of.get(id(p)), compute(p), torch.empty(0))
                for name, p in unit.parameters.items()
            ]
            trained = [leaf for leaf in leaves if leaf.group is not None]
            frozen = [leaf for leaf in leaves if leaf.group is None]
            berth = self._berths[unit.index] = Berth(unit, trained, frozen, unit.index in resident)
            self._settle(berth, stored)
        for index in around_others(units):
            self.hold(index)
        self._slots = self._make_slots(slots)
        self._scratch = Scratch(self._scratch_buffer(max(map(self._scratch_bytes, self.berths), default=0)))
        self._visited: dict[int, Berth] = {}
        self._heard: list[int] = []  # visits since the first that ``order`` does not have
        self._at = -1  # in ``order``
        self._clock = 0

    # What lockstep calls.

    def arrive(self, unit: Unit) -> None:
        """The unit's weights are on the device for what compute does next; those that follow start to come up."""
        with lane_context(self._lanes.device):
            berth = self._visited[unit.index] = self._berths[unit.index]
            self._hear(unit.index)
            self._find(unit.index)
            self._come_up(berth)
            self._refresh(berth)
            for follower in self._followers():
                if follower.slot is None:
                    self._send_up(follower)

    def present(self, unit: Unit, stream: int) -> None:
        """The parameters show what this stream is to see."""
        berth = self._berths[unit.index]
        with lane_context(self._lanes.device):
            self._lanes.mark(self._phase(stream), unit.index)
            shown = iter(self._filled(berth, stream))
            for leaf, weight in zip(berth.leaves, berth.on_device, strict=True):
                leaf.show(next(shown) if self._changes(leaf) else weight)

    def leave(self, unit: Unit) -> None:
        """The parameters show the weights at rest; the unit's slot may be taken."""
        berth = self._berths[unit.index]
        self._visited.pop(unit.index, None)
        for leaf in berth.leaves:
            leaf.show(leaf.rest)
        self._release(berth)

    # Beside the visits.

    @property
    def berths(self) -> list[Berth]:
        """All of them, in module order."""
        return list(self._berths.values())

    @property
    def streamed(self) -> list[Berth]:
        """Those whose weights come and go."""
        return [berth for berth in self.berths if not berth.resident]

    def is_resident(self, index: int) -> bool:
        """Whether this unit is on the device for good."""
        return self._berths[index].resident

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights in host memory."""
        return sum(nbytes(berth.stored) for berth in self.streamed)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that are on the device for good."""
        return sum(nbytes(berth.stored) for berth in self.berths if berth.resident)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: slots, scratch buffers, resident weights."""
        own = [scratch for berth in self.berths if berth.own for scratch in berth.own.values()]
        buffers = [slot.buffer for slot in self._slots] + [scratch.buffer for scratch in (self._scratch, *own)]
        return nbytes(buffers) + self.resident_bytes

    @property
    def places(self) -> Sequence[int]:
        """Units in the order of their first visit, those that are not visited behind them."""
        return list(dict.fromkeys((*self.order, *self._berths)))

    def unit_of(self, priority: int) -> int:
        """The unit that an operation of this priority was for."""
        return priority % len(self._berths)

    def follow(self, order: Sequence[int]) -> None:
        """This is the order of a forward."""
        self.order, self._heard = tuple(order), []

    def rest(self) -> None:
        """Every parameter shows its weight at rest: what an exception has left behind is cleared up."""
        for berth in list(self._visited.values()):
            self.leave(berth.unit)

    def forget(self) -> None:
        """Somebody else has written the weights at rest: what has been made of them is out of date."""
        self._lanes.synchronize()
        for slot in self._slots:
            if slot.holds is not None:
                slot.holds.slot, slot.holds = None, None
        for scratch in [self._scratch, *(s for berth in self.berths if berth.own for s in berth.own.values())]:
            scratch.holds = None

    def hold(self, index: int) -> None:
        """Other units are visited while this one is: it stays on the device, with scratch buffers of its own."""
        berth = self._berths[index]
        if berth.own is None:
            berth.own = {}
        if not berth.resident:
            self._lanes.synchronize()
            berth.resident, berth.slot, berth.device_seen = True, None, berth.host_seen
            self._lay_out(berth, [rest.dtype for rest in berth.stored])

    def give_back(self) -> None:
        """Let go of the scratch buffers of units that are held: their next visit makes those that it needs."""
        for berth in self.berths:
            berth.own = None if berth.own is None else {}

    def close(self) -> None:
        """Give device buffers back; weights at rest stay. Nothing is in flight.

        A weight that was kept in fewer bits than it came in, and forwards saw it in, is widened again where it is: a
        later run asks the parameter for its dtype. One that was kept in more stays so, as nothing may be lost.
        """
        self.rest()
        self.give_back()
        for berth in self.berths:
            berth.slot = None
            for leaf in berth.leaves:
                if leaf.widens and leaf.rest.numel():
                    leaf.show(leaf.rest.to(leaf.compute))
                    leaf.rest = leaf.rest.new_empty(0)
        self._slots, self._scratch = [], Scratch(torch.empty(0, dtype=torch.uint8))

    # What a method adds.

    def _refresh(self, berth: Berth) -> None:
        """The unit's weights are on the device, and no forward of this visit has seen them yet."""

    def _phase(self, stream: int) -> str:
        """What the timeline calls a forward of this stream."""
        return "forward"

    def _changes(self, leaf: Leaf) -> bool:
        """Whether the forward sees something else than the weight as it is kept."""
        return leaf.compute != leaf.rest.dtype

    def _fill(self, leaf: Leaf, weight: Tensor, out: Tensor, stream: int) -> None:
        """Make ``out`` what this stream is to see of ``weight``; both flat."""
        out.copy_(weight)

    def _kind(self, stream: int) -> Hashable:
        """Streams of one kind see the same."""
        return None

    def _version(self, berth: Berth) -> Hashable:
        """What a kind means changes with it."""
        return berth.device_seen

    # Coming and going.

    def _come_up(self, berth: Berth) -> None:
        if berth.resident:
            return
        if berth.slot is None:
            self._send_up(berth)
        assert berth.uploaded is not None
        self._lanes.wait_compute(berth.uploaded)

    def _send_up(self, berth: Berth) -> None:
        slot = self._take_slot(berth)
        slot.holds, berth.slot, berth.device_seen = berth, slot, berth.host_seen
        written = [berth.written] if berth.written is not None else []
        berth.uploaded = self._lanes.copy(
            berth.on_device, berth.stored, "h2d", after=[*slot.free, *written], priority=slot.used, tag="weights"
        )
        slot.free = [berth.uploaded]

    def _write_back(self, berth: Berth) -> None:
        """The trained weights go home as compute has them now."""
        count = len(berth.trained)
        berth.host_seen = berth.device_seen
        if berth.resident or not count:
            return
        assert berth.slot is not None
        berth.written = self._lanes.copy(
            berth.stored[:count],
            berth.on_device[:count],
            "d2h",
            after=[self._lanes.compute()],
            priority=berth.slot.used,
            tag="weights back",
        )

    def _release(self, berth: Berth) -> None:
        if berth.slot is not None:
            written = [berth.written] if berth.written is not None else []
            berth.slot.free = [self._lanes.compute(), *written]

    def _take_slot(self, berth: Berth) -> Slot:
        """The one that has not been taken for longest, of those that nobody needs now."""
        count = len(self._berths)
        self._clock = (self._clock // count + 1) * count + berth.unit.index
        needed = {id(berth) for berth in (*self._visited.values(), *self._followers())}
        slots = [slot for slot in self._slots if slot.holds is None or id(slot.holds) not in needed]
        if not slots:
            inside = ", ".join(f"`{berth.unit.name}`" for berth in self._visited.values())
            raise OffloadError(
                f"{inside} are visited one inside the other, and all {len(self._slots)} device slots are in use; "
                f"pass slots={len(self._slots) + len(self._visited)}"
            )
        slot = min(slots, key=lambda slot: slot.used)
        if slot.holds is not None:
            slot.holds.slot = None
        slot.used = self._clock
        return slot

    def _hear(self, index: int) -> None:
        """From a visit that is not in the known order to the next of the same unit is the new one."""
        if self._heard:
            if index == self._heard[0] or len(self._heard) == _MOST_HEARD:
                self.follow(self._heard)
            else:
                self._heard.append(index)
        elif index not in self.order:
            self._heard.append(index)

    def _find(self, index: int) -> None:
        """Where in the known order this visit is."""
        places = [at for at, other in enumerate(self.order) if other == index]
        self._at = min(places, key=lambda at: (at - self._at - 1) % len(self.order), default=-1)

    def _followers(self) -> list[Berth]:
        """The streamed units that come next, also those of the next forward."""
        if self._at < 0:
            return []
        ahead = [self._berths[i] for i in (*self.order[self._at + 1 :], *self.order[: self._at])]
        found = dict.fromkeys(berth for berth in ahead if not berth.resident and berth.unit.index not in self._visited)
        return list(found)[: self._prefetch]

    # Showing.

    def _filled(self, berth: Berth, stream: int) -> Iterator[Tensor]:
        """What the stream sees of the leaves that it does not see as they are kept."""
        changed = [(leaf, w) for leaf, w in zip(berth.leaves, berth.on_device, strict=True) if self._changes(leaf)]
        if not changed:
            return
        scratch = self._scratch_of(berth, stream)
        outs = scratch.carve((leaf.rest.numel(), leaf.compute) for leaf, _ in changed)
        wanted = (berth.unit.index, self._version(berth), self._kind(stream))
        if scratch.holds != wanted:
            for (leaf, weight), out in zip(changed, outs, strict=True):
                self._fill(leaf, weight, out, stream)
            scratch.holds = wanted
        yield from outs

    def _scratch_of(self, berth: Berth, stream: int) -> Scratch:
        if berth.own is None:
            return self._scratch
        kind = self._kind(stream)
        if kind not in berth.own:
            berth.own[kind] = Scratch(self._scratch_buffer(self._scratch_bytes(berth)))
        return berth.own[kind]

    def _scratch_bytes(self, berth: Berth) -> int:
        changed = [leaf for leaf in berth.leaves if self._changes(leaf)]
        return packed_bytes((leaf.rest.numel(), leaf.compute) for leaf in changed)

    # Buffers.

    def _settle(self, berth: Berth, stored: DTypeOf) -> None:
        """Bring the weights to their berth; the ``Parameter`` objects stay."""
        self._lay_out(berth, [stored(leaf.parameter) for leaf in berth.leaves])

    def _lay_out(self, berth: Berth, dtypes: Sequence[torch.dtype]) -> None:
        place, name = ("device", "resident") if berth.resident else ("pinned", "streamed")
        for dtype in dict.fromkeys(dtypes):
            leaves = [leaf for leaf, other in zip(berth.leaves, dtypes, strict=True) if other == dtype]
            sizes = [leaf.parameter.numel() for leaf in leaves]
            label = f"{berth.unit.name or 'model'}.{name}.{dtype}"
            for leaf, rest in zip(leaves, self._lanes.buffers(label, sizes, dtype, place), strict=True):  # type: ignore[arg-type]
                bring(leaf.parameter)
                rest.copy_(leaf.parameter.detach().reshape(-1))
                leaf.rest = rest
                leaf.show(rest)

    def _make_slots(self, count: int) -> list[Slot]:
        size = max((packed_bytes((t.numel(), t.dtype) for t in berth.stored) for berth in self.streamed), default=0)
        count = min(count, len(self.streamed))
        return [Slot(buffer) for buffer in self._lanes.buffers("slots", [size] * count, torch.uint8, "device")]

    def _scratch_buffer(self, size: int) -> Tensor:
        return self._lanes.buffers("scratch", [size], torch.uint8, "device")[0]


def packed_bytes(tensors: Iterable[tuple[int, torch.dtype]]) -> int:
    """What these tensors (elements, dtype) take in one buffer."""
    return sum(aligned(numel * dtype.itemsize) for numel, dtype in tensors)


def carved(buffer: Tensor, tensors: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Where each of ``tensors`` (elements, dtype) lies in ``buffer``, flat."""
    made, start = [], 0
    for numel, dtype in tensors:
        made.append(buffer[start : start + numel * dtype.itemsize].view(dtype))
        start += aligned(numel * dtype.itemsize)
    return made


def around_others(units: Sequence[Unit]) -> set[int]:
    """Units within whose calls other units are visited."""
    entries = {id(module): unit.index for unit in units for module in unit.entry_modules}
    return {
        unit.index
        for unit in units
        for entry in unit.entry_modules
        for inner in entry.modules()
        if entries.get(id(inner), unit.index) != unit.index
    }
