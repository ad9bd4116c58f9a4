"""What is misspelt is refused by name before anything is made, in one line that has the nearest right one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_offload import cli

EVALUATE = "evaluate model=tiny data=python_docs"

KEYS = [
    # a key or a group, its misspelling, what was meant
    ("train modle=tiny", "modle", "model"),
    ("train sed=1", "sed", "seed"),
    ("train +sed=1", "sed", "seed"),
    ("train ++sed=1", "sed", "seed"),
    ("train +debug.x=1", "debug", ""),
    ("train model.dytpe=float32", "model.dytpe", "dtype"),
    ("train +model.dytpe=float32", "dytpe", "dtype"),
    ("train data.batchsize=4", "data.batchsize", "batch_size"),
    ("train ++data.batchsize=4", "batchsize", "batch_size"),
    ("train optimizer.learning_rate=1", "optimizer.learning_rate", ""),
    ("train +optimizer.weigth_decay=1", "weigth_decay", "weight_decay"),
    ("train scheduler.warmup=3", "scheduler.warmup", "warmup_steps"),
    ("train +scheduler.warmup_step=3", "warmup_step", "warmup_steps"),
    ("train trainer.max_stepps=4", "trainer.max_stepps", "max_steps"),
    ("train +trainer.max_stepps=4", "max_stepps", "max_steps"),
    ("train trainer.strategy.dimm=4", "trainer.strategy.dimm", "dim"),
    ("train +trainer.strategy.dimm=4", "dimm", "dim"),
    ("train method=full +trainer.strategy.dim=4", "dim", ""),  # of another method
    ("train method=zo2 +trainer.strategy.epsilon=1", "epsilon", "eps"),
    ("train method=meft +trainer.strategy.widht=1", "widht", "width"),
    ("train callbacks.stats.every_n_step=3", "callbacks.stats.every_n_step", "every_n_steps"),
    ("train +callbacks.stats.every_n_step=3", "every_n_step", "every_n_steps"),
    ("train callbacks.statz.every_n_steps=3", "callbacks.statz", "stats"),
    ("train +callbacks.statz.every_n_steps=3", "callbacks.statz", "stats"),
    ("train +logger.csv.nmae=a", "nmae", "name"),
    ("train logger=wandb +logger.wandbb.project=a", "logger.wandbb", "wandb"),
    ("train hardware.device_gb=4", "hardware.device_gb", "device_gib"),
    ("train +hardware.device_gb=4", "hardware.device_gb", "device_gib"),
    ("train +hardware.rates.h2d_gbps=4", "hardware.rates.h2d_gbps", "h2d_gb_per_s"),
    ("train +precision.masters=float32", "masters", "master"),
    ("train +method.nam=lsp", "method.nam", "name"),
    ("plan +compre=true", "compre", "compare"),
    ("plan +data.seq_len=3", "seq_len", "sequence_length"),
    ("plan +trainer.strategy.dimm=4", "dimm", "dim"),
    (f"{EVALUATE} spilt=val", "spilt", "split"),
    (f"{EVALUATE} +trainer.max_stepps=3", "max_stepps", "max_steps"),
    (f"{EVALUATE} +precision.masters=x", "masters", "master"),
    (f"{EVALUATE} data.sequnce_length=3", "sequnce_length", "sequence_length"),
    ("export ckpt=a", "ckpt", "ckpt_path"),
    ("export ckpt_path=a +outptu=b", "outptu", "output"),
    ("bench section=[rates]", "section", "sections"),
    ("bench +quality.step=3", "quality.step", "steps"),
    ("doctor devise=cpu", "devise", "device"),
    ("compare run=a", "run", "runs"),
]
OPTIONS = [
    ("trian", "trian", "train"),
    ("train model=tinny", "model/tinny", "tiny"),
    ("train data=python_sorce", "data/python_sorce", "python_source"),
    ("train method=lsp_papr", "method/lsp_papr", "lsp_paper"),
    ("train optimizer=adam", "optimizer/adam", "adamw"),
    ("train scheduler=linaer", "scheduler/linaer", "linear"),
    ("train trainer=defualt", "trainer/defualt", "default"),
    ("train callbacks=ritch", "callbacks/ritch", "rich"),
    ("train logger=tensorbord", "logger/tensorbord", "tensorboard"),
    ("train logger=[csv,tensorbord]", "logger/tensorbord", ""),
    ("train hardware=rtx4900", "hardware/rtx4900", "rtx4090"),
    ("train precision=bf16", "precision/bf16", "bf16-true"),
    ("train debug=overfti", "debug/overfti", "overfit"),
    ("train experiment=frist_run", "experiment/frist_run", "first_run"),
    ("evaluate method=steamed", "method/steamed", "streamed"),
    ("plan hardware=h10", "hardware/h10", "h100"),
]
VALUES = [
    ("train method=zo2 trainer.strategy.noise=filox", "filox", ""),
    ("train trainer.strategy.projector=pac", "pac", ""),
    ("train precision.precision=bf16-treu", "bf16-treu", ""),
    ("train callbacks.progress.kind=ritch", "ritch", ""),
    ("train model.init=randon", "randon", ""),
    ("train data=glue data.path=. data.task=sst3", "sst3", ""),
    (f"{EVALUATE} split=vall", "vall", ""),
    ("bench sections=[rate]", "rate", ""),
    ("doctor device=cpuu", "cpuu", ""),
]
FILES = [
    # what a user's own experiment says
    ("max_stepps: 1", "max_stepps", ""),
    ("ecport: false", "ecport", "export"),
    ("trainer: {max_stepps: 1}", "max_stepps", "max_steps"),
    ("trainer: {strategy: {dimm: 8}}", "dimm", "dim"),
    ("data: {batchsize: 3}", "batchsize", "batch_size"),
    ("callbacks: {early: {patience: 3}}", "callbacks.early", ""),
    ("hardware: {rates: {h2d_gbps: 3}}", "hardware.rates.h2d_gbps", "h2d_gb_per_s"),
    ("method: {nam: lsp}", "method.nam", "name"),
    ("defaults: [override /modle: tiny]", "modle", ""),
    ("defaults: [override /model: tinny]", "model/tinny", "tiny"),
]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The one line with which a command is refused; it leaves nothing behind."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lightning-offload", *arguments])
        before = {Path("runs"), *Path().rglob("*")}
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-offload")]
        assert len(said) == 1
        assert not {*Path().rglob("*")} - before
        return said[0]

    return call


@pytest.mark.parametrize(("arguments", "wrong", "right"), [*KEYS, *OPTIONS, *VALUES], ids=lambda value: value or "-")
def test_a_misspelling_is_refused_by_name(arguments: str, wrong: str, right: str, refused) -> None:
    line = refused(*arguments.split())
    assert wrong in line.partition(": ")[2]
    assert ("did you mean" in line) == bool(right)
    assert right in line.partition("did you mean ")[2].partition("?")[0]


@pytest.mark.parametrize(("content", "wrong", "right"), FILES, ids=lambda value: value or "-")
def test_a_misspelling_in_a_file_of_ones_own(content: str, wrong: str, right: str, refused, tmp_path: Path) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_text(f"# @package _global_\n{content}\n")
    line = refused("train", "--config-dir", "mine", "experiment=own")
    assert wrong in line
    assert right in line.partition("did you mean ")[2].partition("?")[0]


def test_keys_of_other_constructors_are_taken(refused) -> None:
    """What several devices add, what language models alone have, and what is passed on without an end."""
    for arguments in (
        "train trainer.devices=2 +trainer.strategy.timeout_s=3 model.init=randon",
        "train data=glue data.task=sst2 data.path=none model.match_answers=exact",
        "train logger=wandb +logger.wandb.tags=[a] model.init=randon",
    ):
        assert "unexpected" not in refused(*arguments.split())
