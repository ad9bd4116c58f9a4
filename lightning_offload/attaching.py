"""Hangs an engine on a LightningModule that is about to be fitted, whoever asks: a strategy or a mixin."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_offload.memory.arena import LARGE_BYTES, HostMemory
from lightning_offload.memory.blocks import partition
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.cuda import cuda_lanes
from lightning_offload.memory.lanes import InlineLanes, Lanes
from lightning_offload.memory.peers import Peers
from lightning_offload.methods.base import DTypes, Trained
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.meft import MEFTSettings
from lightning_offload.methods.method import Method
from lightning_offload.methods.settings import CommonSettings
from lightning_offload.methods.uses import Uses
from lightning_offload.resuming import chosen_before
from lightning_offload.savings import Run
from lightning_offload.shortage import reported
from lightning_offload.windows import Window, find_window

MakeLanes = Callable[[Machine, CommonSettings], Lanes]
Agree = Callable[[Any], Any]


def make_lanes(device: torch.device, machine: Machine, settings: CommonSettings) -> Lanes:
    """Streams on a GPU; on the CPU everything at once."""
    cap = settings.max_host_bytes
    if device.type == "cpu":
        return InlineLanes(HostMemory(pin=False, cap_bytes=cap), device)
    memory = HostMemory(pin=settings.pin_memory, machine=machine, cap_bytes=cap)
    threads = settings.host_threads
    return cuda_lanes(memory, device, threads if isinstance(threads, int) else None)


def machine_for(module: LightningModule, settings: CommonSettings, device: torch.device, ranks: int = 1) -> Machine:
    """What there is for one of ``ranks`` processes here that train ``module``, within the caps of ``settings``."""
    if 16 * sum(p.numel() for p in module.parameters()) >= LARGE_BYTES:
        gc.collect()  # a Trainer is a reference cycle: what an earlier one held counts as available
    machine = Machine.detect(device).shared_by(ranks)
    return machine.capped(device_bytes=settings.max_device_bytes, host_bytes=settings.max_host_bytes)


def attach(
    who: str,
    trainer: Trainer,
    module: LightningModule,
    method: Method,
    dtypes: DTypes,
    device: torch.device,
    make_lanes: MakeLanes,
    *,
    uses: Uses | None = None,
    peers: Peers | None = None,
    agree: Agree = lambda settings: settings,
) -> Engine:
    """An engine on ``module`` and the Trainer's optimizer, with every ``"auto"`` resolved and said.

    Args:
        who: Named before what is said.
        trainer: Of the fit.
        module: To be trained.
        method: With what was asked for.
        dtypes: Which dtype lives where.
        device: Where it computes.
        make_lanes: The lanes.
        uses: What a plan has found out about the forward.
        peers: The other ranks.
        agree: What all ranks have settled on.
    """
    machine = machine_for(module, method.settings, device, local_ranks(trainer))
    units = partition(module, method.settings.blocks)
    reasons = method.resolve(
        module, units, machine, dtypes, accumulates=accumulates(trainer, module), before=chosen_before(trainer)
    )
    for reason in reasons:
        rank_zero_info(f"{who}: {reason}")
    settled: Any = method  # which alone may change them
    settled.settings = agree(method.settings)
    with reported(lambda: Run(who, module, device, method, dtypes), "`setup`"):
        engine = Engine(
            module,
            trainer.strategy.optimizers[0],
            method,
            make_lanes(machine, method.settings),
            dtypes,
            machine=machine,
            expects_clip=bool(expected_clip(trainer, module)),
            uses=uses,
            units=units,
            peers=peers,
        )
    if engine.own is not None:
        rank_zero_info(f"{who}: {placement(engine)}")
    return engine


def local_ranks(trainer: Trainer) -> int:
    """Processes of this training on this machine."""
    strategy = trainer.strategy
    return strategy.num_processes if isinstance(strategy, DDPStrategy) else 1


def look_for_readers(who: str, trainer: Trainer, module: LightningModule, settings: CommonSettings) -> Window:
    """Which hooks look at weights or gradients in flight, said once."""
    window = find_window(trainer, module)
    if window.weights:
        rank_zero_info(
            f"{who}: {', '.join(window.weights)} may look at weights between steps, so every step waits for its "
            "weights to be back on the device, and weights written there are taken over."
        )
    if window.gradients:
        hooks = ", ".join(window.gradients)
        how = "they stay on the device until the step"
        if isinstance(settings, MEFTSettings):
            how = "each backward waits until those of rows are summed up in host memory, where `.grad` shows them"
        rank_zero_info(f"{who}: {hooks} may look at gradients, so {how}.")
        if getattr(settings, "form", None) == "activations":
            rank_zero_warn(
                f"`form='activations'` has no effect: {hooks} may look at gradients, so they are formed. Remove the "
                "hook, or pass form='gradient'."
            )
    return window


def warn_of_gradient_hooks(who: str, hooked: Iterable[str], why: str) -> None:
    """Hooks on parameters whose gradients nobody sees."""
    names = [f"`{name}`" for name in hooked]
    if names:
        some = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
        rank_zero_warn(f"{who}: hooks on the gradients of {some} never run: {why}")


def expected_clip(trainer: Trainer, module: LightningModule) -> float | None:
    """The Trainer's, or the module's own."""
    own: float | None = own_settings(module).get("gradient_clip_val")
    return trainer.gradient_clip_val or own


def accumulates(trainer: Trainer, module: LightningModule) -> bool:
    """Whether any step of the fit may have more than one micro-batch."""
    own: int = own_settings(module).get("accumulate_grad_batches", 1)
    scheduled = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return trainer.accumulate_grad_batches > 1 or own > 1 or scheduled


def own_settings(module: LightningModule) -> Mapping[str, Any]:
    """What the module says by its own hand (``OffloadMixin.offload``)."""
    offload = getattr(module, "offload", None)
    return offload if isinstance(offload, Mapping) else {}


def placement(engine: Engine) -> str:
    """Where the parameters are trained, in a sentence."""
    assert engine.own is not None
    own, parameters = engine.own.trained, sum(unit.numel for unit in engine.units)
    least = engine.method.settings.min_numel
    stays = engine.method.stays(engine.module)
    small = [t for t in engine.resident.trained if t.parameter.numel() < least and id(t.parameter) not in stays]
    rest = {
        "on the common path in host memory": _numel(engine.host.trained),
        f"on the device (smaller than min_numel={least:,})": _numel(small),
        "on the device": _numel([t for t in engine.resident.trained if t not in small]),
        "frozen": parameters - _numel(engine.trained),
    }
    others = ", ".join(f"{count:,} {where}" for where, count in rest.items() if count)
    return (
        f"{engine.own.describe()}: {_numel(own):,} of {parameters:,} parameters ({_numel(own) / parameters:.0%}); the "
        f"others: {others or 'none'}"
    )


def _numel(trained: list[Trained]) -> int:
    return sum(t.parameter.numel() for t in trained)
