"""What ``lightning-offload bench`` measures, section by section, and which of it this machine can."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lightning_offload.bench.arms import ARMS
from lightning_offload.bench.host import host_phase
from lightning_offload.bench.noise import noise_cost
from lightning_offload.bench.prediction import predictions
from lightning_offload.bench.quality import QualitySettings, quality
from lightning_offload.bench.recall import RecallSettings, recall
from lightning_offload.bench.report import Report, Row, Table, environment
from lightning_offload.bench.simulated import beside_published, machines, simulate
from lightning_offload.bench.simulated_meft import ONE, WHOLE, beside_meft
from lightning_offload.bench.simulated_zo2 import beside_zo2
from lightning_offload.bench.sizes import sizes
from lightning_offload.bench.training import Workload, compare
from lightning_offload.bench.zeroth import ZerothSettings, zeroth
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.rates import Rates

SMALL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "tie_word_embeddings": False,
}
"""20 M parameters: where there is nothing to gain, what does offloading cost?"""


NOISE_NUMEL = 2**22
"""At most, of the section on noise: it costs the same per element beyond."""


def shape(name: str) -> dict[str, Any]:
    """The config of a model of ``conf/model``; empty where it is not given by shape."""
    import yaml

    text = files("lightning_offload.conf").joinpath(f"model/{name}.yaml").read_text()
    config = yaml.safe_load(text)["model"].get("config")
    return config if isinstance(config, dict) else {}


def model_names() -> list[str]:
    """The models of ``conf/model`` that are given by shape."""
    found = sorted(entry.name for entry in files("lightning_offload.conf").joinpath("model").iterdir())
    names = [name.removesuffix(".yaml") for name in found if name.endswith(".yaml")]
    return [name for name in names if shape(name)]


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of a run.

    Attributes:
        sections: What to measure; None is all that this machine can.
        numel: Parameters of the host phase.
        rounds: Of the host phase; every round runs every arm once.
        training_rounds: Of whole training steps, each of which makes its model anew.
        steps: Training steps per arm and round whose time counts.
        models: Of the sections ``simulated`` and ``training``, by their names in ``conf/model``.
        batch: Sequences per step, for these models.
        length: Tokens of each.
        quality: Of the section of that name.
        zeroth: Likewise.
        recall: Likewise.

    Raises:
        ValueError: A section or a model that there is not, or a number below 1.
    """

    sections: Sequence[str] | None = None
    numel: int = 100_000_000
    rounds: int = 25
    training_rounds: int = 3
    steps: int = 4
    models: Sequence[str] = ("llama_1b3", "llama3_8b")
    batch: int = 8
    length: int = 1024
    quality: QualitySettings = field(default_factory=QualitySettings)
    zeroth: ZerothSettings = field(default_factory=ZerothSettings)
    recall: RecallSettings = field(default_factory=RecallSettings)

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, naming the setting and what there is."""
        for name in ("numel", "rounds", "training_rounds", "steps", "batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        _check("section", self.sections or (), list(SECTIONS))
        _check("model", self.models, model_names())


def _check(what: str, given: Sequence[str], known: list[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{what}s: no {what} {unknown[0]!r}; there are {', '.join(known)}")


@dataclass(frozen=True)
class Section:
    """One part of a run.

    Attributes:
        measure: Its tables, one after the other.
        why_not: Why it is left out here unless it is asked for by name; None where it belongs.
    """

    measure: Callable[[BenchSettings], Iterable[Table]]
    why_not: Callable[[], str | None] = lambda: None


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def _rates() -> Rates:
    """Measured in this process: what other runs have kept may be of another day's load."""
    machine = Machine.detect(_device())
    threads = machine.torch_threads if _device() == "cpu" else machine.host_threads
    return Rates.measured(_device(), host_threads=threads)


def _rates_table(settings: BenchSettings) -> Iterator[Table]:
    rows = tuple(Row(name, {"rate": value}) for name, value in asdict(_rates()).items())
    yield Table("rates", f"rates with {Machine.detect(_device()).device_name} as the device", rows)


def _host(settings: BenchSettings) -> Iterator[Table]:
    yield host_phase(settings.numel, settings.rounds)


def _overhead(settings: BenchSettings) -> Iterator[Table]:
    parameters = "20 M parameters, 8 x 256 tokens"
    work = Workload(
        title=f"step on the CPU, {parameters}", config=SMALL, batch=8, length=256, device="cpu", precision="32-true"
    )
    yield _trained("overhead", work, settings, None)


def _simulated(settings: BenchSettings) -> Iterator[Table]:
    for name in settings.models:
        yield simulate(name, shape(name), batch=settings.batch, length=settings.length)


def _published_zo2(settings: BenchSettings) -> Iterator[Table]:
    known = machines()
    yield from beside_zo2(shape, {where: known[where] for where in ("a100", "rtx4090")})


def _simulated_meft(settings: BenchSettings) -> Iterator[Table]:
    known = machines()
    jobs = [(known[where], job) for where, job in (("rtx3090", ONE), ("rtx3090", WHOLE), ("rtx4090", WHOLE))]
    yield from beside_meft(shape("llama_7b"), jobs)


def _sizes(settings: BenchSettings) -> Iterator[Table]:
    yield from sizes(shape, machines()["h100"])


def _noise(settings: BenchSettings) -> Iterator[Table]:
    yield noise_cost(min(settings.numel, NOISE_NUMEL), settings.rounds)


def _training(settings: BenchSettings) -> Iterator[Table]:
    rates = _rates() if _device() == "cuda" else None  # without a device the lanes are one and the same processor
    for name in settings.models:
        yield _trained("training", _workload(name, settings), settings, rates)


def _workload(name: str, settings: BenchSettings) -> Workload:
    return Workload(
        title=f"{name}, {settings.batch} x {settings.length} tokens",
        config=shape(name),
        batch=settings.batch,
        length=settings.length,
        device=_device(),
        precision="bf16-true",
        clip=1.0,
        recompute=True,
    )


def _trained(section: str, work: Workload, settings: BenchSettings, rates: Rates | None) -> Table:
    rows, notes = compare(work, ARMS, rounds=settings.training_rounds, steps=settings.steps, rates=rates)
    title = f"{work.title}, {work.precision}, {settings.training_rounds} x {settings.steps} steps"
    return Table(section, title, rows, notes)


def _prediction(settings: BenchSettings) -> Iterator[Table]:
    yield predictions(shape, device=_device(), length=settings.length, steps=settings.steps, rates=_rates())


def _needs_cuda(section: str) -> str | None:
    return None if torch.cuda.is_available() else f"there is no CUDA device; sections=[{section}] measures here"


def _whole_trainings(section: str, many: str) -> str:
    return f"it is {many} trainings of about a minute; sections=[{section}] runs them"


SECTIONS: dict[str, Section] = {
    "rates": Section(_rates_table),
    "host": Section(_host),
    "overhead": Section(_overhead),
    "simulated": Section(_simulated),
    "noise": Section(_noise),
    "published": Section(lambda settings: beside_published()),
    "published_zo2": Section(_published_zo2),
    "simulated_meft": Section(_simulated_meft),
    "training": Section(_training, lambda: _needs_cuda("training")),
    "prediction": Section(_prediction, lambda: _needs_cuda("prediction")),
    "quality": Section(
        lambda settings: quality(settings.quality), lambda: _whole_trainings("quality", "over a hundred")
    ),
    "zeroth": Section(lambda settings: zeroth(settings.zeroth), lambda: _whole_trainings("zeroth", "21")),
    "recall": Section(lambda settings: recall(settings.recall), lambda: _whole_trainings("recall", "33")),
    "sizes": Section(_sizes, lambda: "it takes minutes; sections=[sizes] runs it"),
}
"""By name, in the order of a run."""


def run_bench(settings: BenchSettings, folder: Path | None = None, say: Callable[[str], object] = print) -> Report:
    """Measure section by section; each table is said, and written with all before it, as soon as it is done.

    Args:
        settings: What and how long.
        folder: Where ``bench.json`` and ``bench.md`` go; None writes nothing.
        say: Takes Markdown.

    Returns:
        All of it.
    """
    report = Report(environment(), asdict(settings))
    say(report.markdown())
    for name, section in SECTIONS.items():
        if settings.sections is not None and name not in settings.sections:
            continue
        for table in _tables(name, section, settings):
            report = replace(report, tables=(*report.tables, table))
            say(table.markdown())
            if folder is not None:
                report.save(folder)
    return report


def _tables(name: str, section: Section, settings: BenchSettings) -> Iterable[Table]:
    why_not = section.why_not() if settings.sections is None else None
    return [Table(name, name, (), (f"left out: {why_not}",))] if why_not else section.measure(settings)
