"""How a module says what a training step is: its optimizer, and the loss of one micro-batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_offload.errors import OffloadError
from lightning_offload.methods.twin import Step, Twin, pretending

_STEP = "Pass `step=`, a function (module, batch) -> loss of one micro-batch."


def optimizer_of(
    twin: Twin, given: torch.optim.Optimizer | None, default: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """The one that was given, the module's own, or the method's default; over the twin's parameters.

    Raises:
        OffloadError: ``configure_optimizers`` cannot be asked, or returns no single optimizer.
    """
    if given is not None:
        return twin.optimizer(given)
    configure = getattr(twin.module, "configure_optimizers", None)
    if not callable(configure):
        return default([p for p in twin.module.parameters() if p.requires_grad])
    name = type(twin.module).__name__
    with pretending(), twin.mode:
        try:
            made = configure()
        except Exception as error:
            raise OffloadError(
                f"`configure_optimizers` of {name} cannot be asked before the Trainer runs ({error}). Pass "
                "`optimizer=`, built from the module's parameters."
            ) from error
    found = _optimizers(made)
    if len(found) != 1:
        raise OffloadError(
            f"`configure_optimizers` of {name} returned {len(found)} optimizers ({type(made).__name__}), and exactly "
            "one can be planned, as it can be offloaded. Use one with several parameter groups, or pass `optimizer=`."
        )
    return found[0]


def _optimizers(made: Any) -> list[torch.optim.Optimizer]:
    """Of all that Lightning takes: one, a dictionary, a list of either, or lists of optimizers and schedulers."""
    if isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, list) for part in made):
        made = made[0]
    several = made if isinstance(made, (list, tuple)) else [made]
    plain = [one.get("optimizer") if isinstance(one, Mapping) else one for one in several]
    return [one for one in plain if isinstance(one, torch.optim.Optimizer)]


def own_step(module: nn.Module, *, backward: bool = True) -> Step:
    """How the module itself makes a loss of a batch.

    Args:
        module: The module.
        backward: Whether the loss has to have a gradient.

    Raises:
        OffloadError: It does not say.
    """
    name, loss = type(module).__name__, partial(_loss, name=type(module).__name__, backward=backward)
    if not callable(getattr(module, "training_step", None)):
        return lambda twin, batch: loss(twin(**batch) if isinstance(batch, Mapping) else twin(batch))
    if getattr(module, "automatic_optimization", True):
        return lambda twin, batch: loss(_called(twin.training_step, batch))
    if callable(getattr(module, "offload_step", None)):  # OffloadMixin
        return lambda twin, batch: loss(_called(twin.loss, batch))
    raise OffloadError(f"{name} optimizes manually, so its `training_step` steps by itself. {_STEP}")


def _called(step: Any, batch: Any) -> Any:
    """With the arguments that it takes, as Lightning does it."""
    takes = [p for p in inspect.signature(step).parameters.values() if p.kind != p.KEYWORD_ONLY]
    return step(batch) if len(takes) == 1 and takes[0].kind != takes[0].VAR_POSITIONAL else step(batch, 0)


def _loss(output: Any, *, name: str, backward: bool) -> Tensor:
    if isinstance(output, Mapping) and "loss" in output:
        output = output["loss"]
    output = getattr(output, "loss", output)
    if not isinstance(output, Tensor):
        raise OffloadError(f"a step of {name} gave {type(output).__name__}, no loss. {_STEP}")
    if output.numel() != 1:
        raise OffloadError(f"a step of {name} gave a tensor of shape {tuple(output.shape)}, no scalar loss. {_STEP}")
    if backward and not output.requires_grad:
        raise OffloadError(f"the loss of {name} has no gradient: is it detached, or everything frozen? {_STEP}")
    return output
