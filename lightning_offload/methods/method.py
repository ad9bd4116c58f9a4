"""What a method is: which parameters it claims, and what steps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.memory.lanes import Lanes
from lightning_offload.memory.peers import Alone, Peers
from lightning_offload.methods.base import DTypes, Rounding, Trained
from lightning_offload.methods.homes import weight_dtype
from lightning_offload.methods.rules import Rule
from lightning_offload.methods.sender import Sender
from lightning_offload.methods.settings import GradientSettings, pins, settle_native


@dataclass(frozen=True)
class Site:
    """What a method's own part is given.

    Attributes:
        rule: The update rule of the user's optimizer.
        lanes: Where it runs.
        dtypes: Which dtype lives where.
        accumulate_on_host: Micro-batches add up on the host.
        wants_norms: Steps are decided by all norms together.
        gradients_visible: Whether users look at ``p.grad`` between backward and step.
        peers: The other ranks.
        mean_: Makes tensors their means over ranks, unless these have met already.
    """

    rule: Rule
    lanes: Lanes
    dtypes: DTypes
    accumulate_on_host: bool
    wants_norms: bool
    gradients_visible: Callable[[], bool] = bool
    peers: Peers = field(default_factory=Alone)
    mean_: Callable[[Sequence[Tensor], str], None] = lambda tensors, what: None


class Method:
    """What happens to the parameters it claims; all others go the common path (host, or device where small).

    As it is here it claims nothing: a method says what differs, by overriding.

    Attributes:
        name: Of the method.
        summary: What it does, in a few words.
        settings_type: The class of its settings.
        layer_wise: Without clipping every parameter is decided by itself, so that it need not wait for the others.
        rounding: How a 16-bit weight takes a finer step, unless the user says otherwise.
        shards: Whether of several ranks each steps a part of what it claims; else every rank steps all of it.
        settings: What was asked for; after ``resolve`` without ``"auto"``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    settings_type: ClassVar[type[GradientSettings]]
    layer_wise: ClassVar[bool] = False
    shards: ClassVar[bool] = True
    rounding: ClassVar[Rounding] = "nearest"
    settings: GradientSettings

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def resolve(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        machine: Machine,
        dtypes: DTypes,
        *,
        accumulates: bool,
        before: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Replace every ``"auto"`` in the settings; returns the reasons, a sentence each.

        Args:
            module: The model.
            units: The model's.
            machine: What there is.
            dtypes: Which dtype lives where.
            accumulates: Whether a step has more than one micro-batch.
            before: What the run that is continued had chosen, of the settings that decide the bits of a step.
        """
        self.settings, reasons = resolve_common(
            self.settings, units, machine, dtypes, accumulates=accumulates, before=before
        )
        return reasons

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the bits of a step; a checkpoint keeps them, and a continued run uses them."""
        return {"accumulate": self.settings.accumulate}

    def claim(self, module: nn.Module, units: Sequence[Unit]) -> set[int]:
        """Ids of the parameters that it steps by itself.

        Raises:
            ValueError: A model or a setting that it cannot work with.
        """
        return set()

    def stays(self, module: nn.Module) -> set[int]:
        """Ids of the parameters that are stepped on the device, however large."""
        return set()

    def leaves_frozen(self) -> bool:
        """Whether what it does not claim is not trained at all."""
        return False

    def host_bytes(self, claimed: Sequence[Trained], rule: Rule, dtypes: DTypes) -> int:
        """Exactly what the host arenas will hold for these parameters."""
        return 0

    def make_part(self, claimed: Sequence[Trained], site: Site) -> Sender | None:
        """What steps the claimed parameters.

        Raises:
            ValueError: An optimizer that it cannot work with.
        """
        return None


Settings = TypeVar("Settings", bound=GradientSettings)


def resolve_common(
    settings: Settings,
    units: Sequence[Unit],
    machine: Machine,
    dtypes: DTypes,
    *,
    accumulates: bool,
    before: Mapping[str, Any] | None,
) -> tuple[Settings, list[str]]:
    """What every method with gradients resolves in the same way; see ``Method.resolve``."""
    reasons = []
    if settings.accumulate == "auto":
        where, reason = _where_to_accumulate(units, machine, dtypes, accumulates=accumulates)
        if before and before.get("accumulate") in ("device", "host"):
            where, reason = before["accumulate"], "as in the run that is continued"
        settings = replace(settings, accumulate=where)
        reasons.append(f"accumulate={where!r}: {reason}")
    if settings.pin_memory == "auto":
        pin, reason = pins(machine)
        settings = replace(settings, pin_memory=pin)
        reasons.append(f"pin_memory={pin}: {reason}")
    if settings.host_threads == "auto":
        threads, reason = machine.host_threads, machine.host_threads_reason
        if machine.device_type == "cpu":
            threads, reason = machine.torch_threads, "the CPU is the device too, so all of torch's threads"
        settings = replace(settings, host_threads=threads)
        reasons.append(f"host_threads={threads}: {reason}")
    settings, reason = settle_native(settings)
    return settings, [*reasons, reason]


def _where_to_accumulate(
    units: Sequence[Unit], machine: Machine, dtypes: DTypes, *, accumulates: bool
) -> tuple[Literal["device", "host"], str]:
    """On the device while gradients take at most a quarter of what the weights leave free there."""
    if not accumulates:
        return "device", "one micro-batch a step"
    if machine.device_type == "cpu":
        return "device", "device and host are one memory"
    sizes_of = [(p, p.numel() * weight_dtype(p, dtypes).itemsize) for unit in units for p in unit.parameters.values()]
    gradients = sum(size for parameter, size in sizes_of if parameter.requires_grad)
    weights = sum(size for _, size in sizes_of)
    free = max(machine.device_free_bytes - weights, 0)
    sizes = f"gradients {gradients / GIB:.2f} GiB, free beside the weights {free / GIB:.2f} GiB"
    return ("device", sizes) if gradients <= free // 4 else ("host", sizes)
