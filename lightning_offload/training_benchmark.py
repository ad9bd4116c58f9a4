"""Trains models by shape and measures it: ``python -m lightning_offload.training_benchmark llama_1b3 llama3_8b``.

Random weights and tokens, ``bf16-true``, gradient clipping, every block recomputed. Time is taken over many steps
with nothing waited for in between, so that what overlaps is seen to overlap. On a machine without a CUDA device it
runs as well, for models that small.
"""

from __future__ import annotations

import argparse
import gc
from importlib.resources import files
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_offload.benchmarks import QUIET, machine
from lightning_offload.memory.budget import GIB
from lightning_offload.memory.ledger import Total
from lightning_offload.strategies import FullOffloadStrategy
from lightning_offload.text import CausalLM

WARM_UP = 3
"""Steps before the clock starts: they allocate."""


def training(config: dict[str, Any], *, batch: int, length: int, steps: int = 8) -> dict[str, dict[str, float | str]]:
    """Measurements by arm: ``full_offload``, and all of bf16 AdamW on the device, which keeps no fp32 master."""
    return {arm: _measure(arm, config, batch, length, steps) for arm in ("full_offload", "all on the device")}


def _measure(arm: str, config: dict[str, Any], batch: int, length: int, steps: int) -> dict[str, float | str]:
    strategy = FullOffloadStrategy() if arm == "full_offload" else "auto"
    clock = _Clock(steps)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        L.Trainer(
            strategy=strategy,
            accelerator="cuda" if cuda else "cpu",
            devices=1,
            max_steps=WARM_UP + steps,
            precision="bf16-true",
            gradient_clip_val=1.0,
            callbacks=[clock],
            **QUIET,
        ).fit(_ByShape(config, batch, length))
    except torch.OutOfMemoryError:
        return {"step s": "does not fit"}
    finally:
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    seconds = clock.seconds / steps
    row: dict[str, float | str] = {"step s": seconds, "tokens/s": batch * length / seconds}
    if cuda:
        row["device GiB"] = torch.cuda.max_memory_allocated() / GIB
    return row | clock.lanes


class _Clock(L.Callback):
    """Wall time of ``steps`` steps, and how much of it each lane was busy."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds = steps, 0.0
        self.lanes: dict[str, float | str] = {}
        self._before: dict[str, Total] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self._before = self._ledger(trainer)
            self.seconds = -perf_counter()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        after = self._ledger(trainer)
        self.seconds += perf_counter()
        strategy = trainer.strategy
        if isinstance(strategy, FullOffloadStrategy) and strategy.engine is not None:
            self.lanes["host GiB"] = strategy.engine.host_bytes(strategy.engine.host.trained) / GIB
            for lane, total in after.items():
                busy = total.seconds - self._before.get(lane, Total()).seconds
                self.lanes[f"{lane} busy %"] = 100 * busy / self.seconds

    @staticmethod
    def _ledger(trainer: L.Trainer) -> dict[str, Total]:
        """Lane totals with nothing in flight."""
        engine = trainer.strategy.engine if isinstance(trainer.strategy, FullOffloadStrategy) else None
        if engine is not None:
            engine.flush()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return engine.lanes.ledger.snapshot() if engine is not None else {}


class _ByShape(CausalLM):
    """Random weights, made in bf16, and batches of random tokens."""

    def __init__(self, config: dict[str, Any], batch: int, length: int) -> None:
        super().__init__(config=config, init="random", dtype="bfloat16", gradient_checkpointing=True)
        self._batch, self._length, self._vocabulary = batch, length, config["vocab_size"]

    def train_dataloader(self) -> DataLoader[Any]:
        tokens = torch.randint(0, self._vocabulary, (64 * self._batch, self._length))
        rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
        return DataLoader(rows, batch_size=self._batch)


def shape(name: str) -> dict[str, Any]:
    """The config of a model of ``conf/model``."""
    import yaml

    described: dict[str, Any] = yaml.safe_load(
        files("lightning_offload.conf").joinpath(f"model/{name}.yaml").read_text()
    )
    config: dict[str, Any] = described["model"]["config"]
    return config


def table(name: str, rows: dict[str, dict[str, float | str]]) -> str:
    """Markdown."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| {name} | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for arm, row in rows.items():
        lines.append(f"| {arm} | " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    """Print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="files of conf/model with a config")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(f"{device}; {machine()}")
    for name in arguments.models:
        rows = training(shape(name), batch=arguments.batch, length=arguments.length, steps=arguments.steps)
        print(f"\n{table(f'{name}, {arguments.batch} x {arguments.length} tokens', rows)}")


if __name__ == "__main__":
    main()
