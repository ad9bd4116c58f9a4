"""MeZO in forty lines, on any model: the oracle of zo2."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Noise = Callable[[int, int, Tensor], Tensor]
"""(step from 1, place among the trained parameters, parameter) -> z in fp32, of its shape."""


class Mezo:
    """The published algorithm: in place, from `numpy`'s global seed and torch's global generator.

    With ``noise``: the same from untouched weights, ``round(theta +- eps z)`` and the update each from fp32.
    """

    def __init__(
        self, model: nn.Module, lr: float, eps: float, weight_decay: float = 0.0, noise: Noise | None = None
    ) -> None:
        self.model, self.lr, self.eps, self.weight_decay, self.noise = model, lr, eps, weight_decay, noise
        self.taken = self.seed = 0

    @torch.no_grad()
    def step(self, loss_fn: Callable[[nn.Module], Tensor]) -> tuple[float, float]:
        """l+ and g; `lr` may be changed between steps."""
        self.taken += 1
        self.named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if self.noise is not None:
            return self._pristine(loss_fn)
        self.seed = int(np.random.randint(1_000_000_000))
        self._perturb(1)
        plus = loss_fn(self.model).float()
        self._perturb(-2)
        minus = loss_fn(self.model).float()
        self._perturb(1)
        g = ((plus - minus) / (2 * self.eps)).item()
        torch.manual_seed(self.seed)
        for name, p in self.named:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            if "bias" not in name and "layer_norm" not in name and "layernorm" not in name:
                p.data = p.data - self.lr * (g * z + self.weight_decay * p.data)
            else:
                p.data = p.data - self.lr * (g * z)
        return plus.item(), g

    def _perturb(self, scaling_factor: int) -> None:
        torch.manual_seed(self.seed)
        for _, p in self.named:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data + scaling_factor * z * self.eps

    def _pristine(self, loss_fn: Callable[[nn.Module], Tensor]) -> tuple[float, float]:
        assert self.noise is not None
        drawn = [self.noise(self.taken, place, p) for place, (_, p) in enumerate(self.named)]
        rest = [p.data for _, p in self.named]
        losses = []
        for sign in (1, -1):
            for (_, p), w, z in zip(self.named, rest, drawn, strict=True):
                p.data = (w.float() + z * (sign * self.eps)).to(w.dtype)
            losses.append(loss_fn(self.model).float())
        g = ((losses[0] - losses[1]) / (2 * self.eps)).item()
        for (_, p), w, z in zip(self.named, rest, drawn, strict=True):
            change = z * g
            if self.weight_decay:
                change = change + w.float() * self.weight_decay
            p.data = (w.float() - change * self.lr).to(w.dtype)
        return losses[0].item(), g
