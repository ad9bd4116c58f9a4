"""`lightning-offload train` and `export` with LoRA, exports of every method's checkpoint, and how they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_offload import runs
from tests import test_cli

pytestmark = pytest.mark.usefixtures("workplace")

QUICK = ["trace=false", "plan=false"]
OF_METHOD = {name: [*settings, *QUICK] for name, settings in test_cli.OF_METHOD.items()}
LORA = {
    "full": ["method=full", *QUICK],
    "lsp": ["trainer.strategy.min_numel=0", "trainer.strategy.nnz=2", *QUICK],
    "zo2": ["method=zo2", "trainer.strategy.min_numel=0", *QUICK],
    "none": ["method=none", "optimizer.fused=false", *QUICK],
}
TOKENS = torch.arange(20)[None]


def loaded(folder: str) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


def same(one: str, other: str) -> bool:
    left, right = loaded(one), loaded(other)
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype and torch.equal(value, right[name]) for name, value in left.items()
    )


QUICKLY = [("none", "32-true"), ("full", "bf16-true"), ("lsp", "bf16-mixed"), ("zo2", "bf16-true")]
EVERY = [(m, p) for m in ("none", "full", "lsp", "zo2") for p in ("32-true", "bf16-true", "bf16-mixed")]


@pytest.mark.parametrize(
    ("method", "precision"),
    [*QUICKLY, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY if pair not in QUICKLY)],
)
def test_a_checkpoint_is_exported_as_the_run_was(method: str, precision: str, run, given) -> None:
    fused = ["optimizer.fused=false"] if method == "none" else []
    settings = [*OF_METHOD[method], f"precision={precision}", "name=a", "trainer.max_steps=1", *fused]
    assert run("train", *given, *settings) == 0
    assert run("export", "ckpt_path=runs/a", "output=again") == 0
    assert same("runs/a/hf", "again")
    assert json.loads(Path("again/config.json").read_text()) == json.loads(Path("runs/a/hf/config.json").read_text())


def test_an_export_generates_as_the_base_does(run, given, inputs: Path) -> None:
    shutil.copytree(inputs / "small", "base")
    said = {"do_sample": True, "temperature": 0.7, "eos_token_id": [0, 5]}
    Path("base/generation_config.json").write_text(json.dumps(said))
    settings = ["model.path=base", "name=a", "trainer.max_steps=1"]
    assert run("train", *given, *OF_METHOD["zo2"], *settings) == 0
    assert run("export", "ckpt_path=runs/a", "output=again") == 0
    assert run("export", "log=runs/a/zo2.log", "output=replayed") == 0
    of_run = json.loads(Path("runs/a/hf/generation_config.json").read_text())
    assert {name: of_run[name] for name in said} == said
    for folder in ("again", "replayed"):
        assert json.loads(Path(folder, "generation_config.json").read_text()) == of_run


@pytest.mark.parametrize("method", ["full", "lsp", "zo2", pytest.param("none", marks=pytest.mark.slow)])
def test_lora_from_training_to_a_merged_model(method: str, run, given, inputs: Path, capsys) -> None:
    settings = [*LORA[method], "name=mine", "model.lora.rank=4"]
    assert run("train", *given, *settings) == 0
    said = capsys.readouterr().out
    assert {p.name for p in Path("runs/mine/adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not Path("runs/mine/hf").exists()
    assert "both together: PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(" in said
    assert run("export", "ckpt_path=runs/mine", "output=again") == 0
    assert same("runs/mine/adapter", "again")
    assert run("export", "ckpt_path=runs/mine", "merge=true") == 0
    merged = AutoModelForCausalLM.from_pretrained("runs/mine/hf")
    base = AutoModelForCausalLM.from_pretrained(inputs / "small")
    before = base(input_ids=TOKENS).logits
    beside = PeftModel.from_pretrained(base, "again")(input_ids=TOKENS).logits
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, beside)
    assert not torch.equal(before, beside)

    capsys.readouterr()
    assert run("evaluate", "ckpt_path=runs/mine", "hardware=cpu", "max_new_tokens=2", *given[-1:]) == 0
    assert run("evaluate", "model=pretrained", "model.path=runs/mine/hf", *given[2:7], "output=merged.json") == 0
    found = [json.loads(Path(file).read_text())["loss"] for file in ("runs/mine/evaluation.json", "merged.json")]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert run("train", *given, *settings, "ckpt_path=last", "trainer.max_steps=6") == 0
    assert torch.load(runs.newest_checkpoint(Path("runs/mine")), weights_only=True)["global_step"] == 6


def test_a_log_of_lora_is_replayed_in_its_run(run, refused, given, inputs: Path) -> None:
    assert run("train", *given, *LORA["zo2"], "name=mine", "model.lora.rank=4", "lr=1e-3") == 0
    assert run("export", "log=runs/mine/zo2.log", "output=again") == 0
    assert same("runs/mine/adapter", "again")
    line = refused("export", "log=runs/mine/zo2.log", f"base={inputs / 'small'}", "output=b")
    assert "is of a run with LoRA" in line
    stored = OmegaConf.load("runs/mine/config.yaml")
    stored.seed = 5  # other adapters to begin with
    OmegaConf.save(stored, "runs/mine/config.yaml")
    assert "belongs to other weights" in refused("export", "log=runs/mine/zo2.log", "output=b")


def test_what_lora_refuses(run, refused, given, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = [*LORA["full"], "model.lora.rank=4"]
    assert "there are alpha, dropout, rank, targets" in refused("train", *given, "model.lora.rnak=4")
    assert "lora.rank=0: give an integer" in refused("train", *given, "method=full", "model.lora.rank=0")
    assert "lora.dropout=0.5 without lora.rank" in refused("train", *given, "model.lora.dropout=0.5")
    assert "not found in the base model" in refused("train", *given, *lora, "model.lora.targets=[qq]")
    rows = [f"trainer.strategy.{one}" for one in ("width=24", "experts=6", "active_experts=2", "top_k=5")]
    line = refused("train", *given, "method=meft", *rows, *QUICK, "model.lora.rank=4")
    assert "`meft` would freeze them beside its own" in line
    line = refused("train", *given, "trainer.strategy.min_numel=0", "model.lora.rank=4")  # the default, lsp
    assert "fewer than `nnz=8`; pass nnz=2, or use `full_offload`" in line

    assert run("train", *given, *lora, "name=mine", "trainer.max_steps=1") == 0
    assert "LoRA is stored as trained" in refused("export", "ckpt_path=runs/mine", "dtype=bfloat16", "output=b")
    line = refused("train", *given, *LORA["full"], "model.lora.rank=2", "name=mine", "ckpt_path=last")
    assert "lora_A.default.weight` is (4, 16) in the checkpoint and (2, 16) in the model" in line
    line = refused("train", *given, *LORA["full"], "name=mine", "ckpt_path=last")
    assert "belongs to another model; first differing tensor: `network.model.layers.0.self_attn.q_proj.weight`" in line
    assert "holds a run already" in refused("train", *given, *lora, "name=mine")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert "pip install 'lightning-offload[peft]'" in refused("train", *given, *lora)


def test_what_an_export_refuses(run, refused, given, inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "small", "base")
    before = {file: file.read_bytes() for file in Path("base").iterdir()}
    settings = [*OF_METHOD["none"], "model.path=base", "name=a", "trainer.max_steps=1"]
    assert run("train", *given, *settings) == 0
    assert "is the model that the run began with" in refused("export", "ckpt_path=runs/a", "output=base")
    Path("thesis").mkdir()
    Path("thesis/chapter").touch()
    assert "is no exported model; choose another" in refused("export", "ckpt_path=runs/a", "output=thesis")
    Path("file").touch()
    assert "is no exported model" in refused("export", "ckpt_path=runs/a", "output=file")
    assert "could not be written to 'file/hf'" in refused("export", "ckpt_path=runs/a", "output=file/hf")
    assert "`max_shard_gib` must be above 0" in refused("export", "ckpt_path=runs/a", "max_shard_gib=0")
    checkpoint = runs.newest_checkpoint(Path("runs/a"))
    whole = checkpoint.read_bytes()
    for part in (whole[:-1000], whole[:100], b""):
        checkpoint.write_bytes(part)
        assert "may have been cut off" in refused("export", "ckpt_path=runs/a", "output=b")
    checkpoint.write_bytes(whole)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["network.model.norm.weight"][0] = float("nan")
    torch.save(content, checkpoint)
    assert "its training diverged; nothing was exported" in refused("export", "ckpt_path=runs/a", "output=b")
    del content["state_dict"]["network.model.norm.weight"]
    torch.save(content, checkpoint)
    assert "`network.model.norm.weight` is absent in the checkpoint" in refused("export", "ckpt_path=runs/a")
    shutil.move("base", "moved")
    assert "Cannot load a model's config from path='base'" in refused("export", "ckpt_path=runs/a", "output=b")
    shutil.move("moved", "base")
    assert {file: file.read_bytes() for file in Path("base").iterdir()} == before
    assert AutoModelForCausalLM.from_pretrained("runs/a/hf")


def test_a_run_of_the_shipped_model_is_exported(run) -> None:
    sizes = ["data.limit_train_tokens=512", "data.limit_val_tokens=128", "trainer.max_steps=1", "hardware=cpu"]
    assert run("train", "method=none", *QUICK, *sizes, "name=tiny", "export=false") == 0
    assert run("export", "ckpt_path=runs/tiny", "output=made") == 0
    assert AutoModelForCausalLM.from_pretrained("made").num_parameters() == 1_916_640
