"""A run that is killed while it saves, again and again, each time resumed by the next process.

``python -m tests.killed FOLDER KILLS SEED [METHOD]`` prints what it saw as JSON. Everything slow is imported once: each
run is a fork of this process, made while it has a single thread.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_offload import FullOffloadStrategy, MEFTOffloadStrategy
from lightning_offload.checkpoint import OffloadCheckpointIO
from tests.plain import fit, new

SIZES = {"width": 384, "depth": 3}  # 21 MiB of weights and moments: most of a step's time is saving


class Telling(OffloadCheckpointIO):
    """Writes a byte to a pipe as a save begins, and one as it ends."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        os.write(self.pipe, b"b")
        super().save_checkpoint(*args, **kwargs)
        os.write(self.pipe, b"e")


def strategy_of(method: str, io: OffloadCheckpointIO | None = None) -> Any:
    if method == "full":
        return FullOffloadStrategy(min_numel=0, checkpoint_io=io)
    return MEFTOffloadStrategy(targets=r"blocks\.\d+", width=1024, seed=0, row_optimizer="dense", checkpoint_io=io)


def train(path: Path, io: OffloadCheckpointIO, steps: int, method: str) -> L.Trainer:
    saving = ModelCheckpoint(path.parent, path.stem, every_n_train_steps=1, enable_version_counter=False)
    found = path if path.exists() else None
    return fit(new(**SIZES), strategy_of(method, io), steps=steps, callbacks=[saving], ckpt_path=found)


@dataclass
class Child:
    """One run in a process of its own, and what it has told so far."""

    pid: int
    pipe: int
    told: bytes = b""

    @classmethod
    def start(cls, path: Path, method: str) -> Child:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                train(path, Telling(writing), 10_000, method)
            finally:
                os._exit(1)  # it is killed long before it ends
        os.close(writing)
        return cls(pid, reading)

    def wait_for(self, byte: bytes, count: int) -> None:
        while self.told.count(byte) < count:
            got = os.read(self.pipe, 1)
            assert got, "the run ended by itself"
            self.told += got

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        while got := os.read(self.pipe, 100):
            self.told += got
        os.close(self.pipe)


def killed_again_and_again(path: Path, kills: int, rng: random.Random, method: str) -> dict[str, int]:
    step, inside, duration_s = 0, 0, 0.05
    for kill in range(kills):
        child = Child.start(path, method)
        child.wait_for(b"b", 1)
        began = time.perf_counter()
        if kill % 5 == 0:  # after a whole save, the first time because there is none before
            child.wait_for(b"e", 1)
            duration_s = time.perf_counter() - began
            child.wait_for(b"b", 2)
        time.sleep(rng.uniform(0, duration_s))
        child.kill()
        ended = step + child.told.count(b"e")
        step = torch.load(path, weights_only=True)["global_step"]
        assert step in (ended, ended + 1), (step, ended)  # renamed, but killed before it could tell
        inside += any(path.parent.glob(".*.partial"))
    return {"step": step, "inside": inside}


def main(folder: Path, kills: int, seed: int, method: str = "full") -> dict[str, Any]:
    path = folder / "run.ckpt"
    seen = killed_again_and_again(path, kills, random.Random(seed), method)
    steps = seen["step"] + 1
    resumed = train(path, OffloadCheckpointIO(), steps, method).lightning_module.state_dict()
    plain = "auto" if method == "full" else strategy_of(method)
    never = fit(new(**SIZES), plain, steps=steps).lightning_module.state_dict()
    same = all(torch.equal(never[name], resumed[name]) for name in never)
    return seen | {"same": same, "files": sorted(file.name for file in folder.iterdir())}


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])))
