"""How many facts the shipped model can recall, closed book, after each method has been shown them: exact match."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from lightning_offload.bench.measure import seed_spread
from lightning_offload.bench.quality_runs import Cache, Result, one_thread, pretrained, rate_factor
from lightning_offload.bench.recall_arms import RECALL_ARMS
from lightning_offload.bench.report import Row, Table
from lightning_offload.text import TINY_PATH, Facts
from lightning_offload.text.answers import right_answers
from lightning_offload.text.loading import load_tokenizer
from lightning_offload.text.loss import next_token_loss

FACTS: Mapping[str, int] = {"families": 100, "members": 1, "attributes": 2, "answers": 400, "unseen": 0}
"""One fact follows from no other; half of the 200 are for choosing rates, half are reported."""

ANSWER_TOKENS = 12
"""That an answer may have; the longest right one has fewer."""


@dataclass(frozen=True, kw_only=True)
class RecallSettings:
    """Settings of the section ``recall``.

    Attributes:
        arms: Which of ``RECALL_ARMS``; None is all.
        steps: Optimizer steps of each training.
        batch: Facts per step.
        paraphrases: Ways to put a question; from 2 on facts are asked in one that they were not trained with.
        seeds: Trainings per arm.
        folder: Where finished trainings are remembered; another run with the same folder goes on from there.

    Raises:
        ValueError: An arm that there is not, or a number below 1.
    """

    arms: Sequence[str] | None = None
    steps: int = 300
    batch: int = 16
    paraphrases: int = 3
    seeds: int = 3
    folder: str = "runs/recall"

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, naming the setting and what there is."""
        for name in ("steps", "batch", "paraphrases", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"recall.{name}={getattr(self, name)}: give at least 1")
        unknown = [name for name in self.arms or () if name not in RECALL_ARMS]
        if unknown:
            raise ValueError(f"recall.arms: no arm {unknown[0]!r}; there are {', '.join(RECALL_ARMS)}")

    def runs(self, name: str) -> list[RecallRun]:
        """Of an arm, a training per seed."""
        arm, shape = RECALL_ARMS[name], {key: getattr(self, key) for key in ("steps", "batch", "paraphrases")}
        seeds = range(1, self.seeds + 1)  # 0 chose the rate
        return [RecallRun(arm=name, settings=arm.settings, rate=arm.rate, seed=seed, **shape) for seed in seeds]


@dataclass(frozen=True, kw_only=True)
class RecallRun:
    """All that decides what a training comes to.

    Attributes:
        arm: Of ``RECALL_ARMS``.
        settings: Of the arm.
        rate: Highest learning rate.
        seed: Of the batches, and of what the arm draws; the facts are the same.
        steps: Optimizer steps.
        batch: Facts per step.
        paraphrases: See ``RecallSettings``.
        split: Facts that are asked: ``"val"`` chooses rates, ``"test"`` is reported.
    """

    arm: str
    settings: Mapping[str, Any]
    rate: float
    seed: int
    steps: int
    batch: int
    paraphrases: int
    split: str = "test"


@dataclass(frozen=True, kw_only=True)
class Recalled(Result):
    """What a training came to.

    Attributes:
        right_percent: Of the questions, those answered by exactly the right answer; greedily.
        parameters: Numbers that were trained.
    """

    right_percent: float
    parameters: int


def train(run: RecallRun) -> Recalled:
    """Train the shipped model on one thread, in fp32; the same for the same ``run``."""
    with one_thread():
        begun = process_time()
        torch.manual_seed(run.seed)
        data, network = _facts(run), deepcopy(pretrained())
        fit = RECALL_ARMS[run.arm].make(network, run.rate, **run.settings)
        seconds = []
        for step, batch in enumerate(islice(_endless(data), run.steps), 1):
            start = perf_counter()
            for group in fit.optimizer.param_groups:
                group["lr"] = run.rate * rate_factor(step, run.steps)
            fit.step(next_token_loss(network, batch, chunk_tokens=0).mean)
            seconds.append(perf_counter() - start)
        loss, right = ask(network.eval(), data, run.split)
        return Recalled(
            loss=loss,
            curve=[(run.steps, loss)],
            step_s=median(seconds),
            cpu_s=process_time() - begun,
            device_bytes=fit.device_bytes,
            host_bytes=fit.host_bytes,
            right_percent=100 * right,
            parameters=fit.parameters,
        )


def _facts(run: RecallRun) -> Facts:
    """The same facts for every seed, in an order of its own."""
    shape: dict[str, Any] = {**FACTS, "paraphrases": run.paraphrases, "ask": "trained"}
    data = Facts(sequence_length=40, batch_size=run.batch, val_batch_size=128, **shape)
    data.tokenizer = load_tokenizer(None, TINY_PATH)
    data.setup("fit")
    data.seed = run.seed
    return data


def _endless(data: Facts) -> Iterator[dict[str, Tensor]]:
    """Batches of training, epoch after epoch."""
    loader = data.train_dataloader()
    while True:  # every iteration goes on where the last one stopped
        yield from loader


@torch.no_grad()
def ask(network: Any, data: Facts, split: str) -> tuple[float, float]:
    """Mean loss over the tokens of the answers, and the share that is given exactly."""
    total, tokens, right = 0.0, 0, []
    for batch in data.test_dataloader() if split == "test" else data.val_dataloader():
        loss = next_token_loss(network, batch, chunk_tokens=0)
        total, tokens = total + float(loss.mean * loss.tokens), tokens + int(loss.tokens)
        given = right_answers(
            network, batch, tokenizer=data.tokenizer, data=data, match="exact", max_new_tokens=ANSWER_TOKENS
        )
        right += given.tolist()
    return total / tokens, fmean(right)


def recall(settings: RecallSettings) -> Iterator[Table]:
    """One table; with widths among the arms, exact match against trained parameters in the folder: ``recall.png``."""
    cache, done, missing = Cache(Path(settings.folder), train, Recalled), {}, []
    for name in settings.arms or RECALL_ARMS:
        why = RECALL_ARMS[name].why_not()
        if why is None:
            done[name] = [cache.result(run) for run in settings.runs(name)]
        else:
            missing.append(f"{name}: {why}")
    yield recall_table(done, settings, missing)
    if done:
        draw_recall(done, Path(settings.folder, "recall.png"))


_ABOUT = (
    "plain torch on one thread, fp32, no weight decay; rates chosen with seed 0 on the other half, from few",
    "bytes are of what is trained, between steps: weights and moments; in a step meft has its rows in use there too",
)


def recall_table(done: Mapping[str, list[Recalled]], settings: RecallSettings, missing: Sequence[str] = ()) -> Table:
    """A row per arm: mean and spread over the seeds of what is answered right, and of the loss on the answers."""
    rows = tuple(Row(name, _values(RECALL_ARMS[name].rate, settings.steps, results)) for name, results in done.items())
    way = "as they were trained" if settings.paraphrases == 1 else "in a way not seen with them"
    title = f"recall of trained facts, asked {way}, {settings.steps} steps of {settings.batch}, {settings.seeds} seeds"
    described = [f"{name}: {RECALL_ARMS[name].note}" for name in done]
    return Table("recall", title, rows, (*_ABOUT, *described, *missing))


def _values(rate: float, steps: int, results: Sequence[Recalled]) -> dict[str, float]:
    right, losses = [result.right_percent for result in results], [result.loss for result in results]
    return {
        "right_percent": fmean(right),
        "right_std": seed_spread(right),
        "loss": fmean(losses),
        "loss_std": seed_spread(losses),
        "steps": steps,
        "lr": rate,
        "trained_k": results[0].parameters / 1000,
        "device_kib": results[0].device_bytes / 1024,
        "host_kib": results[0].host_bytes / 1024,
        "step_s": median(result.step_s for result in results),
    }


def draw_recall(done: Mapping[str, list[Recalled]], out: Path) -> Path:
    """Draw exact match against trained parameters: a point per seed, a line through the means of each family of arms.

    Args:
        done: Of each arm, seed by seed.
        out: The picture to write.

    Returns:
        ``out``.
    """
    # by object: pyplot would keep figures in global state and could open a window
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7.2, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    families: dict[str, list[list[Recalled]]] = {}
    for name, results in done.items():
        families.setdefault(name.rpartition(" ")[0] or name, []).append(results)
    for at, (family, arms) in enumerate(families.items()):
        points = sorted((results[0].parameters / 1e6, fmean(r.right_percent for r in results)) for results in arms)
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{at}", markeredgecolor="white", label=family)
        for result in (result for results in arms for result in results):
            axes.plot(result.parameters / 1e6, result.right_percent, ".", color=f"C{at}", markersize=4, alpha=0.5)
    axes.set(xlabel="trained parameters (millions)", ylabel="facts recalled (%)", xscale="log")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out)
    return out
