"""Linear layers that hand over the factors of their weight's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_offload.methods.activations import tap


def test_a_gradient_of_a_gradient_is_refused() -> None:
    """The factors that a weight's gradient is made of are handed over once, without a graph."""
    layer, inputs = nn.Linear(3, 2), torch.ones(4, 3, requires_grad=True)
    undo = tap(layer, torch.zeros((), requires_grad=True), lambda left, right: None)
    (gradient,) = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    undo()
