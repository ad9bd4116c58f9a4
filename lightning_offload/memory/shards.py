"""Tensors of safetensors files by name, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_offload.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"

_FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        file: Where it is.
        shape: Its shape.
        dtype: As safetensors calls it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_floating(self) -> bool:
        """Whether its values are weights as they are; 8 bits and fewer have scales elsewhere."""
        return self.dtype in _FLOATING


class Shards:
    """The tensors of one file, or of a folder as transformers writes it: with an index, with one file, with several.

    Attributes:
        place: The file or folder.
        tensors: What is there, by name.

    Raises:
        CheckpointError: There is no such place, nothing to read in it, or a file that is missing or damaged.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.tensors: dict[str, Stored] = {}
        for file in _files_of(place):
            self._look_into(file)

    def read(self, name: str) -> Tensor:
        """The values; those that are mapped from the file are given back with the tensor.

        Raises:
            CheckpointError: The file has changed or is damaged.
        """
        with _opened(self.tensors[name].file) as file:
            values: Tensor = file.get_tensor(name)
        return values

    def _look_into(self, path: Path) -> None:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                if name in self.tensors:
                    raise CheckpointError(
                        f"`{name}` is both in {str(self.tensors[name].file)!r} and in {str(path)!r}: give the one file "
                        f"that is meant, or a folder with {INDEX}"
                    )
                part = file.get_slice(name)
                self.tensors[name] = Stored(path, tuple(part.get_shape()), part.get_dtype())


def _files_of(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise CheckpointError(
            f"there is no file or folder {str(place)!r} to read weights from; of a model on the hub give what "
            "`huggingface_hub.snapshot_download` returns"
        )
    if (place / INDEX).is_file():
        return _indexed(place)
    files = [place / WHOLE] if (place / WHOLE).is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        others = ", ".join(sorted(path.name for path in place.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"the folder {str(place)!r} has no *.safetensors to read weights from (it has {others}); "
            "`AutoModel.from_pretrained(folder).save_pretrained(other)` writes them"
        )
    return files


def _indexed(folder: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{str(folder / INDEX)!r} is damaged, copy it again: {error!r}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(missing)} of the {len(names)} files that its {INDEX} names "
            f"({', '.join(missing[:3])}): copy them too"
        )
    return [folder / name for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged or no safetensors file, copy it again: {error}") from error
