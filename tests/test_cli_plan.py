"""`plan`, `doctor` and `bench` through the real entry point, and the plan that a run prints first."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_offload import cli
from lightning_offload.memory.rates import Rates
from lightning_offload.text import TINY_PATH
from tests.planning.machines import RATES

SHAPE = "model_type: llama, vocab_size: 512, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2"
MODEL = ["model=by_shape", f"model.config={{{SHAPE}, num_attention_heads: 2}}"]
NAMES = ("nearest", "stochastic")
SMALL = [*MODEL, "hardware=rtx4090", "data.batch_size=4", "data.sequence_length=32"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(Rates, "cached", classmethod(lambda cls, *_: cls(**RATES)))  # nothing is measured here
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Call the console script's function as a shell would."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lightning-offload", *arguments])
        try:
            return cli.main()
        except SystemExit as stopped:
            return stopped.code

    return call


def planned(run: Any, *arguments: str) -> dict[str, Any]:
    assert run("plan", *arguments, "output=out") == 0
    return json.loads(Path("out/plan.json").read_text())


# What it answers.


def test_a_plan_is_printed_written_and_drawn(run, capsys) -> None:
    made = planned(run, *SMALL, "compare=true", "precision=bf16-true")
    assert made["fits"] is True
    assert made["tokens"] == 4 * 32
    assert made["precision"] == "bf16-true"
    assert {made["method"], *(other["method"] for other in made["others"])} == {
        "none",
        "zero-offload",
        "full",
        "lsp",
        "zo2",
        "meft",
    }
    assert imread("out/plan.png").std() > 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("fits", "zero-offload", "device memory", "out/plan.json"))


@pytest.mark.parametrize(
    ("precision", "asked", "factor"),
    [
        ("32-true", "wire=float16", 0.5),
        ("bf16-mixed", "wire=bfloat16", 0.5),
        ("bf16-true", "master=float32", 2.0),
        ("bf16-true", "rounding=nearest", 1.0),
    ],
)
def test_a_plan_of_zo2_takes_what_is_asked_of_dtypes(run, precision: str, asked: str, factor: float) -> None:
    zo2 = [*SMALL, "model.config.num_hidden_layers=4", "method=zo2", f"precision={precision}"]
    before, after = planned(run, *zo2), planned(run, *zo2, f"precision.{asked}")
    for lane in ("h2d", "d2h"):
        assert after["lanes"][lane]["bytes"] == factor * before["lanes"][lane]["bytes"] > 0
    assert after["host"]["holds"]["weights"] == factor * before["host"]["holds"]["weights"]


@pytest.mark.parametrize(
    "more",
    [["method=full", "precision.rounding=nearest"], *(["method=lsp", f"precision.rounding={x}"] for x in NAMES)],
    ids=str,
)
def test_how_weights_are_rounded_takes_no_memory(run, more: list[str]) -> None:
    before = planned(run, *SMALL, "precision=bf16-true", more[0])
    after = planned(run, *SMALL, "precision=bf16-true", *more)
    assert before["host"] == after["host"]
    assert before["device"] == after["device"]


def test_dtypes_that_a_method_refuses_leave_it_out_of_a_comparison(run, capsys) -> None:
    made = planned(run, *SMALL, "method=zo2", "precision.wire=float16", "compare=true")
    assert [other["method"] for other in made["others"]] == ["none"]
    refused = [note for note in made["notes"] if "cannot be compared" in note]
    assert [note.split()[0] for note in refused] == ["zero-offload", "full", "lsp", "meft"]
    assert all("OffloadPrecision(wire=torch.float16)" in note for note in refused)
    assert run("plan", *SMALL, "method=full", "precision.wire=float16") != 0
    assert "`OffloadPrecision(wire=torch.float16)` is not supported by method `full`" in capsys.readouterr().err


def test_a_plan_of_lsp_takes_its_settings(run) -> None:
    half, quarter = (
        planned(run, *SMALL, "method=lsp", "precision=bf16-true", f"trainer.strategy.dim={dim}") for dim in (0.5, 0.25)
    )
    assert half["method"] == quarter["method"] == "lsp"
    states = [made["host"]["holds"]["optimizer state in subspaces"] for made in (half, quarter)]
    assert states == [2 * 4 * 2 * 7 * dim**2 for dim in (32, 16)]
    assert half["lanes"]["d2h"]["bytes"] > quarter["lanes"]["d2h"]["bytes"]
    assert any("of what full moves" in note for note in half["notes"])


def test_without_output_nothing_is_left_and_the_empty_folder_stays(run, workplace: Path) -> None:
    assert run("plan", *SMALL) == 0
    assert workplace.is_dir()
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["method=none"], {"method": "none", "micro_batches": 1}),
        (
            ["precision=bf16-mixed", "trainer.accumulate_grad_batches=3"],
            {"precision": "bf16-mixed", "micro_batches": 3},
        ),
        (["name=a", "callbacks=default", "logger=csv", "scheduler=cosine", "debug=limit"], {"method": "lsp"}),
    ],
)
def test_the_arguments_of_train_are_planned(arguments: list[str], expected: dict[str, Any], run) -> None:
    made = planned(run, *SMALL, *arguments)
    assert {name: made[name] for name in expected} == expected
    assert not Path("runs").exists()


def test_an_experiment_is_planned(run) -> None:
    assert planned(run, "experiment=first_run", "hardware=rtx4090")["tokens"] > 0


def test_not_fitting_is_an_answer_and_its_advice_can_be_typed(run, capsys) -> None:
    settings = [*SMALL, "data.batch_size=16", "data.sequence_length=512", "model.gradient_checkpointing=false"]
    takes = planned(run, *settings)["device"]["bytes"]
    cap = f"hardware.device_gib={(takes - 2**22) / 2**30}"
    made = planned(run, *settings, cap)
    assert made["fits"] is False
    assert "does NOT fit" in capsys.readouterr().out
    assert made["advice"]
    for advice in made["advice"]:
        assert planned(run, *settings, cap, *" ".join(advice["overrides"]).split())["fits"] is True


def test_a_model_folder_is_planned_without_its_weights(run) -> None:
    Path("folder").mkdir()
    shutil.copy(Path(TINY_PATH, "config.json"), "folder")
    made = planned(run, "model=pretrained", "model.path=folder", *SMALL[2:])
    assert made["parameters"] == planned(run, "model=tiny", *SMALL[2:])["parameters"]


# Own modules, with own data.


class Regression(L.LightningModule):
    """Nothing of the package."""

    tokenizer = None

    def __init__(self, width: int = 48, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.blocks(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.blocks(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


class Fickle(Regression):
    """A step that looks at values in a way that cannot be answered."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * torch.unique(batch).shape[0] / batch.numel()


class Rows(L.LightningDataModule):
    """Six batches of five rows."""

    tokenizer: Any = None

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.arange(30 * 48.0).reshape(30, 48) / 1e3, batch_size=5)

    val_dataloader = train_dataloader

    def preview(self, batch: Tensor) -> str:
        return f"{len(batch)} rows"


@pytest.fixture
def own(workplace: Path) -> list[str]:
    """Settings that choose the classes above."""
    for group, target in (("model", "Regression"), ("data", "Rows")):
        Path("mine", group).mkdir(parents=True)
        Path("mine", group, "own.yaml").write_text(f"_target_: {__name__}.{target}\n")
    return ["--config-dir", "mine", "model=own", "data=own", "method=full", "lr=1e-3"]


def test_an_own_module_is_planned_with_its_own_data(run, own) -> None:
    made = planned(run, *own, "hardware=rtx4090")
    assert (made["tokens"], made["unit"]) == (5, "samples")
    assert made["parameters"] == 3 * 48 * 49


def test_a_step_that_cannot_be_planned_is_one_line(run, own, capsys) -> None:
    assert run("plan", *own, f"model._target_={__name__}.Fickle", "hardware=rtx4090") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Fickle cannot be planned" in line
    assert f"{Path(__file__).name}:" in line
    assert "unique" in line
    assert "step=" in line


def test_a_run_whose_model_cannot_be_planned_says_so_and_trains(run, own, capsys) -> None:
    settings = ["hardware=cpu", "trainer.max_steps=2", "trainer.enable_progress_bar=false", "export=false", "name=a"]
    settings += ["trainer.val_check_interval=2", "callbacks=none", "trace=false", "trainer.strategy.min_numel=0"]
    assert run("train", *own, f"model._target_={__name__}.Fickle", *settings) == 0
    out = capsys.readouterr().out
    assert "no plan: Fickle cannot be planned" in out
    assert "loss" in out.split("held-out, before -> after")[1]

    assert run("train", *own, *settings, "name=b") == 0
    assert "fits" in capsys.readouterr().out


def test_plan_and_trace_are_switched_off(run, own, capsys) -> None:
    settings = ["hardware=cpu", "trainer.max_steps=4", "trainer.enable_progress_bar=false", "export=false", "name=a"]
    settings += ["trainer.val_check_interval=2", "callbacks=none", "plan=false", "trace=false"]
    assert run("train", *own, *settings, "trainer.strategy.min_numel=0") == 0
    assert "fits" not in capsys.readouterr().out
    assert not list(Path("runs/a").glob("t*"))


# How it refuses.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("plan model=tinny", "Could not find 'model/tinny'"),
        ("plan method=fulll", "Could not find 'method/fulll'"),
        ("plan hardware=rtx9", "Could not find 'hardware/rtx9'"),
        ("plan hardware=rtx4090 hardware.rates.h2d_gb_per_s=null", "but not `rates.h2d_gb_per_s`; give all"),
        (
            "plan hardware=rtx4090 hardware.rates.h2d_gb_per_s=-3",
            "`rates.h2d_gb_per_s` must be a positive number, got -3",
        ),
        ("plan hardware=rtx4090 +hardware.rates.h2d=3", "no key 'hardware.rates.h2d'"),
        ("plan hardware=rtx4090 hardware.device_gib=0", "`hardware.device_gib` must be a positive number of GiB"),
        ("plan hardware=rtx4090 hardware.cores=null", "gives rates, but not `hardware.cores`"),
        ("plan hardware=rtx4090 data.batch_size=0", "batch sizes >= 1"),
        (
            "plan hardware=rtx4090 trainer.accumulate_grad_batches=0",
            "`accumulate_grad_batches` must be an integer >= 1",
        ),
        ("plan hardware=rtx4090 precision.precision=64-true", "`precision` must be one of: ('32-true'"),
        ("plan hardware=rtx4090 trainer.strategy.accumulate=disk", "accumulate"),
        ("plan hardware=rtx4090 model=pretrained model.path=/no/where", "There is no folder at path='/no/where'"),
        (
            "plan {shape} model.config.hidden_size=100 model.config.num_attention_heads=7",
            "not a multiple of the number of",
        ),
        ("plan {shape} model.config.model_type=nope", "nope"),
        ("plan +foo=1", "no key 'foo'"),
        ("plan model=gpt2 data.sequence_length=1025", "1,025 is more than the model's 1,024 positions"),
        ("plan model=opt_125m data.sequence_length=2049", "2,049 is more than the model's 2,048 positions"),
        ("doctor device=tpu", "tpu"),
        ("bench sections=[nothing]", "nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: str, said: str, run, capsys) -> None:
    words = [word for each in arguments.split() for word in (SMALL if each == "{shape}" else [each])]
    assert run(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-offload")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not [path for path in Path().rglob("*") if path != Path("runs")]


# The machine.


def test_doctor_says_by_its_exit_code_whether_training_can_work(run, capsys) -> None:
    assert run("doctor", "device=cpu") == 0
    assert "Training can work here" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert run("doctor", "device=cuda") == 1
        assert "problem" in capsys.readouterr().out


def test_bench_measures_and_writes(run, capsys) -> None:
    assert run("bench", "sections=[host]", "numel=100000", "rounds=2", "output=bench") == 0
    assert "adamw" in capsys.readouterr().out.lower()
    assert list(Path("bench").iterdir())
