"""What a user is shown: the bar's columns, the logger's rows, the table of what lives where."""

from __future__ import annotations

import csv
import logging
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_offload import OffloadStats, OffloadSummary
from lightning_offload.callbacks import summary
from tests.helpers import Net
from tests.lit import Lit, fit, offload
from tests.meft import SIZES, picked
from tests.meft_lit import MLit, meft
from tests.zo2 import ZLit, zo2


class SeesTheBar(L.Callback):
    """What a progress bar would show."""

    shown: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.shown = dict(trainer.progress_bar_metrics)


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as lines:
        return [row for row in csv.DictReader(lines) if row.get("offload/grad_norm")]


def test_stats_reach_the_bar_and_the_logger(tmp_path: Path) -> None:
    logger, bar, strategy = CSVLogger(tmp_path), SeesTheBar(), offload()
    fit(Lit(), strategy, logger=logger, callbacks=[OffloadStats(every_n_steps=3), bar], gradient_clip_val=0.05)
    assert {"samples/s", "host GiB"} <= bar.shown.keys()
    assert bar.shown["samples/s"] > 0
    found = rows(logger)
    assert [int(row["step"]) for row in found] == [3, 6, 9, 12, 15, 18]
    assert strategy.engine is not None
    last = found[-1]
    assert float(last["offload/grad_norm"]) == pytest.approx(strategy.engine.report.grad_norm)
    assert float(last["offload/clip_coefficient"]) == pytest.approx(strategy.engine.report.clip_coefficient)
    assert 0 < float(last["offload/clip_coefficient"]) < 1
    assert float(last["offload/skipped_steps"]) == 0
    assert float(last["offload/d2h_gb_per_s"]) > 0
    assert float(last["offload/h2d_gb_per_s"]) > 0


def test_stats_count_tokens_where_there_are_some(tmp_path: Path) -> None:
    class Tokens(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch["input_ids"], batch_idx)

        def train_dataloader(self) -> Any:
            return DataLoader([{"input_ids": tokens} for tokens in super().train_dataloader()], batch_size=None)

    bar = SeesTheBar()
    stats = OffloadStats(every_n_steps=1)
    fit(Tokens(), offload(), callbacks=[stats, bar], max_steps=4)
    assert bar.shown["tok/s"] > 0


def test_the_union_of_meft_is_shown_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, logger, bar, strategy = MLit(), CSVLogger(tmp_path), SeesTheBar(), meft(placement="keys")
    stats = [OffloadStats(every_n_steps=3), OffloadSummary(), bar]
    with caplog.at_level(logging.INFO), picked(module) as seen:
        fit(module, strategy, logger=logger, callbacks=stats, limit_val_batches=0)
    unions = [float(row["offload/union"]) for row in rows(logger)]
    calls = [len(picks.rows) / SIZES["width"] for picks in seen]
    each = len(calls) // len(unions)
    assert unions == pytest.approx([fmean(calls[at : at + each]) for at in range(0, len(calls), each)])
    assert bar.shown["union"] == pytest.approx(unions[-1])
    assert 0 < min(unions) < 1
    assert any("method meft with AdamW, placement keys; host" in record.getMessage() for record in caplog.records)


def test_stats_work_without_an_engine_and_refuse_nonsense(tmp_path: Path) -> None:
    bar = SeesTheBar()
    fit(Lit(), callbacks=[OffloadStats(every_n_steps=2), bar])
    assert "samples/s" in bar.shown
    assert "host GiB" not in bar.shown
    with pytest.raises(ValueError, match=r"`every_n_steps` must be an integer >= 1, got 0"):
        OffloadStats(0)


def test_summary_says_where_everything_lives(caplog: pytest.LogCaptureFixture) -> None:
    strategy = offload(min_numel=60)
    with caplog.at_level(logging.INFO):
        fit(Lit(depth=4, frozen=True), strategy, callbacks=[OffloadSummary()], precision="bf16-true", max_steps=1)
    text = next(r.getMessage() for r in caplog.records if "trained on" in r.getMessage())
    assert strategy.engine is not None
    block = sum(p.numel() for p in Net(depth=1).blocks.parameters())
    small = sum(p.numel() for p in Net(depth=1).blocks.parameters() if p.numel() < 60)
    assert re.search(r"net\.embed +[\d,]+ +bfloat16 +frozen 779 +0\.0", text)
    assert f"host {block - small:,} + device {small:,}" in text
    assert f"frozen {block:,}" in text
    assert "net.blocks.2 .. net.blocks.3 (2 units, each)" in text
    assert "method full with AdamW" in text
    assert summary(strategy.engine).splitlines()[0] == text.splitlines()[0]


def test_summary_bytes_are_those_of_the_arenas(caplog: pytest.LogCaptureFixture) -> None:
    strategy = offload()
    with caplog.at_level(logging.INFO):
        fit(Lit(), strategy, callbacks=[OffloadSummary()], max_steps=1)
    text = next(r.getMessage() for r in caplog.records if "trained on" in r.getMessage())
    assert strategy.engine is not None
    held = strategy.engine.host_bytes(strategy.engine.host.trained)
    assert held == 16 * sum(p.numel() for p in Net().parameters())
    assert f"host {held / 1024**3:.3f} GiB" in text


def test_the_share_of_the_bound_is_shown_and_logged(tmp_path: Path) -> None:
    logger, bar = CSVLogger(tmp_path), SeesTheBar()
    fit(Lit(), offload(), logger=logger, callbacks=[OffloadStats(every_n_steps=3, bound_s=1e-3), bar])
    last = rows(logger)[-1]
    assert float(last["offload/bound_share"]) == pytest.approx(1e-3 / float(last["offload/step_s"]))
    assert bar.shown["% of bound"] == pytest.approx(100 * float(last["offload/bound_share"]))
    with pytest.raises(ValueError, match=r"`bound_s` must be positive seconds or None, got 0"):
        OffloadStats(bound_s=0)


def test_validation_counts_as_no_time_and_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only validation and training batches move on."""
    now_s = 0.0

    class Clocked(ZLit):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            nonlocal now_s
            now_s += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            nonlocal now_s
            now_s += 100
            super().validation_step(batch, batch_idx)

    monkeypatch.setattr("lightning_offload.callbacks.perf_counter", lambda: now_s)
    logger = CSVLogger(tmp_path)
    kwargs = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 2, "max_epochs": -1}
    fit(Clocked(), zo2(), logger=logger, callbacks=[OffloadStats(every_n_steps=3)], max_steps=9, **kwargs)
    with (Path(logger.log_dir) / "metrics.csv").open() as lines:
        found = [row for row in csv.DictReader(lines) if row.get("offload/step_s")]
    assert [float(row["offload/step_s"]) for row in found] == pytest.approx([7 / 3, 2, 2])  # the first looks ahead once
    per_step = [float(row["offload/h2d_gb_per_s"]) * float(row["offload/step_s"]) for row in found]
    assert per_step[1] == pytest.approx(per_step[2])  # though one has seen one validation, the other two
