"""Runs Lightning's own tests under the strategies of this package, against a strict list of what is refused and why.

::

    git clone --depth 1 --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning
    python -m tests.contract.run pytorch-lightning/tests/tests_pytorch

A test that passes under ``single_device`` must pass under each strategy unless ``expected.toml`` lists it; one that is
listed and passes is an error too, as is a line of the list that names no test. The tests need ``pytest-timeout``,
``pytest-rerunfailures``, ``scikit-learn``, ``pandas``, ``cloudpickle`` and ``tensorboard`` beside the package.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STOCK = "single_device"
STRATEGIES = ("full_offload", "lsp_offload", "zo2_offload", "meft_offload")

FILES = (
    "strategies/test_custom_strategy.py",
    "strategies/test_single_device.py",
    "strategies/test_common.py",
    "models/test_hooks.py",
    "models/test_cpu.py",
    "models/test_restore.py",
    "trainer/optimization",
    "core/test_lightning_optimizer.py",
    "core/test_lightning_module.py",
    "core/test_metric_result_integration.py",
    "loops",
    "callbacks/test_weight_averaging.py",
    "callbacks/test_stochastic_weight_avg.py",
    "callbacks/test_lr_monitor.py",
    "callbacks/test_early_stopping.py",
    "callbacks/test_finetuning_callback.py",
    "callbacks/test_gradient_accumulation_scheduler.py",
    "callbacks/test_pruning.py",
    "callbacks/test_throughput_monitor.py",
    "callbacks/test_timer.py",
    "tuner",
    "checkpointing/test_model_checkpoint.py",
    "checkpointing/test_checkpoint_callback_frequency.py",
    "checkpointing/test_trainer_checkpoint.py",
    "checkpointing/test_torch_saving.py",
    "trainer/connectors/test_checkpoint_connector.py",
    "plugins/test_checkpoint_io_plugin.py",
    "plugins/test_async_checkpoint.py",
    "plugins/precision/test_all.py",
    "trainer/flags",
    "utilities/test_auto_restart.py",
)
"""Those in which strategies show, of ``tests_pytorch``."""

OTHERS = "not ddp"
"""Tests that bring a strategy of their own, and several processes."""

Outcomes = Mapping[str, str]
"""``"passed"``, ``"skipped"``, or why it failed, by test."""


@dataclass(frozen=True)
class Refusal:
    """Tests that are known to fail.

    Attributes:
        reason: Why that is right, or that it is a gap.
        strategies: Under which.
        tests: Their ids below ``tests_pytorch``; ``*`` stands for anything.
    """

    reason: str
    strategies: Sequence[str]
    tests: Sequence[str]


def refusals(path: Path) -> list[Refusal]:
    """What ``expected.toml`` lists, ``[stock]`` included."""
    listed: dict[str, Any] = tomllib.loads(path.read_text())
    stock = [Refusal(reason, [STOCK], tests) for reason, tests in listed["stock"].items()]
    return stock + [Refusal(**entry) for entry in listed["refusal"]]


def problems(strategy: str, outcomes: Outcomes, listed: Sequence[Refusal], stock: Outcomes) -> list[str]:
    """What differs from the list: failures that it lacks, refusals that pass, patterns that name no test."""
    known = {name for name, outcome in stock.items() if _failed(outcome)} if strategy != STOCK else set()
    found, expected = [], set()
    for refusal in listed:
        for pattern in refusal.tests if strategy in refusal.strategies else ():
            names = [name for name in outcomes if _matches(name, pattern)]
            expected |= set(names)
            found += [f"names no test: {pattern}"] if not names else []
            found += [f"passes, but is listed ({refusal.reason}): {n}" for n in names if outcomes[n] == "passed"]
    for name, outcome in outcomes.items():
        if _failed(outcome) and name not in expected | known:
            found.append(f"fails: {name}: {outcome.splitlines()[0][:200]}")
    return found


def _failed(outcome: str) -> bool:
    return outcome not in ("passed", "skipped")


def _matches(name: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def run(tree: Path, strategy: str, files: Sequence[str]) -> Outcomes:
    """The tests in ``files`` under ``strategy``, in a copy of ``tree``: some look at what lies beside them."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "tests")
        shutil.copytree(tree, copy / "tests_pytorch")
        outcomes = Path(folder, "outcomes.jsonl")
        paths = [str(ROOT), str(copy), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PL_TRAINER_STRATEGY": strategy,
            "PL_TRAINER_ACCELERATOR": "cpu",
            "PL_TRAINER_DEVICES": "1",
            "CONTRACT_OUTCOMES": str(outcomes),
        }
        options = ["-p", "tests.contract.plugin", "-p", "no:cacheprovider", "-q", "--tb=no", "--timeout=180"]
        plain = ["-o", "addopts=", "-o", "filterwarnings=", "-k", OTHERS, "--rootdir", str(copy)]
        targets = [f"tests_pytorch/{file}" for file in files]
        command = [sys.executable, "-m", "pytest", *options, *plain, *targets]
        subprocess.run(command, cwd=copy, env=environment, check=False)
        return read(outcomes)


def read(path: Path) -> Outcomes:
    """What the plugin wrote, by id below ``tests_pytorch``; a failure stays one, whatever follows it."""
    outcomes: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, outcome, why = json.loads(line)
        name = name.partition("tests_pytorch/")[2]
        if not _failed(outcomes.get(name, "passed")):
            outcomes[name] = why or "failed" if outcome == "failed" else outcome
    return outcomes


def row(strategy: str, outcomes: Outcomes, stock: Outcomes) -> str:
    """Passed, failed under stock too, refused, skipped: a line of the table."""
    failed = [name for name, outcome in outcomes.items() if _failed(outcome)]
    both = sum(_failed(stock.get(name, "passed")) for name in failed)
    passed, skipped = (sum(outcome == kind for outcome in outcomes.values()) for kind in ("passed", "skipped"))
    return f"{strategy:14} {passed:7} {both:10} {len(failed) - both:8} {skipped:8}"


def main() -> int:
    """Exit code 1 where anything differs from the list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tree", type=Path, help="`tests/tests_pytorch` of Lightning's source, tag 2.6.5")
    parser.add_argument("--strategy", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--files", nargs="+", default=FILES, help="some of them, below the tree")
    asked = parser.parse_args()
    listed = refusals(Path(__file__).with_name("expected.toml"))
    stock = run(asked.tree, STOCK, asked.files)
    done = {STOCK: stock, **{strategy: run(asked.tree, strategy, asked.files) for strategy in asked.strategy}}
    print(f"{'strategy':14} {'passed':>7} {'also stock':>10} {'refused':>8} {'skipped':>8}")
    print("\n".join(row(strategy, outcomes, stock) for strategy, outcomes in done.items()))
    found = [
        f"{strategy} {problem}"
        for strategy, outcomes in done.items()
        for problem in problems(strategy, outcomes, listed, stock)
        if asked.files is FILES or "names no test" not in problem
    ]
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
