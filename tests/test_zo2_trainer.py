"""`zo2_offload` under a Trainer: MeZO's trajectory, its boundaries, and what users hang on it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SumMetric

from lightning_offload import ZO2OffloadStrategy
from tests.helpers import VOCAB, Net, pairwise, row_id
from tests.lit import trainer
from tests.zo2 import ZO2, ZLit, oracle, same_weights, sgd, shuffled_zo2, zfit, zo2

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16, "bf16-mixed": torch.float32}
ROUNDS_TO_NEAREST = {"rounding": "nearest"}


def batches(module: ZLit, epochs: int = 1) -> list[Tensor]:
    return list(module.train_dataloader()) * epochs


def nearest(precision: str, **settings: Any) -> ZO2OffloadStrategy:
    """The oracle rounds to nearest."""
    from lightning_offload import OffloadPrecision

    return zo2(precision_plugin=OffloadPrecision(precision, rounding="nearest"), **settings)


FACTORS: dict[str, list[Any]] = {
    "noise": ["philox", "mezo"],
    "precision": list(DTYPES),
    "accumulate": [1, 2],
    "schedule": [None, "step", "epoch"],
    "net": [{}, {"tied": True}, {"frozen": True}, {"functional_head": True}],
    "settings": [{}, {"write_back_every": 3}, {"slots": 4, "prefetch": 2}, {"resident": 1.0}],
}


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=1), ids=row_id)
def test_a_fit_is_mezo(row: dict[str, Any]) -> None:
    precision, accumulate, schedule = row["precision"], row["accumulate"], row["schedule"]
    module = ZLit(schedule=schedule, **row["net"])
    net = copy.deepcopy(module.net).to(DTYPES[precision])
    steps = [batches(module)[at : at + accumulate] for at in range(0, 9, accumulate)]
    per_epoch = len(steps)

    def lr(step: int) -> float:
        count = {"step": step, "epoch": step // per_epoch, None: 3}[schedule]
        return 1e-3 * min(1.0, (count + 1) / 4)

    run = zfit(module, nearest(precision, noise=row["noise"], **row["settings"]), accumulate_grad_batches=accumulate)
    expected = oracle(net, steps * 2, kind=row["noise"], lr=lr, autocast=precision == "bf16-mixed")
    got = [(entry.step, entry.coefficient) for entry in run.strategy.log]
    assert got == [(at + 1, g) for at, (_, g) in enumerate(expected)]
    assert len({g for _, g in got}) > 2
    for (name, wanted), (_, have) in zip(net.named_parameters(), module.net.named_parameters(), strict=True):
        assert torch.equal(have, wanted), name
    assert module.net.head.weight.dtype == DTYPES[precision]
