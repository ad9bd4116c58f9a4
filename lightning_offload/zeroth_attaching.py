"""Hangs the engine of `zo2` on a LightningModule, whoever asks (a strategy or a mixin), and runs its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_offload.attaching import Agree, MakeLanes, local_ranks, machine_for, warn_of_gradient_hooks
from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.memory.blocks import Unit, partition
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.peers import Peers
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import METHOD
from lightning_offload.methods.uses import Uses
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2
from lightning_offload.parts import parts_of, samples, weight_of
from lightning_offload.resuming import EXTRAS, chosen_before, warn_of_weights_alone
from lightning_offload.savings import Run
from lightning_offload.shortage import reported
from lightning_offload.windows import Window, find_window


def resolved(
    who: str, trainer: Trainer, module: LightningModule, method: ZO2, dtypes: DTypes, device: torch.device
) -> tuple[Machine, list[Unit]]:
    """The machine and the module's units; every ``"auto"`` of ``method`` is chosen and said."""
    machine = machine_for(module, method.settings, device, local_ranks(trainer))
    units = partition(module, method.settings.blocks)
    for reason in method.resolve(units, machine, dtypes, before=chosen_before(trainer)):
        rank_zero_info(f"{who}: {reason}")
    return machine, units


def attach_zeroth(
    who: str,
    trainer: Trainer,
    module: LightningModule,
    method: ZO2,
    dtypes: DTypes,
    device: torch.device,
    make_lanes: MakeLanes,
    *,
    uses: Uses | None = None,
    peers: Peers | None = None,
    agree: Agree = lambda settings: settings,
) -> ZerothEngine:
    """An engine on ``module`` and the Trainer's optimizer.

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

    Raises:
        MisconfigurationException: A module whose step cannot run several times.
    """
    _check_module(module)
    machine, units = resolved(who, trainer, module, method, dtypes, device)
    method.settings = agree(method.settings)
    with reported(lambda: Run(who, module, device, method, dtypes), "`setup`"):
        return ZerothEngine(
            module,
            trainer.strategy.optimizers[0],
            method,
            make_lanes(machine, method.settings),
            dtypes,
            machine=machine,
            uses=uses,
            units=units,
            peers=peers,
        )


def look_for_zeroth_readers(who: str, trainer: Trainer, module: LightningModule) -> Window:
    """Which hooks look at weights between steps, or for gradients, said once."""
    window = find_window(trainer, module)
    if window.weights:
        rank_zero_info(
            f"{who}: {', '.join(window.weights)} may look at weights between steps, so every step brings all of them "
            "up once more for its update. Move that to `on_validation_start` to save it."
        )
    if window.gradients:
        rank_zero_warn(f"{who}: {', '.join(window.gradients)} will find no gradients: zo2 has none.")
    return window


def look_for_gradient_hooks(who: str, module: nn.Module) -> None:
    """Which parameters have hooks that wait for gradients, said."""
    named = module.named_parameters()
    hooked = [name for name, p in named if p._backward_hooks or p._post_accumulate_grad_hooks]
    warn_of_gradient_hooks(who, hooked, "zo2 has none. Remove them.")


def run_micro_batch(engine: ZerothEngine, module: nn.Module, run: Callable[[Any], Any], batch: Any) -> Tensor:
    """All forwards of one micro-batch; returns l+, detached.

    Args:
        engine: Of the fit.
        module: Whose modes are set for the time of the forwards.
        run: What a ``training_step`` returns for a part of the batch.
        batch: Cut into ``micro_batches`` parts.
    """
    settings = engine.method.settings
    if settings.micro_batches > 1 and not samples(batch):
        _warn_whole(type(batch).__name__, settings.micro_batches)
    parts = parts_of(batch, settings.micro_batches)
    with _mode(module, train=settings.train_mode):
        return engine.micro_batch(lambda part: _loss(run(part)), parts, [weight_of(part) for part in parts])


def pack_zeroth(engine: ZerothEngine) -> dict[str, Any]:
    """The optimizer's state in torch's own layout; the rest under our key."""
    return engine.optimizer_state() | {EXTRAS: engine.extras()}


def unpack_zeroth(engine: ZerothEngine, states: list[dict[str, Any]]) -> None:
    """The inverse of ``pack_zeroth``; of another method's or a plain Trainer's checkpoint the weights alone are taken.

    Raises:
        CheckpointError: It belongs to another model or to other settings.
    """
    if len(states) > 1:
        raise CheckpointError(f"The checkpoint holds the states of {len(states)} optimizers, this run has one.")
    extras: Mapping[str, Any] = states[0].get(EXTRAS, {}) if states else {}  # none: saved before there was an optimizer
    if extras.get(METHOD) == engine.method.name:
        engine.load_optimizer_state(states[0])
        engine.load_extras(extras)
        return
    warn_of_weights_alone(engine, extras)


@cache
def _warn_whole(kind: str, count: int) -> None:
    """Once."""
    rank_zero_warn(
        f"`micro_batches={count}` has no effect: no tensor was found in a batch of type `{kind}`, so it is not cut. "
        "Return tensors, or lists, tuples and dictionaries of tensors, or leave `micro_batches` out."
    )


def _check_module(module: LightningModule) -> None:
    who = type(module).__name__
    if not module.automatic_optimization and not hasattr(module, "offload_step"):
        raise MisconfigurationException(
            f"`{who}` steps by itself (`automatic_optimization = False`), but method `zo2` has no gradients that a "
            "`manual_backward` could make. Derive it from `ZO2Mixin` and write `loss`, or use automatic optimization."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"`{who}.training_step` takes `dataloader_iter`, but method `zo2` runs each batch several times. Take "
            "`batch` instead."
        )


def _loss(output: Any) -> Tensor:
    """Of what a ``training_step`` returned."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise OffloadError(
            f"`training_step` returned {type(output).__name__}; method `zo2` needs the loss of every batch, a tensor "
            "or a dictionary with 'loss'. Leave batches out in the dataloader, or return a loss of NaN, which skips "
            "the step."
        )
    return loss


@contextmanager
def _mode(module: nn.Module, *, train: bool) -> Iterator[None]:
    """Around the forwards of a step: ``eval()`` as MeZO has it, or as it is; afterwards as before."""
    if train:
        yield
        return
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
