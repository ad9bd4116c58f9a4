"""Arms of the bench of recall train what they say; runs are remembered; rows are means over seeds."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from lightning_offload.bench import quality_runs
from lightning_offload.bench import recall as bench
from lightning_offload.bench.recall import FACTS, Recalled, RecallRun, RecallSettings, ask, recall, recall_table, train
from lightning_offload.bench.recall_arms import RECALL_ARMS, RecallArm, Trained
from lightning_offload.methods.meft import MEFTSettings

RESULT = Recalled(
    loss=3.0,
    curve=[(10, 3.0)],
    step_s=0.1,
    cpu_s=1.0,
    device_bytes=2048,
    host_bytes=1024,
    right_percent=50.0,
    parameters=1000,
)
HIDDEN, LAYERS, MOMENTS = 160, 5, 3  # of the shipped model; a weight and its two moments


def run_of(arm: str, **others: Any) -> RecallRun:
    own = RECALL_ARMS[arm]
    shape = {"steps": 2, "batch": 2, "paraphrases": 3, "seed": 1, "rate": own.rate, "settings": own.settings}
    return RecallRun(**{"arm": arm, **shape, **others})


def fitted(arm: str) -> tuple[Any, Trained, set[str]]:
    """The network after two steps, what trained it, and the names of parameters that moved."""
    own = RECALL_ARMS[arm]
    if why := own.why_not():
        pytest.skip(why)
    network = deepcopy(quality_runs.pretrained())
    fit = own.make(network, 1e-3, **own.settings)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    tokens = torch.randint(2048, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        fit.step(network(input_ids=tokens, labels=tokens).loss)
    return network, fit, {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("arm", RECALL_ARMS)
def test_an_arm_trains_what_it_says_and_counts_it(arm: str) -> None:
    network, fit, moved = fitted(arm)
    parameters = dict(network.named_parameters())
    assert fit.parameters == sum(parameters[name].numel() for name in moved)
    assert fit.device_bytes + fit.host_bytes == 4 * MOMENTS * fit.parameters
    added = {"meft": ".meft.", "dense": ".meft.", "lora": "lora_", "adamw": ""}[arm.split()[0]]
    assert moved
    assert all(added in name for name in moved)
    if arm.startswith("meft"):
        assert fit.host_bytes == 4 * MOMENTS * LAYERS * 2 * int(arm.split()[-1]) * HIDDEN
    else:
        assert fit.host_bytes == 0


def test_lora_has_the_device_bytes_or_the_parameters_of_meft() -> None:
    if why := RECALL_ARMS["lora 7"].why_not():
        pytest.skip(why)
    meft = fitted("meft 1024")[1]
    assert meft.device_bytes <= fitted("lora 7")[1].device_bytes < meft.device_bytes * 7 / 6
    for own in ("lora 112", "lora qv 544"):
        assert abs(fitted(own)[1].parameters / meft.parameters - 1) < 0.01


def test_the_dense_adapter_uses_every_row_for_every_token() -> None:
    asked = MEFTSettings(
        **{key: value for key, value in RECALL_ARMS["dense 1024"].settings.items() if key not in ("on_host", "key_std")}
    )
    assert (asked.width, asked.top_k, asked.expert_count, asked.gate) == (1024, 1024, 1, "none")


def test_a_run_learns_and_is_the_same_again_and_another_with_another_seed() -> None:
    long = {"arm": "adamw", "steps": 12, "batch": 8}
    first, again, other = (train(run_of(**long, seed=seed)) for seed in (1, 1, 2))
    assert first.loss == again.loss != other.loss
    untrained = train(run_of(**{**long, "rate": 0.0}))
    assert first.loss < untrained.loss - 0.5
    assert untrained.right_percent == 0.0


def test_what_is_asked_was_trained_otherwise_and_all_of_it_can_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bench._facts(run_of("adamw"))
    facts = data.facts()
    assert not {fact.question for fact in facts.train} & {fact.question for fact in (*facts.val, *facts.test)}
    assert {fact.answer for fact in facts.test} <= {fact.answer for fact in facts.train}
    assert len(facts.val) == len(facts.test) == FACTS["families"] * FACTS["attributes"] // 2
    longest = max(len(data.encode([fact.answer])[0]) for fact in (*facts.val, *facts.test))
    assert longest < bench.ANSWER_TOKENS  # and the end
    monkeypatch.setattr(bench, "right_answers", lambda network, batch, **_: torch.ones(len(batch["input_ids"])))
    assert ask(quality_runs.pretrained().eval(), data, "test")[1] == 1.0


def test_runs_are_remembered_and_rows_are_means_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def take(run: RecallRun) -> Recalled:
        trained.append(run)
        return Recalled(**{**vars(RESULT), "right_percent": 10.0 * run.seed, "loss": 3.0 + run.seed})

    monkeypatch.setattr(bench, "train", take)
    settings = RecallSettings(arms=["meft 256", "adamw"], steps=7, folder=str(tmp_path))
    (table,) = recall(settings)
    assert [run.seed for run in trained] == [1, 2, 3] * 2
    values = table.rows[0].values
    assert (values["right_percent"], values["right_std"], values["loss"], values["loss_std"]) == (20.0, 10.0, 5.0, 1.0)
    assert (values["steps"], values["device_kib"], values["host_kib"], values["trained_k"]) == (7, 2.0, 1.0, 1.0)
    assert list(recall(settings)) == [table]
    assert len(trained) == 6
    assert imread(tmp_path / "recall.png").shape[2] == 4


def test_the_section_trains_two_arms(tmp_path: Path) -> None:
    arms = ["meft 256", "meft paper 1024"]
    settings = RecallSettings(arms=arms, steps=2, batch=2, seeds=1, folder=str(tmp_path))
    (table,) = recall(settings)
    assert [row.arm for row in table.rows] == arms
    assert all(0 <= row.values["right_percent"] <= 100 and row.values["loss"] > 0 for row in table.rows)
    assert "asked in a way not seen with them" in table.title


def test_an_arm_that_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = RecallArm(make=lambda *_: None, rate=1.0, why_not=lambda: "not installed (pip install peft)", note="")
    monkeypatch.setattr(bench, "RECALL_ARMS", {"lora 7": arm})
    (table,) = recall(RecallSettings(arms=["lora 7"], folder=str(tmp_path)))
    assert table.rows == ()
    assert "lora 7: not installed (pip install peft)" in table.markdown()


def test_the_title_says_how_facts_are_asked() -> None:
    assert "as they were trained" in recall_table({}, RecallSettings(paraphrases=1)).title


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps=0: give at least 1"),
        ({"seeds": 0}, "seeds=0"),
        ({"arms": ["lora 1"]}, "arms: no arm 'lora 1'; there are meft 256"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"recall.{message}"):
        RecallSettings(**given)
