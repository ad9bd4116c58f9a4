"""Every arm of the bench of forwards spends as many of them; runs are remembered; they learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from lightning_offload.bench import zeroth as bench
from lightning_offload.bench.quality_runs import Result
from lightning_offload.bench.zeroth import ZEROTH_ARMS, ZerothRun, ZerothSettings, runs_of, train, zeroth
from lightning_offload.methods.zo2 import ZO2Settings

RESULT = Result(loss=3.0, curve=[(0, 4.0), (10, 3.0)], step_s=0.1, cpu_s=1.0, device_bytes=2048, host_bytes=1024)


def run_of(arm: str, **others: Any) -> ZerothRun:
    return ZerothRun(**{"arm": arm, "settings": ZEROTH_ARMS[arm].settings, "rate": 6e-4, "seed": 1, **others})


@pytest.mark.parametrize("arm", ZEROTH_ARMS)
def test_every_arm_spends_all_forwards_in_settings_that_there_are(arm: str) -> None:
    settings = ZO2Settings(**ZEROTH_ARMS[arm].settings)
    run = run_of(arm, forwards=ZerothSettings().forwards)
    assert run.steps * 2 * settings.directions == run.forwards


def test_a_run_learns_and_is_the_same_again_and_another_with_another_seed() -> None:
    first, again, other = (train(run_of("rademacher", forwards=48, seed=seed, split="val")) for seed in (0, 0, 1))
    assert first.curve == again.curve != other.curve
    assert first.curve[0] == other.curve[0]  # the same facts
    assert [forwards for forwards, _ in first.curve][-1] == 48
    assert first.loss == first.curve[-1][1] < first.curve[0][1] - 0.4


def test_mezo_keeps_all_weights_on_the_device() -> None:
    mezo, streamed = (train(run_of(arm, forwards=2)) for arm in ("MeZO, all resident", "popcount"))
    assert mezo.host_bytes == 0 < streamed.host_bytes
    assert mezo.device_bytes > streamed.device_bytes
    weights, block = 1_916_640 * 4, 317_760 * 4
    assert 0 <= mezo.device_bytes - weights - 2048 * 160 * 4 < 4096  # and what forwards see: the largest unit
    assert abs(mezo.device_bytes - streamed.device_bytes - 3 * block) < 4096  # five blocks in two slots


def test_a_run_that_is_not_finite_has_an_infinite_loss() -> None:
    assert train(run_of("rademacher", forwards=30, rate=1e38)).loss == math.inf


def test_runs_are_remembered_and_rows_are_means_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def take(run: ZerothRun) -> Result:
        trained.append(run)
        return Result(**{**vars(RESULT), "loss": 3.0 + run.seed})

    monkeypatch.setattr(bench, "train", take)
    settings = ZerothSettings(forwards=16, folder=str(tmp_path), gsm8k="somewhere")
    facts, answers = zeroth(settings)
    assert len(trained) == 3 * (len(facts.rows) + len(answers.rows))
    assert [row.arm for row in facts.rows] == list(ZEROTH_ARMS)
    assert {run.gsm8k for run in trained} == {None, "somewhere"}
    assert facts.rows[0].values["loss"] == 5.0
    assert facts.rows[0].values["loss_std"] == 1.0
    assert list(zeroth(settings)) == [facts, answers]
    for text in ("facts", "gsm8k"):
        assert imread(tmp_path / f"zeroth-{text}.png").shape[2] == 4
    assert len(trained) == 3 * (len(facts.rows) + len(answers.rows))


def test_an_arm_without_a_rate_for_a_text_is_left_out() -> None:
    runs = {name: runs_of(name, "somewhere", ZerothSettings()) for name in ZEROTH_ARMS}
    assert {name for name, chosen in runs.items() if chosen} == {
        name for name, arm in ZEROTH_ARMS.items() if arm.gsm8k_rate is not None
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"forwards": 15}, "forwards=15: give at least 16"),
        ({"seeds": 0}, "seeds=0"),
        ({"arms": ["9 directions"]}, "arms: no arm '9 directions'; there are rademacher"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"zeroth.{message}"):
        ZerothSettings(**given)
