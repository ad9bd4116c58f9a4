"""MeZO's own noise and arithmetic, bit for bit (Malladi et al., arXiv 2305.17333), for parameters in any order.

MeZO seeds a generator and draws ``z`` of every parameter in canonical order. `MezoSequence` gives the ``z`` of any one
of them; the four functions are its in-place steps, each operation rounded to the dtype of the weight.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

UNDECAYED = ("bias", "layer_norm", "layernorm")


class MezoSequence:
    """``z`` of MeZO's steps with random access.

    On the CPU the generator's state before each parameter is kept (5 KB each): a first pass in canonical order draws
    nothing twice, any other order draws what lies before once more. On CUDA the state is a seed and an offset, and how
    far each parameter advances it is measured once.

    Args:
        parameters: shape and dtype of each trained parameter, in canonical order.
        device: where the reference would hold them: bits differ between the CPU and each kind of GPU.
        keep: seeds whose states are kept, at least 1.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[Sequence[int], torch.dtype]],
        device: torch.device | str,
        keep: int = 4,
    ) -> None:
        self._parameters = [(tuple(shape), dtype) for shape, dtype in parameters]
        self._generator = torch.Generator(device)
        self._keep = keep
        self._kept: OrderedDict[int, list[Tensor]] = OrderedDict()
        self._offsets = self._measured() if self._generator.device.type == "cuda" else None

    def states(self, seed: int) -> list[Tensor]:
        """The generator's state before each parameter, and after the last.

        Args:
            seed: of the step.
        """
        return self._until(seed, len(self._parameters))

    def z(self, seed: int, parameter: int) -> Tensor:
        """Noise of one parameter in its shape and dtype.

        Args:
            seed: of the step.
            parameter: its place in canonical order.
        """
        states = self._until(seed, parameter)
        self._generator.set_state(states[parameter])
        drawn = self._draw(parameter)
        if len(states) == parameter + 1:
            states.append(self._generator.get_state())
        return drawn

    def _until(self, seed: int, parameter: int) -> list[Tensor]:
        """States of ``seed``, at least up to the one before ``parameter``."""
        states = self._kept.pop(seed, None) or self._started(seed)
        self._kept[seed] = states
        while len(self._kept) > self._keep:
            self._kept.popitem(last=False)
        if len(states) <= parameter:
            self._generator.set_state(states[-1])
        while len(states) <= parameter:
            self._draw(len(states) - 1)
            states.append(self._generator.get_state())
        return states

    def _started(self, seed: int) -> list[Tensor]:
        self._generator.manual_seed(seed)
        if self._offsets is None:
            return [self._generator.get_state()]
        states = []
        for offset in self._offsets:
            self._generator.set_offset(offset)
            states.append(self._generator.get_state())
        return states

    def _measured(self) -> list[int]:
        """CUDA: the generator's offset before each parameter, and after the last."""
        advance: dict[tuple[int, torch.dtype], int] = {}
        offsets = [0]
        for index, (shape, dtype) in enumerate(self._parameters):
            key = (torch.Size(shape).numel(), dtype)
            if key not in advance:
                self._generator.manual_seed(0)
                self._draw(index)
                advance[key] = self._generator.get_offset()
            offsets.append(offsets[-1] + advance[key])
        return offsets

    def _draw(self, parameter: int) -> Tensor:
        shape, dtype = self._parameters[parameter]
        generator = self._generator
        return torch.normal(0.0, 1.0, shape, generator=generator, dtype=dtype, device=generator.device)


def mezo_plus(weight: Tensor, z: Tensor, eps: float) -> Tensor:
    """``w + 1 z eps``: the first perturbation.

    Args:
        weight: any shape and floating dtype.
        z: same shape and dtype.
        eps: size of the perturbation.
    """
    return weight + 1 * z * eps


def mezo_minus(plus: Tensor, z: Tensor, eps: float) -> Tensor:
    """``w - 2 z eps``, from the outcome of `mezo_plus`."""
    return plus + -2 * z * eps


def mezo_restore(minus: Tensor, z: Tensor, eps: float) -> Tensor:
    """``w + 1 z eps``, from the outcome of `mezo_minus`: the weight, but for three roundings."""
    return minus + 1 * z * eps


def mezo_update(restored: Tensor, z: Tensor, g: float, lr: float, weight_decay: float | None) -> Tensor:
    """``w - lr (g z + weight_decay w)``.

    Args:
        restored: from `mezo_restore`.
        z: same shape and dtype.
        g: projected gradient.
        lr: learning rate.
        weight_decay: None where `decays` says no: then the term is left out.
    """
    if weight_decay is None:
        return restored - lr * (g * z)
    return restored - lr * (g * z + weight_decay * restored)


def decays(name: str) -> bool:
    """Whether MeZO decays the parameter of this name."""
    return not any(part in name for part in UNDECAYED)
