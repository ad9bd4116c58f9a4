"""The measuring scripts run; what they measure is not tested."""

from __future__ import annotations

from lightning_offload.benchmarks import host_phase, machine
from lightning_offload.training_benchmark import shape, table, training
from tests.zoo import VOCAB


def test_host_phase_names_every_arm() -> None:
    text = host_phase(numel=1, rounds=1)
    assert all(arm in text for arm in ("torch AdamW fused", "full, 32-true", "full, bf16-true", "GB/s"))
    assert "torch 2." in machine()


def test_training_measures_both_arms_and_the_lanes() -> None:
    tiny = shape("llama_1b3") | {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    }
    rows = training(tiny, batch=1, length=8, steps=1)
    assert rows["full_offload"]["tokens/s"] > 0
    assert {"d2h busy %", "h2d busy %", "host busy %", "host GiB"} <= rows["full_offload"].keys()
    assert "tokens/s" in rows["all on the device"]
    assert "| full_offload |" in table("tiny", rows)
