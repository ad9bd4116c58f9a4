"""Loaded into Lightning's own test run: registers the strategies and writes down how each test ended.

``CONTRACT_OUTCOMES`` names the file to write to; a line is a JSON list of the test, its outcome, and why it failed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn

from lightning_offload.strategies import STRATEGIES

OUTCOMES = "CONTRACT_OUTCOMES"
SETTINGS: dict[str, dict[str, Any]] = {
    "lsp_offload": {"dim": 2, "nnz": 1},
    "meft_offload": {
        "width": 64,
        "active_experts": 4,
        "top_k": 8,
        "targets": "feed_forward",
        "router_init": "normal",
        "seed": 5,
    },
}
"""The models of these tests are small: at the defaults nothing would be offloaded."""


class LayerWithNetwork(nn.Linear):
    """The layer of Lightning's test model, with the feed-forward network in front that `meft` needs."""

    def __init__(self) -> None:
        super().__init__(32, 2)
        self.feed_forward = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 32))

    def forward(self, x: Tensor) -> Tensor:
        # more of it diverges at the learning rates of these tests
        return super().forward(x + 0.01 * self.feed_forward(x).tanh())


def pytest_configure() -> None:
    """Registers every strategy for small models, and gives the test model what the one under test needs."""
    for strategy in STRATEGIES:
        name = strategy.strategy_name
        StrategyRegistry.register(name, strategy, override=True, min_numel=0, **SETTINGS.get(name, {}))
    under_test = os.environ["PL_TRAINER_STRATEGY"]
    if under_test == "meft_offload":
        _give_network()
    if under_test == "lsp_offload":
        _give_adamw()


def _give_network() -> None:
    make: Any = BoringModel.__init__

    def init(self: Any) -> None:
        make(self)
        state = torch.get_rng_state()  # as many draws as without
        self.layer = LayerWithNetwork()
        torch.set_rng_state(state)

    BoringModel.__init__ = init  # type: ignore[method-assign]


def _give_adamw() -> None:
    """`lsp` refuses the model's own SGD."""

    def configure_optimizers(self: Any) -> tuple[list[Any], list[Any]]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]

    BoringModel.configure_optimizers = configure_optimizers  # type: ignore[method-assign,assignment]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """What fails before or after a test fails the test."""
    report = yield
    if report.failed or report.when == "call" or report.skipped:
        error = call.excinfo
        why = f"{error.typename}: {error.value}"[:2000] if report.failed and error is not None else ""
        with Path(os.environ[OUTCOMES]).open("a") as lines:
            lines.write(json.dumps([item.nodeid, report.outcome, why or report.longreprtext[:2000]]) + "\n")
    return report
