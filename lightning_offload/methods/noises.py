"""The two kinds of noise of ``zo2``: what a forward sees, and what an update does, for one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_offload.methods.base import Rounding
from lightning_offload.methods.steplog import Entry
from lightning_offload.methods.streaming import Leaf
from lightning_offload.numerics.mezo import MezoSequence, decays, mezo_minus, mezo_plus, mezo_restore, mezo_update
from lightning_offload.numerics.native import Kernels
from lightning_offload.numerics.noise import Distribution, Draw
from lightning_offload.numerics.zeroth import Update, perturb, update_


class Noise(Protocol):
    """What ``zo2`` draws."""

    def seed(self) -> int:
        """For the step that begins."""
        ...

    def show(self, leaf: Leaf, weight: Tensor, out: Tensor, *, seed: int, step: int, direction: int, sign: int) -> None:
        """``out = weight + sign eps z``; both flat."""
        ...

    def apply(self, leaf: Leaf, weight: Tensor, entries: Sequence[Entry]) -> None:
        """One update of ``weight`` (flat, in place) after the other."""
        ...

    def state(self) -> Any:
        """What a checkpoint keeps: of ``seed``."""
        ...

    def load(self, state: Any) -> None:
        """The inverse of ``state``."""
        ...


class PhiloxNoise:
    """From a counter: any element of z by itself, the same bits everywhere. Weights are never moved in place.

    Args:
        seed: Of the run.
        eps: Of the method.
        distribution: Of z.
        rounding: Of updates of 16-bit weights.
        kernels: Compiled, for weights in host memory.
    """

    def __init__(
        self, seed: int, eps: float, distribution: Distribution, rounding: Rounding, kernels: Kernels | None = None
    ) -> None:
        self._seed, self._eps, self._distribution, self._rounding = seed, eps, distribution, rounding
        self._kernels = kernels

    @property
    def compiled(self) -> bool:
        """Whether z of weights in host memory comes from compiled kernels."""
        return self._kernels is not None

    def seed(self) -> int:
        """See ``Noise.seed``: that of the run; the step is part of the counter's key."""
        return self._seed

    def show(self, leaf: Leaf, weight: Tensor, out: Tensor, *, seed: int, step: int, direction: int, sign: int) -> None:
        """See ``Noise.show``."""
        perturb(
            weight, Draw(seed, step, leaf.place, direction), sign * self._eps, out, self._distribution, self._kernels
        )

    def apply(self, leaf: Leaf, weight: Tensor, entries: Sequence[Entry]) -> None:
        """See ``Noise.apply``."""
        assert leaf.group is not None
        updates = [
            Update(
                Draw(entry.seed, entry.step, leaf.place, entry.direction),
                entry.coefficient,
                entry.lr[leaf.group],
                entry.weight_decay[leaf.group],
            )
            for entry in entries
        ]
        update_(weight, updates, self._distribution, self._rounding, self._kernels)

    def state(self) -> Any:
        """See ``Noise.state``."""
        return None

    def load(self, state: Any) -> None:
        """See ``Noise.load``."""


class MezoNoise:
    """MeZO's: seeds from NumPy's global generator, z drawn parameter after parameter, weights moved there and back.

    What moving there and back does to 16-bit weights belongs to an update, as in MeZO.

    Args:
        leaves: The trained parameters in ``named_parameters()`` order.
        eps: Of the method.
        device: Where z is drawn.
    """

    def __init__(self, leaves: Sequence[Leaf], eps: float, device: torch.device) -> None:
        self._eps = eps
        self._at = {leaf.name: at for at, leaf in enumerate(leaves)}
        self._sequence = MezoSequence([(leaf.parameter.shape, leaf.compute) for leaf in leaves], device)

    def seed(self) -> int:
        """See ``Noise.seed``."""
        return int(_numpy().random.randint(1_000_000_000))

    def show(self, leaf: Leaf, weight: Tensor, out: Tensor, *, seed: int, step: int, direction: int, sign: int) -> None:
        """See ``Noise.show``."""
        z = self._z(leaf, seed)
        shown = mezo_plus(weight, z, self._eps)
        out.copy_(shown if sign > 0 else mezo_minus(shown, z, self._eps))

    def apply(self, leaf: Leaf, weight: Tensor, entries: Sequence[Entry]) -> None:
        """See ``Noise.apply``."""
        assert leaf.group is not None
        for entry in entries:
            z, eps = self._z(leaf, entry.seed), self._eps
            restored = mezo_restore(mezo_minus(mezo_plus(weight, z, eps), z, eps), z, eps)
            decay = entry.weight_decay[leaf.group] if decays(leaf.name) else None
            weight.copy_(mezo_update(restored, z, entry.coefficient, entry.lr[leaf.group], decay))

    def state(self) -> Any:
        """See ``Noise.state``."""
        kind, keys, *rest = _numpy().random.get_state()
        return [kind, torch.from_numpy(keys.astype("int64")), *rest]

    def load(self, state: Any) -> None:
        """See ``Noise.load``."""
        kind, keys, *rest = state
        _numpy().random.set_state((kind, keys.numpy().astype("uint32"), *rest))

    def _z(self, leaf: Leaf, seed: int) -> Tensor:
        return self._sequence.z(seed, self._at[leaf.name]).reshape(-1)


def _numpy() -> Any:
    import numpy

    return numpy
