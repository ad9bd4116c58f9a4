"""Weights come from files to the GPU, or to page-locked memory, as those of a model that was loaded whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.lit import trainer
from tests.test_materialising import CONFIG, STRATEGIES, Late

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("method", STRATEGIES)
def test_evaluates_and_trains_as_if_it_had_been_loaded(method: str, precision: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    seen, first = [], []
    for how in ("loaded", "meta", "init"):
        module = Late(how, tmp_path, method=method)
        run = trainer(STRATEGIES[method](), accelerator="cuda", limit_val_batches=3, precision=precision, max_epochs=1)
        seen.append(run.validate(module, verbose=False))
        module = Late(how, tmp_path, method=method)  # without values again
        run.fit(module)
        first.append(module.losses[0])  # later ones depend on the order in which a GPU adds
        assert all(map(math.isfinite, module.losses))
    assert seen[0] == seen[1] == seen[2]
    assert first[0] == first[1] == first[2]
