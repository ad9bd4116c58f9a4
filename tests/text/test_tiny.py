import json
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_offload.text import TINY_PATH, CausalLM, PythonDocs, PythonSource, load_corpus
from lightning_offload.text.pretrain import train_tokenizer

#: held-out losses of these tokens when it was made: docs 3.322, code 3.519; the bounds leave room for other processors
DOCS_BOUND, CODE_BOUND = 3.4, 3.6


@pytest.fixture(scope="module")
def tiny():
    return CausalLM(path=TINY_PATH)


def test_what_ships(tiny):
    files = {file.name: file.stat().st_size for file in Path(TINY_PATH).iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(files)
    assert sum(files.values()) < 5 * 2**20
    assert sum(parameter.numel() for parameter in tiny.parameters()) == 1_916_640
    stored = AutoModelForCausalLM.from_pretrained(TINY_PATH)
    assert stored.dtype == torch.bfloat16
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    assert tiny.network.dtype == torch.float32
    assert tiny.network.training


@pytest.mark.parametrize(("domain", "bound"), [(PythonDocs, DOCS_BOUND), (PythonSource, CODE_BOUND)])
def test_held_out_loss(tiny, domain, bound):
    data = domain(limit_val_tokens=16_384, val_batch_size=16, limit_train_tokens=256, tokenizer=tiny.tokenizer)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert trainer.validate(tiny, data, verbose=False)[0]["val/loss"] < bound


def test_it_writes(tiny):
    words = tiny.generate("Return the", max_new_tokens=8)
    assert words
    assert words == tiny.generate("Return the", max_new_tokens=8)
    assert tiny.network.training


def test_the_tokenizer_round_trips_and_can_be_made_again(tokenizer):
    text = "def größer(x):\n\treturn '🤖  '\r\n\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (0, 0, 2048)
    shipped = json.loads(Path(TINY_PATH, "tokenizer.json").read_text())["model"]
    made = json.loads(train_tokenizer(load_corpus("docs", "pretrain")).backend_tokenizer.to_str())["model"]
    assert made["vocab"] == shipped["vocab"]
    assert made["merges"] == shipped["merges"]


def test_a_model_without_a_tokenizer_says_so(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "tokenizer", None)
    with pytest.raises(ValueError, match="no tokenizer: pass tokenizer_path"):
        tiny.generate("x")
