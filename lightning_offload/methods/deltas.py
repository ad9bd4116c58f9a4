"""Parts whose host makes deltas: what comes up is not the weight, but what changes it on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_offload.errors import CheckpointError
from lightning_offload.memory.lanes import Event, lane_context
from lightning_offload.methods.base import Groups, Trained, Verdict
from lightning_offload.methods.deliveries import Deliveries, Parcel, slot_bytes
from lightning_offload.methods.homes import Home, UnitHomes
from lightning_offload.methods.part import HostPart

if TYPE_CHECKING:
    from lightning_offload.methods.method import Site

AHEAD = 3
"""Units whose deltas may be on the device at once: one in use, one that has arrived, one on its way."""


@dataclass(eq=False, kw_only=True)
class DeltaHome(Home):
    """The home of a weight that stays on the device and is changed there.

    Attributes:
        rate: Learning rate of the step that has made its delta.
        decay: What the weight is multiplied by when it is applied.
        step_made: Number of the optimizer step that has made it.
        stepped: That step on the host.
        under_way: Whether its delta has yet to be applied.
    """

    rate: float = 0.0
    decay: float = 1.0
    step_made: int = 0
    stepped: Event | None = None
    under_way: bool = False

    @property
    def delta(self) -> tuple[int, torch.dtype]:
        """Elements and dtype of what comes up; its memory is on its owner's host alone."""
        raise NotImplementedError

    def start_anew(self) -> None:
        """Without state."""
        for tensor in (*self.states.values(), self.step):
            tensor.zero_()

    @property
    def made(self) -> Tensor:
        """Where the host has it; empty on other ranks."""
        return self.wire


AnyDeltaHome = TypeVar("AnyDeltaHome", bound=DeltaHome)


class DeltaPart(HostPart[AnyDeltaHome]):
    """See the module docstring, and ``HostPart``: there are no masters, the weight itself is the truth.

    Deltas come up through a few device slots, in the order in which the next forward needs them, and are applied on the
    compute lane just before it.
    """

    _kept: ClassVar[str] = "values of this method"
    """What a checkpoint keeps of each weight."""

    def __init__(self, trained: Sequence[Trained], site: Site) -> None:
        super().__init__(trained, site)
        sizes = [slot_bytes([home.delta for home in unit.homes]) for unit in self._units]
        self._deliveries = Deliveries(self._lanes, [unit.flight for unit in self._units], max(sizes), AHEAD)
        self._sent: set[int] = set()

    @abstractmethod
    def _apply(self, home: AnyDeltaHome, delta: Tensor) -> None:
        """Change the weight by its delta, on the compute lane."""

    # Part.

    def update(self, groups: Groups, verdict: Verdict, backward_done: Event) -> list[Event]:
        """See ``Part.update``."""
        readers = super().update(groups, verdict, backward_done)
        self._sent.clear()
        self._deliveries.settle()
        return readers

    def drop(self) -> None:
        """See ``Part.drop``."""
        super().drop()
        self._sent.clear()

    def adopt(self) -> None:
        """See ``Part.adopt``: there is no master."""

    def state_of(self, trained: Trained) -> dict[str, Tensor]:
        """See ``Part.state_of``: torch's layout has no place for what it keeps; see ``extras``."""
        return {}

    def load_state_of(self, trained: Trained, state: Mapping[str, Any]) -> None:
        """See ``Part.load_state_of``: it starts anew unless ``load_extras`` follows."""
        self._home[trained.name].start_anew()

    def master_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.master_of``."""
        return None

    # Beside the protocol.

    @property
    def device_bytes(self) -> int:
        """Rings, and slots of deltas."""
        return super().device_bytes + self._deliveries.nbytes

    def free_rings(self) -> None:
        """Give rings and slots back to the device."""
        super().free_rings()
        self._deliveries.close()

    def extras(self) -> dict[str, Any]:
        """What is kept of each weight, by name; of what other ranks step nothing."""
        mine = {home.trained.name for home in self._mine(self._home.values())}
        return {name: self._extras_of(home) if name in mine else {} for name, home in self._home.items()}

    def load_extras(self, extras: Mapping[str, Any]) -> None:
        """See ``Sender.load_extras``."""
        for name, home in self._home.items():
            if name not in extras:
                raise CheckpointError(f"The checkpoint has no {self._kept} for `{name}`, which this run trains.")
            self._load_extras_of(home, extras[name])

    def _extras_of(self, home: AnyDeltaHome) -> dict[str, Any]:
        return {"step": home.step.clone(), **home.states}

    def _load_extras_of(self, home: AnyDeltaHome, saved: Mapping[str, Any]) -> None:
        if self._mine([home]):
            home.step.copy_(saved["step"])
            for name, tensor in home.states.items():
                tensor.copy_(saved[name].reshape(-1))

    # On the host.

    def _step(self, unit: UnitHomes[AnyDeltaHome], groups: Groups, verdict: Verdict) -> Event:
        for home in unit.taken:
            group = groups[home.trained.group]
            home.rate = float(group["lr"])
            home.decay = 1 - home.rate * group["weight_decay"]
            home.step_made = verdict.step
        return super()._step(unit, groups, verdict)

    # Up.

    def _stepped_early(self, unit: UnitHomes[AnyDeltaHome]) -> None:
        self._send_up(unit)

    def _launch(self, unit: UnitHomes[AnyDeltaHome], backward_done: Event) -> None:
        if unit.index not in self._sent:
            self._send_up(unit)

    def _send_up(self, unit: UnitHomes[AnyDeltaHome]) -> None:
        assert unit.stepped is not None
        self._sent.add(unit.index)
        homes = unit.taken
        for home in homes:
            home.stepped, home.under_way = unit.stepped, True
        places = [home.made if home.made.numel() else None for home in homes]
        deltas = [home.delta for home in homes]
        self._deliveries.send(Parcel(unit.flight, deltas, places, unit.stepped, partial(self._apply_all, homes)))

    def _apply_all(self, homes: Sequence[AnyDeltaHome], parcel: Parcel, deltas: Sequence[Tensor]) -> None:
        """Before the unit's forward."""
        with lane_context(self._lanes.device):
            for home, delta in zip(homes, deltas, strict=True):
                if self._peers.left and not self._mine([home]):
                    continue  # it will not come any more
                self._peers.share_([delta], home.trained.owner, "deltas")
                self._apply(home, delta)
                home.under_way = False
