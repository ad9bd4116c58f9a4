"""Checkpoints that never exist twice in memory and never half on disk."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

from lightning_offload.errors import CheckpointError
from lightning_offload.writing import written_file

ADAPTERS = "meft_adapters"
"""Key in a checkpoint: the settings of the adapters in it."""

_DECISIVE = ("width", "experts", "active_experts", "top_k", "gate", "scope")
"""Settings of adapters that decide a forward; the others describe initial values."""


class OffloadCheckpointIO(TorchCheckpointIO):
    """Streams a checkpoint tensor by tensor to a temporary file, syncs it, and renames it into place.

    Lightning's own way serialises the whole checkpoint into memory first: once more the size of everything, in the
    memory that offloading has filled. A kill at any moment leaves the previous file whole. Remote paths go Lightning's
    way. Files are ordinary ``torch.save`` files of plain tensors and primitives.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            TypeError: ``storage_options`` was given.
            OSError: The disk is full, or the place cannot be written to: with the path and what there was to write.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        with written_file(Path(path), _nbytes(checkpoint)) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch says where in the archive, not what the disk said
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    @override
    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: There is none.
            CheckpointError: It is no checkpoint, or not a whole one; names the file.
        """
        try:
            if not _is_remote(path) and zipfile.is_zipfile(path):
                # mapped, not read: a resume must not need the checkpoint's size in memory beside what it fills
                content: dict[str, Any] = torch.load(path, map_location, weights_only=weights_only, mmap=True)
                return content
            return super().load_checkpoint(path, map_location, weights_only)
        except Exception as error:
            if isinstance(error, (FileNotFoundError, PermissionError)) or _is_remote(path) or zipfile.is_zipfile(path):
                raise  # not damaged: torch says itself what it refuses and how to load it
            raise CheckpointError(
                f"The checkpoint `{path}` cannot be read: it is truncated, damaged, or no checkpoint "
                f"({reason(error)}). Resume from an earlier checkpoint."
            ) from error


def compare_weights(own: Mapping[str, Any], stored: Mapping[str, Any], *, source: str) -> None:
    """Compare names and shapes of a model's and a checkpoint's weights.

    Raises:
        CheckpointError: They differ; names the first tensor that does, in the model's order.
    """
    for name in [*own, *(name for name in stored if name not in own)]:
        shapes = [_shape(tensors, name) for tensors in (stored, own)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{source} belongs to another model; first differing tensor: `{name}` is {shapes[0]} in the checkpoint "
                f"and {shapes[1]} in the model{_hint(name, own)}"
            )


def compare_adapters(own: Mapping[str, Any], checkpoint: Mapping[str, Any], *, source: str) -> None:
    """Compare what decides a forward of a model's and a checkpoint's adapters.

    Of a checkpoint that does not keep settings only what shapes tell is known.

    Raises:
        CheckpointError: They differ; names all settings that do.
    """
    stored = checkpoint.get(ADAPTERS) or _seen(checkpoint["state_dict"])
    other = [name for name in _DECISIVE if name in stored and stored[name] != own[name]]
    if other:
        here, there = (", ".join(f"{name}={of[name]!r}" for name in other) for of in (own, stored))
        raise CheckpointError(
            f"{here}, but {source} has adapters with {there}; pass the same, or start without `ckpt_path`"
        )


def _seen(state: Mapping[str, Any]) -> dict[str, int]:
    parts = (("width", ".meft.keys"), ("experts", ".meft.router"))
    rows = {name: [len(t) for key, t in state.items() if key.endswith(part)] for name, part in parts}
    return {name: counts[0] for name, counts in rows.items() if counts}


def _hint(name: str, own: Mapping[str, Any]) -> str:
    if ".meft." not in name or any(".meft." in other for other in own):
        return ""
    return (
        " (adapters of `meft`: load it under strategy='meft_offload', into a module with `MEFTMixin`, or after "
        "`attach_parameters` of lightning_offload.methods.sparse_adapter)"
    )


def _shape(tensors: Mapping[str, Any], name: str) -> str:
    if name not in tensors:
        return "absent"
    value = tensors[name]
    return str(tuple(value.shape)) if isinstance(value, Tensor) else "no tensor"


def _nbytes(value: Any) -> int:
    """Of the tensors in it."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_nbytes, parts))


def _is_remote(path: Any) -> bool:
    return "://" in str(path)


def reason(error: Exception) -> str:
    """The first line, unless it is torch's advice on ``weights_only``, which does not help here."""
    line = next(iter(str(error).splitlines()), "")
    return type(error).__name__ if "weights_only" in line or not line else f"{type(error).__name__}: {line}"
