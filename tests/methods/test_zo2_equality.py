"""zo2 is MeZO: l+, g and every weight equal, bit for bit, those of forty lines on the model alone."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from lightning_offload.methods.base import DTypes
from tests.helpers import every, pairwise, row_id
from tests.zeroth import (
    MODELS,
    assert_equal,
    assert_streamed,
    built,
    by_engine,
    by_oracle,
    constant,
    halved,
    model_loss,
    sgd,
)

STEPS = 12
CORE = ["opt", "opt_350m_like", "llama", "qwen3", "gemma2", "mixtral", "gpt2", "bert_classifier"]
FACTORS: dict[str, list[Any]] = {
    "dtype": ["float32", "bfloat16", "float16"],
    "decay": [0.0, 0.1],
    "lr": ["constant", "decaying"],
}
MEZO = {"noise": ["mezo"], "family": CORE, **FACTORS}
OTHERS = {"noise": ["mezo"], "family": [name for name in MODELS if name not in CORE], **FACTORS}
KINDS = {"noise": ["popcount", "gaussian", "rademacher"], **FACTORS}
PHILOX = {"noise": KINDS["noise"], "family": [*OTHERS["family"], *CORE], **FACTORS}
EVERY_FAMILY = [
    {**row, "family": family}
    for family, row in zip(PHILOX["family"], [*pairwise(KINDS), *pairwise(KINDS, seed=1)], strict=False)
]


def check(noise: str, family: str, dtype: str, decay: float, lr: str) -> None:
    module, batches = built(family, getattr(torch, dtype), STEPS)
    schedule = constant if lr == "constant" else halved
    drawn = {"noise": "mezo"} if noise == "mezo" else {"distribution": noise}
    if noise == "gaussian":
        drawn["native"] = "off"  # the oracle's logarithm and waves are torch's
    ours = by_engine(
        module,
        batches,
        model_loss,
        make_optimizer=lambda module: sgd(module, weight_decay=decay),
        schedule=schedule,
        dtypes=DTypes(rounding="nearest"),
        **drawn,
    )
    distribution: Any = None if noise == "mezo" else noise
    theirs = by_oracle(module, batches, model_loss, weight_decay=decay, schedule=schedule, distribution=distribution)
    assert any(g != 0 for _, g in theirs.steps)
    assert_equal(ours, theirs)
    if family != "albert":  # its one block fits into a slot for good
        assert_streamed(ours, micro_batches=STEPS)


@pytest.mark.parametrize("row", pairwise(MEZO), ids=row_id)
def test_the_bits_are_those_of_mezo(row: dict[str, Any]) -> None:
    check(**row)


@pytest.mark.parametrize("row", every(2, EVERY_FAMILY), ids=row_id)
def test_with_counter_based_noise_they_are_those_of_the_oracle(row: dict[str, Any]) -> None:
    check(**row)


@pytest.mark.slow
@pytest.mark.parametrize("values", [v for f in (MEZO, OTHERS, PHILOX) for v in product(*f.values())], ids=str)
def test_every_row(values: tuple[Any, ...]) -> None:
    check(**dict(zip(MEZO, values, strict=True)))
