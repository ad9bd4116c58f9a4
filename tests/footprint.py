"""Peak memory of a process that does one thing, as JSON; Linux.

``python -m tests.footprint train {plain,ours} PRECISION``: 100 M parameters for three steps of SGD.
``python -m tests.footprint save FOLDER``: a checkpoint of 100 MB, with our writer and with Lightning's.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_offload import FullOffloadStrategy
from lightning_offload.checkpoint import OffloadCheckpointIO
from tests.plain import trainer


class Wide(L.LightningModule):
    """Blocks of one bias-free linear: weights are everything, activations nothing."""

    def __init__(self, width: int, depth: int, make_optimizer: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.make_optimizer = make_optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = torch.ones(2, self.blocks[0].in_features)
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def memory_bytes(name: str) -> int:
    """A row of this process's status: `VmRSS` now, `VmHWM` at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise KeyError(name)


def forget_peak() -> None:
    """The peak is counted from here on, and nothing that was freed before can hide what comes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def fit(strategy: Any, module: Wide, precision: str) -> L.Trainer:
    run = trainer(strategy, steps=3, precision=precision)
    run.fit(module, DataLoader(range(3)))  # type: ignore[arg-type]
    return run


def train(kind: str, precision: str) -> dict[str, int]:
    imports = memory_bytes("VmRSS")
    if kind == "plain":
        fit("auto", Wide(4096, 6, lambda p: torch.optim.SGD(p, lr=1e-3)), precision)
        return {"peak": memory_bytes("VmHWM"), "imports": imports}
    strategy = FullOffloadStrategy()
    held = {}

    class Look(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            report = strategy.engine.lanes.memory.report()
            held.update(requested=report.requested_bytes, allocated=report.allocated_bytes)

    run = trainer(strategy, steps=3, precision=precision, callbacks=[Look()])
    run.fit(Wide(4096, 6, lambda p: torch.optim.AdamW(p, lr=1e-3)), DataLoader(range(3)))  # type: ignore[arg-type]
    return {"peak": memory_bytes("VmHWM"), "imports": imports, **held}


def save(folder: str) -> dict[str, int]:
    """Growth while the same training state is saved by ours and by Lightning's writer."""
    strategy = FullOffloadStrategy()
    run = fit(strategy, Wide(1024, 8, lambda p: torch.optim.AdamW(p, lr=1e-3)), "32-true")
    seen = {}
    for kind, io in {"ours": OffloadCheckpointIO(), "plain": TorchCheckpointIO()}.items():
        strategy.checkpoint_io = io
        forget_peak()
        before = memory_bytes("VmRSS")
        run.save_checkpoint(Path(folder) / kind)
        seen[kind] = memory_bytes("VmHWM") - before
    return seen | {"file": (Path(folder) / "ours").stat().st_size}


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:]
    print(json.dumps({"train": train, "save": save}[command](*arguments)))
