"""Data and evaluation through the public commands, with a model of a few thousand parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from lightning_offload import cli
from lightning_offload.text import TINY_PATH

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QUICK = ["hardware=cpu", "lr=1e-2", "trainer.max_steps=3", "trainer.enable_progress_bar=false", "trace=false"]
ROWS = [{"sentence": f"film {'good ' * (n % 5) if n % 2 else 'bad ' * (n % 3)}", "label": n % 2} for n in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Settings of a small model in a folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_PATH)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ["model=pretrained", f"model.path={folder}"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """A function from arguments to the exit code and what was said, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightning-offload", *arguments])
        try:
            code = cli.main()
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        return code, said.out if code == 0 else said.err

    return call


@pytest.fixture
def glue(tmp_path):
    """Settings of a folder of labelled sentences."""
    (tmp_path / "sst2").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "sst2" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["data=glue", "data.path=sst2", "data.task=sst2", "data.batch_size=4"]


@pytest.mark.parametrize("method", ["lsp", *(pytest.param(m, marks=pytest.mark.slow) for m in ("none", "full", "zo2"))])
def test_a_classifier_is_trained_evaluated_and_exported(method, run, model, glue):
    code, said = run("train", *QUICK, *model, *glue, f"method={method}", "name=a")
    assert code == 0
    assert all(f"\n  {name:<14} " in said for name in ("loss", "accuracy", "f1", "matthews"))
    assert "⟦positive⟧" in said or "⟦negative⟧" in said
    trained = AutoModelForSequenceClassification.from_pretrained("runs/a/hf")
    assert trained.config.id2label == {0: "negative", 1: "positive"}

    code, said = run("evaluate", "ckpt_path=runs/a", "split=test", "trainer.enable_progress_bar=false")
    assert code == 0
    found = json.loads(Path("runs/a/evaluation.json").read_text())
    assert {"loss", "accuracy", "f1", "matthews"} < found.keys()
    assert "sample" not in found
    again = ["model=pretrained", "model.path=runs/a/hf", *glue, "trainer.enable_progress_bar=false", "output=b.json"]
    assert run("evaluate", *again)[0] == 0
    assert json.loads(Path("b.json").read_text())["loss"] == pytest.approx(found["loss"], rel=1e-4)

    code, said = run("export", "ckpt_path=runs/a", "output=c")
    assert code == 0
    weights = AutoModelForSequenceClassification.from_pretrained("c").state_dict()
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in weights.items())


def test_a_classifier_is_planned_without_data(run):
    code, said = run("plan", "data=glue", "data.task=mnli", "hardware=laptop_4gb", "method=full")
    assert code == 0
    assert "SequenceClassifier of 1.92 M parameters" in said


@pytest.fixture
def gsm8k(tmp_path):
    """Settings of a folder of questions with one answer, asked for by generation."""
    (tmp_path / "g").mkdir()
    for name, count in (("train", 16), ("test", 3)):
        rows = [{"question": f"{name} {n}?", "answer": "So <<7=7>>7\n#### 7"} for n in range(count)]
        (tmp_path / "g" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    match = ["model.match_answers=exact", "model.max_answer_tokens=20"]
    return ["data=gsm8k", "data.path=g", "data.val_examples=4", "data.sequence_length=64", *match]


@pytest.mark.parametrize("methods", [["zo2"], pytest.param(["lsp", "meft"], marks=pytest.mark.slow)])
def test_answers_are_generated_under_every_method(methods, run, model, gsm8k):
    code, said = run("train", *QUICK, *model, *gsm8k, "method=full", "name=a", "trainer.max_steps=60", "plan=false")
    assert code == 0
    assert "exact match    0.000 -> 1.000" in said, said.partition("before ->")[2][:300]
    for method in methods:
        code, said = run(
            "train", *QUICK, "model=pretrained", "model.path=runs/a/hf", *gsm8k, f"method={method}", f"name={method}",
            "lr=1e-8", "trainer.max_steps=1", "plan=false", "export=false",
        )  # fmt: skip
        assert code == 0
        assert "exact match    1.000 -> 1.000" in said
    evaluate = ["trainer.enable_progress_bar=false", "hardware=cpu", "max_new_tokens=2", "split=test"]
    for settings in (["ckpt_path=runs/a", "method=streamed"], [f"ckpt_path=runs/{methods[-1]}"]):
        code, said = run("evaluate", *settings, *evaluate)
        assert code == 0
        assert "exact match 1.000" in said


def test_an_answer_that_is_cut_is_found_before_training(run, model, gsm8k):
    code, line = run("train", *QUICK, *model, *gsm8k, "data.sequence_length=16")
    assert code == 2
    assert "train: Nothing counts in the answer " in line.splitlines()[-1]
    assert "raise data.sequence_length (now 16)." in line.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.task=sst"], "task='sst': the choice is cola, sst2"),
        (["data.task=null"], "Say what is to be read: data.task=sst2"),
        (["data.task=rte"], "train.jsonl, line 1: has the fields ['label', 'sentence']; needs 'sentence1'"),
        (["data.path=nowhere"], "There is no folder path='nowhere'"),
        (["model.match_answers=exact"], "model.match_answers=exact is for language models; this one classifies"),
        (["method=meft"], "is new, and frozen here"),
        (["model.num_labels=3"], "this model has num_labels=3, the data 2"),
    ],
)
def test_what_a_classifier_refuses(arguments, said, run, model, glue):
    code, line = run("train", *QUICK, *model, *glue, *arguments)
    assert code == 2
    *_, last = line.splitlines()
    assert last.startswith("lightning-offload train: ")
    assert said in last
    assert "Traceback" not in line


@pytest.mark.slow
def test_devices_and_windows_are_one_big_batch(run, model, tmp_path):
    rows = [{"prompt": f"Say {n}: ", "completion": "word " * (1 + (n * 5) % 13)} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        *QUICK,
        *model,
        "method=full",
        "data=jsonl",
        "data.path=data.jsonl",
        "data.val_path=data.jsonl",
        "plan=false",
    ]
    given += ["optimizer=sgd", "lr=0.5", "scheduler=constant", "trainer.max_steps=-1", "trainer.max_epochs=1"]
    assert run("train", *given, "data.batch_size=8", "name=one")[0] == 0
    command = [sys.executable, "-m", "lightning_offload.cli", "train", *given, "data.batch_size=1", "name=two"]
    command += ["trainer.devices=2", "trainer.accumulate_grad_batches=4", "trainer.accelerator=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(f"runs/{name}/hf/model.safetensors") for name in ("one", "two"))
    before = load_file(Path(model[1].partition("=")[2], "model.safetensors"))
    assert max((one[name] - value).abs().max() for name, value in before.items()) > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
