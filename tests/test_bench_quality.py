"""Every arm of the quality bench trains the weights it says; runs are remembered; tables add up."""

from __future__ import annotations

import json
import math
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_offload.bench import quality as bench
from lightning_offload.bench import quality_arms, quality_runs, simulated
from lightning_offload.bench.equal_loss import PUBLISHED, equal_loss, steps_to
from lightning_offload.bench.measure import CannotRun
from lightning_offload.bench.quality import Outcome, QualitySettings, best_rate, measure, quality, quality_table
from lightning_offload.bench.quality_arms import QUALITY_ARMS, Fit
from lightning_offload.bench.quality_runs import Cache, Result, Run, Text, rate_factor, read_text, train
from lightning_offload.errors import DataError, NonFiniteError
from lightning_offload.methods.lsp import LSPSettings

RUN = Run(arm="adamw", settings={}, rate=1e-3, seed=1, steps=2, batch=2, length=16, held_out_tokens=64, split="test")
RESULT = Result(loss=3.0, curve=[(0, 4.0), (10, 3.0)], step_s=0.1, cpu_s=1.0, device_bytes=2048, host_bytes=1024)
QUICK = QualitySettings(arms=["adamw"], steps=1, batch=1, length=16, seeds=1, held_out_tokens=16, jobs=1)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tokens to train on."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(2048, (28, 16), generator=generator)
    monkeypatch.setattr(
        quality_runs, "read_text", lambda length, gsm8k: Text(sequences[:22], sequences[22:25], sequences[25:])
    )


def _installed(arm: str) -> None:
    why = QUALITY_ARMS[arm].why_not()
    if why:
        pytest.skip(why)


def _settings(arm: str) -> dict[str, Any]:
    """Of the arm; where values are fitted, briefly."""
    settings = dict(QUALITY_ARMS[arm].settings)
    return {**settings, "fit_steps": 1} if arm in ("lsp_learned", "lsp_paper") else settings


def _fitted(arm: str) -> tuple[Any, Fit, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The network after two steps, what trained it, the parameters that it had had, and their values before."""
    network = deepcopy(quality_runs.pretrained())
    weights = dict(network.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    fit = QUALITY_ARMS[arm].make(network, 1e-2, **_settings(arm))
    tokens = torch.randint(2048, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        fit.step(*2 * [lambda: network(input_ids=tokens, labels=tokens).loss])
    fit.settle()
    return network, fit, weights, before


@pytest.mark.parametrize("arm", QUALITY_ARMS)
def test_an_arm_trains_what_its_base_trains(arm: str) -> None:
    _installed(arm)
    network, fit, weights, before = _fitted(arm)
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    linear = {name for name in weights if name.endswith("proj.weight")}
    added = [name for name, _ in network.named_parameters() if "lora_" in name or ".meft." in name]
    layers = network.config.num_hidden_layers
    of_added = {"lora": 2 * len(linear), "meft": 3 * layers, "dense": 3 * layers}
    assert len(added) == (4 * layers if arm.startswith("lora_qv") else of_added.get(arm.split("_")[0], 0))
    assert changed == (set() if added else set(weights) if QUALITY_ARMS[arm].base == "adamw_all" else linear)
    assert fit.device_bytes > 0


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("arm", QUALITY_ARMS)
def test_a_run_is_the_same_again_and_another_with_another_seed(arm: str) -> None:
    _installed(arm)
    threads = torch.get_num_threads()
    run = replace(RUN, arm=arm, settings=_settings(arm))
    first, again, other = train(run), train(run), train(replace(run, seed=2))
    assert [step for step, _ in first.curve] == [0, 2]
    assert first.curve[0] == other.curve[0]  # the untrained model
    assert first.loss == again.loss != other.loss
    assert first.curve[1][1] < first.curve[0][1]
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("noise")
def test_a_run_of_no_steps_measures_the_model_as_it_is() -> None:
    untrained = train(replace(RUN, steps=0))
    text = quality_runs.read_text(16, None)
    assert untrained.loss == quality_runs.held_out_loss(quality_runs.pretrained(), text.test)
    assert untrained.step_s == 0.0


@pytest.mark.usefixtures("noise")
def test_more_steps_than_text_take_it_again_in_another_order() -> None:
    text = quality_runs.read_text(16, None)
    run = replace(RUN, steps=6, batch=2)
    batches = list(quality_runs._batches(text.train[:6], run))
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert not torch.equal(first, second)
    assert (
        sorted(map(tuple, first.tolist()))
        == sorted(map(tuple, second.tolist()))
        == sorted(map(tuple, text.train[:6].tolist()))
    )


@pytest.mark.usefixtures("noise")
def test_a_run_that_is_not_finite_has_an_infinite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *losses: Any) -> None:
        raise NonFiniteError("too many")

    monkeypatch.setattr(quality_arms.Plain, "step", refuse)
    assert train(RUN).loss == math.inf


def test_text_is_split_by_its_documents(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("test", 20)):
        rows = [{"question": f"{name} {number}?", "answer": f"{number} " * 8} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = read_text(16, str(tmp_path))
    assert all(part.shape[1] == 16 and len(part) for part in (text.train, text.val, text.test))
    assert abs(len(text.val) - len(text.test)) <= 1
    assert not set(map(tuple, text.val.tolist())) & set(map(tuple, text.test.tolist()))
    with pytest.raises(DataError, match="There is no file"):
        read_text(16, str(tmp_path / "nowhere"))


def test_the_rate_rises_then_falls_to_almost_nothing() -> None:
    factors = [rate_factor(step, 100) for step in range(1, 101)]
    top = factors.index(max(factors))
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert 0 < factors[-1] < 0.02 < 0.9 < max(factors) <= 1


def test_a_finished_run_is_read_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Run] = []
    monkeypatch.setattr(quality_runs, "train", lambda run: trained.append(run) or RESULT)
    for _ in range(2):
        assert Cache(tmp_path / "new").result(RUN) == RESULT
    for other in (replace(RUN, seed=2), replace(RUN, settings={"dim": 0.5}), replace(RUN, rate=2e-3)):
        Cache(tmp_path / "new").result(other)
    assert [asdict(run)["seed"] for run in trained] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("losses", "best", "tried"),
    [
        ({0.5: 3, 1: 2, 2: 3}, 1, 3),
        ({0.5: 2, 1: 3, 2: 4, 0.25: 3}, 0.5, 4),
        ({0.5: 4, 1: 3, 2: 2, 4: 1, 8: math.inf}, 4, 5),
        ({0.5: 9, 1: 8, 2: 7, 4: 6, 8: 5, 16: 4, 32: 3}, 16, 6),
    ],
)
def test_the_best_rate_lies_between_worse_ones_unless_that_is_too_far(
    losses: dict[float, float], best: float, tried: int
) -> None:
    asked: list[float] = []
    assert best_rate(lambda rate: asked.append(rate) or losses[rate], 1.0) == best
    assert len(asked) == tried


def test_rates_are_chosen_on_validation_text_and_losses_reported_on_test_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Run] = []
    monkeypatch.setattr(quality_runs, "train", lambda run: trained.append(run) or replace(RESULT, loss=run.rate))
    outcome = measure("adamw", None, QualitySettings(seeds=2, folder=str(tmp_path)))
    assert {run.split for run in trained if run.seed == 0} == {"val"}
    assert [(run.seed, run.split, run.rate) for run in trained if run.seed] == [
        (1, "test", outcome.rate),
        (2, "test", outcome.rate),
    ]
    assert outcome.losses == [outcome.rate] * 2


def test_gain_is_the_share_of_what_the_base_gains() -> None:
    outcomes = {
        "adamw": Outcome(1e-3, [replace(RESULT, loss=2.0), replace(RESULT, loss=3.0)]),
        "lora_device": Outcome(2e-3, [replace(RESULT, loss=3.0), replace(RESULT, loss=3.5)]),
    }
    table = quality_table(4.0, outcomes, "text", ["galore_device: not installed"])
    base, own = (row.values for row in table.rows)
    assert (base["loss"], base["gain_percent"], base["gain_std"]) == (2.5, 100.0, 0.0)
    assert own["gain_percent"] == pytest.approx(50.0)
    assert own["gain_std"] == 0.0  # 50 % with both seeds
    assert (own["loss_std"], own["device_kib"], own["host_kib"], own["lr"]) == (pytest.approx(0.5 / 2**0.5), 2, 1, 2e-3)
    assert "| 2.5000 |" in table.markdown()
    assert "loss before: 4.0000" in table.markdown()


@pytest.mark.parametrize("arm", ["lora_device", "lora_total", "galore_device", "galore_total"])
def test_a_competitor_has_the_memory_of_lsp(arm: str) -> None:
    _installed(arm)
    ours, theirs = (_fitted(name)[1] for name in ("lsp_pca", arm))
    memory = ours.device_bytes + (ours.host_bytes if arm.endswith("total") else 0)
    rank = QUALITY_ARMS[arm].settings["rank"]
    assert memory <= theirs.device_bytes < memory * (rank + 1) / (rank - 1)


def test_steps_to_a_loss_are_read_off_the_curve() -> None:
    curve = [(0, 4.0), (10, 3.0), (20, 3.5), (30, 1.5)]
    assert [steps_to(curve, loss) for loss in (5.0, 3.5, 3.0, 2.5, 1.0)] == [0.0, 5.0, 10.0, 25.0, None]


def test_time_to_equal_loss_is_steps_times_planned_seconds() -> None:
    own, full = [(0, 4.0), (10, 3.0), (20, 2.0)], [(0, 4.0), (10, 2.0), (20, 1.0)]
    plans: Any = {
        "a job": {name: SimpleNamespace(step_s=s) for name, s in (("lsp", 1.0), ("full", 4.0), ("zero-offload", 8.0))}
    }
    table = equal_loss("lsp", own, full, plans, "text")
    last = table.rows[-1].values
    assert (last["loss"], last["steps"], last["full_steps"]) == (2.0, 20.0, 10.0)
    assert (last["seconds"], last["full_s"], last["zero_offload_s"]) == (20.0, 40.0, 80.0)
    assert (last["less_than_full_percent"], last["less_than_zero_offload_percent"]) == (50.0, 75.0)
    assert PUBLISHED in table.notes
    assert equal_loss("lsp", own, [(0, 4.0), (10, 3.9)], plans, "text").rows == ()


@pytest.mark.usefixtures("noise")
def test_the_default_of_lsp_also_yields_times_from_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape: Any = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(simulated, "PAPER", {"a job": simulated.Job("laptop_4gb", shape, 1, 8, LSPSettings(), {})})
    monkeypatch.setattr(quality_runs, "train", lambda run: replace(RESULT, loss=3.0 if run.steps else 4.0))
    (_, times) = quality(replace(QUICK, arms=["lsp_others"], folder=str(tmp_path)))
    assert [row.arm for row in times.rows] == [f"a job: {share} % of its gain" for share in (50, 75, 90, 100)]
    assert all(row.values["full_s"] <= row.values["zero_offload_s"] for row in times.rows)
    assert all(row.values["steps"] == row.values["full_steps"] for row in times.rows)


@pytest.mark.usefixtures("noise")
def test_a_text_yields_a_table_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUALITY_ARMS, "absent", replace(QUALITY_ARMS["adamw"], why_not=lambda: "not installed"))  # type: ignore[arg-type]
    (table,) = quality(replace(QUICK, arms=["absent"], folder=str(tmp_path)))
    assert [row.arm for row in table.rows] == ["adamw"]
    assert table.rows[0].values["gain_percent"] == 100.0
    assert "absent: not installed" in table.notes
    with pytest.raises(CannotRun, match="not installed"):
        measure("absent", None, QUICK)


@pytest.mark.slow
def test_other_processes_do_the_trainings_on_all_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "gsm8k"
    data.mkdir()
    for name in ("train", "test"):
        row = {"question": "How many?", "answer": "Two. " * 40}
        (data / f"{name}.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    settings = replace(QUICK, jobs=2, folder=str(tmp_path / "runs"), gsm8k=str(data))
    here: list[int] = []
    monkeypatch.setattr(quality_runs, "train", lambda run: here.append(run.steps) or RESULT)
    tables = list(quality(settings))
    assert [table.title.split(",")[0] for table in tables] == ["Python source", "GSM8K"]
    assert here == [0, 0]  # the untrained model
    lines = (tmp_path / "runs" / "quality.jsonl").read_text().splitlines()
    assert {json.loads(line)["run"]["gsm8k"] for line in lines} == {None, str(data)}


def test_processes_share_the_arms_and_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, str | None]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            assert (command[:2], env["OMP_NUM_THREADS"]) == ([sys.executable, "-c"], "1")
            monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
            exec(command[2], {})

        def wait(self) -> None:
            measured.append(("waited", None))

        def terminate(self) -> None: ...

    monkeypatch.setattr(bench.subprocess, "Popen", Process)
    monkeypatch.setattr(bench, "measure", lambda name, gsm8k, settings: measured.append((name, gsm8k)))
    settings = QualitySettings(arms=["lora_device", "adamw_all", "galore_device"], jobs=2, gsm8k="there")
    bench._in_processes(settings)
    arms = ["adamw", "adamw_all", "lora_device", "galore_device"]
    trainings = [(arm, text) for arm in arms for text in (None, "there")]
    assert sorted(measured, key=str) == sorted([*trainings, ("waited", None), ("waited", None)], key=str)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": ["adam"]}, r"quality.arms: no arm 'adam'; there are adamw, .*galore_total"),
        ({"seeds": 0}, r"quality.seeds=0: give at least 1"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QualitySettings(**settings)


def test_a_text_that_calibration_uses_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.zeros(quality_runs.CALIBRATION, 16, dtype=torch.int64)
    monkeypatch.setattr(quality_runs, "read_text", lambda length, gsm8k: quality_runs.Text(noise, noise, noise))
    run = quality_runs.Run(
        arm="adamw", settings={}, rate=1e-3, seed=0, steps=1, batch=1, length=16, held_out_tokens=64, split="val"
    )
    with pytest.raises(CannotRun, match=r"16 sequences that are kept for calibration"):
        quality_runs.train(run)
