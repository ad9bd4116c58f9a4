"""Adapter folders of models that were trained on a CUDA device, and of models that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_offload import MEFTOffloadStrategy, load_meft_adapter, save_meft_adapter
from lightning_offload.text import TINY_PATH, CausalLM
from tests.gpu.test_full_gpu import device
from tests.lit import trainer
from tests.meft import PLACEMENTS

__all__ = ["device"]  # a fixture


def base(device: torch.device) -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_PATH, dtype=torch.float32).to(device)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    return model(input_ids=tokens.to(model.device)).logits


@pytest.mark.gpu
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fit_on_the_device_gives_a_folder_for_it(placement: str, tmp_path: Path, device: torch.device) -> None:
    tokens = torch.randint(2048, (4, 2, 16), generator=torch.Generator().manual_seed(0))
    batches = DataLoader([{"input_ids": ids, "labels": ids} for ids in tokens], batch_size=None)
    module = CausalLM(path=str(TINY_PATH))
    strategy = MEFTOffloadStrategy(width=64, experts=16, top_k=8, placement=placement)
    trainer(strategy, accelerator=device.type, max_epochs=1).fit(module, batches)
    written = save_meft_adapter(module, tmp_path / "adapter")
    loaded = load_meft_adapter(base(device), written)
    assert {p.device.type for p in loaded.parameters()} == {device.type}
    trained = module.network.to(device)
    assert torch.equal(logits(loaded, tokens[0]), logits(trained, tokens[0]))
    assert not torch.equal(logits(loaded, tokens[0]), logits(base(device), tokens[0]))
    again = save_meft_adapter(trained, tmp_path / "again")
    assert (again / "adapter_model.safetensors").read_bytes() == (written / "adapter_model.safetensors").read_bytes()
