"""The other name of Lightning: `pytorch_lightning` has classes and a registry of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_offload

pytest.importorskip("pytorch_lightning")

FIT = """
import warnings
warnings.filterwarnings("ignore")
import {name} as pl
import lightning_offload{more}
import torch
from torch import nn
from torch.utils.data import DataLoader

class Lit({bases}pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 8))

    def loss(self, batch, batch_idx):
        return (self.net(batch) - batch).square().mean()

    {step}

    def configure_optimizers(self):
        return torch.optim.{optimizer}(self.parameters(), lr=1e-2)

torch.manual_seed(1)
trainer = pl.Trainer(strategy={strategy}, accelerator="cpu", devices=1, max_epochs=2, logger=False,
                     precision="bf16-true", enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False)
module = Lit()
trainer.fit(module, DataLoader(torch.randn(12, 8), batch_size=4))
weights = float(sum(p.double().sum() for p in module.parameters()))
print(type(trainer.strategy).__module__, trainer.global_step, weights)
"""
STEP = "training_step = loss"


def fit(name: str, **how: str) -> list[str]:
    """In a process of its own, where nothing else has been imported."""
    text = {"more": "", "bases": "", "step": STEP, "optimizer": "AdamW", **how}
    command = [sys.executable, "-c", FIT.format(name=name, **text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-3:]


@pytest.mark.parametrize("strategy", ["full_offload", "zo2_offload"])
def test_a_strategy_by_name_has_the_same_bits(strategy: str) -> None:
    how = {"strategy": repr(strategy), "optimizer": "SGD" if strategy == "zo2_offload" else "AdamW"}
    home, *numbers = fit("pytorch_lightning", **how)
    assert home == "lightning_offload.pl.strategies"
    assert numbers == fit("lightning.pytorch", **how)[1:]


def test_an_instance_and_a_mixin() -> None:
    how = {
        "strategy": "lightning_offload.pl.FullOffloadStrategy(min_numel=0)",
        "more": ".pl",  # whichever is imported first
        "bases": "lightning_offload.pl.OffloadMixin, ",
        "step": "pass",
    }
    home, steps, _ = fit("pytorch_lightning", **how)
    assert (home, steps) == ("lightning_offload.pl.strategies", "6")


def test_every_module_that_knows_lightning_is_there() -> None:
    """And those that use one of them, but for what makes files of either's modules."""
    from lightning_offload import pl

    imports: dict[str, set[str]] = {}
    for path in Path(lightning_offload.__file__).parent.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        found = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        imports[path.stem] = {m.split(".")[1] if m.startswith("lightning_offload.") else m.split(".")[0] for m in found}
    facing = {module for module, found in imports.items() if "lightning" in found} - {"__init__"}
    while more := {module for module, found in imports.items() if found & facing} - facing - {"__init__"}:
        facing |= more
    assert facing - {"adapters", "export", "merging"} == pl.FACING


def test_names_are_those_of_the_package() -> None:
    from lightning_offload import pl

    for name in lightning_offload.__all__:
        assert getattr(pl, name).__name__ == getattr(lightning_offload, name).__name__
    assert pl.LSPOffloadStrategy is not lightning_offload.LSPOffloadStrategy
    assert pl.plan is lightning_offload.plan
    with pytest.raises(AttributeError, match="has no attribute `nothing`"):
        _ = pl.nothing
