"""Settings that methods share, each refused at once where it cannot work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from torch import nn

from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.numerics.native import Kernels, Native, load, settle


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """Settings that every method has.

    Attributes:
        min_numel: Smaller parameters (zo2: units) stay on the device with their optimizer state.
        blocks: Module paths or classes that are the model's blocks, when discovery is wrong.
        pin_memory: Page-lock the host memory that crosses the link; ``"auto"`` does so as far as the machine allows.
        host_threads: Threads of the host worker; ``"auto"`` is the physical cores less one, of zo2 one.
        native: Compiled kernels for what the host computes: ``"auto"`` where a C++ compiler is, ``"on"`` or an error,
            or ``"off"`` (YAML reads ``on`` and ``off`` as truths, which mean the same).
        skip_nonfinite: Leave everything as it is in a step whose gradient norm (zo2: loss) is not finite; ``False`` is
            exact parity with plain AdamW on NaN.
        max_skips: Skipped steps in a row that are put up with; one more is an error.
        on_misfit: What to do when the host arenas cannot fit: ``"error"`` or ``"warn"``.
        max_device_gib: Device memory to stay within, CUDA's own part included, as if the device had no more.
        max_host_gib: Host memory that the arenas stay within, as if the machine had no more.
    """

    min_numel: int = 4096
    blocks: Sequence[str | type[nn.Module]] | None = None
    pin_memory: bool | Literal["auto"] = "auto"
    host_threads: int | Literal["auto"] = "auto"
    native: Native = "auto"
    skip_nonfinite: bool = True
    max_skips: int = 10
    on_misfit: Literal["error", "warn"] = "error"
    max_device_gib: float | None = None
    max_host_gib: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the setting."""
        require(isinstance(self.min_numel, int) and self.min_numel >= 0, "min_numel", self.min_numel, "an integer >= 0")
        require(self.pin_memory in (True, False, "auto"), "pin_memory", self.pin_memory, "true, false or 'auto'")
        threads = self.host_threads
        require(
            threads == "auto" or (isinstance(threads, int) and threads >= 1),
            "host_threads",
            threads,
            "an integer >= 1 or 'auto'",
        )
        native: object = self.native
        if isinstance(native, bool):
            object.__setattr__(self, "native", "on" if native else "off")
        require(self.native in ("auto", "on", "off"), "native", self.native, "'auto', 'on' or 'off'")
        require(isinstance(self.skip_nonfinite, bool), "skip_nonfinite", self.skip_nonfinite, "true or false")
        require(isinstance(self.max_skips, int) and self.max_skips >= 0, "max_skips", self.max_skips, "an integer >= 0")
        require(self.on_misfit in ("error", "warn"), "on_misfit", self.on_misfit, "'error' or 'warn'")
        for name, gib in (("max_device_gib", self.max_device_gib), ("max_host_gib", self.max_host_gib)):
            holds = gib is None or (isinstance(gib, int | float) and not isinstance(gib, bool) and 0 < gib < math.inf)
            require(holds, name, gib, "a positive number of GiB, or None")

    @property
    def kernels(self) -> Kernels | None:
        """Those of this process, or none.

        Raises:
            NotBuiltError: ``native="on"``, and they cannot be had.
        """
        return load()[0] if settle(self.native)[0] == "on" else None

    @property
    def max_device_bytes(self) -> int | None:
        """``max_device_gib`` in bytes."""
        return None if self.max_device_gib is None else int(self.max_device_gib * GIB)

    @property
    def max_host_bytes(self) -> int | None:
        """``max_host_gib`` in bytes."""
        return None if self.max_host_gib is None else int(self.max_host_gib * GIB)


AnySettings = TypeVar("AnySettings", bound=CommonSettings)


@dataclass(frozen=True, kw_only=True)
class GradientSettings(CommonSettings):
    """Settings of the methods that have gradients.

    Attributes:
        accumulate: Where micro-batches accumulate: ``"device"`` (in ``p.grad``, one link transfer per step), ``"host"``
            (in fp32, one transfer per micro-batch, 4 more host bytes per element sent), or ``"auto"``: on the device if
            its gradients fit.
    """

    accumulate: Literal["auto", "device", "host"] = "auto"

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the setting."""
        super().__post_init__()
        choices = ("auto", "device", "host")
        require(self.accumulate in choices, "accumulate", self.accumulate, "'auto', 'device' or 'host'")


def settle_native(settings: AnySettings) -> tuple[AnySettings, str]:
    """Settings whose ``native`` is not ``"auto"``, and why.

    Raises:
        NotBuiltError: ``native="on"``, and the kernels cannot be had.
    """
    chosen, reason = settle(settings.native)
    return replace(settings, native=chosen), f"native={chosen!r}: {reason}"


def pins(machine: Machine) -> tuple[bool, str]:
    """What ``pin_memory="auto"`` is on this machine, and why."""
    if machine.device_type != "cuda":
        return False, "device and host are one memory"
    return True, f"{machine.lockable_bytes / GIB:.1f} GiB can be page-locked ({machine.lockable_limit})"


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise a ``ValueError`` that names the setting, what it was, and what it may be."""
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, got {value!r}")
