"""Forwards alone over weights that do not fit on the device: validate, test, predict, generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.lanes import Lanes
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.lockstep import Lockstep, refuse_compiled
from lightning_offload.methods.streaming import Streaming
from lightning_offload.methods.zo2 import ZO2, compute_dtype, resident_units, stored_dtype


class StreamedForwards:
    """Hangs on a module; from then on every forward of it brings up the weights that it needs.

    Args:
        module: Its weights move to host memory, but for those that stay on the device.
        method: With its settings.
        lanes: Where it runs.
        dtypes: Which dtype lives where.
        units: The module's.
    """

    def __init__(self, module: nn.Module, method: ZO2, lanes: Lanes, dtypes: DTypes, units: Sequence[Unit]) -> None:
        refuse_compiled(module, units)
        settings = method.settings
        self.lanes = lanes
        self.streaming = Streaming(
            module,
            units,
            lanes,
            stored=lambda p: stored_dtype(p, dtypes),
            compute=lambda p: compute_dtype(p, dtypes),
            group_of={},
            resident=resident_units(units, settings, dtypes),
            slots=settings.slots - 1,
            prefetch=settings.prefetch,
        )
        self._lockstep = Lockstep(module, units, self.streaming)
        self._undo: list[Callable[[], Any]] = self._lockstep.install()
        self._undo.append(module.register_load_state_dict_post_hook(lambda *_: self.adopt()).remove)

    def adopt(self) -> None:
        """Somebody else has written weights: they are the truth."""
        self.streaming.forget()

    def detach(self) -> None:
        """Take everything off; weights stay where they are at rest."""
        while self._undo:
            self._undo.pop()()
        self.lanes.synchronize()
        self._lockstep.close()
        self.streaming.close()
        self.lanes.close()
