"""Tests the tester, as ``test_dependencies``: every dependency that method lsp declares is removed in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lightning_offload.errors import RaceError
from lightning_offload.methods.base import Clip, DTypes
from tests.helpers import Net, train
from tests.methods.test_dependencies import Kind, Recorder
from tests.methods.test_lsp import NARROW
from tests.projected import lsp


def scenario(
    make_net: Callable[[], nn.Module] = lambda: Net(depth=2),
    *,
    clip: bool = False,
    micro_batches: int = 2,
    dtypes: DTypes | None = None,
    **settings: Any,
) -> Callable[[Recorder], None]:
    def run(lanes: Recorder) -> None:
        train(
            make_net(),
            lanes,
            steps=4,
            micro_batches=micro_batches,
            clip=Clip(0.05) if clip else None,
            dtypes=dtypes,
            method=lsp(**{"projector": "block", "moments": "paper", "refit_every": 1, "min_numel": 60, **settings}),
        )

    return run


def unused() -> Net:
    made = Net(depth=3, sometimes_unused=True)
    made.calls = 1  # used in the first forward, so that nobody thinks it has no hook
    return made


SCENARIOS = [
    scenario(),
    scenario(clip=True),
    scenario(accumulate="host"),
    scenario(accumulate="host", clip=True, dtypes=NARROW),
    scenario(lambda: Net(depth=5), skip_nonfinite=False, dtypes=NARROW),
    scenario(lambda: Net(depth=5), min_numel=0),
    scenario(unused, micro_batches=1),
    scenario(unused, micro_batches=1, share="type"),
    scenario(unused, micro_batches=1, share="type", moments="reset"),
    scenario(share="type", moments="reset"),
    scenario(lambda: Net(depth=5), form="activations"),
]


COMMON = {"d2h gradients", "h2d weights", "host norm", "d2h verdict", "host verdict"}
"""What full does too, which ``test_dependencies`` looks at."""

BEYOND_BUFFERS = {("d2h projectors", "compute"), ("host report", "host step")}
"""Projectors are plain tensors and a matrix's own norm is a number: ``CheckedLanes`` sees buffers of the engine."""


def kinds_of(run: Callable[[Recorder], None]) -> set[Kind]:
    lanes = Recorder()
    run(lanes)
    return lanes.kinds


def is_caught(kind: Kind, run: Callable[[Recorder], None]) -> bool:
    try:
        run(Recorder(kind))
    except RaceError:
        return True
    return False


@pytest.mark.slow
def test_every_dependency_that_is_removed_is_caught() -> None:
    kinds = [kinds_of(run) for run in SCENARIOS]
    declared = {kind for kind in set[Kind]().union(*kinds) if not set(kind) & COMMON} - BEYOND_BUFFERS
    assert {"d2h projectors", "host moments", "h2d deltas"} <= {operation for operation, _ in declared}
    where = {kind: [run for run, of in zip(SCENARIOS, kinds, strict=True) if kind in of] for kind in declared}
    assert [kind for kind in sorted(declared) if not any(is_caught(kind, run) for run in where[kind])] == []


@pytest.mark.parametrize("scenario", range(len(SCENARIOS)))
def test_with_all_of_them_nothing_is_found(scenario: int) -> None:
    SCENARIOS[scenario](Recorder())
