"""The log of a ``zo2`` run: all that a fine-tune is, beside the weights that it began with.

A file is a header (which weights it began with, what z is) and one record of fixed size per update, each with its own
checksum, so that whatever a crash leaves behind is read up to the last whole step.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_offload.errors import CheckpointError
from lightning_offload.memory.hashing import digest

MAGIC = b"ZO2LOG1\n"
_SIZE = struct.Struct("<I")
_FIXED = struct.Struct("<IHQd")  # step, direction, seed, coefficient


@dataclass(frozen=True)
class Entry:
    """One update of all trained weights: ``W <- W - lr (coefficient z + weight_decay W)``.

    Attributes:
        step: Number of the optimizer step, from 1; steps that were skipped are left out.
        direction: Which of the step's draws.
        seed: Of z: of the run with philox noise, of the step with MeZO's.
        coefficient: Projected gradient over the number of directions.
        lr: Per parameter group, that of the step.
        weight_decay: Per parameter group; 0 but in the step's first direction.
    """

    step: int
    direction: int
    seed: int
    coefficient: float
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]


@dataclass(frozen=True)
class Header:
    """What the entries of a log refer to.

    Attributes:
        base: Hash of the weights that the run began with, in the dtypes in which it kept them.
        noise: Kind of noise.
        distribution: Of philox noise.
        eps: Of the method.
        directions: Entries per step.
        rounding: Of updates of 16-bit weights.
        groups: Names of the trained parameters, per parameter group.
        stored: dtype of each parameter, by name, in the order of the module's parameters.
        shapes: Of the same.
        device: Kind of device on which z has these bits; None: on any.
        compiled: Whether z has the bits of compiled kernels, which only Gaussian noise of a CPU has of its own.
    """

    base: str
    noise: str
    distribution: str
    eps: float
    directions: int
    rounding: str
    groups: tuple[tuple[str, ...], ...]
    stored: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    device: str | None = None
    compiled: bool = False


def hash_weights(tensors: Iterable[Tensor]) -> str:
    """Of shapes, dtypes and every bit, in this order; names do not matter, or a prefix would."""
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            total.update(digest(flat.view(torch.uint8)))
    return total.hexdigest()


def pack_header(header: Header) -> bytes:
    """The head of a file."""
    text = json.dumps(asdict(header)).encode()
    return MAGIC + _SIZE.pack(len(text)) + text + _SIZE.pack(zlib.crc32(text))


def pack_entry(entry: Entry) -> bytes:
    """One record."""
    fixed = _FIXED.pack(entry.step, entry.direction, entry.seed, entry.coefficient)
    hyper = struct.pack(f"<{2 * len(entry.lr)}d", *entry.lr, *entry.weight_decay)
    return fixed + hyper + _SIZE.pack(zlib.crc32(fixed + hyper))


def read_log(data: bytes, source: str) -> tuple[Header, list[Entry], int]:
    """Header, entries of whole steps, and how many bytes those take.

    Raises:
        CheckpointError: No log, a damaged header, or a damaged entry with others behind it: a crash leaves its traces
            at the end alone.
    """
    header, start = _read_header(data, source)
    groups = len(header.groups)
    size = _FIXED.size + 16 * groups + _SIZE.size
    entries: list[Entry] = []
    whole = start
    for at in range(start, len(data) - size + 1, size):
        entry = _read_entry(data[at : at + size], groups)
        if entry is None:
            later = range(at + size, len(data) - size + 1, size)
            if any(_read_entry(data[other : other + size], groups) is not None for other in later):
                kept = entries[: len(entries) // header.directions * header.directions]
                raise CheckpointError(
                    f"{source} is damaged at byte {at}, entry {len(entries) + 1}: {len(kept)} entries before it, up to "
                    f"step {kept[-1].step if kept else 0}, are good. Cut the file there to use them."
                )
            break
        entries.append(entry)
        if len(entries) % header.directions == 0:
            whole = at + size
    return header, entries[: len(entries) // header.directions * header.directions], whole


def load_log(path: Path) -> tuple[Header, list[Entry]]:
    """Header and entries of whole steps.

    Raises:
        CheckpointError: There is none at ``path``, or it is damaged.
    """
    if path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a folder: name the log in it")
    if not path.is_file():
        raise CheckpointError(f"no log at {str(path)!r}")
    header, entries, _ = read_log(path.read_bytes(), str(path))
    return header, entries


def check_log_file(path: Path, *, resumed: bool) -> None:
    """A run that begins has nothing to go on from: what is at ``path`` already is not written over.

    Raises:
        CheckpointError: It is a folder; or, for a run that is not ``resumed``, another file or a log with updates.
    """
    if path.is_dir():
        raise CheckpointError(f"`log_file={str(path)!r}` is a folder: name a file in it")
    held = b"" if resumed or not path.exists() else path.read_bytes()
    if not held:
        return
    what = "which is no log of a zo2 run"
    if held.startswith(MAGIC):
        _, entries, _ = read_log(held, str(path))
        if not entries:
            return
        what = f"the log of a run up to step {entries[-1].step}, which is all that there is of it beside its base"
    raise CheckpointError(
        f"`log_file={str(path)!r}` is there already, {what}. Pass another path, remove it, or continue that run from a "
        "checkpoint (`trainer.fit(..., ckpt_path=...)`)."
    )


def _read_header(data: bytes, source: str) -> tuple[Header, int]:
    if not data.startswith(MAGIC):
        raise CheckpointError(f"{source} is no log of a zo2 run: it does not begin with {MAGIC!r}.")
    start = len(MAGIC) + _SIZE.size
    end = start + (_SIZE.unpack(data[len(MAGIC) : start])[0] if len(data) >= start else 0)
    text = data[start:end]
    if len(data) < end + _SIZE.size or zlib.crc32(text) != _SIZE.unpack(data[end : end + _SIZE.size])[0]:
        raise CheckpointError(f"{source} has a damaged header: nothing of it can be used.")
    raw: dict[str, Any] = json.loads(text)
    shapes = {name: tuple(shape) for name, shape in raw["shapes"].items()}
    return Header(**{**raw, "groups": tuple(map(tuple, raw["groups"])), "shapes": shapes}), end + _SIZE.size


def _read_entry(record: bytes, groups: int) -> Entry | None:
    body, check = record[: -_SIZE.size], record[-_SIZE.size :]
    if zlib.crc32(body) != _SIZE.unpack(check)[0]:
        return None
    hyper = struct.unpack(f"<{2 * groups}d", body[_FIXED.size :])
    step, direction, seed, coefficient = _FIXED.unpack(body[: _FIXED.size])
    return Entry(step, direction, seed, coefficient, hyper[:groups], hyper[groups:])


class LogFile:
    """A log that is written as the run goes; each step is handed to the system before the next one begins.

    Args:
        path: Where; its folder must exist.
        header: Of the run.
        entries: Of the steps so far; what the file has beyond them is cut off (see ``check_log_file``).

    Raises:
        CheckpointError: The file is the log of another run.
    """

    def __init__(self, path: Path, header: Header, entries: Sequence[Entry]) -> None:
        self._file: BinaryIO = self._open(path, header, entries)

    def append(self, entries: Sequence[Entry]) -> None:
        """The entries of one step."""
        self._file.write(b"".join(map(pack_entry, entries)))
        self._file.flush()

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()

    @staticmethod
    def _open(path: Path, header: Header, entries: Sequence[Entry]) -> BinaryIO:
        wanted = pack_header(header) + b"".join(map(pack_entry, entries))
        held = path.read_bytes() if path.exists() else b""
        if held[: len(wanted)] != wanted[: len(held)]:
            raise CheckpointError(
                f"{path} is the log of another run (other weights to begin with, other settings, or other steps); "
                "give this run a file of its own, or remove that one."
            )
        file = path.open("r+b" if path.exists() else "w+b")
        file.truncate(min(len(held), len(wanted)))
        file.seek(0, 2)
        file.write(wanted[len(held) :])
        file.flush()
        return file
