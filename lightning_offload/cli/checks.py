"""What a Trainer would take without a word, or fail on in the middle: refused before anything is read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, ListConfig

from lightning_offload.errors import OffloadError

_MANY = 8
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": (lambda n: n == -1 or (n >= 1 and n == int(n)), "a number from 1, or -1 where max_epochs decides"),
    "accumulate_grad_batches": (lambda n: n >= 1 and n == int(n), "a number from 1"),
    "gradient_clip_val": (lambda x: x >= 0, "a number from 0, or null"),
    "val_check_interval": (lambda x: x > 0, "steps, or a share of an epoch"),
    "log_every_n_steps": (lambda n: n >= 0, "a number of steps"),
    "limit_train_batches": (lambda x: x > 0, "batches, a share of an epoch, or null; with none there is no training"),
}


def check_trainer(trainer: DictConfig) -> None:
    """Refuse numbers that a Trainer cannot train with; what is no number it refuses itself.

    Raises:
        OffloadError: Names the first such key, its value and what may stand there.
    """
    for name, (is_good, wanted) in _WANTED.items():
        value = trainer.get(name)
        if isinstance(value, int | float) and not (math.isfinite(value) and is_good(value)):
            raise OffloadError(f"trainer.{name}={value}: give {wanted}")
    _check_devices(trainer)


def _check_devices(trainer: DictConfig) -> None:
    if trainer.get("accelerator") == "gpu" and not torch.cuda.is_available():
        raise OffloadError("trainer.accelerator=gpu: torch finds no GPU here; leave it out, or take hardware=cpu")
    devices, cores = trainer.get("devices"), os.cpu_count() or 1
    count = len(devices) if isinstance(devices, ListConfig) else devices
    on_cpu = trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
    if isinstance(count, int) and on_cpu and count > max(cores, _MANY):
        raise OffloadError(
            f"trainer.devices={count}: each device of the CPU is a process, and this machine has {cores} cores"
        )


def seed_everything(seed: int) -> None:
    """Seed every generator, workers' too.

    Raises:
        OffloadError: It is no seed.
    """
    if not 0 <= seed < 2**32:
        raise OffloadError(f"seed={seed}: give a number from 0 to {2**32 - 1}")
    L.seed_everything(seed, workers=True, verbose=False)


def check_rates(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a learning rate that is no number.

    Raises:
        OffloadError: It is infinite; torch refuses what is not a number itself.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    if not all(math.isfinite(rate) for rate in rates):
        raise OffloadError(f"lr={rates[0]}: give a finite learning rate, such as lr=1e-4")
