"""Held-out loss at equal steps: each method's share of what AdamW gains on the same weights, and time to equal loss."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lightning_offload.bench.equal_loss import equal_loss, published_plans
from lightning_offload.bench.measure import CannotRun, seed_spread
from lightning_offload.bench.quality_arms import QUALITY_ARMS
from lightning_offload.bench.quality_runs import Cache, Result, Run
from lightning_offload.bench.report import Row, Table
from lightning_offload.planning.methods import SUBSPACE

TUNING_SEED = 0
"""Of the runs that choose a rate; those that are reported have the seeds after it."""

MOST_RATES = 6

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """Settings of the section ``quality``.

    Attributes:
        arms: Which of ``QUALITY_ARMS``; None is all. Those that an arm is compared with come with it.
        steps: Optimizer steps of each training.
        batch: Sequences per step.
        length: Tokens of each.
        seeds: Trainings per arm at its best rate.
        held_out_tokens: Of the text of the final loss, at most.
        jobs: Processes that train at the same time, on one thread each; 1 is this process.
        folder: Where finished trainings are remembered; another run with the same folder goes on from there.
        gsm8k: Folder with GSM8K's ``train.jsonl`` and ``test.jsonl``: train on that as well.

    Raises:
        ValueError: An arm that there is not, or a number below 1.
    """

    arms: Sequence[str] | None = None
    steps: int = 200
    batch: int = 4
    length: int = 128
    seeds: int = 3
    held_out_tokens: int = 32_768
    jobs: int = 2
    folder: str = "runs/quality"
    gsm8k: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, naming the setting and what there is."""
        for name in ("steps", "batch", "length", "seeds", "held_out_tokens", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"quality.{name}={getattr(self, name)}: give at least 1")
        unknown = [name for name in self.arms or () if name not in QUALITY_ARMS]
        if unknown:
            raise ValueError(f"quality.arms: no arm {unknown[0]!r}; there are {', '.join(QUALITY_ARMS)}")

    @property
    def chosen(self) -> list[str]:
        """The arms, those that others are compared with first."""
        asked = list(self.arms) if self.arms is not None else list(QUALITY_ARMS)
        return list(dict.fromkeys([*(QUALITY_ARMS[name].base for name in asked), *asked]))

    def run(self, arm: str, **others: Any) -> Run:
        """A training of this arm."""
        shape = {name: getattr(self, name) for name in ("steps", "batch", "length", "held_out_tokens")}
        return Run(arm=arm, settings=QUALITY_ARMS[arm].settings, **{**shape, **others})

    @property
    def domains(self) -> list[str | None]:
        """Values of ``Run.gsm8k``."""
        return [None] if self.gsm8k is None else [None, self.gsm8k]


@dataclass(frozen=True)
class Outcome:
    """An arm at its best rate, seed by seed."""

    rate: float
    results: list[Result]

    @property
    def losses(self) -> list[float]:
        """Of each seed."""
        return [result.loss for result in self.results]

    @property
    def curve(self) -> Curve:
        """Mean over the seeds."""
        points = zip(*(result.curve for result in self.results), strict=True)
        return [(seeds[0][0], fmean(loss for _, loss in seeds)) for seeds in points]


def best_rate(loss_at: Callable[[float], float], usual: float) -> float:
    """Half the usual rate, itself, twice it; and on in doublings or halves as long as the best is at an end."""
    losses = {power: loss_at(usual * 2.0**power) for power in (-1, 0, 1)}
    while len(losses) < MOST_RATES:
        best = min(losses, key=losses.__getitem__)
        if min(losses) < best < max(losses):
            break
        beyond = best + 1 if best == max(losses) else best - 1
        losses[beyond] = loss_at(usual * 2.0**beyond)
    return usual * 2.0 ** min(losses, key=losses.__getitem__)


def measure(name: str, gsm8k: str | None, settings: QualitySettings) -> Outcome:
    """Choose the rate on validation text with one seed, then train with others and measure on test text.

    Raises:
        CannotRun: What the arm needs is not here.
    """
    arm, cache = QUALITY_ARMS[name], Cache(Path(settings.folder))
    why = arm.why_not()
    if why is not None:
        raise CannotRun(why)

    def result(rate: float, seed: int, split: str) -> Result:
        found: Result = cache.result(settings.run(name, rate=rate, seed=seed, split=split, gsm8k=gsm8k))
        return found

    rate = best_rate(lambda rate: result(rate, TUNING_SEED, "val").loss, arm.rate)
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + settings.seeds)
    return Outcome(rate, [result(rate, seed, "test") for seed in seeds])


def quality(settings: QualitySettings) -> Iterator[Table]:
    """Per text a table, and one of the time to equal loss where the default of lsp was trained."""
    if settings.jobs > 1:
        _in_processes(settings)
    for gsm8k in settings.domains:
        untrained = settings.run("adamw", rate=0.0, seed=0, steps=0, split="test", gsm8k=gsm8k)
        start = Cache(Path(settings.folder)).result(untrained)
        outcomes, missing = _outcomes(gsm8k, settings)
        title = f"{_title(gsm8k)}, {_shape(settings)}"
        yield quality_table(start.loss, outcomes, title, missing)
        if "lsp_others" in outcomes:
            curves = outcomes["lsp_others"].curve, outcomes["adamw_all"].curve
            yield equal_loss(SUBSPACE, *curves, published_plans(), _title(gsm8k))


def _title(gsm8k: str | None) -> str:
    return "GSM8K" if gsm8k else "Python source"


def _shape(settings: QualitySettings) -> str:
    return f"{settings.steps} steps of {settings.batch} x {settings.length} tokens, {settings.seeds} seeds"


def _outcomes(gsm8k: str | None, settings: QualitySettings) -> tuple[dict[str, Outcome], list[str]]:
    outcomes, missing = {}, []
    for name in settings.chosen:
        try:
            outcomes[name] = measure(name, gsm8k, settings)
        except CannotRun as why:
            missing.append(f"{name}: {why}")
    return outcomes, missing


def quality_table(start: float, outcomes: Mapping[str, Outcome], title: str, notes: Sequence[str] = ()) -> Table:
    """A row per arm: mean and spread of the held-out loss, and the share of its base's gain over ``start``."""
    rows = []
    for name, outcome in outcomes.items():
        base = outcomes[QUALITY_ARMS[name].base].losses
        shares = [100 * (start - own) / (start - other) for own, other in zip(outcome.losses, base, strict=True)]
        values = {
            "device_kib": outcome.results[0].device_bytes / 1024,
            "host_kib": outcome.results[0].host_bytes / 1024,
            "lr": outcome.rate,
            "loss": fmean(outcome.losses),
            "loss_std": seed_spread(outcome.losses),
            "gain_percent": 100 * (start - fmean(outcome.losses)) / (start - fmean(base)),
            "gain_std": seed_spread(shares),
            "step_s": median(result.step_s for result in outcome.results),
        }
        rows.append(Row(name, values))
    described = [f"{name}: {QUALITY_ARMS[name].note}" for name in outcomes]
    about = f"loss before: {start:.4f}; gain: share of what AdamW gains on the same weights"
    return Table("quality", title, tuple(rows), (about, *described, *notes))


def _in_processes(settings: QualitySettings) -> None:
    """Have other processes do the trainings, so that here they are only read; what one could not do is done here."""
    command = [sys.executable, "-c", "from lightning_offload.bench.quality import work; work()"]
    told = json.dumps(asdict(settings))
    workers = [
        subprocess.Popen([*command, told, str(index)], env={**os.environ, "OMP_NUM_THREADS": "1"})
        for index in range(settings.jobs)
    ]
    try:
        for worker in workers:
            worker.wait()
    finally:
        for worker in workers:
            worker.terminate()


def work() -> None:
    """Of one such process: every ``jobs``-th arm, on every text."""
    log = logging.getLogger("lightning_offload")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    settings, index = QualitySettings(**json.loads(sys.argv[1])), int(sys.argv[2])
    for gsm8k in settings.domains:
        for name in settings.chosen[index :: settings.jobs]:
            try:
                measure(name, gsm8k, settings)
            except CannotRun:
                continue
