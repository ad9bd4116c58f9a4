"""How a run ends before its time: what is left of it, and how it goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_offload import runs
from lightning_offload.cli.building import shown
from lightning_offload.cli.users import Interrupted
from lightning_offload.errors import OffloadError
from lightning_offload.writing import is_of_disk, said


class Stopping(Callback):
    """Ctrl-C and SIGTERM end training after the step at hand, so that its checkpoint is written; a second one at once.

    Args:
        begins: Called when everything is in its place and training begins.

    Attributes:
        begun: Whether there has been a batch.
        received: The signal that has ended training.
    """

    def __init__(self, begins: Callable[[], None]) -> None:
        self.begins = begins
        self.begun = False
        self.received: int | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:  # ranks would stop at different steps
            self._listen()
        self.begins()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.begun = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.received and ((batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch):
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate first

    def _listen(self) -> None:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, self._stop)
            if "SLURM_JOB_ID" not in os.environ:  # where Lightning knows better
                signal.signal(signal.SIGTERM, self._stop)  # it puts back what was there when fit ends

    def _stop(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        with suppress(OSError):  # no print: it may be what was interrupted
            os.write(2, b"\nstops after this step and saves it; once more stops at once\n")


@contextmanager
def left_in_order(folder: Path, stopping: Stopping) -> Iterator[None]:
    """What a run wrote before its first batch goes with an error; later the error says how to go on.

    Raises:
        Interrupted: A signal has stopped it.
        OffloadError: The disk has.
    """
    before = runs.contents(folder)
    try:
        yield
    except BaseException as error:
        if not stopping.begun:
            runs.remove_added(folder, before)
        if is_of_disk(error):
            raise OffloadError(f"{said(error, folder)}{_way_back(folder, stopping)}") from error  # type: ignore[arg-type]
        # Lightning makes an exit of it
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            number = stopping.received or signal.SIGINT
            raise Interrupted(f"interrupted{_way_back(folder, stopping)}", number) from error
        raise


def _way_back(folder: Path, stopping: Stopping) -> str:
    newest = runs.newest_checkpoint(folder)
    if newest is not None:
        return f". {shown(newest)} is whole: the same command with ckpt_path=last goes on from it"
    begun = "There is no checkpoint to go on from"
    return f". {begun if stopping.begun else 'Training had not begun, and nothing is left'}"
