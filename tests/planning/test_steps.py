"""What a module's own optimizer and step are taken to be."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_offload.errors import OffloadError
from lightning_offload.planning import plan
from lightning_offload.planning.methods import NATIVE
from lightning_offload.planning.scenario import Dry, Scenario
from tests.planning.machines import cpu, gpu

BATCH = torch.zeros(4, 8)


class Base(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def loss(self, batch: Tensor) -> Tensor:
        for block in self.blocks:
            batch = block(batch)
        return batch.mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())

    def adamw(self, at: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.blocks[at].parameters())


class WithoutIndex(Base):
    def training_step(self, batch: Tensor) -> Any:  # type: ignore[override]
        return {"loss": self.loss(batch)}


class AnyArguments(Base):
    def training_step(self, *args: Any) -> Any:
        batch, batch_idx = args
        assert batch_idx == 0
        return self.loss(batch)


@pytest.mark.parametrize("kind", [Base, WithoutIndex, AnyArguments])
def test_a_step_gets_the_arguments_that_it_takes(kind: type[Base]) -> None:
    assert plan(kind(), BATCH, hardware=cpu()).fits


def returning(what: str) -> type[Base]:
    class Configured(Base):
        def configure_optimizers(self) -> Any:
            one = self.adamw(0)
            schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1.0)
            return {
                "one": one,
                "list": [one],
                "lists": ([one], [schedule]),
                "dict": {"optimizer": one, "lr_scheduler": schedule},
                "dicts": [{"optimizer": one}],
                "two": [one, self.adamw(1)],
                "two lists": ([one, self.adamw(1)], []),
                "two dicts": ({"optimizer": one}, {"optimizer": self.adamw(1)}),
                "none": None,
            }[what]

    return Configured


@pytest.mark.parametrize("what", ["one", "list", "lists", "dict", "dicts"])
def test_every_form_of_one_optimizer_is_understood(what: str) -> None:
    assert plan(returning(what)(), BATCH, hardware=cpu()).trained == 8 * 8 + 8


@pytest.mark.parametrize(("what", "count"), [("two", 2), ("two lists", 2), ("two dicts", 2), ("none", 0)])
def test_several_or_none_are_refused_by_name(what: str, count: int) -> None:
    with pytest.raises(OffloadError, match=rf"Configured returned {count} optimizers.*`optimizer=`"):
        plan(returning(what)(), BATCH, hardware=cpu())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda module, batch: None, "gave NoneType, no loss"),
        (lambda module, batch: module(batch), r"shape \(4, 8\), no scalar loss"),
        (lambda module, batch: module(batch).mean().detach(), "has no gradient"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, message: str) -> None:
    class Wrong(nn.Linear):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return loss(self, batch)

    with pytest.raises(OffloadError, match=rf"Wrong.*{message}|{message}.*`step=`"):
        plan(Wrong(8, 8), BATCH, hardware=cpu())


@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.LBFGS])
def test_an_optimizer_that_looks_at_values_is_refused_by_name(optimizer: Any) -> None:
    module = nn.Linear(8, 8)
    with pytest.raises(OffloadError, match=rf"{optimizer.__name__} cannot be planned.*optimizer=torch.optim.AdamW"):
        plan(
            module,
            BATCH,
            method=NATIVE,
            hardware=gpu(),
            optimizer=optimizer(module.parameters()),
            step=lambda module, batch: module(batch).mean(),
        )


def test_the_backward_of_blocks_is_not_called_logits() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256)) for _ in range(4)))
            self.head = nn.Linear(256, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(x)).mean()

    kinds = dict(Dry(Scenario(Classifier(), torch.zeros(512, 256), gpu())).run.meter.peak.kinds)
    of_the_head = 4 * 512 * 1024  # at most what the last block's backward makes before its first gradient
    assert kinds.get("logits", 0) <= 2 * of_the_head < kinds["activations"]
