"""A LightningModule and a Trainer that know nothing of the package, to compare with and to exchange checkpoints with.

As a script it continues checkpoints where the package cannot be imported::

    python plain.py STEPS CKPT OUT [CKPT OUT ...]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

VOCAB = 41
BATCHES = 5  # per epoch: a window of two or three micro-batches is ragged at its end


class Lit(L.LightningModule):
    """Dropout, batch statistics in buffers, a tied head, two groups, a scheduler.

    Batches and dropout masks follow from the number of the batch, so that a resumed run can equal one that never
    stopped: Lightning restores neither the loader's place nor the random state.
    """

    def __init__(self, optimizer: str = "adamw", width: int = 19, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.losses: list[float] = []

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + self.dropout(block(x))
        return self.head(self.norm(x.flatten(0, 1)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(number)
        tokens = torch.randint(0, VOCAB, (3, 7))
        loss = F.cross_entropy(self(tokens).float(), tokens.roll(1, -1).flatten())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        tokens = (torch.arange(21).view(3, 7) + batch) % VOCAB
        self.log("val/loss", F.cross_entropy(self(tokens).float(), tokens.roll(1, -1).flatten()), batch_size=3)

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self((torch.arange(21).view(3, 7) + batch) % VOCAB)

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.dim() < 2], "lr": 1e-2, "weight_decay": 0.0},
        ]
        make = {
            "adamw": lambda: torch.optim.AdamW(groups, lr=3e-2, fused=True),
            "adam": lambda: torch.optim.Adam(groups, lr=3e-2, fused=True),
            "sgd": lambda: torch.optim.SGD(groups, lr=1e-1, fused=True),
            "momentum": lambda: torch.optim.SGD(groups, lr=1e-1, momentum=0.9, nesterov=True, fused=True),
        }[self.hparams["optimizer"]]
        optimizer = make()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader() -> DataLoader[int]:
    return DataLoader(range(BATCHES))  # type: ignore[arg-type]


def trainer(strategy: Any = "auto", *, steps: int = 8, callbacks: Sequence[Any] = (), **options: Any) -> L.Trainer:
    """One without output; checkpoints are written where a callback says so."""
    warnings.filterwarnings("ignore", module="lightning")
    saves = any(isinstance(callback, L.pytorch.callbacks.ModelCheckpoint) for callback in callbacks)
    return L.Trainer(
        strategy=strategy,
        max_epochs=-1,
        max_steps=steps,
        callbacks=[*callbacks],
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": saves,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            **options,
        },
    )


def new(optimizer: str = "adamw", **sizes: int) -> Lit:
    torch.manual_seed(3)
    return Lit(optimizer, **sizes)


def fit(module: Lit, strategy: Any = "auto", *, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    run = trainer(strategy, **options)
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return run


def continued(ckpt: Path, out: Path, steps: int) -> None:
    content = torch.load(ckpt, weights_only=True)
    fit(new(content["hyper_parameters"]["optimizer"]), steps=steps, ckpt_path=ckpt).save_checkpoint(out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["lightning_offload"] = None  # type: ignore[assignment]  # importing it raises
    until, *paths = sys.argv[1:]
    for source, target in zip(paths[::2], paths[1::2], strict=True):
        continued(Path(source), Path(target), int(until))
