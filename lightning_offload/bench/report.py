"""What was measured, on what: as data, as JSON, as Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_offload.memory.host_limits import cpu_model

PACKAGES = ("torch", "lightning", "transformers", "torchao", "galore-torch", "peft")
"""Whose versions a report names, where they are installed."""

_HEADS = {
    "ms": "ms",
    "gb_per_s": "GB/s",
    "ratio": "ratio (middle half)",
    "percent_of_bound": "% of bound",
    "step_s": "step s",
    "tokens_per_s": "tokens/s",
    "bound_s": "bound s",
    "allocated_gib": "peak GiB",
    "reserved_gib": "reserved GiB",
    "state_gib": "state GiB",
    "device_gib": "device GiB",
    "host_gib": "host GiB",
    "native_s": "native s",
    "zero_offload_s": "ZeRO-Offload's schedule s",
    "link_gb": "link GB",
    "speed_percent": "% of dense speed",
    "down_p": "down",
    "up_p": "up",
    "both_p": "both",
    "device_kib": "device KiB",
    "host_kib": "host KiB",
}
_WITH_RATIO = ("ratio_low", "ratio_high")


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        arm: Its name.
        values: What was found, by name with its unit.
        samples_s: Seconds of each round that counted.
    """

    arm: str
    values: Mapping[str, float]
    samples_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """Arms that ran in turns.

    Attributes:
        section: Name of the section.
        title: What was measured.
        rows: One per arm.
        notes: A line each: what was not measured and why, and what the numbers do not say.
    """

    section: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """A row per arm; columns in the order in which they first occur."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row.values if name not in _WITH_RATIO))
        heads = [_HEADS.get(name, name.replace("_percent", " %").replace("_", " ")) for name in columns]
        lines = [f"| {self.title} | {' | '.join(heads)} |", "|---|" + "--:|" * len(columns)]
        lines += [f"| {row.arm} | {' | '.join(_cell(row, name) for name in columns)} |" for row in self.rows]
        return "\n".join([*(lines if self.rows else [f"{self.title}:"]), "", *(f"- {note}" for note in self.notes)])


@dataclass(frozen=True)
class Report:
    """All sections of one run.

    Attributes:
        environment: Hardware and versions.
        settings: Of the run.
        tables: In the order of measuring.
    """

    environment: Mapping[str, str]
    settings: Mapping[str, Any]
    tables: tuple[Table, ...] = field(default=())

    def to_json(self) -> str:
        """Every number."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of ``to_json``."""
        content = json.loads(text)
        tables = tuple(
            Table(
                table["section"],
                table["title"],
                tuple(Row(row["arm"], row["values"], tuple(row["samples_s"])) for row in table["rows"]),
                tuple(table["notes"]),
            )
            for table in content["tables"]
        )
        return cls(content["environment"], content["settings"], tables)

    def markdown(self) -> str:
        """The hardware and the versions, then every table."""
        where = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        return "\n\n".join([where, *(table.markdown().rstrip() for table in self.tables)]) + "\n"

    def save(self, folder: Path) -> None:
        """Write ``bench.json`` and ``bench.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(self.to_json() + "\n")
        (folder / "bench.md").write_text(self.markdown())


def environment() -> dict[str, str]:
    """Hardware and versions of this process."""
    found = {"processor": cpu_model(), "threads": str(torch.get_num_threads())}
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["CUDA"] = str(torch.version.cuda)
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cell(row: Row, name: str) -> str:
    value = row.values.get(name)
    if value is None:
        return ""
    if name == "ratio" and all(end in row.values for end in _WITH_RATIO):
        low, high = (row.values[end] for end in _WITH_RATIO)
        return f"{value:.3f} ({low:.3f}..{high:.3f})"
    if name.startswith("loss"):
        return f"{value:.4f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
