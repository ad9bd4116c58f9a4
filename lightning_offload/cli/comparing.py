"""`lightning-offload compare`, and what a multirun leaves of its jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from lightning_offload import runs
from lightning_offload.cli.building import shown
from lightning_offload.cli.users import user_errors
from lightning_offload.comparing import COSTS, LOSSES, TABLE
from lightning_offload.comparing import compare as compare_runs
from lightning_offload.errors import OffloadError
from lightning_offload.plots import metrics_files


def compare(cfg: DictConfig) -> int:
    """Print the table of finished runs, and write it with two pictures."""
    with user_errors():
        if isinstance(cfg.runs, ListConfig):
            given, folder = [Path(run) for run in cfg.runs], Path()
        else:
            given, folder = _in_folder(Path(cfg.runs)), Path(cfg.runs)
        _side_by_side(given, Path(cfg.output or folder))
    return 0


def after_sweep(jobs: Sequence[Path]) -> None:
    """Compare those jobs of a multirun that have logged something, in the folder above theirs."""
    logged = [job for job in jobs if metrics_files(job)]
    if len(logged) > 1:
        _side_by_side(logged, logged[0].parent)


def _in_folder(folder: Path) -> list[Path]:
    """The runs of a sweep, or of any folder of runs, in the order of their numbers."""
    found = [path.parent for path in folder.glob(f"*/{runs.CONFIG}")]
    if not found:
        raise OffloadError(
            f"no runs in {str(folder)!r}: give runs=<folder of a sweep>, or 'runs=[<run>,<run>]' with their folders"
        )
    return sorted(found, key=lambda run: (len(run.name) if run.name.isdecimal() else 0, run.name))


def _side_by_side(given: Sequence[Path], out: Path) -> None:
    print(f"\n{compare_runs(given, out)}\n")
    print(f"written to {', '.join(shown(out / name) for name in (TABLE, LOSSES, COSTS))}")
