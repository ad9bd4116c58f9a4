"""One optimizer step on given tensors: AdamW, Adam, SGD.

All go through torch's fused kernels, one call per *list of tensors*: the result for each tensor is that of a call of
its own, at any offset and thread count, while a flat tensor made of them would round the tails differently. On the
CPU the fused kernels are 5 to 8 times faster than torch's default ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW (``decoupled``) or Adam, in place; the same bits as ``torch.optim.AdamW(fused=True)``.

    ``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v + (1 - beta2) g^2``,
    ``w <- (1 - lr wd) w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``
    (Adam adds ``wd w`` to ``g`` instead). Source: Loshchilov and Hutter, arXiv 1711.05101.

    Args:
        params: weights ``w``, any shape, one floating dtype.
        grads: gradients ``g``, same shapes and dtype.
        exp_avgs: first moments ``m``, same shapes and dtype.
        exp_avg_sqs: second moments ``v``, same shapes and dtype.
        steps: step counts ``t``, one fp32 scalar tensor per weight, on the weights' device; advanced here.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator, outside the square root.
        weight_decay: ``wd``.
        decoupled: AdamW's decay (True) or Adam's.
        found_inf: fp32 scalar on the weights' device; where it is 1 nothing changes, steps included.
    """
    torch._foreach_add_(steps, 1)
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    found_inf: Tensor | None = None,
) -> None:
    """One step of SGD in place: ``b <- momentum b + g + wd w``, ``w <- w - lr b`` (Nesterov: ``g + momentum b``).

    Buffers start as zeros, which equals torch's first step (``b = g``) since dampening is zero.

    Args:
        params: weights ``w``, any shape, one floating dtype.
        grads: gradients ``g``, same shapes and dtype.
        momentum_buffers: ``b``, same shapes and dtype; empty when ``momentum`` is 0.
        lr: learning rate.
        momentum: see the equation.
        weight_decay: ``wd``.
        nesterov: look ahead along the momentum.
        found_inf: fp32 scalar on the weights' device; where it is 1 nothing changes.
    """
    torch._fused_sgd_(
        params,
        grads,
        momentum_buffers,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
        grad_scale=None,
        found_inf=found_inf,
    )
