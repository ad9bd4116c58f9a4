"""Tests the tester: every dependency that method full declares is removed in turn, and somebody notices.

A dependency is a pair of kinds of operations, such as ``host step`` after ``d2h gradients``. None is redundant:
``CheckedLanes`` catches each that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.errors import RaceError
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import Event
from lightning_offload.methods.base import Clip, DTypes
from tests.helpers import Net, train

Kind = tuple[str, str]


class Recorder(CheckedLanes):
    """Notes each kind of dependency, and leaves one of them out."""

    def __init__(self, without: Kind | None = None) -> None:
        super().__init__(HostMemory())
        self.without, self.kinds = without, set[Kind]()

    def kept(self, operation: str, after: Iterable[Event]) -> list[Event]:
        kinds = [((operation, event.name), event) for event in after]
        self.kinds |= {kind for kind, _ in kinds}
        return [event for kind, event in kinds if kind != self.without]

    def copy(self, dst: Any, src: Any, lane: Any, *, after: Any = (), priority: int = 0, tag: str = "") -> Event:
        return super().copy(dst, src, lane, after=self.kept(f"{lane} {tag}", after), tag=tag)

    def host(
        self, fn: Callable[[], object], *, after: Any = (), priority: int = 0, tag: str = "", traffic_bytes: int = 0
    ) -> Event:
        return super().host(fn, after=self.kept(f"host {tag}", after), tag=tag)

    def wait_compute(self, *events: Event) -> None:
        super().wait_compute(*self.kept("compute", events))


class DetachedUse(Net):
    """Reads the head's weight in backward after the head's gradient has left."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x @ self.head.weight.detach().T @ self.head.weight.detach())
        return self.head(self.norm(x))


def only_small_gradients(net: nn.Module, step: int) -> None:
    if step % 2:
        for p in net.parameters():
            p.grad = p.grad if p.numel() < 60 else None


def gradient_without_use(net: nn.Module, step: int) -> None:
    for p in net.parameters():
        p.grad = torch.ones(p.shape, dtype=p.dtype) if p.grad is None else p.grad


def scenario(
    make_net: Callable[[], Net], *, clip: bool = False, bf16: bool = False, spoil: Any = None, **settings: Any
) -> Callable[[Recorder], None]:
    def run(lanes: Recorder) -> None:
        train(
            make_net(),
            lanes,
            steps=5,
            micro_batches=1 if spoil or make_net is unused else 2,
            clip=Clip(0.05) if clip else None,
            dtypes=DTypes(compute=torch.bfloat16 if bf16 else None),
            settings=settings,
            spoil=spoil,
            late=spoil is not None,
        )

    return run


def net() -> Net:
    return Net(depth=2)


def frozen() -> Net:
    return Net(depth=2, frozen=True, functional_head=True)


def unused() -> Net:
    made = Net(depth=3, sometimes_unused=True)
    made.calls = 1  # used in the first forward, so that nobody thinks it has no hook
    return made


SCENARIOS = [
    scenario(net, clip=True, min_numel=60),
    scenario(frozen, bf16=True),
    scenario(net, skip_nonfinite=False),
    scenario(net, skip_nonfinite=False, bf16=True, min_numel=60),
    scenario(net, accumulate="host", clip=True, bf16=True, min_numel=60),
    scenario(net, accumulate="host"),
    scenario(frozen, accumulate="host", skip_nonfinite=False),
    scenario(unused),
    scenario(unused, accumulate="host", clip=True),
    scenario(net, min_numel=60, spoil=only_small_gradients),
    scenario(unused, spoil=gradient_without_use),
    scenario(unused, spoil=gradient_without_use, bf16=True),
    scenario(lambda: DetachedUse(depth=1), skip_nonfinite=False),
]


def all_kinds() -> list[Kind]:
    kinds: set[Kind] = set()
    for run in SCENARIOS:
        lanes = Recorder()
        run(lanes)
        kinds |= lanes.kinds
    return sorted(kinds)


def is_caught(kind: Kind) -> bool:
    for run in SCENARIOS:
        try:
            run(Recorder(kind))
        except RaceError:
            return True
    return False


def test_every_dependency_that_is_removed_is_caught() -> None:
    kinds = all_kinds()
    assert len(kinds) > 20
    assert [kind for kind in kinds if not is_caught(kind)] == []


@pytest.mark.parametrize("scenario", range(len(SCENARIOS)))
def test_with_all_of_them_nothing_is_found(scenario: int) -> None:
    SCENARIOS[scenario](Recorder())
