"""What the top level of each command's configuration may hold; anything else is an error that names it.

Groups whose files have a `_target_` are open here: the constructor behind it refuses unknown keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Named:
    """A group that is known by name and writes its settings elsewhere."""

    name: str = MISSING


@dataclass
class Rates:
    """`lightning_offload.memory.rates.Rates`: all of them, or none."""

    fp32_tflops: float | None = None
    bf16_tflops: float | None = None
    device_gb_per_s: float | None = None
    h2d_gb_per_s: float | None = None
    d2h_gb_per_s: float | None = None
    duplex: float | None = None
    pageable_gb_per_s: float | None = None
    host_gb_per_s: float | None = None
    op_us: float | None = None


@dataclass
class Hardware:
    """What `lightning_offload.memory.budget.machine_from` takes; without rates this machine is meant and measured.

    A real run stays within `device_gib` and `host_gib`.
    """

    name: str = MISSING
    device_type: str | None = None
    device_gib: float | None = None
    host_gib: float | None = None
    cores: int | None = None
    link: str | None = None
    rates: Rates | None = field(default_factory=Rates)


@dataclass
class Running:
    """What the commands with a Trainer share."""

    seed: int = 0
    lr: float | None = None  # every model file brings the learning rate to start from; training alone uses it
    zeroth_lr: float | None = None  # and that of methods without gradients
    model: Any = None
    data: Any = None
    ckpt_path: str | None = None
    trainer: Any = MISSING
    precision: Any = MISSING
    method: Named = field(default_factory=Named)
    hardware: Hardware = field(default_factory=Hardware)


@dataclass
class Train(Running):
    """`lightning-offload train`."""

    name: str | None = None
    runs_dir: str = "runs"
    export: bool = True
    plan: bool = True
    trace: bool = True
    optimizer: Any = MISSING
    scheduler: Any = None
    callbacks: Any = None
    logger: Any = None


@dataclass
class Plan(Train):
    """`lightning-offload plan`: what a run takes, so that its arguments can be planned as they are."""

    compare: bool = False
    union: float = MISSING
    output: str | None = None


@dataclass
class Doctor:
    """`lightning-offload doctor`."""

    device: str | None = None


@dataclass
class Evaluate(Running):
    """`lightning-offload evaluate`."""

    output: str | None = None
    split: str = MISSING
    prompt: str = MISSING
    max_new_tokens: int = MISSING


@dataclass
class Export:
    """`lightning-offload export`."""

    ckpt_path: str = MISSING
    log: str | None = None
    base: str | None = None
    output: str | None = None
    dtype: str | None = None
    max_shard_gib: float = 2.0
    merge: bool = False


@dataclass
class Compare:
    """`lightning-offload compare`."""

    runs: Any = MISSING  # a folder, or a list of them
    output: str | None = None


@dataclass
class Quality:
    """`lightning_offload.bench.QualitySettings`."""

    arms: list[str] | None = None
    steps: int = MISSING
    batch: int = MISSING
    length: int = MISSING
    seeds: int = MISSING
    held_out_tokens: int = MISSING
    jobs: int = MISSING
    folder: str = MISSING
    gsm8k: str | None = None


@dataclass
class Zeroth:
    """`lightning_offload.bench.ZerothSettings`."""

    arms: list[str] | None = None
    forwards: int = MISSING
    seeds: int = MISSING
    folder: str = MISSING
    gsm8k: str | None = None


@dataclass
class Recall:
    """`lightning_offload.bench.RecallSettings`."""

    arms: list[str] | None = None
    steps: int = MISSING
    batch: int = MISSING
    paraphrases: int = MISSING
    seeds: int = MISSING
    folder: str = MISSING


@dataclass
class Bench:
    """`lightning-offload bench`."""

    sections: list[str] | None = None
    models: list[str] = MISSING
    batch: int = MISSING
    length: int = MISSING
    numel: int = MISSING
    rounds: int = MISSING
    training_rounds: int = MISSING
    steps: int = MISSING
    quality: Quality = field(default_factory=Quality)
    zeroth: Zeroth = field(default_factory=Zeroth)
    recall: Recall = field(default_factory=Recall)
    output: str | None = None


def register() -> None:
    """Make the schemas known to Hydra, as the first entry of each command's defaults list."""
    store = ConfigStore.instance()
    for schema in (Train, Evaluate, Export, Bench, Plan, Doctor, Compare):
        store.store(name=f"{schema.__name__.lower()}_schema", node=schema)
