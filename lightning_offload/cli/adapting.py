"""Runs that leave the model as it was: what becomes of their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_offload.adapters import save_meft_adapter
from lightning_offload.cli.building import shown
from lightning_offload.errors import OffloadError
from lightning_offload.export import has_adapters
from lightning_offload.lora import has_peft, save_peft_adapter
from lightning_offload.stock import stock_model


def is_adapted(model: Any) -> bool:
    """Whether adapters are what was trained, by `meft` or LoRA."""
    return has_adapters(model) or has_peft(model)


def save_adapter(model: Any, folder: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write the folder of the adapters.

    Raises:
        OffloadError: A ``dtype`` for LoRA, which keeps that in which it was trained.
    """
    if has_adapters(model):
        return save_meft_adapter(model, folder, dtype=dtype)
    if dtype is not None:
        raise OffloadError("`dtype` is for whole models: LoRA is stored as trained; give merge=true, or leave it out")
    return save_peft_adapter(model, folder)


def how_to_load(model: Any, adapter: Path) -> str:
    """The line of Python that puts an adapter on the model that it was trained beside."""
    network = stock_model(model)
    base = network.config._name_or_path
    dtype = str(network.dtype).removeprefix("torch.")
    kind = type(network).__name__
    labels = f", num_labels={network.config.num_labels}" if "SequenceClassification" in kind else ""
    made = f"{kind}.from_pretrained({shown(base)!r}, dtype={dtype!r}{labels})" if base else "<the same model>"
    load = "load_meft_adapter" if has_adapters(model) else "PeftModel.from_pretrained"
    return f"the model itself has not changed; both together: {load}({made}, {shown(adapter)!r})"
