"""Every experiment takes two steps as it is written: on a tiny model of its architecture, with rows of its data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from lightning_offload.conf import schema
from omegaconf import DictConfig, OmegaConf, open_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from lightning_offload.cli import training
from lightning_offload.cli.options import options
from lightning_offload.text import sources
from lightning_offload.text.glue import TASKS

FOLDER = Path(schema.__file__).parent / "experiment"
EXPERIMENTS = sorted(file.stem for file in FOLDER.glob("*.yaml"))

TYPES = {
    "roberta": "roberta",
    "gpt2": "gpt2",
    "opt": "opt",
    "llama": "llama",
    "deepseek": "llama",
    "Mistral": "mistral",
}
"""Architectures by what is in the name of the weights."""
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 8,
}
ROWS = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "lsp": {"dim": 8, "nnz": 4, "fit_steps": 2, "min_numel": 0},
    "zo2": {"min_numel": 0},
    "meft": {"width": 24, "experts": 6, "active_experts": 2, "top_k": 4, "key_std": 0.02},
    "full": {"min_numel": 0},
}


@pytest.fixture(autouse=True)
def _hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    schema.register()
    OmegaConf.register_new_resolver("options", options, replace=True)
    OmegaConf.register_new_resolver("run_folder", lambda *_: "runs/a", replace=True)
    with initialize_config_module("lightning_offload.conf", version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each architecture."""
    folder = tmp_path_factory.mktemp("weights")
    raw = Tokenizer(models.BPE(unk_token="<end>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special, letters = ["<end>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=letters))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", bos_token="<end>", pad_token="<pad>")
    for kind in sorted(set(TYPES.values())):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind)
        known = {name: value for name, value in SIZES.items() if hasattr(config, name)}
        auto = AutoModel if kind == "roberta" else AutoModelForCausalLM  # a classifier's head is new
        made = auto.from_config(AutoConfig.for_model(kind, **known))
        made.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return folder


def rows(data: DictConfig) -> Iterator[dict[str, Any]]:
    """What the data of an experiment reads, a line each."""
    kind = data._target_.rpartition(".")[2]
    for number in range(ROWS):
        text = f"{number} is a number"
        if kind == "Glue":
            label = number / 3 if not TASKS[data.task].labels else number % len(TASKS[data.task].labels)
            yield {**dict.fromkeys(TASKS[data.task].fields, text), "label": label}
        elif kind == "Jsonl":
            yield {data.prompt_field: text, data.completion_field: f" {number}"}
        elif kind == "Gsm8k":
            yield {"question": text, "answer": f"It is. #### {number}"}
        else:
            yield {"sentence": text, "passage": text, "question": text, "label": number % 2}


def write_data(cfg: DictConfig) -> None:
    """Put a few rows where the experiment reads its data."""
    if "path" not in list(cfg.data):  # a missing value is not `in`
        return
    lines = "".join(json.dumps(row) + "\n" for row in rows(cfg.data))
    Path("data").mkdir()
    for split in ("train", "validation", "test"):
        Path(f"data/{split}.jsonl").write_text(lines)
    cfg.data.path = "data/train.jsonl" if cfg.data._target_.endswith("Jsonl") else "data"


def shrink(cfg: DictConfig, weights: Path) -> None:
    """Make the model of an experiment tiny, and its run two steps on this CPU; what it is about stays."""
    model, data, trainer = cfg.model, cfg.data, cfg.trainer
    named = str(OmegaConf.to_container(model).get("path"))
    if OmegaConf.select(model, "config") is not None:
        model.config.update({name: value for name, value in SIZES.items() if name in model.config})
        model.tokenizer_path = str(weights / "llama")
    elif "TINY_PATH" not in named:
        model.path = str(weights / next((kind for part, kind in TYPES.items() if part in named), "llama"))
    small = {"batch_size": 2, "val_batch_size": 2, "val_examples": 2, "families": 2, "answers": 4}
    small |= {"sequence_length": 48, "limit_val_tokens": 64}
    data.update({name: value for name, value in small.items() if name in data})
    trainer.update({"accelerator": "cpu", "devices": 1, "max_steps": 2, "limit_val_batches": 0, "max_time": None})
    trainer.update({"enable_progress_bar": False, "accumulate_grad_batches": min(trainer.accumulate_grad_batches, 2)})
    trainer.update({"val_check_interval": None, "check_val_every_n_epoch": 1, "enable_checkpointing": False})
    if cfg.method.name != "none":
        trainer.strategy.update(SETTINGS[cfg.method.name])
    cfg.hardware.update({"device_gib": None, "host_gib": None})
    cfg.update({"plan": False, "trace": False, "export": False, "callbacks": {}, "logger": {}})


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


STRATEGIES = {
    "none": "SingleDeviceStrategy",
    "full": "FullOffloadStrategy",
    "lsp": "LSPOffloadStrategy",
    "zo2": "ZO2OffloadStrategy",
    "meft": "MEFTOffloadStrategy",
}


class Fit:
    """Stands for the fit of a run, and remembers what it changed."""

    def __init__(self) -> None:
        self.real = training._fit

    def __call__(self, trainer: Any, model: Any, *rest: Any) -> None:
        before: dict[str, Any] = {}
        watch = L.Callback()
        watch.on_train_start = lambda *_: before.update(copied(model))  # type: ignore[method-assign]
        trainer.callbacks.append(watch)
        self.real(trainer, model, *rest)
        after = model.state_dict()
        self.steps = trainer.global_step
        self.strategy = type(trainer.strategy).__name__
        self.moved = {
            name for name, value in after.items() if name not in before or not torch.equal(value, before[name])
        }


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_two_steps(experiment: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose("train", [f"experiment={experiment}"], return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = "runs/a"
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
        shrink(cfg, weights)
        write_data(cfg)
    Path("runs/a").mkdir(parents=True)
    monkeypatch.setattr(training, "_fit", fit := Fit())
    monkeypatch.setattr(
        sources, "load_corpus", lambda domain, split: [f"{domain} {split} {n}\n" * 99 for n in range(5)]
    )
    assert training.train(cfg) == 0
    assert fit.steps == 2
    assert fit.strategy == STRATEGIES[cfg.method.name]
    assert any(".meft." in name if cfg.method.name == "meft" else "weight" in name for name in fit.moved)
