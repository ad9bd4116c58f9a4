"""Language models and text for the command line.

Names are looked up on first use: the corpus needs neither Lightning nor transformers, and nothing here imports
transformers before a model or a tokenizer is asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_offload.text.batches import batch_by_shape
    from lightning_offload.text.boolq import BoolQ
    from lightning_offload.text.classifier import SequenceClassifier
    from lightning_offload.text.corpus import load_corpus
    from lightning_offload.text.data import TextData
    from lightning_offload.text.facts import Facts
    from lightning_offload.text.glue import Glue
    from lightning_offload.text.gsm8k import Gsm8k
    from lightning_offload.text.hf import HfDataset
    from lightning_offload.text.jsonl import Jsonl
    from lightning_offload.text.modules import CausalLM
    from lightning_offload.text.pretrain import MuonAdamW
    from lightning_offload.text.schedules import linear_decay, wsd
    from lightning_offload.text.sources import PythonDocs, PythonSource, TextFiles
    from lightning_offload.text.sst2 import Sst2
    from lightning_offload.text.verbalizers import PromptClassifier

#: folder of the shipped pretrained model and its tokenizer, in Hugging Face's format
TINY_PATH = str(Path(__file__).parent / "assets" / "tiny")

_HOME = {
    "batch_by_shape": "batches",
    "BoolQ": "boolq",
    "SequenceClassifier": "classifier",
    "load_corpus": "corpus",
    "TextData": "data",
    "Facts": "facts",
    "Glue": "glue",
    "Gsm8k": "gsm8k",
    "HfDataset": "hf",
    "Jsonl": "jsonl",
    "CausalLM": "modules",
    "MuonAdamW": "pretrain",
    "linear_decay": "schedules",
    "wsd": "schedules",
    "PythonDocs": "sources",
    "PythonSource": "sources",
    "TextFiles": "sources",
    "Sst2": "sst2",
    "PromptClassifier": "verbalizers",
}

__all__ = [
    "TINY_PATH",
    "BoolQ",
    "CausalLM",
    "Facts",
    "Glue",
    "Gsm8k",
    "HfDataset",
    "Jsonl",
    "MuonAdamW",
    "PromptClassifier",
    "PythonDocs",
    "PythonSource",
    "SequenceClassifier",
    "Sst2",
    "TextData",
    "TextFiles",
    "batch_by_shape",
    "linear_decay",
    "load_corpus",
    "wsd",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
