"""Finished runs side by side, from what they logged; a sweep compares its jobs by itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf

from lightning_offload import cli, plots
from lightning_offload.comparing import compare, outcomes

COLUMNS = ["offload/step_s", "offload/tok/s", "offload/device_GiB", "offload/host_GiB", "val/accuracy"]


def logged(folder: Path, method: str, *rows: Sequence[float | str], lr: float = 1.0, version: int = 0) -> Path:
    """A run that has logged rows of step, training loss, held-out loss and more."""
    logs = folder / f"logs/version_{version}"
    logs.mkdir(parents=True)
    header = ",".join(["step", "train/loss", "val/loss", *COLUMNS])
    lines = [",".join(map(str, [*row, *[""] * (3 + len(COLUMNS) - len(row))])) for row in rows]
    (logs / "metrics.csv").write_text("\n".join([header, *lines]))
    config = {"method": {"name": method}, "name": str(folder), "lr": lr, "optimizer": {"lr": lr}, "plan": version > 0}
    OmegaConf.save({**config, "out": f"{folder}/x"}, folder / "config.yaml")
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    full = logged(
        tmp_path / "0",
        "full",
        (0, "", 5, "", "", "", "", 0.5),
        (9, 3, "", "", "", "", ""),
        (10, "", "", 2, 100, 1, 4),
        (20, "", "", 4, 300, 2.5, 4),
        (20, "", 2.5, "", "", "", "", 0.75),
    )
    zo2 = logged(tmp_path / "1", "zo2", (0, "", 5), (50, 4, "", 0.5, 400, "", 1), (100, 3.5, 4))
    return [full, zo2]


def test_outcomes_are_what_was_logged(pair) -> None:
    full, zo2 = outcomes(pair)
    assert (full.label, full.losses, full.steps, full.step_s, full.rate) == ("full", (5, 2.5), 20, 3, 200)
    assert full.metrics == {"accuracy": (0.5, 0.75)}
    assert (full.device_bytes, full.host_bytes) == (2.5 * 2**30, 4 * 2**30)
    assert (zo2.label, zo2.losses, zo2.metrics, zo2.device_bytes) == ("zo2", (5, 4), {}, None)


def test_the_table_and_the_pictures(pair, tmp_path: Path) -> None:
    lines = compare(pair, tmp_path / "out").splitlines()
    assert lines[0].split("  ")[0] == "run"
    assert " ".join(lines[2].split()) == "full 5.000 -> 2.500 0.500 -> 0.750 20 3.00 s 200 tok 2.50 GiB 4.00 GiB"
    assert " ".join(lines[3].split()) == "zo2 5.000 -> 4.000 - 100 500 ms 400 tok - 1.00 GiB"
    assert (tmp_path / "out/comparison.txt").read_text() == "\n".join(lines) + "\n"
    for name in ("loss.png", "comparison.png"):
        assert imread(tmp_path / "out" / name).std() > 0
    alone = plots.plot_losses(pair[:1], tmp_path / "alone.png")
    wide, narrow = (imread(picture).shape[1] for picture in (tmp_path / "out/loss.png", alone))
    assert wide > 1.3 * narrow  # steps, and time beside them


def test_time_is_that_of_the_steps_also_where_a_run_was_continued(tmp_path: Path) -> None:
    run = logged(tmp_path / "a", "full", (10, 3, "", 2), (20, 2, "", 4))
    at = plots.seconds_of(run)
    assert [at(step) for step in (0, 5, 10, 15, 20, 22)] == [0, 10, 20, 40, 60, 68]
    logged(run, "full", (11, 3, ""), (20, 2, "", 1), version=1)
    assert plots.seconds_of(run)(20) == 30


def test_runs_of_one_method_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    runs = [logged(tmp_path / str(n), "lsp", (0, 3, 3), lr=lr, version=n) for n, lr in enumerate((0.1, 0.2))]
    assert plots.labels(runs) == ["lsp, lr=0.1", "lsp, lr=0.2"]
    twins = [logged(tmp_path / name, "lsp", (0, 3, 3)) for name in ("a", "b")]
    assert plots.labels(twins) == ["lsp (a)", "lsp (b)"]
    assert compare(twins, tmp_path / "out").splitlines()[2].split("  ")[0] == "lsp (a)"


def test_what_has_logged_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no logs/version_\*/metrics.csv in .*: nothing to compare"):
        compare([tmp_path], tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["lightning-offload", *arguments])
        try:
            return cli.main()
        except SystemExit as stopped:
            return stopped.code

    return call


QUICK = ["trainer.max_steps=2", "data=facts", "data.families=2", "trainer.limit_val_batches=1"]
QUICK += ["plan=false", "trace=false", "export=false", "callbacks.stats.every_n_steps=1", "trainer.log_every_n_steps=1"]


def test_a_sweep_goes_on_after_a_job_that_cannot_run_and_compares_the_others(run, capsys) -> None:
    assert run("train", "-m", *QUICK, "method=full,lsp", "model.dtype=float32,float33") == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("lightning-offload")]
    assert [line.partition(": ")[0] for line in errors] == [f"lightning-offload train, job {n}" for n in (1, 3)]
    (sweep,) = Path("runs").iterdir()
    assert {path.name for path in sweep.iterdir()} >= {"0", "2", "loss.png", "comparison.png", "comparison.txt"}
    table = (sweep / "comparison.txt").read_text()
    assert table in said.out
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["full", "lsp"]

    assert run("compare", f"runs={sweep}", "output=again") == 0
    assert Path("again/comparison.txt").read_text() == table
    assert run("compare", f"runs=[{sweep}/2,{sweep}/0]") == 0
    assert [line.split()[0] for line in Path("comparison.txt").read_text().splitlines()[2:]] == ["lsp", "full"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "runs has no value; give runs=<value>"),
        (["runs=nowhere"], "no runs in 'nowhere': give runs=<folder of a sweep>"),
        (["runs=[nowhere]"], "no logs/version_*/metrics.csv in nowhere: nothing to compare"),
        (["rums=a"], "no key or group 'rums'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments, said: str, run, capsys) -> None:
    assert run("compare", *arguments) == 2
    assert said in capsys.readouterr().err


def test_help_fits_a_screen(run, capsys) -> None:
    assert run("compare", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("lightning-offload compare")


def test_what_no_run_has_measured_is_not_drawn(tmp_path: Path) -> None:
    runs = [logged(tmp_path / name, name, (1, 3), (2, 2)) for name in ("full", "lsp")]
    text = compare(runs, tmp_path / "out")
    assert " ".join(text.splitlines()[2].split()) == "full - 2 - - - -"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["comparison.txt", "loss.png"]


def test_the_table_is_there_before_the_pictures(tmp_path: Path) -> None:
    runs = [logged(tmp_path / name, name, (1, "", "", 2)) for name in ("full", "lsp")]
    with pytest.raises(ValueError, match="no losses in"):
        compare(runs, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["comparison.txt"]


@pytest.mark.parametrize(("data", "label"), [("Glue", "loss"), ("Sst2", "loss"), ("Jsonl", "loss (nats per token)")])
def test_the_unit_of_a_loss_is_that_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, label: str
) -> None:
    run = logged(tmp_path / "run", "full", (0, 3, 5), (9, 2, 4))
    OmegaConf.save({"data": {"_target_": f"lightning_offload.text.{data}"}}, run / "config.yaml")
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, out: drawn.append(figure) or out)
    plots.plot_losses([run], tmp_path / "loss.png")
    assert drawn[0].axes[0].get_ylabel() == label
