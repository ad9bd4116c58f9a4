"""How fast a machine is: rates that its jobs achieve, given or measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import torch

from lightning_offload.memory.calibrate import measure
from lightning_offload.memory.host_limits import cpu_model, host_is_busy
from lightning_offload.memory.kept import KeptJson

if TYPE_CHECKING:
    from lightning_offload.memory.budget import Machine

log = logging.getLogger(__name__)

_measured_here: dict[str, Rates] = {}
"""By key: a cache that cannot be written does not make a process measure twice."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine achieves, which is less than what its data sheets promise. GB/s is 1e9 bytes a second.

    Attributes:
        fp32_tflops: Dense matrix product in fp32 as torch does it by default, without TF32.
        bf16_tflops: Dense matrix product in bf16.
        device_gb_per_s: Device memory, reads and writes of a large elementwise operation.
        h2d_gb_per_s: Page-locked host memory to the device, nothing else running.
        d2h_gb_per_s: The device to page-locked host memory, nothing else running.
        duplex: Rate of each direction while both run, as a share of it alone: 0.5 (they take turns) to 1.
        pageable_gb_per_s: A copy between the device and memory that is not page-locked.
        host_gb_per_s: In-place sweep of host memory by the host worker's threads, reads and writes.
        op_us: Least time from one kernel to the next as the framework issues them, in microseconds.

    Raises:
        ValueError: A rate that is not a positive, finite number, or a ``duplex`` above 1.
    """

    fp32_tflops: float
    bf16_tflops: float
    device_gb_per_s: float
    h2d_gb_per_s: float
    d2h_gb_per_s: float
    duplex: float
    pageable_gb_per_s: float
    host_gb_per_s: float
    op_us: float

    def __post_init__(self) -> None:
        """Refuse values that no machine has, naming the rate."""
        for name, value in asdict(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise ValueError(f"`rates.{name}` must be a positive number, got {value!r}")
        if self.duplex > 1:
            raise ValueError(f"`rates.duplex` must be a share, above 0 and at most 1, got {self.duplex!r}")

    @classmethod
    def from_mapping(cls, rates: Mapping[str, object], *, of: str = "hardware") -> Rates:
        """The rates in a mapping by name; None and ``"???"`` are missing.

        Args:
            rates: All of the rates.
            of: What the mapping describes, for the message.

        Raises:
            ValueError: A rate is missing, unknown or no rate.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in rates if name not in known]
        if unknown:
            raise ValueError(f"`rates.{unknown[0]}` of {of} is not a rate; there are {', '.join(known)}")
        given = {name: value for name, value in rates.items() if value is not None and value != "???"}
        missing = [f"`rates.{name}`" for name in known if name not in given]
        if missing:
            raise ValueError(f"{of} gives some rates, but not {', '.join(missing)}; give all of them, or rates=null")
        return cls(**given)  # type: ignore[arg-type]  # checked by __post_init__

    def both_ways_s(self, up_s: float, down_s: float) -> float:
        """Least time of the link for what takes so long up and so long down, each alone."""
        less, more = sorted((up_s, down_s))
        return more - less + less / self.duplex

    @classmethod
    def measured(cls, device: torch.device | str = "cpu", *, host_threads: int | None = None) -> Rates:
        """Measures this machine, which takes about two seconds.

        Args:
            device: Where compute happens. On the CPU the link's rates are those of copies within host memory.
            host_threads: Threads that will sweep host memory; by default as many as torch uses.
        """
        return cls(**measure(device, host_threads or torch.get_num_threads()))

    @classmethod
    def cached(cls, machine: Machine, device: torch.device | str | None = None) -> Rates:
        """The rates of this machine: from the user's cache folder, else measured and kept there.

        A cache that is damaged or cannot be written is never an error: the machine is measured, and the log says why.

        Args:
            machine: This machine, as ``Machine.detect`` found it.
            device: Where compute happens, if not on the first device of the machine's type.
        """
        kept = KeptJson("rates.json")
        key = _key(machine)
        if key not in _measured_here:
            _measured_here[key] = cls._recalled(kept, key) or cls._measured_and_kept(kept, key, machine, device)
        return _measured_here[key]

    @classmethod
    def is_cached(cls, machine: Machine) -> bool:
        """Whether ``cached`` answers without measuring."""
        key = _key(machine)
        return key in _measured_here or cls._recalled(KeptJson("rates.json"), key) is not None

    @classmethod
    def _recalled(cls, kept: KeptJson, key: str) -> Rates | None:
        try:
            entry = kept.read().get(key)
            return None if entry is None else cls.from_mapping(entry, of="the cache")
        except (ValueError, TypeError, AttributeError, OSError) as error:
            log.warning("cannot use the rates kept in %s (%s): measuring again", kept.path, error)
            return None

    @classmethod
    def _measured_and_kept(cls, kept: KeptJson, key: str, machine: Machine, device: torch.device | str | None) -> Rates:
        log.info("measuring this machine, about 2 s; kept in %s", kept.path)
        rates = cls.measured(device or machine.device_type, host_threads=_host_threads(machine))
        if host_is_busy():
            log.warning("other programs keep this machine busy: its rates are what they leave, and are not kept")
            return rates
        try:
            kept.add(key, asdict(rates))
        except OSError as error:
            log.warning("the rates cannot be kept in %s (%s): the next run measures again", kept.path, error)
        return rates


def _host_threads(machine: Machine) -> int:
    """The CPU as the device computes with all of torch's threads; beside a GPU the host worker has its own."""
    return machine.torch_threads if machine.device_type == "cpu" else machine.host_threads


def _key(machine: Machine) -> str:
    """What rates depend on."""
    threads = f"{machine.torch_threads}+{_host_threads(machine)} threads"
    return " | ".join([machine.device_type, machine.device_name, f"torch {torch.__version__}", threads, cpu_model()])
