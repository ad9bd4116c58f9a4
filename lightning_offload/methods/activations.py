"""``form="activations"``: linear layers whose backward hands over its factors instead of the weight's gradient.

With G = dY^T X, ``P^T G Q = (dY P)^T (X Q)``: several times fewer FLOPs, and nothing of the size of the weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Factors = Callable[[Tensor, Tensor], None]
"""Takes (tokens, m) and (tokens, n), whose product is the gradient (m, n); called once per use of the weight."""


def linear_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Linear layers inside, GPT-2's ``Conv1D`` too, whose weight is (in, out)."""
    for part in module.modules():
        if isinstance(part, nn.Linear) or _is_transposed(part):
            yield part


def tap(module: nn.Module, ticket: Tensor, factors: Factors) -> Callable[[], None]:
    """Have a linear layer's backward call ``factors``, and leave its weight without a gradient; returns the undoing.

    The class changes, not ``forward``: a deep copy of the module (weight averaging) must use its own weight.

    Args:
        module: The layer.
        ticket: A leaf that gets a gradient of nothing in its place: autograd says when all uses have been seen.
        factors: See ``Factors``.
    """
    before: Any = type(module)
    weight: Any = module.weight
    transposed = _is_transposed(module)

    def forward(self: Any, inputs: Tensor) -> Any:
        if self.weight is weight and weight.requires_grad and torch.is_grad_enabled():
            return _Product.apply(inputs, weight.detach(), self.bias, ticket, factors, transposed)
        return before.forward(self, inputs)

    module.__class__ = type(before.__name__, (before,), {"forward": forward})

    def undo() -> None:
        module.__class__ = before

    return undo


class _Product(torch.autograd.Function):
    """``X W^T + b``, or ``X W + b``; its backward knows no gradient of W."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ticket: Tensor,
        factors: Factors,
        transposed: bool,
    ) -> Tensor:
        output = F.linear(inputs, weight.t() if transposed else weight, bias)
        ctx.save_for_backward(inputs.to(output.dtype), weight)
        ctx.factors, ctx.transposed, ctx.dtypes = factors, transposed, (inputs.dtype, getattr(bias, "dtype", None))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad_output = _rows(grad_outputs[0])
        weight = weight.to(inputs.dtype)  # autocast
        grad_inputs = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_inputs = grad_output @ (weight.t() if ctx.transposed else weight)
            grad_inputs = grad_inputs.view(inputs.shape).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0).to(ctx.dtypes[1])
        factors = (grad_output, _rows(inputs))
        ctx.factors(*reversed(factors) if ctx.transposed else factors)
        return grad_inputs, None, grad_bias, grad_output.new_zeros((), dtype=torch.float32), None, None


def _rows(x: Tensor) -> Tensor:
    """One per token."""
    return x.reshape(-1, x.shape[-1])


def _is_transposed(part: nn.Module) -> bool:
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(part, pytorch_utils.Conv1D)
