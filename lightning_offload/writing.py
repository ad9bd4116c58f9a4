"""Files that are written whole or not at all, and what is said where they cannot be."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from lightning_offload.words import gigabytes

_WAYS_OUT = {
    errno.ENOSPC: "free some space there, or write elsewhere",
    errno.EDQUOT: "free some of your quota there, or write elsewhere",
    errno.EFBIG: "raise the limit (`ulimit -f`), or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "choose a place that is yours",
    errno.EPERM: "choose a place that is yours",
    errno.EIO: "the disk fails: write elsewhere",
    errno.ENOTDIR: "choose a path below folders",
    errno.EISDIR: "name a file",
    errno.EEXIST: "a file is in the way: choose another name",
    errno.ENOENT: "choose a place that there is",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def is_of_disk(error: BaseException) -> bool:
    """Whether a file or a folder is the matter, which a person can mend."""
    return isinstance(error, OSError) and error.errno in _WAYS_OUT


def said(error: OSError, place: str | os.PathLike[str] = "the disk") -> str:
    """One line: which file (or where, if the error does not tell), what is the matter, and the way out."""
    path = error.filename2 or error.filename or place
    reason = error.strerror or str(error)
    way_out = _WAYS_OUT.get(error.errno or 0)
    return f"{os.fspath(path)!r}: {reason}" + (f"; {way_out}" if way_out else "")


@contextmanager
def written_file(target: Path, nbytes: int = 0) -> Iterator[Path]:
    """Give a file beside ``target`` to write, renamed to it at the end; an error, or a kill, leaves what was there.

    Args:
        target: What the file is to be called. A device or a pipe is written to as it is.
        nbytes: About how much there is to write, for the error.

    Raises:
        OSError: It could not be written: with the path and, where space has run out, how much was needed.
    """
    is_new = not target.exists() or target.is_file()
    partial = target.parent / f".{target.name}.{uuid4().hex[:8]}.partial" if is_new else target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_new:
            _remove_stale(target)
        yield partial
        if is_new:
            _sync(partial)
            os.replace(partial, target)
            _sync(target.parent)
    except OSError as error:
        raise _telling(error, target, nbytes) from error
    finally:
        if is_new:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _remove_stale(target: Path) -> None:
    """What was left by a process that was killed while it wrote."""
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        stale.unlink(missing_ok=True)


def _telling(error: OSError, target: Path, nbytes: int) -> OSError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and nbytes:
        with suppress(OSError):
            reason += f" ({gigabytes(nbytes)} to write, {gigabytes(shutil.disk_usage(target.parent).free)} free)"
    return OSError(error.errno, reason, str(target))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle on folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
