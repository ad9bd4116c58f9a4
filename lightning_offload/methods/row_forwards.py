"""Forwards alone with adapters whose rows stay in host memory: validate, test, predict, generate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.lanes import Lanes
from lightning_offload.methods.base import DTypes, Flight
from lightning_offload.methods.homes import settle, settled_dtype, weight_dtype
from lightning_offload.methods.meft import MEFT, adapters_of
from lightning_offload.methods.row_source import AdapterRows, Desk, LaneSource
from lightning_offload.methods.row_tables import Rows


class RowForwards:
    """Hangs on a module; from then on its adapters fetch what a forward uses. Everything else goes to the device.

    Args:
        module: With adapters.
        method: With its settings, resolved.
        lanes: Where it runs.
        dtypes: Which dtype lives where.
        units: The module's.
    """

    def __init__(self, module: nn.Module, method: MEFT, lanes: Lanes, dtypes: DTypes, units: Sequence[Unit]) -> None:
        placement = method.settings.placement
        assert placement != "auto"
        self.lanes, self._adapters = lanes, adapters_of(module)
        self._rows: list[Rows] = []
        own = {id(p) for adapter in self._adapters for p in (adapter.keys, adapter.values)}
        for unit in units:
            for parameter in unit.parameters.values():
                if id(parameter) not in own:
                    settle(parameter, lanes.device, settled_dtype(parameter, dtypes))
        homes = [
            AdapterRows.on(
                lanes,
                adapter,
                self._at_rest(f"{adapter.path}.keys", adapter.keys, dtypes),
                self._at_rest(f"{adapter.path}.values", adapter.values, dtypes),
                Flight(at),
                placement,
            )
            for at, adapter in enumerate(self._adapters)
        ]
        largest = max(rows.master.numel() for rows in self._rows)
        desk = Desk(lanes, self._rows[0].shadow.dtype, largest, len(homes[0].fetched))
        for home in homes:
            home.adapter.source = LaneSource(home, desk, _nobody)
        self._desk, self._homes = desk, homes

    def adopt(self) -> None:
        """Somebody else has written weights: they are the truth."""
        self.lanes.synchronize()
        for home in self._homes:
            for rows in home.tables:
                rows.show()
            home.refresh(self.lanes)
            home.flight.land()
        self.lanes.synchronize()

    def detach(self) -> None:
        """Adapters take their own rows again; the weights stay where they are."""
        for adapter in self._adapters:
            adapter.source = None
        self.lanes.synchronize()
        self._desk.close()
        self.lanes.close()

    def _at_rest(self, name: str, parameter: nn.Parameter, dtypes: DTypes) -> Rows:
        settle(parameter, torch.device("cpu"), torch.float32)
        shown = weight_dtype(parameter, dtypes)
        master, shadow = parameter.data, parameter.data
        if shown != torch.float32:
            shadow = self.lanes.buffers(f"{name}.shadow", [parameter.numel()], shown, "host")[0].view(master.shape)
        rows = Rows(name=name, master=master, shadow=shadow)
        rows.show()
        self._rows.append(rows)
        return rows


def _nobody(rows: Rows, numbers: Tensor, gradient: Tensor) -> None:
    """Nobody asks for gradients here."""
