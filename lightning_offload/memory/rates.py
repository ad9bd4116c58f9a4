"""How fast a machine is: rates that its jobs achieve, given or measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


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
