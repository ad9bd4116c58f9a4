"""Peak memory while weights in files become weights that are trained, as JSON; Linux.

``python -m tests.meta_footprint FOLDER STEPS DTYPE METHOD ...``: for a model in DTYPE from files of bfloat16, by each
method, from before it is made to the first step, or to the end of STEPS. ``zo2/loaded`` is ``from_pretrained``;
``zo2/whole`` keeps what was read from all files, as nothing should. FOLDER may be empty: then it gets a model of 200 M.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_offload import FullOffloadStrategy, LSPOffloadStrategy, MEFTOffloadStrategy, ZO2OffloadStrategy
from lightning_offload.memory.shards import INDEX
from lightning_offload.methods.zeroth import ZerothEngine
from tests.footprint import forget_peak, memory_bytes
from tests.plain import trainer

SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 64},
    "20M": {"hidden_size": 320, "num_hidden_layers": 10, "intermediate_size": 1152, "vocab_size": 16000},
    "200M": {"hidden_size": 1024, "num_hidden_layers": 13, "intermediate_size": 2816, "vocab_size": 32000},
}
MAKE = {
    "full": FullOffloadStrategy,
    "lsp": lambda: LSPOffloadStrategy(dim=32, nnz=4, seed=0),
    "zo2": lambda: ZO2OffloadStrategy(seed=0),
    "meft": lambda: MEFTOffloadStrategy(width=64, experts=8, active_experts=2, top_k=8, seed=0),
}


def empty_model(config: Any, dtype: str = "bfloat16") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def write(folder: Path, shape: str, shards: int = 5) -> int:
    """The files of a tied Llama of this shape in bfloat16, no two values of one weight alike; the largest's bytes."""
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPES[shape], num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = dict(empty_model(config).named_parameters())
    bound = sum(p.numel() for p in weights.values()) / shards
    parts, filled = [{}], 0.0
    for name, p in weights.items():
        if filled >= bound:
            parts, filled = [*parts, {}], 0.0
        parts[-1][name] = p
        filled += p.numel()
    where = {}
    for at, part in enumerate(parts):
        values = {n: (torch.arange(p.numel()) % 251 / 5000).to(torch.bfloat16).view(p.shape) for n, p in part.items()}
        save_file(values, folder / f"model-{at}.safetensors")
        where |= dict.fromkeys(part, f"model-{at}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


class FromFiles(L.LightningModule):
    """Has no weights until a strategy takes them from the files."""

    def __init__(self, folder: Path, dtype: str, sgd: bool, how: str) -> None:
        super().__init__()
        self.folder, self.dtype_asked, self.sgd, self.how = folder, dtype, sgd, how
        if not how:
            self.offload_weights = folder
        self.model: Any = None

    def configure_model(self) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.how == "loaded":
            dtype = getattr(torch, self.dtype_asked)
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).train()
            return
        with self.trainer.init_module(empty_init=True):
            self.model = empty_model(AutoConfig.from_pretrained(self.folder), self.dtype_asked)
        if self.how == "whole":
            files = [load_file(file) for file in sorted(self.folder.glob("*.safetensors"))]
            weights = {name: tensor.clone() for tensors in files for name, tensor in tensors.items()}
            self.model.load_state_dict(weights, strict=False, assign=True)
            self.model.tie_weights()
            self.files = files  # what a user's own loading may forget to let go of

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        if self.sgd:
            return torch.optim.SGD(self.parameters(), lr=1e-4)
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class Peak(L.Callback):
    """At the first hook after weights are where they are trained."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bytes = memory_bytes("VmHWM")
        engine: Any = trainer.strategy.engine
        weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
        if isinstance(engine, ZerothEngine):
            beside = engine.streaming.device_bytes - engine.streaming.resident_bytes
        else:  # of what is on the host only masters have been written yet
            beside = engine.host.holdings.get("masters", 0) + engine.device_bytes
        self.formula = weights + beside
        self.arenas = engine.lanes.memory.report().requested_bytes


def fit(folder: Path, name: str, dtype: str, steps: int) -> dict[str, int]:
    """Growth of this process up to the first step and to the end; what it has to hold then, and its arenas in all."""
    gc.collect()
    forget_peak()
    before, peak = memory_bytes("VmRSS"), Peak()
    method, _, how = name.partition("/")
    module = FromFiles(folder, dtype, method == "zo2", how)
    batches = DataLoader(torch.zeros(max(steps, 1), 4, dtype=torch.int64), batch_size=1)
    run = trainer(MAKE[method](), steps=steps, precision="bf16-true", callbacks=[peak])
    run.fit(module, batches)
    end = memory_bytes("VmHWM") - before
    return {"start": peak.bytes - before, "formula": peak.formula, "end": end, "arenas": peak.arenas}


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, count, dtype, *names = sys.argv[1:]
    if not (Path(place) / INDEX).exists():
        write(Path(place), "200M")
    write(Path(place) / "tiny", "tiny")
    for name in names:  # whatever is imported or compiled on the way
        fit(Path(place) / "tiny", name, dtype, 1)
    print(json.dumps({name: fit(Path(place), name, dtype, int(count)) for name in names}))
