"""What a checkpoint keeps of an engine, and how one that another method or a plain Trainer has made is continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_offload.calibration import Calibration
from lightning_offload.errors import CheckpointError
from lightning_offload.methods.engine import GRADIENTS, METHOD, OWN, SETTINGS, Engine
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.subspace import SubspaceOptimizer
from lightning_offload.methods.zeroth import ZerothEngine

CALIBRATION = "calibration"
EXTRAS = "lightning_offload"
"""Our key in a checkpoint's ``optimizer_states[0]``; torch and Lightning ignore it."""


def chosen_before(trainer: Trainer) -> Mapping[str, Any] | None:
    """What the run that is being continued had chosen for ``"auto"``."""
    states = trainer._checkpoint_connector._loaded_checkpoint.get("optimizer_states") or [{}]
    chosen: Mapping[str, Any] | None = states[0].get(EXTRAS, {}).get(SETTINGS)
    return chosen


def pack(engine: Engine, calibration: Calibration, *, torn: bool) -> dict[str, Any]:
    """The optimizer's state in torch's own layout, so that a plain Trainer resumes from it; the rest under our key.

    Args:
        engine: Whose.
        calibration: Its batches.
        torn: A part of a micro-batch is in the gradients: the whole of it will be done again.
    """
    extras = engine.extras()
    if torn:
        extras[GRADIENTS] = {}
    return engine.optimizer_state() | {EXTRAS: extras | {CALIBRATION: calibration.state()}}


def unpack(engine: Engine, calibration: Calibration, states: list[dict[str, Any]]) -> Mapping[str, Tensor]:
    """The inverse of ``pack``; returns the gradients of an unfinished window, which Lightning clears once more.

    Raises:
        CheckpointError: It belongs to another model, to other settings, or to a window that cannot be finished.
    """
    if not states:  # saved before there was an optimizer
        warn_of_weights_alone(engine, {})
        return {}
    if len(states) != 1:
        raise CheckpointError(f"The checkpoint holds the states of {len(states)} optimizers, this run has one.")
    state = states[0]
    extras: Mapping[str, Any] = state.get(EXTRAS, {})
    if extras and GRADIENTS not in extras:  # of forwards alone
        warn_of_weights_alone(engine, extras)
        return {}
    if extras:
        _check_window(engine, extras)
    engine.load_optimizer_state(state)
    if extras:
        engine.load_extras(dict(extras))
        calibration.load(extras.get(CALIBRATION, {}))
    projects = isinstance(engine.own, SubspaceOptimizer)  # rows have torch's own moments
    if extras.get(METHOD) != engine.method.name and (projects or extras.get(OWN)):
        _warn_of_new_moments(engine, extras)
    gradients: Mapping[str, Tensor] = extras.get(GRADIENTS, {})
    return gradients


@torch.no_grad()
def restore_rows(engine: Engine, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Rows of method ``meft`` in full: into parameters of 16 bits they were rounded as the module was loaded."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averages = any(isinstance(callback, WeightAveraging) for callback in callbacks)  # which then stand for weights
    state = (averages and checkpoint.get("current_model_state")) or checkpoint["state_dict"]
    if isinstance(engine.own, RowOptimizer):
        engine.flush()
        for trained in engine.own.trained:
            if trained.name in state:
                trained.parameter.copy_(state[trained.name])
        engine.adopt()


def warn_of_weights_alone(engine: Engine | ZerothEngine, extras: Mapping[str, Any]) -> None:
    """Between methods with gradients and those without, nothing of an optimizer can be continued."""
    source = f"method `{extras[METHOD]}`" if METHOD in extras else "a plain Trainer"
    lr = ", ".join(f"{group['lr']:g}" for group in engine.optimizer.param_groups)
    rank_zero_warn(
        f"The checkpoint was made by {source}, this run trains by method `{engine.method.name}`: weights, step count "
        f"and schedulers are loaded, the optimizer's state is not (lr stays {lr} until a scheduler sets it). "
        "`load_from_checkpoint` takes the weights alone."
    )


def _check_window(engine: Engine, extras: Mapping[str, Any]) -> None:
    """The first part of a window is of the form in which the method that made it sums up."""
    if not extras[GRADIENTS]:
        return
    method, where = extras[METHOD], extras[SETTINGS].get("accumulate")
    own, own_where = engine.method.name, engine.method.settings.accumulate
    if method != own:
        raise CheckpointError(
            f"The checkpoint was saved by method `{method}` in the middle of an accumulation window, which `{own}` "
            f"cannot finish. Continue with `{method}_offload` to the next optimizer step and save there "
            "(`ModelCheckpoint(every_n_train_steps=...)` does), or load the weights alone (`load_from_checkpoint`)."
        )
    if engine.own is not None and where != own_where:
        raise CheckpointError(
            f"The checkpoint was saved in the middle of an accumulation window with `accumulate={where!r}`, this run "
            f"has `accumulate={own_where!r}`: continue with the setting of the checkpoint."
        )


def _warn_of_new_moments(engine: Engine, extras: Mapping[str, Any]) -> None:
    source = f"method `{extras[METHOD]}`" if METHOD in extras else "a plain Trainer"
    own = engine.own
    projected = {t.name for t in own.trained} if isinstance(own, SubspaceOptimizer) else set(extras[OWN])
    rank_zero_warn(
        f"The checkpoint was made by {source}, this run trains by method `{engine.method.name}`: weights are loaded, "
        f"but the optimizer's moments of {len(projected)} linear weights live in another space and start anew."
    )
