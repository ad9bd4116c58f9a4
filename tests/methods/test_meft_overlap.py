"""What meft declares of a call of a frozen network: rows are chosen and gathered beside it, and waited for after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import Event
from tests.meft import adapted, make_engine, tokens_of


class Diary(CheckedLanes):
    """Writes down what is issued, and after what."""

    def __init__(self) -> None:
        super().__init__(HostMemory(pin=False))
        self.entries: list[str] = []

    def write(self, what: str, after: Iterable[Event]) -> None:
        names = [event.name for event in after]  # type: ignore[attr-defined]
        self.entries.append(f"{what} after {', '.join(names)}")

    def copy(self, dst: Any, src: Any, lane: Any, *, after: Any = (), priority: int = 0, tag: str = "") -> Event:
        self.write(f"{lane} {tag}", after := [*after])
        return super().copy(dst, src, lane, after=after, priority=priority, tag=tag)

    def host(self, fn: Any, *, after: Any = (), tag: str = "", **kwargs: Any) -> Event:
        self.write(f"host {tag}", after := [*after])
        return super().host(fn, after=after, tag=tag, **kwargs)

    def wait_compute(self, *events: Event) -> None:
        self.write("compute", events)
        super().wait_compute(*events)


BESIDE = {
    "host": ("tokens", "select"),
    "keys": ("rows used", "gather"),
    "device": ("rows used", "gather"),
}
"""What goes down, and what the host makes of it."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("placement", BESIDE)
def test_only_what_follows_a_network_waits_for_its_rows(placement: str, training: bool) -> None:
    lanes = Diary()
    engine = make_engine(adapted(), placement, lanes)
    network: Any = engine.module.blocks[0].mlp
    network.up.register_forward_pre_hook(lambda *_: lanes.entries.append("the network begins"))
    network.down.register_forward_hook(lambda *_: lanes.entries.append("the network ends"))
    with lanes.checking(), engine.micro_batch(), torch.set_grad_enabled(training):
        engine.module.loss(tokens_of(0))
    at = lanes.entries.index("the network begins")
    down, chosen = (f"{lane} {tag}" for lane, tag in zip(("d2h", "host"), BESIDE[placement], strict=True))
    assert lanes.entries[at - 2 : at + 5] == [
        f"{down} after compute",
        f"{chosen} after {down}",
        "the network begins",
        "the network ends",
        f"compute after {chosen}",  # how many rows there are
        f"h2d rows after {chosen}",  # whatever compute still does
        "compute after h2d rows",
    ]
