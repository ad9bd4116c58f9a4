"""Predicted device memory against what torch reserves, on a CUDA device with 12 GiB free."""

from __future__ import annotations

import gc
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_offload import FullOffloadStrategy, LSPOffloadStrategy
from lightning_offload.memory.budget import Machine
from lightning_offload.planning import plan
from lightning_offload.text import CausalLM, batch_by_shape
from tests.planning.machines import gpu

pytestmark = pytest.mark.gpu

POINTS = [
    (width, depth, batch, precision, recompute)
    for width, depth, batch in ((1024, 8, 4), (2048, 6, 8))
    for precision in ("32-true", "bf16-mixed", "bf16-true")
    for recompute in (False, True)
]


class ByShape(CausalLM):
    """Random weights and tokens."""

    def __init__(self, width: int, depth: int, batch: int, precision: str, recompute: bool) -> None:
        config: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "hidden_size": width}
        config |= {"intermediate_size": 4 * width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
        dtype = "bfloat16" if precision == "bf16-true" else "float32"
        super().__init__(config=config, init="random", dtype=dtype, gradient_checkpointing=recompute)
        self.batches = [batch_by_shape(batch, 512, 32000) for _ in range(4)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [FullOffloadStrategy, LSPOffloadStrategy])
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_reserved_memory_is_within_five_percent(point: tuple[Any, ...], make: type[Any]) -> None:
    with torch.device("meta"):
        shape = ByShape(*point)
    predicted = plan(
        shape,
        shape.batches[0],
        method="lsp" if make is LSPOffloadStrategy else "full",
        precision=point[3],
        hardware=gpu(80),
        gradient_clip_val=1.0,
    )
    module = ByShape(*point)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    L.Trainer(
        strategy=make(),
        accelerator="cuda",
        devices=1,
        precision=point[3],
        gradient_clip_val=1.0,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module)
    measured = torch.cuda.max_memory_reserved() - before + Machine.detect("cuda").context_bytes
    expected = predicted.device.bytes - gpu(80).context_bytes + Machine.detect("cuda").context_bytes
    assert expected == pytest.approx(measured, rel=0.05)
