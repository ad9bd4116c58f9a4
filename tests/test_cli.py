"""The command line through its real entry point: what it writes, what it continues, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.image import imread
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, OPTConfig

from lightning_offload import conf, load_meft_adapter, plots, runs
from tests.command import SMALL

pytestmark = pytest.mark.usefixtures("workplace")


def steps_logged(folder: Path) -> list[int]:
    return [step for step, _ in plots.read_curve(folder, "train/loss")]


# What it does


OF_METHOD = {
    "none": ["method=none"],
    "full": ["method=full"],
    "lsp": ["trainer.strategy.min_numel=0", "trainer.strategy.nnz=4"],  # the default method
    "zo2": ["method=zo2", "trainer.strategy.min_numel=0"],
    "lsp_paper": ["method=lsp_paper", "trainer.strategy.min_numel=0", "trainer.strategy.fit_steps=2"],
}
"""What makes each method work on a model of this size."""


def test_weights_may_stream_to_be_evaluated_and_generate(run, given) -> None:
    assert run("train", *given, "method=none", "name=a", "plan=false") == 0
    found = {}
    for method in ("none", "streamed"):
        of_method = ["trainer.strategy.min_numel=0"] if method == "streamed" else []
        assert run("evaluate", "ckpt_path=runs/a", f"method={method}", *of_method, "hardware=cpu") == 0
        found[method] = json.loads(Path("runs/a/evaluation.json").read_text())
    assert found["streamed"] == found["none"]
    assert found["none"]["sample"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", OF_METHOD)
def test_train_and_export_in_every_precision(method: str, precision: str, run, given) -> None:
    fused = [] if method != "none" else ["optimizer.fused=false"]
    settings = [*OF_METHOD[method], f"precision={precision}", "name=a", "trainer.max_steps=2", *fused]
    assert run("train", *given, *settings) == 0
    assert AutoModelForCausalLM.from_pretrained("runs/a/hf")


@pytest.mark.parametrize("method", ["none", "full", "lsp", "zo2"])
def test_train_writes_everything_and_continues(method: str, run, given, capsys, workplace: Path) -> None:
    assert run("train", *given, *OF_METHOD[method]) == 0
    folder = workplace / "runs" / f"{method}-pretrained-text-1"
    drawn = ["timeline.png", "trace.json"] if method != "none" else []
    drawn += ["zo2.log"] if method == "zo2" else []
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "checkpoints", "hf", "logs", "loss.png", *drawn}
    assert all(imread(folder / name).std() > 0 for name in ("loss.png", *drawn[:1]))
    assert AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert (folder / "hf" / "tokenizer.json").is_file()
    assert OmegaConf.load(folder / "config.yaml").method.name == method
    assert torch.load(runs.newest_checkpoint(folder), weights_only=True)["global_step"] == 4
    out = capsys.readouterr().out
    assert "learned, between" in out
    before, after = out.split("  loss ")[1].splitlines()[0].split(" -> ")
    assert float(after) < float(before)

    assert run("train", *given, *OF_METHOD[method], "ckpt_path=last", "trainer.max_steps=7") == 0
    assert [p.name for p in (workplace / "runs").iterdir()] == [folder.name]
    assert torch.load(runs.newest_checkpoint(folder), weights_only=True)["global_step"] == 7
    assert len(steps_logged(folder)) == 7
    assert "continues from" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_losses_and_runs_are_numbered(run, given, workplace: Path) -> None:
    for _ in range(2):
        assert run("train", *given, "method=none", "export=false") == 0
    first, second = (workplace / "runs" / f"none-pretrained-text-{n}" for n in (1, 2))
    assert plots.read_curve(first, "train/loss") == plots.read_curve(second, "train/loss")
    assert plots.plot_losses([first, second], workplace / "both.png").stat().st_size > 10_000
    assert plots.labels([first, second]) == [f"none ({folder.name})" for folder in (first, second)]
    assert plots.labels([first]) == ["none"]


def test_a_named_run_is_never_overwritten_and_feeds_evaluate_and_export(run, refused, given, inputs, capsys) -> None:
    assert run("train", *given, "method=none", "name=mine") == 0
    capsys.readouterr()
    line = refused("train", *given, "method=none", "name=mine")
    assert "'runs/mine' holds a run already" in line.replace(f"{os.getcwd()}/", "")
    assert "ckpt_path=last" in line

    assert run("evaluate", "ckpt_path=runs/mine", "hardware=cpu", "max_new_tokens=4", "prompt=def add") == 0
    result = json.loads(Path("runs/mine/evaluation.json").read_text())
    assert {"loss", "perplexity", "bits_per_byte", "sample"} <= result.keys()
    assert run("evaluate", "model=pretrained", "model.path=runs/mine/hf", *given[2:7], "output=other.json") == 0
    assert json.loads(Path("other.json").read_text())["loss"] == pytest.approx(result["loss"], rel=1e-6)

    assert run("export", "ckpt_path=runs/mine", "output=out", "dtype=bfloat16") == 0
    assert AutoModelForCausalLM.from_pretrained("out", dtype="auto").dtype == torch.bfloat16
    assert "out" in capsys.readouterr().out
    capsys.readouterr()

    checkpoint = runs.newest_checkpoint(Path("runs/mine"))
    line = refused("train", *given, f"model.path={inputs / 'wide'}", "method=none", f"ckpt_path='{checkpoint}'")
    assert "first differing tensor: `network.model.layers.0.mlp.gate_proj.weight`" in line
    Path("cut.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    assert "cut.ckpt" in refused("train", *given, "method=none", "ckpt_path=cut.ckpt")
    assert "in no run's folder" in refused("export", "ckpt_path=cut.ckpt")
    assert "`dtype` is float32" in refused("export", "ckpt_path=runs/mine", "dtype=int8", "output=out2")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_log_is_exported_as_the_checkpoint_is(precision: str, run, refused, given, inputs) -> None:
    settings = ["method=zo2", "name=mine", f"precision={precision}", "export=false", "plan=false", "trace=false"]
    assert run("train", *[s for s in given if not s.startswith("lr")], "lr=1e-3", *settings) == 0
    assert run("export", "ckpt_path=runs/mine", "output=a") == 0
    assert run("export", "log=runs/mine/zo2.log", "output=b") == 0
    shutil.copy("runs/mine/zo2.log", "elsewhere.log")
    assert run("export", "log=elsewhere.log", f"base={inputs / 'small'}", "output=c") == 0
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in "abc"]
    start = AutoModelForCausalLM.from_pretrained(inputs / "small", dtype=models[0].dtype)
    for other in models[1:]:
        assert all(torch.equal(one, two) for one, two in zip(models[0].parameters(), other.parameters(), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(models[0].parameters(), start.parameters(), strict=True))
    assert "belongs to other weights" in refused("export", "log=elsewhere.log", "base=c", "output=d")
    assert "in no run's folder" in refused("export", "log=elsewhere.log", "output=d")
    assert "is a folder" in refused("export", "log=runs/mine", "base=nowhere")  # before it looks for the base
    Path("bad.log").write_text("my notes")
    assert "bad.log is no log of a zo2 run" in refused("export", "log=bad.log", "base=nowhere")
    assert "without log=<file>" in refused("export", "ckpt_path=runs/mine", "base=c", "output=d")


@pytest.mark.parametrize(
    ("precision", "adapter_only"),
    [("32-true", "false"), ("32-true", "true"), ("bf16-true", "true"), ("bf16-mixed", "true")],
)
def test_a_run_by_meft_leaves_an_adapter(
    precision: str, adapter_only: str, run, refused, given, inputs, capsys
) -> None:
    sizes = ("width=24", "experts=6", "active_experts=2", "top_k=5", "key_std=0.02")
    rows = [f"trainer.strategy.{name}" for name in sizes]
    settings = ["method=meft", *rows, f"trainer.strategy.adapter_only={adapter_only}", "name=mine", "trace=false"]
    settings.append(f"precision={precision}")
    assert run("train", *given, *settings) == 0
    said = capsys.readouterr().out
    folder = Path("runs/mine/adapter")
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not Path("runs/mine/hf").exists()
    base = os.path.relpath(inputs / "small")
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    of_base = f"LlamaForCausalLM.from_pretrained({base!r}, {dtype=})"
    assert f"load_meft_adapter({of_base}, {str(folder)!r})" in said
    capsys.readouterr()

    assert run("export", "ckpt_path=runs/mine", "output=again") == 0
    assert f"load_meft_adapter({of_base}, 'again')" in capsys.readouterr().out
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == Path("again", name).read_bytes()
    model = load_meft_adapter(AutoModelForCausalLM.from_pretrained(inputs / "small"), folder)
    stored = torch.load(runs.newest_checkpoint(Path("runs/mine")), weights_only=True)["state_dict"]
    assert any(value.any() for name, value in stored.items() if name.endswith("values"))
    assert all(torch.equal(value, stored[f"network.{n}"]) for n, value in model.state_dict().items() if ".meft." in n)
    assert ("network.lm_head.weight" in stored) == (adapter_only == "false")

    shown = ["hardware=cpu", "max_new_tokens=2", f"precision={precision}", *given[-1:], "trainer.limit_val_batches=2"]
    assert run("evaluate", "ckpt_path=runs/mine", *shown) == 0
    found = json.loads(Path("runs/mine/evaluation.json").read_text())["loss"]
    after = float(said.partition("before -> after")[2].partition("-> ")[2].split()[0])
    assert found == pytest.approx(after, rel=1e-3 if precision == "bf16-true" else 1e-4)  # rotary tables are rounded
    assert run("train", *given, *settings, "ckpt_path=last", "trainer.max_steps=6") == 0
    assert torch.load(runs.newest_checkpoint(Path("runs/mine")), weights_only=True)["global_step"] == 6
    assert "holds a run already" in refused("train", *given, *settings)
    other = ("trainer.strategy.top_k=6", "ckpt_path=last")
    assert re.search(r"top_k=6, but '.*' has adapters with top_k=5; pass", refused("train", *given, *settings, *other))
    assert "is no ReLU network" in refused("export", "ckpt_path=runs/mine", "merge=true", "output=b")


def test_adapters_are_merged_where_that_is_exact(run, refused, given, inputs: Path, capsys) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"word_embed_proj_dim": 16, "max_position_embeddings": 64, "vocab_size": 300}
    shutil.copytree(inputs / "small", "opt")
    Path("opt/model.safetensors").unlink()
    AutoModelForCausalLM.from_config(OPTConfig(**shape)).save_pretrained("opt")
    dense = ["width=24", "experts=1", "active_experts=1", "top_k=24", "variant=paper"]
    settings = ["method=meft", "model.path=opt", *(f"trainer.strategy.{one}" for one in dense), "name=mine"]
    assert run("train", *given, *settings, "trace=false", "plan=false") == 0
    assert run("export", "ckpt_path=runs/mine", "merge=true") == 0
    assert "runs/mine/hf" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained("runs/mine/hf")
    assert merged.config.ffn_dim == 56
    beside = load_meft_adapter(AutoModelForCausalLM.from_pretrained("opt"), "runs/mine/adapter")
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(merged(input_ids=tokens).logits, beside(input_ids=tokens).logits)
    assert run("train", *given, "method=none", "name=plain", "plan=false", "export=false") == 0
    assert "has no adapters to merge" in refused("export", "ckpt_path=runs/plain", "merge=true")


@pytest.mark.parametrize(
    "method", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "lsp")), "zo2"]
)
def test_label_words_are_trained_and_evaluated(method: str, run, given, refused, capsys) -> None:
    rows = [json.dumps({"sentence": f"def add_{n}", "label": n % 2}) + "\n" for n in range(12)]
    Path("sst2").mkdir()
    for split in ("train", "dev", "test"):
        Path(f"sst2/{split}.jsonl").write_text("".join(rows))
    data = ["data=sst2", "data.path=sst2", "data.sequence_length=32", "data.label_words=[' x',' return y']"]
    words = [*given[:2], *data, "hardware=cpu", "trainer.max_steps=2", "data.batch_size=4"]
    assert run("train", *words, *OF_METHOD[method], "name=words", "lr=1e-2") == 0
    said = capsys.readouterr().out
    assert "PromptClassifier of" in said
    assert "accuracy" in said.partition("before -> after")[2]
    for split in ("val", "test"):
        assert run("evaluate", "ckpt_path=runs/words", "hardware=cpu", "max_new_tokens=2", f"split={split}") == 0
        result = json.loads(Path("runs/words/evaluation.json").read_text())
        assert result["split"] == split
        assert 0 <= result["accuracy"] <= 1

    # a language model's run, with data that says how the model is used
    assert run("train", *given, *OF_METHOD[method], "name=plain", "trainer.max_steps=1", "plan=false") == 0
    assert run("evaluate", "ckpt_path=runs/plain", "hardware=cpu", *data, "max_new_tokens=2") == 0
    assert "accuracy" in json.loads(Path("runs/plain/evaluation.json").read_text())
    assert "`split` is val or test; got 'train'" in refused("evaluate", "ckpt_path=runs/words", "split=train")


@pytest.mark.parametrize("method", ["full", "lsp"])
def test_facts_are_generated(method: str, run, given, capsys) -> None:
    facts = [*given[:2], "data=facts", "data.families=4", "data.sequence_length=64", "hardware=cpu"]
    assert run("train", *facts, *OF_METHOD[method], "name=facts", "trainer.max_steps=2", "lr=1e-2") == 0
    assert "is learned, between" in capsys.readouterr().out
    assert run("evaluate", "ckpt_path=runs/facts", "split=test", "hardware=cpu", "max_new_tokens=2") == 0
    assert json.loads(Path("runs/facts/evaluation.json").read_text())["bits_per_byte"] > 0


@pytest.mark.parametrize("method", ["full", "zo2"])
def test_facts_are_asked_and_the_answers_matched(method: str, run, given, refused, capsys) -> None:
    facts = [*given[:2], "data=facts", "data.families=4", "data.paraphrases=3", "data.ask=trained", "hardware=cpu"]
    match = ["model.match_answers=contains", "model.max_answer_tokens=3"]
    steps = ["name=facts", "trainer.max_steps=2", "plan=false", "trace=false"]
    assert run("train", *facts, *match, *OF_METHOD[method], *steps) == 0
    assert "contains match" in capsys.readouterr().out.partition("before -> after")[2]
    asked = ["data.ask=unseen", "model.match_answers=exact", "hardware=cpu", "max_new_tokens=2", "split=test"]
    assert run("evaluate", "ckpt_path=runs/facts", *asked) == 0
    assert "exact match 0.0" in capsys.readouterr().out
    assert json.loads(Path("runs/facts/evaluation.json").read_text())["exact_match"] == 0
    assert "unexpected keyword argument 'aks'" in refused("evaluate", "ckpt_path=runs/facts", "data.aks=unseen")


def test_a_plan_by_shape_has_the_label_words(run, capsys) -> None:
    shape = ["model=opt_125m", "data=sst2", "data.path=none", "data.sequence_length=16", "hardware=rtx4090"]
    assert run("plan", *shape, "data.batch_size=4", "method=full") == 0
    assert "128 tokens per step" in capsys.readouterr().out  # 4 examples, 2 label words


def test_multirun_gives_each_job_its_folder(run, given) -> None:
    assert run("train", "-m", *given, "method=none", "seed=0,1", "export=false", "trainer.max_steps=1") == 0
    (sweep,) = Path("runs").iterdir()
    assert {p.name for p in sweep.iterdir() if p.is_dir()} == {"0", "1"}
    assert [OmegaConf.load(sweep / str(n) / "config.yaml").seed for n in (0, 1)] == [0, 1]


def test_fast_dev_run_leaves_nothing(run, given) -> None:
    assert run("train", *given, "method=none", "debug=fast_dev_run") == 0
    assert not list(Path("runs").iterdir())


def test_users_add_their_own_files(run, given, refused, capsys) -> None:
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/a.yaml").write_text("# @package _global_\nname: from_a\ntrainer: {max_steps: 1}\n")
    arguments = ["train", "--config-dir", "mine", *given[:8], "method=none", "trainer.enable_progress_bar=false"]
    assert run(*arguments, "experiment=a", "export=false", "trainer.limit_val_batches=1") == 0
    assert Path("runs/from_a/config.yaml").is_file()
    capsys.readouterr()
    Path("mine/experiment/b.yaml").write_text("# @package _global_\nmax_stepps: 1\n")
    assert "max_stepps" in refused(*arguments, "experiment=b")
    Path("mine/experiment/c.yaml").write_text("# @package _global_\ntrainer: {max_stepps: 1}\n")
    assert "max_stepps" in refused(*arguments, "experiment=c")


# How it refuses


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("trian", "no command 'trian'; there are train, plan, evaluate, export, bench, doctor"),
        ("train modle=tiny", "no key or group 'modle'"),
        ("train model=tinny", "Could not find 'model/tinny'"),
        ("train model.dimm=3", "no key or group 'model.dimm'"),
        ("train method.nam=x", "no key or group 'method.nam'"),
        ("train +foo=1", "no key 'foo'"),
        ("train seed=abc", "seed=abc"),
        ("train logger=null", "switched off by =none"),
        ("train foo", "cannot read 'foo'; settings are key=value"),
        ("train --max-steps 4", "key=value"),
        ("train +optimizer.lrr=1", "optimizer: got an unexpected keyword argument 'lrr'"),
        ("train optimizer._target_=torch.optim.Adammm", "optimizer: Error loading 'torch.optim.Adammm'"),
        ("train model=pretrained", "model.path has no value"),
        ("train model=pretrained model.path=/no/where", "There is no folder at path='/no/where'"),
        ("train {given} model.dtype=float33", "model: dtype='float33'"),
        ("train {given} +model.dimm=3", "unexpected keyword argument 'dimm'"),
        ("train {given} data.path=none.txt", "none.txt"),
        ("train {given} data.sequence_length=1", "data: data needs sequence_length >= 2"),
        ("train {given} data.path=empty.txt", "nothing to train on"),
        ("train {given} data=jsonl data.path=bad.jsonl", "bad.jsonl, line 2: not valid JSON"),
        ("train {given} trainer.max_steps=abc", "trainer: "),
        ("train {given} +trainer.max_stepps=4", "trainer: "),
        ("train {given} trainer.gradient_clip_algorithm=nrom", "trainer: `gradient_clip_algorithm` nrom is invalid"),
        ("train {given} precision=bf16-mixed precision.precision=64-true", "64-true"),
        ("train {given} trainer.strategy.min_numel=-1", "min_numel"),
        ("train {given} trainer.strategy.dim=4", "trainer.strategy: `dim` must be at least nnz=8"),
        ("train {given} trainer.strategy.dim=20", "a multiple of nnz=8, so that columns form nnz bands; try 16 or 24"),
        ("train {given} trainer.strategy.projector=svd", "`projector` must be one of 'learned', 'pca', 'block'"),
        ("train {given} precision.precision=16-mixed", "`OffloadPrecision(precision='16-mixed')` is not supported"),
        ("train {given} precision=bf16-true precision.master=float32", "method `lsp`"),
        ("train {given} method=full precision.rounding=stochastic", "keeps fp32 masters; it must be 'nearest'"),
        ("train {given} method=none precision.master=float32", "precision.master is for the offload methods"),
        (
            "train {given} method=none precision=bf16-mixed",
            "set optimizer.fused=false or trainer.gradient_clip_val=null",
        ),
        ("train {given} lr=-1", "Invalid learning rate: -1"),
        ("train {given} ckpt_path=last", "ckpt_path=last finds no checkpoint"),
        ("train {given} ckpt_path=none.ckpt", "no checkpoint and no run at 'none.ckpt'"),
        ("train {given} scheduler=cosine trainer.max_steps=-1", "trainer.max_steps=<number>"),
        ("train {given} model=llama_1b3 {shape}", "init='random'"),
        ("evaluate", "which model and data to evaluate"),
        ("evaluate ckpt_path=nowhere", "no checkpoint and no run at 'nowhere'"),
        ("export", "ckpt_path has no value"),
        (
            "train {given} ckpt_path=adapter",
            "'adapter' is an adapter, no checkpoint: give the folder of its run, or put",
        ),
        ("evaluate ckpt_path=adapter", "'adapter' is an adapter, no checkpoint"),
        ("export ckpt_path=adapter", "model by `load_meft_adapter(model, 'adapter')`"),
        (
            "train {given} model.path=adapter",
            "path='adapter' is an adapter, no model: give the model that it was trained beside, and put it on that by "
            "`load_meft_adapter(model, 'adapter')`",
        ),
        ("export ckpt_path=nowhere", "no checkpoint and no run at 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: str, said: str, refused, given, inputs) -> None:
    Path("empty.txt").touch()
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    shape = [
        *(f"model.config.{name}={value}" for name, value in SMALL.items()),
        "model.config.num_key_value_heads=2",
        f"model.tokenizer_path={inputs / 'small'}",
    ]
    words: list[str] = []
    for word in arguments.split():
        words += given if word == "{given}" else shape if word == "{shape}" else [word]
    if "data=jsonl" in words:
        words.remove("data=text")
    if "model=llama_1b3" in words:
        words = [w for w in words if not w.startswith(("model=pretrained", "model.path"))]
    assert said in refused(*words)


def test_a_bug_keeps_its_traceback(run, given, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_offload.text import CausalLM

    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(CausalLM, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("train", *given, "method=none")


def test_a_conflict_found_in_fit_is_one_line(refused, given, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_offload.text import CausalLM

    def conflict(*_: object) -> None:
        raise MisconfigurationException("these two flags exclude each other")

    monkeypatch.setattr(CausalLM, "validation_step", conflict)
    with monkeypatch.context() as patch:
        patch.setattr(OmegaConf, "save", lambda *_, **__: None)
        assert "exclude each other" in refused("train", *given, "method=none", "logger=none", "callbacks=none")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["optimizer._target_=torch.optim.Adagrad", "~optimizer.betas", "~optimizer.fused"],
            "adagrad.Adagrad` cannot be offloaded",
        ),
        (["optimizer=sgd", "trainer.strategy.min_numel=0"], "method `lsp` cannot project `SGD`"),
        (["trainer.strategy.min_numel=0", "trainer.strategy.dim=64"], "`dim=64` is larger than min(m, n)=16 of"),
        ([], "found no linear weight to project in CausalLM"),
    ],
)
def test_what_a_strategy_refuses_before_the_first_batch_is_one_line(settings, said: str, run, given, capsys) -> None:
    assert run("train", *given, *settings) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_calibration_takes_training_data_where_none_is_given(run, given, capsys) -> None:
    learned = [
        "trainer.strategy.projector=learned",
        "trainer.strategy.fit_steps=2",
        "trainer.strategy.calibration=batch",
    ]
    assert run("train", *given, *OF_METHOD["lsp"], *learned, "name=a", "export=false") == 0
    assert "held-out, before -> after" in capsys.readouterr().out


def test_the_whole_traceback_when_asked_for(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(HydraException):
        run("train", "modle=tiny")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_the_installed_script() -> None:
    script = shutil.which("lightning-offload", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if script is None:
        pytest.skip("the package is not installed, only importable")
    help_text = subprocess.run([script], capture_output=True, text=True, check=True).stdout
    assert len(help_text.splitlines()) <= 24
    assert all(f"lightning-offload {command}" in help_text for command in ("train", "evaluate", "export"))
    bad = subprocess.run([script, "train", "modle=tiny"], capture_output=True, text=True, check=False)
    assert (bad.returncode, len(bad.stderr.splitlines()), bad.stdout) == (2, 1, "")


@pytest.mark.parametrize("command", ["train", "plan", "evaluate", "export", "bench", "doctor"])
def test_help_of_a_command_fits_a_screen(command: str, run, capsys) -> None:
    assert run(command, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith(f"lightning-offload {command}")


def test_help_names_every_option_of_a_group(run, capsys) -> None:
    run("plan", "--help")
    text = capsys.readouterr().out
    for file in (Path(conf.__file__).parent / "model").glob("*.yaml"):
        assert file.stem in text


# Folders and curves


def test_last_is_the_newest_run_of_that_name_with_a_checkpoint(tmp_path: Path) -> None:
    for number, has_checkpoint in ((2, True), (9, True), (10, False)):
        (tmp_path / f"a-{number}" / "checkpoints").mkdir(parents=True)
        if has_checkpoint:
            (tmp_path / f"a-{number}" / "checkpoints" / "x.ckpt").touch()
    (tmp_path / "a-b-11").mkdir()
    choose = runs.choose_folder
    assert choose(str(tmp_path), None, "a", "last") == str(tmp_path / "a-9")
    assert choose(str(tmp_path), None, "a", None) == str(tmp_path / "a-11")
    assert choose(str(tmp_path), None, "a", None) == str(tmp_path / "a-12")
    assert choose(str(tmp_path), "mine", "a", "last") == str(tmp_path / "mine")


def test_a_continued_run_is_one_curve(tmp_path: Path) -> None:
    rows = {0: ["0,5,", "0,,5", "1,4,", "2,3,"], 1: ["0,,9", "2,2,", "3,1,", "3,,1"]}
    for version, lines in rows.items():
        (tmp_path / f"logs/version_{version}").mkdir(parents=True)
        content = "\n".join(["step,train/loss,val/loss", *lines])
        (tmp_path / f"logs/version_{version}/metrics.csv").write_text(content)
    assert plots.read_curve(tmp_path, "train/loss") == [(0, 5), (1, 4), (2, 2), (3, 1)]
    assert plots.read_curve(tmp_path, "val/loss") == [(0, 5), (3, 1)]


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no losses in"):
        plots.plot_losses([tmp_path], tmp_path / "loss.png")


def test_smoothing_keeps_a_line_and_the_length() -> None:
    assert plots.smooth([1.0, 2.0, 3.0, 4.0], 3)[1:3] == [2.0, 3.0]
    assert plots.smooth([1.0], 5) == [1.0]


def test_several_devices_are_one_training(tmp_path: Path) -> None:
    """Processes of its own, the method's strategy for several, and one that speaks."""
    command = [sys.executable, "-m", "lightning_offload.cli", "train", "name=two", "trainer.accelerator=cpu"]
    command += ["trainer.devices=2", "trainer.max_steps=2", "trace=false", "data.batch_size=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out, before -> after") == 1
    assert len(re.findall(r"^model\b.*tiny", done.stdout, flags=re.MULTILINE)) == 1
    assert "_offload_ddp: " in done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert (tmp_path / "runs/two/hf/model.safetensors").is_file()
