"""The Trainer on lanes that really run side by side: the plain Trainer's bits, whatever is late.

On a CPU the lanes are threads with random delays. On a CUDA device (marker ``gpu``) they are streams with random
delays, compared with the same run without: there plain Lightning steps on the device, with other bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_offload import FullOffloadStrategy
from lightning_offload.memory.asynchronous import AsyncLanes
from tests.helpers import every
from tests.lit import Lit, Manual, assert_equal_modules, fit
from tests.streams import thread_lanes
from tests.test_parity import ReadsWeights, WritesWeights


class Streamed(FullOffloadStrategy):
    """On lanes of the test's choice."""

    lanes: AsyncLanes

    def _make_lanes(self, machine: Any, settings: Any) -> AsyncLanes:
        return self.lanes


class Saves(L.Callback):
    """In the middle of everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 4 == 2:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    "validates": {"limit_val_batches": 2, "val_check_interval": 3},
    "reads": {"callbacks": [ReadsWeights()]},
    "writes": {"callbacks": [WritesWeights()], "accumulate_grad_batches": 2},
}


def train(kind: type[Lit], strategy: Any, folder: Path, case: str, **kwargs: Any) -> tuple[Lit, dict[str, Any]]:
    """The trained module, and every checkpoint saved on the way."""
    folder.mkdir()
    options = {**CASES[case], **kwargs}
    module = kind(dropout=0.1, schedule="step", tied=True)
    if isinstance(module, Manual):
        module.offload = {
            key: options.pop(key) for key in ("gradient_clip_val", "accumulate_grad_batches") if key in options
        }
    callbacks = [*options.pop("callbacks", []), Saves(folder)]
    fit(module, strategy, callbacks=callbacks, **options)
    saved = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.iterdir())}
    assert len(saved) > 2
    return module, saved


def assert_equal_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        for key, value in one[name]["state_dict"].items():
            assert torch.equal(value, other[name]["state_dict"][key]), (name, key)
        moments = [checkpoint[name]["optimizer_states"][0]["state"] for checkpoint in (one, other)]
        for index, state in moments[0].items():
            assert torch.equal(state["exp_avg_sq"], moments[1][index]["exp_avg_sq"]), (name, index)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("accumulate", "min_numel"), [("device", 0), ("host", 60)])
@pytest.mark.parametrize("seed", every(3, range(3)))
def test_threads_give_the_bits_of_the_plain_trainer(
    case: str, accumulate: str, min_numel: int, seed: int, tmp_path: Path
) -> None:
    plain, expected = train(Lit, "auto", tmp_path / "plain", case)
    with thread_lanes(seed) as lanes:
        strategy = Streamed(min_numel=min_numel, accumulate=accumulate)
        strategy.lanes = lanes
        ours, found = train(Manual if seed == 2 and case == "clip" else Lit, strategy, tmp_path / "ours", case)
        assert lanes.ledger.moved("h2d", "weights") > 0
    assert_equal_modules(plain, ours)
    assert_equal_weights(expected, found)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("accumulate", "min_numel"), [("device", 0), ("host", 60)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_delays_on_a_gpu_change_nothing(
    case: str, accumulate: str, min_numel: int, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.gpu.test_full_gpu import cuda

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    runs = []
    for seed in (None, 1, 2):
        with cuda(torch.device("cuda", 0), seed=seed) as lanes:
            strategy = Streamed(min_numel=min_numel, accumulate=accumulate)
            strategy.lanes = lanes
            folder = tmp_path / str(seed)
            runs.append(train(Lit, strategy, folder, case, accelerator="cuda", precision=precision))
            assert lanes.ledger.moved("h2d", "weights") > 0
    for module, saved in runs[1:]:
        assert_equal_modules(runs[0][0], module)
        assert_equal_weights(runs[0][1], saved)
