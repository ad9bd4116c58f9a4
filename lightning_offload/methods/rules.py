"""Which optimizers can be offloaded, and how one step of each reads its group's hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.numerics.adam import adam_, sgd_
from lightning_offload.numerics.native import Kernels


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: The torch class it stands for.
        states: Names of the state tensors shaped like the weight, as torch's optimizer calls them.
        has_step: Whether torch's state holds a step count.
        step_: ``(params, grads, states, steps, group, found_inf=None)`` in place.
        decoupled: Whether it is AdamW: Adam whose decay acts on the weight, not through the gradient.
        kernels: Compiled, for the host.
    """

    name: str
    states: tuple[str, ...]
    has_step: bool
    step_: Callable[..., None]
    decoupled: bool = False
    kernels: Kernels | None = None

    @property
    def fused(self) -> Kernels | None:
        """Kernels that step, cast and clip in one pass: of Adam's kind alone."""
        return self.kernels if self.states == ("exp_avg", "exp_avg_sq") else None

    def hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Of Adam's kind, as its functions take them."""
        return _hyper(group, self.decoupled)


def refuse_step_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Look for hooks on the step of ``optimizer``, which an engine never calls.

    Raises:
        ValueError: There are some.
    """
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(
            "Hooks on the optimizer's step (`register_step_pre_hook`, `register_step_post_hook`) would never run: "
            "`optimizer.step` is not called. Use Lightning's `on_before_optimizer_step` or `on_train_batch_end`."
        )


def refuse_new_groups(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Have ``optimizer.add_param_group`` raise an ``OffloadError``; what is returned undoes it."""

    def refuse(group: dict[str, Any]) -> None:
        raise OffloadError(
            "`optimizer.add_param_group` was called after setup, but host memory is laid out per group and cannot "
            "grow. Create all groups in `configure_optimizers` (parameters may be frozen by lr=0)."
        )

    held: Any = optimizer
    held.add_param_group = refuse
    return lambda: held.__dict__.pop("add_param_group", None)


def rule_for(optimizer: torch.optim.Optimizer, kernels: Kernels | None = None) -> Rule:
    """The rule of a user's optimizer, decided by exact type: a subclass may mean something else.

    Args:
        optimizer: The user's.
        kernels: Compiled, for the host.

    Raises:
        ValueError: A class or an option that cannot be offloaded, with the list of what can.
    """
    kind = type(optimizer)
    refuse_step_hooks(optimizer)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
            raise ValueError(
                f"The learning rate is a tensor on `{group['lr'].device}`: reading it would wait for the "
                "device in every step. Use a number, or a tensor on the CPU."
            )
    for flag in ("amsgrad", "maximize", "differentiable"):
        if kind in _SUPPORTED and any(group.get(flag) for group in optimizer.param_groups):
            raise ValueError(f"`{kind.__name__}({flag}=True)` cannot be offloaded; remove `{flag}`")
    if kind in (torch.optim.AdamW, torch.optim.Adam):
        if kind is torch.optim.AdamW:
            decoupled = [True]
        else:  # Adam(decoupled_weight_decay=True) is AdamW by another name
            decoupled = [bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups]
        if len(set(decoupled)) > 1:
            raise ValueError("`Adam` groups that disagree on `decoupled_weight_decay` cannot be offloaded")
        step = partial(_adam_step, decoupled=decoupled[0])
        return Rule(kind.__name__, ("exp_avg", "exp_avg_sq"), True, step, decoupled[0], kernels)
    if kind is torch.optim.SGD:
        if any(group["dampening"] != 0 for group in optimizer.param_groups):
            raise ValueError("`SGD(dampening=...)` cannot be offloaded; set it to 0")
        momentum = any(group["momentum"] != 0 for group in optimizer.param_groups)
        return Rule("SGD", ("momentum_buffer",) if momentum else (), False, _sgd_step, kernels=kernels)
    supported = ", ".join(f"`torch.optim.{cls.__name__}`" for cls in _SUPPORTED)
    raise ValueError(
        f"`{kind.__module__}.{kind.__qualname__}` cannot be offloaded. Supported optimizers: {supported} (the exact "
        "classes). Return one of them from `configure_optimizers`, or use a plain strategy."
    )


_SUPPORTED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def _adam_step(
    params: list[Tensor],
    grads: list[Tensor],
    states: Mapping[str, list[Tensor]],
    steps: list[Tensor],
    group: Mapping[str, Any],
    *,
    decoupled: bool,
    found_inf: Tensor | None = None,
) -> None:
    exp_avgs, exp_avg_sqs = states["exp_avg"], states["exp_avg_sq"]
    adam_(params, grads, exp_avgs, exp_avg_sqs, steps, found_inf=found_inf, **_hyper(group, decoupled))


def _hyper(group: Mapping[str, Any], decoupled: bool) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {
        "lr": float(group["lr"]),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "decoupled": decoupled,
    }


def _sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    states: Mapping[str, list[Tensor]],
    steps: list[Tensor],
    group: Mapping[str, Any],
    *,
    found_inf: Tensor | None = None,
) -> None:
    torch._foreach_add_(steps, 1)  # not torch's state: tells a parameter that has never been stepped
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))
    sgd_(
        params,
        grads,
        states["momentum_buffer"] if group["momentum"] != 0 else [],
        lr=float(group["lr"]),
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        found_inf=found_inf,
    )


def frozen_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups' hyper-parameters as they are now: host work takes them when it is issued, not when it runs."""
    return [
        {key: _frozen(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def _frozen(value: Any) -> Any:
    """Schedulers write into a learning rate that is a tensor."""
    return float(value) if isinstance(value, Tensor) else value


_READ = ("lr", "betas", "eps", "weight_decay", "momentum", "nesterov")
_FIXED = ("amsgrad", "maximize", "differentiable", "dampening", "decoupled_weight_decay")


def check_groups(optimizer: torch.optim.Optimizer, rule: Rule, saved: Sequence[Mapping[str, Any]]) -> None:
    """Hyper-parameters come from the checkpoint, as with torch, but not the update rule nor the states it has.

    Raises:
        CheckpointError: The checkpoint's groups are of another optimizer.
    """
    what = f"the checkpoint is of another optimizer than this run's `{type(optimizer).__name__}`"
    for own, group in zip(optimizer.param_groups, saved, strict=False):
        for key in _READ:
            if key in own and key not in group:
                raise CheckpointError(f"The checkpoint's optimizer has no `{key}`: {what}.")
        for key in _FIXED:
            if key in own and group.get(key, own[key]) != own[key]:
                raise CheckpointError(f"The checkpoint's optimizer has `{key}={group[key]}`: {what} ({own[key]}).")
        if group.get("momentum") and "momentum" in own and not rule.states:
            raise CheckpointError(f"The checkpoint's optimizer has `momentum={group['momentum']}`: {what} (0).")
