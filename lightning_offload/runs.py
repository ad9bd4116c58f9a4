"""Folders of runs: how they are named, what is in them, which checkpoint is the newest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lightning_offload.errors import CheckpointError, OffloadError

CONFIG = "config.yaml"
MODEL = "hf"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"


def choose_folder(runs_dir: str, name: str | None, default_name: str, ckpt_path: str | None) -> str:
    """Return the folder of a run, created: ``<name>``, or ``<default name>-<first free number>``.

    With ``ckpt_path="last"`` and no name it is the newest run of the default name that has a checkpoint.
    """
    if name:
        return str(Path(runs_dir, name))
    numbered = sorted(_numbered(Path(runs_dir), default_name))
    if ckpt_path == "last":
        for _, folder in reversed(numbered):
            if newest_checkpoint(folder):
                return str(folder)
    number = numbered[-1][0] + 1 if numbered else 1
    while True:  # creating it is the claim: two runs started together get two folders
        folder = Path(runs_dir, f"{default_name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return str(folder)
        number += 1


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of a run that was written last."""
    return max(folder.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that ``path`` means: itself, or the newest of the run in that folder.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint and no run at {str(path)!r}")
    newest = newest_checkpoint(path)
    if newest is None and (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{str(path)!r} is an adapter, no checkpoint: give the folder of its run, or put it on its model by "
            f"`load_meft_adapter(model, {str(path)!r})`"
        )
    if newest is None:
        raise CheckpointError(f"no checkpoint in {str(path)!r}; was it run with callbacks=none?")
    return newest


def checkpoint_to_resume(folder: Path, ckpt_path: str | None) -> Path | None:
    """Return where a run in ``folder`` starts from; a finished run is never begun anew in the same folder.

    Raises:
        CheckpointError: ``ckpt_path`` names none, or is "last" and the run has none.
        OffloadError: The folder holds the results of another run.
    """
    if ckpt_path == "last":
        newest = newest_checkpoint(folder)
        if newest is None:
            raise CheckpointError(
                f"ckpt_path=last finds no checkpoint in {str(folder)!r}; start without ckpt_path, "
                "or give the name= of a run that has one"
            )
        return newest
    if ckpt_path:
        return find_checkpoint(ckpt_path)
    if newest_checkpoint(folder) or any((folder / name).exists() for name in (MODEL, ADAPTER)):
        raise OffloadError(
            f"{str(folder)!r} holds a run already; continue it with ckpt_path=last, or choose another name="
        )
    return None


def folder_of(checkpoint: Path) -> Path:
    """Return the run that a checkpoint belongs to.

    Raises:
        CheckpointError: The file is not in a run's folder, so nothing says which model it is of.
    """
    for folder in checkpoint.absolute().parents:
        if (folder / CONFIG).is_file():
            return folder
    raise CheckpointError(f"{str(checkpoint)!r} is in no run's folder: there is no {CONFIG} that says its model")


def contents(folder: Path) -> set[Path]:
    """Return everything in a folder, and below."""
    return set(folder.rglob("*"))


def remove_added(folder: Path, before: set[Path]) -> None:
    """Take away what has come into a folder since its `contents` were taken."""
    for path in sorted(contents(folder) - before, reverse=True):  # what is in a folder before the folder
        with suppress(OSError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_if_empty(folder: Path, runs_dir: str | None = None) -> None:
    """Leave nothing behind when a run stopped before it wrote anything; never the working folder.

    With ``runs_dir`` the folders up to that one go as well, when nothing is in them.
    """
    above = [
        parent for parent in folder.absolute().parents if runs_dir and parent.is_relative_to(Path.cwd() / runs_dir)
    ]
    with suppress(OSError):  # not empty
        for path in (folder, *above):
            if path.resolve() == Path.cwd():
                return
            path.rmdir()


def _numbered(runs_dir: Path, default_name: str) -> Iterator[tuple[int, Path]]:
    for folder in runs_dir.glob(f"{default_name}-*"):
        number = folder.name.removeprefix(f"{default_name}-")
        if number.isdecimal():
            yield int(number), folder
