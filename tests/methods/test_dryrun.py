"""A replayed step is a recorded one; the schedule reaches its bound where there is enough to compute."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.hooks import RemovableHandle

from lightning_offload.memory.ledger import Span
from lightning_offload.methods.base import Clip
from lightning_offload.methods.drivers import EngineDriver
from lightning_offload.methods.dryrun import DryRun
from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.twin import TwinError
from lightning_offload.planning.methods import NATIVE, SERIAL
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.text import CausalLM, batch_by_shape
from tests.helpers import pairwise, row_id
from tests.methods.test_twin import hugging_face
from tests.planning.machines import gpu

ROWS = pairwise(
    {
        "micro_batches": [1, 2, 4],
        "accumulate": ["device", "host"],
        "clip": [None, Clip(1.0)],
        "skip_nonfinite": [True, False],
        "checkpointing": [False, True],
        "method": ["full", SERIAL, NATIVE],
    },
    seed=3,
)


def _rounded(spans: tuple[Span, ...]) -> list[tuple[Any, ...]]:
    start_s = min(span.start_s for span in spans)
    return sorted(
        (s.lane, s.kind, s.order, round((s.start_s - start_s) * 1e9), round((s.end_s - start_s) * 1e9), s.bytes)
        for s in spans
    )


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_replaying_a_step_is_running_it(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = hugging_face("llama")
    scenario = Scenario(
        module,
        batch,
        gpu(),
        method=row["method"],
        settings=FullSettings(min_numel=0, accumulate=row["accumulate"], skip_nonfinite=row["skip_nonfinite"]),
        micro_batches=row["micro_batches"],
        clip=row["clip"],
        checkpointing=row["checkpointing"],
    )
    replayed = Dry(scenario).timing
    monkeypatch.setattr(DryRun, "_replay", lambda self, tape, *, last: self._record(last=last))
    monkeypatch.setattr(EngineDriver, "unhook", lambda self: None)
    monkeypatch.setattr(RemovableHandle, "remove", lambda self: None)
    ran = Dry(scenario).timing
    assert _rounded(replayed.spans) == _rounded(ran.spans)
    assert replayed.step_s == pytest.approx(ran.step_s, rel=1e-9)  # sums in another order
    assert replayed.kinds == ran.kinds


def wide(batch: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Four blocks as wide as those of a 1.3B model."""
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5504}
    config |= {"num_hidden_layers": 6, "num_attention_heads": 16, "tie_word_embeddings": False}
    with torch.device("meta"):
        module = CausalLM(config=config, init="random", dtype="bfloat16", gradient_checkpointing=True)
        return module, batch_by_shape(batch, 1024, 32000)


@pytest.mark.parametrize("name", ["laptop_4gb", "rtx3090", "rtx4090", "a100", "h100", "h200"])
def test_a_step_is_within_a_tenth_of_its_bound_with_a_large_batch(name: str) -> None:
    from lightning_offload.bench.simulated import machines

    module, batch = wide(16)
    dry = Dry(Scenario(module, batch, machines()[name], precision="bf16-true", clip=Clip(1.0)))
    assert dry.waiting.bound_s <= dry.timing.step_s <= 1.10 * dry.waiting.bound_s
    assert dry.timing.kinds[("h2d", "weights")].bytes == 2 * sum(
        p.numel() for p in module.parameters() if p.numel() >= 4096
    )


def test_the_order_of_schedules() -> None:
    """Layer by layer under backward, after backward, and after backward with everything waited for."""
    module, batch = wide(2)
    late = Scenario(module, batch, gpu(), precision="bf16-true", clip=Clip(1.0))
    eager = replace(late, clip=None, settings=FullSettings(skip_nonfinite=False))
    seconds = [Dry(s).timing.step_s for s in (eager, late, replace(late, method=SERIAL))]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[1] < seconds[2]


@pytest.mark.parametrize("method", ["full", NATIVE])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_of_a_dry_run(method: str, fails: bool) -> None:
    """Autograd keeps the hooks of a parameter, and what they refer to, beyond the reach of the collector."""

    def step(module: torch.nn.Module, batch: Any) -> torch.Tensor:
        if fails:
            raise ZeroDivisionError
        return module(**batch).loss  # type: ignore[no-any-return]

    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, DryRun) for thing in gc.get_objects())

    module, batch = hugging_face("llama")
    before = alive()  # of tests that keep the hooks
    with suppress(TwinError):
        assert Dry(Scenario(module, batch, gpu(), method=method, step=step)).timing
    assert alive() == before
