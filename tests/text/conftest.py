import json

import pytest
import torch
from transformers import AutoTokenizer

from lightning_offload.text import TINY_PATH, CausalLM


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small lose more to waiting for threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TINY_SHAPE = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_PATH)


@pytest.fixture
def small_model():
    """A function from keyword arguments to a random model of 0.15 M parameters with the shipped tokenizer."""

    def build(**options):
        torch.manual_seed(0)
        return CausalLM(config=TINY_SHAPE, init="random", tokenizer_path=TINY_PATH, **options)

    return build


@pytest.fixture
def jsonl(tmp_path):
    """A function from lines (objects, or text as it stands) to a file."""

    def write(*lines, name="data.jsonl"):
        file = tmp_path / name
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return str(file)

    return write
