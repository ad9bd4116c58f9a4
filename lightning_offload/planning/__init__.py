"""Know before you run: a dry run of one training step, as a plan."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_offload.errors import OffloadError
from lightning_offload.memory.budget import Machine, machine_from
from lightning_offload.methods.base import Clip
from lightning_offload.methods.row_source import PUBLISHED_UNION
from lightning_offload.methods.settings import CommonSettings
from lightning_offload.methods.twin import Step
from lightning_offload.planning.advice import advise
from lightning_offload.planning.methods import (
    PRECISIONS,
    SPARSE,
    ZEROTH,
    Precision,
    default_optimizer,
    methods,
    settings_of,
)
from lightning_offload.planning.result import Advice, Memory, Plan
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.planning.schedules import draw_schedules

__all__ = ["Advice", "Memory", "Plan", "draw_schedules", "methods", "plan"]


def plan(
    module: nn.Module,
    batch: Any,
    *,
    method: str = "full",
    settings: CommonSettings | None = None,
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-true"] | Precision = "32-true",
    hardware: str | Machine = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: Literal["norm", "value"] = "norm",
    step: Step | None = None,
    union: float = PUBLISHED_UNION,
    compare: bool = False,
) -> Plan:
    """Predict one training step: memory by place, time by lane, whether it fits, and what to change if not.

    The module's own step and the real engine run on a fake twin of the module: nothing is allocated, no weights are
    needed, and ``module`` is not touched. On two cores a model of 8B parameters takes about 4 s, one of 175B about
    16 s; advice for one that does not fit costs a dry run per trial.

    Args:
        module: A ``LightningModule``, or any module; on any device, ``meta`` included (``with torch.device("meta")``).
        batch: One micro-batch, as ``training_step`` gets it; values do not matter.
        method: ``"full"``, ``"lsp"``, ``"zo2"``, ``"meft"``, ``"none"`` (everything on the device) or
            ``"zero-offload"`` (its schedule).
        settings: Of the method (``LSPSettings``, ``ZO2Settings``, ``MEFTSettings``, else ``FullSettings``); its
            ``max_device_gib`` and ``max_host_gib`` make the machine smaller, as in a run.
        precision: As for the Trainer; ``"16-true"`` for zo2 alone. Or an ``OffloadPrecision``.
        hardware: A name of ``conf/hardware`` (``"rtx4090"``, ``"laptop_4gb"``), ``"auto"`` for this machine (measured
            once, about 2 s), or a ``Machine`` with rates.
        optimizer: Over the module's parameters; default ``configure_optimizers``, else AdamW, of zo2 SGD.
        accumulate_grad_batches: Micro-batches per step.
        gradient_clip_val: As for the Trainer.
        gradient_clip_algorithm: As for the Trainer.
        step: ``(module, batch) -> loss`` for modules whose own step does not run without values, or steps by itself.
        union: Of meft: share of a layer's rows that the tokens of a micro-batch use, which only data can tell.
        compare: Also plan all other methods; one that cannot be planned is left out, and a note says why.

    Raises:
        TwinError: The step does not run without values; says where, and what to pass.
        OffloadError: The module does not say how to make a loss.
        PartitionError: A model that cannot be split.
        ValueError: An unknown method, precision or hardware, a machine without rates, a setting that cannot work, or
            nothing to train.
    """
    plugin = precision if isinstance(precision, Precision) else None
    name: Any = precision if plugin is None else plugin.precision
    _check_choices(method, name, accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm)
    _check_objects(module, method, settings, optimizer)
    _check_parameters(module, optimizer, frozen=method == SPARSE)
    if not 0 < union <= 1:
        raise ValueError(f"`union` must be a share, above 0 and at most 1, got {union!r}")
    settings = settings or settings_of(method)()
    machine = _machine(hardware).capped(device_bytes=settings.max_device_bytes, host_bytes=settings.max_host_bytes)
    scenario = Scenario(
        module=module,
        batch=batch,
        machine=machine,
        method=method,
        settings=settings,
        precision=name,
        plugin=plugin,
        micro_batches=accumulate_grad_batches,
        clip=Clip(gradient_clip_val, gradient_clip_algorithm) if gradient_clip_val else None,
        optimizer=optimizer,
        step=step,
        union=union,
    )
    made = Dry(scenario).plan()
    others, notes = _others(scenario) if compare else ([], [])
    return replace(
        made,
        advice=advise(scenario, made),
        others=tuple(others),
        notes=(*made.notes, *_without_effect(settings, machine), *notes),
    )


def _others(scenario: Scenario) -> tuple[list[Plan], list[str]]:
    """The same with every other method; why, of those that it is impossible with."""
    plans, notes = [], []
    for method in methods():
        if method == scenario.method:
            continue
        other: dict[str, Any] = {"method": method}
        if ZEROTH in (method, scenario.method):  # neither takes the other's optimizer
            trained = [p for p in scenario.module.parameters() if p.requires_grad]
            other["optimizer"] = default_optimizer(method)(trained)
        try:
            plans.append(Dry(replace(scenario, **other)).plan())
        except (ValueError, OffloadError) as error:
            notes.append(f"{method} cannot be compared: {error}")
    return plans, notes


def _without_effect(settings: CommonSettings, machine: Machine) -> list[str]:
    if settings.max_device_gib is None or machine.device_type != "cpu":
        return []
    return [
        f"`max_device_gib={settings.max_device_gib:g}` (`hardware.device_gib`) has no effect: the CPU is the device, "
        "and its memory is the host's (`max_host_gib`, `hardware.host_gib`)"
    ]


def _check_choices(method: str, precision: object, micro_batches: int, clip: float | None, algorithm: str) -> None:
    """Refuse what no Trainer takes either, naming the argument."""
    if method not in methods():
        raise ValueError(f"`method` must be one of {', '.join(methods())}, got {method!r}")
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"`accumulate_grad_batches` must be an integer >= 1, got {micro_batches!r}")
    number = isinstance(clip, int | float) and not isinstance(clip, bool)
    if clip is not None and not (number and clip >= 0):
        raise ValueError(f"`gradient_clip_val` must be a number >= 0, or None, got {clip!r}")
    if algorithm not in ("norm", "value"):
        raise ValueError(f"`gradient_clip_algorithm` must be 'norm' or 'value', got {algorithm!r}")


def _check_objects(module: object, method: str, settings: object, optimizer: object) -> None:
    """Refuse what is of another kind, naming the argument."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"`module` must be a torch.nn.Module, got {module!r}; pass an instance")
    kind = settings_of(method)
    if settings is not None and not isinstance(settings, kind):
        raise ValueError(f"`settings` must be {kind.__name__}(...) for method={method!r}, or None, got {settings!r}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"`optimizer` must be a torch.optim.Optimizer, or None, got {optimizer!r}; pass an instance, built from "
            "`module.parameters()`"
        )


def _check_parameters(module: nn.Module, optimizer: torch.optim.Optimizer | None, *, frozen: bool) -> None:
    """Refuse a module without shapes or with nothing to train but where it is frozen, and an optimizer of others."""
    owner = type(module).__name__
    lazy = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"`module` ({owner}) has parameters without a shape yet (lazy): {', '.join(lazy)}; run one forward first, "
            "or give the layers their sizes"
        )
    if not any(True for _ in module.parameters()) and callable(getattr(module, "configure_model", None)):
        raise ValueError(
            f"`module` ({owner}) has no parameters: nothing to train. If its layers are made in `configure_model`, "
            'call `module.configure_model()` first (under `torch.device("meta")` nothing is allocated)'
        )
    known = {id(parameter) for parameter in module.parameters()}
    if not frozen and not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"`module` ({owner}) has no parameter with requires_grad=True: nothing to train")
    groups = optimizer.param_groups if optimizer is not None else []
    if any(id(parameter) not in known for group in groups for parameter in group["params"]):
        raise ValueError("`optimizer` has parameters that are not of `module`; build it from `module.parameters()`")


def hardware_names() -> list[str]:
    """The files of ``conf/hardware``."""
    return sorted(path.name.removesuffix(".yaml") for path in _hardware().iterdir() if path.name.endswith(".yaml"))


def _machine(hardware: str | Machine) -> Machine:
    if isinstance(hardware, Machine):
        if hardware.rates is None:
            raise ValueError(
                f"`hardware` is a Machine without rates ({hardware.name!r}); pass hardware='auto' to have this machine "
                "measured, or replace(machine, rates=Rates.cached(machine))"
            )
        return hardware
    import yaml

    path = _hardware().joinpath(f"{hardware}.yaml")
    if not path.is_file():
        raise ValueError(f"`hardware` must be a Machine or one of {', '.join(hardware_names())}, got {hardware!r}")
    return machine_from(yaml.safe_load(path.read_text())["hardware"])


def _hardware() -> Any:
    return files("lightning_offload.conf").joinpath("hardware")
