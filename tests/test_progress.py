"""Progress in a file: plain lines that say where the run is."""

from __future__ import annotations

import re
import sys
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_offload import OffloadStats
from lightning_offload.errors import OffloadError
from lightning_offload.progress import PlainProgress, number, progress_bar, readable
from tests.lit import Lit, offload, trainer

STEPS = {"max_epochs": -1, "max_steps": 6, "enable_progress_bar": True}


class Shown(Lit):
    """Shows its losses in the bar."""

    def log(self, name: str, value: Any, **_: Any) -> None:
        super().log(name, value, prog_bar=True)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = capsys.readouterr().out
    assert "\r" not in text
    assert text.isascii()
    return text.splitlines()


def test_plain_lines_count_steps_and_have_every_column(capsys) -> None:
    stats = OffloadStats(every_n_steps=2, bound_s=1e-3)
    kwargs = {"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    made = trainer(offload(), callbacks=[stats, PlainProgress(every_s=0)], **STEPS, **kwargs)
    module = Shown()
    made.validate(module, verbose=False)
    made.fit(module)
    said = lines(capsys)
    assert said[0] == "validation of 1 batches"
    steps = [line for line in said if "[" in line]
    assert [line[:8] for line in steps] == [f"step {n}/6" for n in range(1, 7)]
    assert re.fullmatch(
        r"step 4/6  loss \S+  samples/s \S+  host GiB \S+  % of bound \S+  \[\d:\d\d:\d\d, \d:\d\d:\d\d left\]",
        steps[3],
    )
    validated = [line for line in said[1:] if "[" not in line]
    assert [re.sub(r"[\d.]+$", "", line) for line in validated] == [f"step {n}/6  val/loss " for n in (3, 6)]


def test_few_lines_and_always_the_last(capsys) -> None:
    made = trainer(callbacks=[PlainProgress(every_s=3600)], **{**STEPS, "accumulate_grad_batches": 2, "max_steps": 5})
    made.fit(Shown())
    assert [line.split()[1] for line in lines(capsys)] == ["1/5", "5/5"]


def test_without_an_end_only_what_is_known_is_said(capsys) -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    made = trainer(callbacks=[PlainProgress(every_s=0), Stops()], max_epochs=-1, enable_progress_bar=True)
    made.fit(Shown())
    assert re.fullmatch(r"step 2  loss \S+  \[0:00:\d\d\]", lines(capsys)[1])


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, kind in ((True, TQDMProgressBar), (False, PlainProgress)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert isinstance(progress_bar(), kind)
    assert isinstance(progress_bar("rich"), RichProgressBar)


def test_rich_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress._RICH_AVAILABLE", False)
    with pytest.raises(OffloadError, match="callbacks=rich needs the package rich: pip install rich"):
        progress_bar("rich")
    with pytest.raises(ValueError, match=r"`kind` must be one of 'auto', 'bar', 'rich', 'plain', got 'fancy'"):
        progress_bar("fancy")
    with pytest.raises(ValueError, match="`every_s` must be at least 0, got -1"):
        PlainProgress(-1)


@pytest.mark.parametrize("kind", ["bar", "rich"])
def test_bars_show_the_same_columns(kind: str, capsys) -> None:
    stats = OffloadStats(every_n_steps=1)
    bar = progress_bar(kind)
    trainer(offload(), callbacks=[stats, bar], **STEPS).fit(Shown())
    shown = bar.get_metrics(bar.trainer, bar.trainer.lightning_module)
    assert list(shown) == ["loss", "samples/s", "host GiB"]
    assert all(isinstance(value, str) and len(value) < 9 for value in shown.values())
    assert "loss" in capsys.readouterr().out


def test_amounts_are_readable() -> None:
    assert [number(x) for x in (3042.6, 12.345, 0.0087051, 1.2e-5, 0.0)] == ["3043", "12.3", "0.00871", "1.2e-05", "0"]
    assert readable({"v_num": 3, "train/loss": 3.24153, "epoch": 2}) == {"loss": "3.24", "epoch": 2}
