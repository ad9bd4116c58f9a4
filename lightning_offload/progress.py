"""Progress that can be read: a bar on a terminal, plain lines in a file, a pipe or CI."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from math import isfinite
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from typing_extensions import override

from lightning_offload.errors import OffloadError

KINDS = ("auto", "bar", "rich", "plain")


def progress_bar(kind: str = "auto", every_s: float = 10.0) -> ProgressBar:
    """What shows a Trainer's progress.

    Args:
        kind: ``bar``, one line of a terminal; ``plain``, a line now and then; ``rich``, a bar drawn by the package of
            that name; ``auto``, a bar where the output is a terminal, else plain.
        every_s: Seconds between two plain lines, at least.

    Returns:
        A callback for the Trainer.

    Raises:
        ValueError: ``kind`` is none of these, or ``every_s`` is negative.
        OffloadError: ``rich`` is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if kind == "auto":
        kind = "bar" if sys.stdout.isatty() else "plain"
    if kind == "rich":
        try:
            return ReadableRichBar()
        except ModuleNotFoundError as error:
            raise OffloadError("callbacks=rich needs the package rich: pip install rich") from error
    return PlainProgress(every_s) if kind == "plain" else ReadableBar()


class _Readable(ProgressBar):
    """Shows amounts with the digits that mean something."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return readable(super().get_metrics(trainer, pl_module))


class ReadableBar(_Readable, TQDMProgressBar):
    """Lightning's bar."""


class ReadableRichBar(_Readable, RichProgressBar):
    """Lightning's bar by rich."""


class PlainProgress(_Readable):
    """One line now and then, for output that is kept: no carriage returns, no colours.

    Args:
        every_s: Seconds between two lines, at least; the last step always has one.

    Raises:
        ValueError: ``every_s`` is negative.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        if every_s < 0:
            raise ValueError(f"`every_s` must be at least 0, got {every_s!r}")
        super().__init__()
        self.every_s = every_s
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            print(*args, flush=True, **kwargs)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began_s, self._said_s = perf_counter(), float("-inf")
        self._start = self._step = trainer.global_step
        self._last = trainer.estimated_stepping_batches
        self._of_validation: set[str] = set()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now_s, step = perf_counter(), trainer.global_step
        if step == self._step or (now_s - self._said_s < self.every_s and step != self._last):
            return
        self._step, self._said_s = step, now_s
        metrics = self.get_metrics(trainer, pl_module)
        shown = [f"{name} {value}" for name, value in metrics.items() if name not in self._of_validation]
        self.print("  ".join([self._at(step), *shown, self._times(now_s - self._began_s)]))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = self.get_metrics(trainer, pl_module)
        if trainer.state.fn != "fit":
            self.print(f"validation of {sum(trainer.num_val_batches):,.0f} batches")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = self.get_metrics(trainer, pl_module)
        self._of_validation |= metrics.keys() - self._before.keys()
        shown = [f"{name} {metrics[name]}" for name in metrics if name in self._of_validation]
        self.print("  ".join([self._at(trainer.global_step), *shown]))

    def _at(self, step: int) -> str:
        if not isfinite(self._last):
            return f"step {step}"
        return f"step {step:>{len(str(self._last))}}/{self._last}"

    def _times(self, elapsed_s: float) -> str:
        """Since the start, and what is left at this pace."""
        left_s = elapsed_s / (self._step - self._start) * (self._last - self._step)
        return f"[{_clock(elapsed_s)}{f', {_clock(left_s)} left' if isfinite(left_s) else ''}]"


def load_without_bars() -> None:
    """Have transformers load weights without its bar, which is one long line where there is no terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def readable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Three digits for every float; without the logger's version, and ``train/`` before a name."""
    return {
        name.removeprefix("train/"): number(value) if isinstance(value, float) else value
        for name, value in metrics.items()
        if name != "v_num"
    }


def number(value: float) -> str:
    """``3043``, ``2.26``, ``0.0123``, ``1.2e-05``."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
