"""The command line as a shell would call it, in this process: fixtures for the tests of what it does and refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TEXT = "".join(f"def add_{i}(x, y={i}):\n    return x + y * {i * i}\n\n" for i in range(200))
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of a few thousand parameters, another one of other shape, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # slow to import, and most tests do without
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.py").write_text(TEXT)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()
    raw.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    for name, changes in {"small": {}, "wide": {"intermediate_size": 48}}.items():
        torch.manual_seed(0)
        config = LlamaConfig(**{**SMALL, **changes, "vocab_size": len(tokenizer), "tie_word_embeddings": True})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def settings(inputs: Path) -> list[str]:
    """Of a run that takes a second."""
    return [
        "model=pretrained",
        f"model.path={inputs / 'small'}",
        "data=text",
        f"data.path={inputs / 'text.py'}",
        "data.sequence_length=16",
        "data.batch_size=2",
        "hardware=cpu",
        "lr=1e-2",
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "trainer.limit_val_batches=2",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
    ]


@pytest.fixture
def given(inputs: Path) -> list[str]:
    """Settings of a run that takes a second."""
    return settings(inputs)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    """Call the console script's function as a shell would."""
    from lightning_offload import cli

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lightning-offload", *arguments])
        try:
            return cli.main()
        except SystemExit as stopped:
            return stopped.code
        finally:
            assert sys.argv == ["lightning-offload", *arguments]

    return call


@pytest.fixture
def refused(run, capsys: pytest.CaptureFixture[str]):
    """Call it with something wrong: one line, exit code 2, nothing left behind. Returns the line."""

    def call(*arguments: str) -> str:
        before = {Path("runs"), *Path().rglob("*")}
        assert run(*arguments) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-offload")]
        assert len(said) == 1
        assert not set(Path().rglob("*")) - before
        return said[0]

    return call
