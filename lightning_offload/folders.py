"""Folders that are written whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from lightning_offload.errors import OffloadError


@contextmanager
def written_whole(target: Path, *, mark: str, what: str, files: Iterable[str]) -> Iterator[Path]:
    """Give a folder beside ``target`` to write into, renamed to it at the end; an error leaves what was there.

    What a killed process left beside ``target`` is removed.

    Args:
        target: What the folder is to be called; of a link, what it points to. An earlier one of its kind is replaced.
        mark: The file by which folders of this kind are known.
        what: This kind, in words.
        files: Patterns of all that may be in one.

    Raises:
        FileExistsError: ``target`` holds something else: a wrong path must not cost anybody a folder.
        OffloadError: The disk is full, or the place is not for us to write to; says which.
    """
    from safetensors import SafetensorError

    place = target.resolve()
    _refuse_other(place, repr(str(target)), mark, what, [mark, *files])
    staging = place.with_name(f".{place.name}.{uuid4().hex}.tmp")
    try:
        staging.mkdir(parents=True)
        _tidy(place, staging)
        yield staging
        _move(staging, place)
    except (OSError, SafetensorError) as error:  # the latter for a full disk, too
        raise OffloadError(
            f"the {what} could not be written to {str(target)!r}: {error}; what was there before still is"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_other(place: Path, named: str, mark: str, what: str, files: list[str]) -> None:
    if not place.exists():
        return
    inside = sorted(place.iterdir()) if place.is_dir() else []
    if not place.is_dir() or (inside and not (place / mark).is_file()):
        raise FileExistsError(f"{named} exists and is no {what}; choose another folder")
    if Path.cwd().is_relative_to(place):
        raise FileExistsError(f"{named} is the working folder, or above it; choose another folder")
    for path in inside:
        holds = path.is_dir() or path.lstat().st_size > 0
        if holds and not any(map(path.match, files)):
            raise FileExistsError(
                f"{named} would be replaced, and {path.name!r} in it is of no {what}; choose another folder, or move"
                " that elsewhere"
            )


def _tidy(place: Path, staging: Path) -> None:
    """Undo what a killed process began: what it had moved away is put back, what it wrote is removed."""
    begun = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]+\.(tmp|old)")
    left = [path for path in place.parent.iterdir() if path != staging and begun.fullmatch(path.name)]
    for path in left:
        if path.suffix == ".old" and not place.exists():
            path.rename(place)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _move(staging: Path, place: Path) -> None:
    replaced = staging.with_suffix(".old")
    if place.exists():
        place.rename(replaced)
    try:
        staging.rename(place)
    except BaseException:
        if replaced.exists():
            replaced.rename(place)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
