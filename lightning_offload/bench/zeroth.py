"""What `zo2` learns at equal numbers of forwards: by several directions, kinds of noise, and as MeZO in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from time import perf_counter, process_time
from typing import Any

import torch
from lightning import seed_everything

from lightning_offload.bench.measure import seed_spread
from lightning_offload.bench.quality_runs import Cache, Result, one_thread, pretrained
from lightning_offload.bench.report import Row, Table
from lightning_offload.errors import NonFiniteError
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import InlineLanes
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from lightning_offload.text import TINY_PATH, Facts, Gsm8k, TextData
from lightning_offload.text.loading import load_tokenizer
from lightning_offload.text.loss import next_token_loss

POINTS = 12
"""Of a curve, after its start."""

GSM8K_TOKENS, GSM8K_BATCH = 256, 4
"""Of an example, and examples per step."""

HELD_OUT_BATCHES = 8
"""That the loss is measured on, at most: all facts, or 128 answers of GSM8K."""


@dataclass(frozen=True)
class ZerothArm:
    """A way to spend forwards.

    Attributes:
        settings: Of ``zo2``, by name.
        rate: Highest learning rate on facts; chosen with seed 0 on validation facts.
        gsm8k_rate: The same on GSM8K; None where it is not trained.
    """

    settings: Mapping[str, Any]
    rate: float
    gsm8k_rate: float | None = None


ZEROTH_ARMS: Mapping[str, ZerothArm] = {
    "rademacher": ZerothArm({"distribution": "rademacher"}, 6e-4, 4e-4),
    "2 directions": ZerothArm({"distribution": "rademacher", "directions": 2}, 1.2e-3),
    "4 directions": ZerothArm({"distribution": "rademacher", "directions": 4}, 2.4e-3),
    "8 directions": ZerothArm({"distribution": "rademacher", "directions": 8}, 4.8e-3),
    "popcount": ZerothArm({}, 6e-4),
    "gaussian": ZerothArm({"distribution": "gaussian"}, 6e-4),
    "MeZO, all resident": ZerothArm({"noise": "mezo", "resident": 1.0}, 6e-4),
}
"""By name. Directions are compared with the noise that costs least on the CPU; popcount is the default."""


@dataclass(frozen=True, kw_only=True)
class ZerothSettings:
    """Settings of the section ``zeroth``.

    Attributes:
        arms: Which of ``ZEROTH_ARMS``; None is all.
        forwards: Of each training.
        seeds: Trainings per arm.
        folder: Where finished trainings are remembered; another run with the same folder goes on from there.
        gsm8k: Folder of GSM8K's two splits: train on that as well.

    Raises:
        ValueError: An arm that there is not, too few forwards for a step of each, or no seed.
    """

    arms: Sequence[str] | None = None
    forwards: int = 800
    seeds: int = 3
    folder: str = "runs/zeroth"
    gsm8k: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, naming the setting."""
        most = max(directions_of(arm.settings) for arm in ZEROTH_ARMS.values())
        for name, least in (("forwards", 2 * most), ("seeds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"zeroth.{name}={getattr(self, name)}: give at least {least}")
        unknown = [name for name in self.arms or () if name not in ZEROTH_ARMS]
        if unknown:
            raise ValueError(f"zeroth.arms: no arm {unknown[0]!r}; there are {', '.join(ZEROTH_ARMS)}")


@dataclass(frozen=True, kw_only=True)
class ZerothRun:
    """All that decides what a training comes to.

    Attributes:
        arm: Of ``ZEROTH_ARMS``.
        settings: Of ``zo2``.
        rate: Highest learning rate; it falls linearly.
        seed: Of the batches and of the noise.
        forwards: Of all steps.
        split: Held-out facts: ``"val"`` chooses rates, ``"test"`` is reported.
        gsm8k: Folder of GSM8K, to train on that; None is generated facts.
    """

    arm: str
    settings: Mapping[str, Any]
    rate: float
    seed: int
    forwards: int
    split: str = "test"
    gsm8k: str | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.forwards // (2 * directions_of(self.settings))


def train(run: ZerothRun) -> Result:
    """Train all weights of the shipped model on one thread, in fp32."""
    with one_thread():
        begun = process_time()
        seed_everything(run.seed, verbose=False)
        network, data = deepcopy(pretrained()), _data(run)
        optimizer = torch.optim.SGD(network.parameters(), lr=run.rate)
        method = ZO2(ZO2Settings(seed=run.seed, **run.settings))
        engine = ZerothEngine(network, optimizer, method, InlineLanes(HostMemory(pin=False)), DTypes())
        try:
            curve, seconds = _trained(engine, data, run)
            loss = curve[-1][1]
        except NonFiniteError:
            curve, seconds, loss = [], [0.0], float("inf")
        device_bytes, host_bytes = engine.device_bytes, engine.lanes.memory.report().allocated_bytes
        engine.detach()
        return Result(
            loss=loss,
            curve=curve,
            step_s=median(seconds),
            cpu_s=process_time() - begun,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
        )


def _trained(engine: ZerothEngine, data: TextData, run: ZerothRun) -> tuple[list[tuple[int, float]], list[float]]:
    """Forwards done and held-out loss; seconds of each step."""
    network: Any = engine.module
    loader = data.test_dataloader() if run.split == "test" else data.val_dataloader()
    held_out = partial(held_out_loss, network, list(islice(loader, HELD_OUT_BATCHES)))
    curve, seconds = [(0, held_out())], []
    points = {round(run.steps * point / POINTS) for point in range(1, POINTS + 1)}
    for step, batch in enumerate(islice(_endless(data), run.steps), 1):
        start = perf_counter()
        for group in engine.optimizer.param_groups:
            group["lr"] = run.rate * (run.steps + 1 - step) / run.steps
        engine.micro_batch(lambda part: next_token_loss(network, part, chunk_tokens=0).mean, [batch])
        engine.step()
        seconds.append(perf_counter() - start)
        if step in points:
            curve.append((step * run.forwards // run.steps, held_out()))
    return curve, seconds


def _data(run: ZerothRun) -> TextData:
    """The same examples for every seed, in an order of its own."""
    if run.gsm8k is None:
        data: TextData = Facts(sequence_length=32, batch_size=16, val_batch_size=128)
    else:
        data = Gsm8k(path=run.gsm8k, sequence_length=GSM8K_TOKENS, batch_size=GSM8K_BATCH, val_batch_size=16)
    data.tokenizer = load_tokenizer(None, TINY_PATH)
    data.setup("fit")
    data.seed = run.seed
    return data


def _endless(data: TextData) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of training, epoch after epoch."""
    loader = data.train_dataloader()
    while True:  # every iteration goes on where the last one stopped
        yield from loader


@torch.no_grad()
def held_out_loss(network: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean over the tokens of all answers."""
    losses = [next_token_loss(network, batch, chunk_tokens=0) for batch in batches]
    return sum(float(loss.mean * loss.tokens) for loss in losses) / sum(int(loss.tokens) for loss in losses)


def directions_of(settings: Mapping[str, Any]) -> int:
    """Of an arm."""
    return int(settings.get("directions", 1))


def zeroth(settings: ZerothSettings) -> Iterator[Table]:
    """A table of facts, and one of GSM8K where it is given; their curves in the folder, as ``zeroth-<text>.png``."""
    cache = Cache(Path(settings.folder), train)
    for gsm8k in [None] if settings.gsm8k is None else [None, settings.gsm8k]:
        arms = [runs_of(name, gsm8k, settings) for name in settings.arms or ZEROTH_ARMS]
        done = [(runs[0], [cache.result(run) for run in runs]) for runs in arms if runs]
        rows = tuple(_row(run, results) for run, results in done)
        text = "answers of GSM8K" if gsm8k else "unseen facts"
        picture = Path(settings.folder, f"zeroth-{'gsm8k' if gsm8k else 'facts'}.png")
        draw_curves({run.arm: results for run, results in done}, picture, text)
        yield Table("zeroth", f"{text}, {settings.forwards:,} forwards, {settings.seeds} seeds", rows, (_ABOUT,))


def runs_of(name: str, gsm8k: str | None, settings: ZerothSettings) -> list[ZerothRun]:
    """Of one arm, a training per seed; none where it has no rate for this text."""
    arm = ZEROTH_ARMS[name]
    rate = arm.rate if gsm8k is None else arm.gsm8k_rate
    if rate is None:
        return []
    shared = partial(ZerothRun, arm=name, settings=arm.settings, rate=rate, forwards=settings.forwards, gsm8k=gsm8k)
    return [shared(seed=seed) for seed in range(1, settings.seeds + 1)]


def draw_curves(results: Mapping[str, list[Result]], out: Path, text: str) -> Path:
    """Draw loss against forwards: every seed thin, their mean thick.

    Args:
        results: Of each arm, seed by seed.
        out: The picture to write.
        text: What the loss is of.

    Returns:
        ``out``.
    """
    # by object: pyplot would keep figures in global state and could open a window
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for at, (arm, seeds) in enumerate(results.items()):
        curves = [result.curve for result in seeds if result.curve]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=f"C{at}", linewidth=0.7, alpha=0.5)
        mean = [(points[0][0], fmean(loss for _, loss in points)) for points in zip(*curves, strict=True)]
        axes.plot(*zip(*mean, strict=True), "o-", color=f"C{at}", markersize=4, markeredgecolor="white", label=arm)
    axes.set(xlabel="forwards", ylabel=f"loss on {text}\n(nats per token)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out)
    return out


_ABOUT = "all weights of the shipped model in fp32; seconds are of one thread of a machine that others may be using"


def _row(run: ZerothRun, results: list[Result]) -> Row:
    losses = [result.loss for result in results]
    values = {
        "directions": directions_of(run.settings),
        "steps": run.steps,
        "lr": run.rate,
        "loss_before": fmean(result.curve[0][1] for result in results),
        "loss": fmean(losses),
        "loss_std": seed_spread(losses),
        "device_kib": results[0].device_bytes / 1024,
        "forward_ms": 1000 * median(result.step_s for result in results) / (2 * directions_of(run.settings)),
    }
    return Row(run.arm, values)
