"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_offload.errors import OffloadError


@contextmanager
def written_whole(target: Path, *, mark: str, what: str) -> Iterator[Path]:
    """Give a folder beside ``target`` to write into, renamed to it at the end; an error leaves what was there.

    Args:
        target: What the folder is to be called. An earlier one of its kind is replaced.
        mark: The file by which folders of this kind are known.
        what: This kind, in words.

    Raises:
        FileExistsError: ``target`` holds something else: a wrong path must not cost anybody a folder.
        OffloadError: The disk is full, or the place is not for us to write to; says which.
    """
    from safetensors import SafetensorError

    if target.exists() and not _replaceable(target, mark):
        raise FileExistsError(f"{str(target)!r} exists and is no {what}; choose another folder")
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        yield staging
        _move(staging, target)
    except (OSError, SafetensorError) as error:  # the latter for a full disk, too
        raise OffloadError(
            f"the {what} could not be written to {str(target)!r}: {error}; what was there before still is"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replaceable(target: Path, mark: str) -> bool:
    return target.is_dir() and (not any(target.iterdir()) or (target / mark).is_file())


def _move(staging: Path, target: Path) -> None:
    replaced = staging.with_suffix(".old")
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
