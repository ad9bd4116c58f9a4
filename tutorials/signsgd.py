"""signSGD, offloaded: its momentum and the arithmetic on the host, the sign of it comes back, a byte per weight.

``M <- beta M + (1 - beta) G``, ``W <- (1 - lr wd) W - lr sign(M)``

Source: signSGD (arXiv 1802.04434), section 3; with ``momentum=0`` it is signSGD itself, with more its "Signum". Down go
the gradients, in the wire's dtype; the host keeps one number per weight, where AdamW keeps three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_offload import OffloadStrategy
from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.lanes import nbytes
from lightning_offload.methods.base import DTypes, Groups, Trained, Verdict
from lightning_offload.methods.deltas import DeltaHome, DeltaPart
from lightning_offload.methods.homes import clip_, settle, skips, weight_dtype
from lightning_offload.methods.method import Method, Site
from lightning_offload.methods.rules import Rule
from lightning_offload.methods.settings import GradientSettings, require

SKIPPED = -128
"""First sign of a step that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class SignSGDSettings(GradientSettings):
    """Settings of ``signsgd``.

    Attributes:
        momentum: beta; 0 for signSGD itself.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")


class SignSGD(Method):
    """The method ``signsgd``: claims every matrix; what is left (norms, biases) is the user's optimizer's."""

    name: ClassVar[str] = "signsgd"
    summary: ClassVar[str] = "signs of a momentum in host memory"
    settings_type: ClassVar[type[GradientSettings]] = SignSGDSettings
    settings: SignSGDSettings

    def claim(self, module: nn.Module, units: Sequence[Unit]) -> set[int]:
        """Return the ids of the matrices that are not too small."""
        weights = [weight for unit in units for weight in unit.parameters.values() if weight.requires_grad]
        return {id(w) for w in weights if w.ndim > 1 and w.numel() >= self.settings.min_numel}

    def host_bytes(self, claimed: Sequence[Trained], rule: Rule, dtypes: DTypes) -> int:
        """Return what `SignPart` takes on the host, in bytes."""
        each = 4 + 1 + 4 * (self.settings.accumulate == "host")  # momentum, sign, sum over micro-batches
        return sum(t.parameter.numel() * (each + weight_dtype(t.parameter, dtypes).itemsize) for t in claimed)

    def make_part(self, claimed: Sequence[Trained], site: Site) -> SignPart:
        """Return what steps them."""
        return SignPart(claimed, site, self.settings.momentum)


@dataclass(eq=False, kw_only=True)
class SignHome(DeltaHome):
    """Where one weight's momentum lives."""

    sign: Tensor

    @property
    def delta(self) -> tuple[int, torch.dtype]:
        """How many numbers come up, and their dtype."""
        return self.trained.parameter.numel(), torch.int8

    @property
    def made(self) -> Tensor:
        """What the host has made of a gradient, and sends."""
        return self.sign


class SignPart(DeltaPart[SignHome]):
    """Gradients down, the momentum's step on the host, its signs up."""

    def __init__(self, trained: Sequence[Trained], site: Site, beta: float) -> None:
        self._beta = beta
        super().__init__(trained, site)

    def _make_homes(self, members: list[Trained]) -> list[SignHome]:
        label = f"{members[0].unit.name or 'model'}.signsgd"
        sizes = [self._numel_here(t, t.parameter.numel()) for t in members]
        dtypes = [weight_dtype(t.parameter, self._dtypes) for t in members]
        wires = self._carve(f"{label}.wire", sizes, [(dtype, "pinned") for dtype in dtypes])
        momenta = self._carve(f"{label}.momentum", sizes, [(torch.float32, "host")] * len(sizes))
        signs = self._carve(f"{label}.sign", sizes, [(torch.int8, "pinned")] * len(sizes))
        totals = self._carve_totals(label, sizes)
        homes = []
        for t, dtype, wire, momentum, sign, total in zip(members, dtypes, wires, momenta, signs, totals, strict=True):
            settle(t.parameter, self._lanes.device, dtype)
            self._lanes.watch(t.name, t.parameter)
            step = torch.zeros((), dtype=torch.float32, device="cpu")
            states = {"momentum": momentum.zero_()}
            homes.append(SignHome(trained=t, wire=wire, states=states, step=step, total=total, sign=sign))
        return homes

    def _host_step(self, homes: list[SignHome], groups: Groups, verdict: Verdict) -> None:
        for home in homes:
            if skips(home, verdict, self._rule.kernels):
                home.sign.fill_(SKIPPED)
                continue
            clip_([home.gradient], verdict)
            momentum = home.states["momentum"].mul_(self._beta)
            home.sign.copy_(momentum.add_(home.gradient.float(), alpha=1 - self._beta).sign())

    def _step_bytes(self, home: SignHome) -> int:
        return home.wire.element_size() + 8 + 1  # the gradient read, the momentum read and written, the sign written

    def _apply(self, home: SignHome, delta: Tensor) -> None:
        weight, sign = home.trained.parameter.detach(), delta.view(home.trained.parameter.shape)
        moved = (weight.float() * home.decay).add_(sign, alpha=-home.rate).to(weight.dtype)
        weight.copy_(torch.where(sign == SKIPPED, weight, moved))

    @property
    def holdings(self) -> dict[str, int]:
        """Host memory by what it is for, in bytes."""
        homes = self._home.values()
        held = {
            "momenta": [home.states["momentum"] for home in homes],
            "wire (gradients down)": [home.wire for home in homes],
            "signs (up)": [home.sign for home in homes],
            "sums over micro-batches": [home.total for home in homes if home.total is not None],
        }
        return {name: nbytes(tensors) for name, tensors in held.items() if tensors}


class SignSGDStrategy(OffloadStrategy, method=SignSGD):
    """signSGD with its momentum in host memory."""
