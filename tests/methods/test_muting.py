"""Metrics and logging of streams in lock-step: what stays is what the first stream alone would have left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics import classification

from lightning_offload.memory.blocks import Unit, partition
from lightning_offload.methods.lockstep import Lockstep


class Quiet:
    def arrive(self, unit: Unit) -> None: ...

    def present(self, unit: Unit, stream: int) -> None: ...

    def leave(self, unit: Unit) -> None: ...


class Listing(torchmetrics.Metric):
    """A list state, a plain counter, and a dictionary changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=[], dist_reduce_fx="cat")
        self.calls, self.notes = 0, {"calls": [0]}

    def update(self, values: Tensor, target: Tensor) -> None:
        self.seen.append(values.sum())
        self.calls += 1
        self.notes["calls"][0] += 1

    def compute(self) -> Tensor:
        return torch.stack(self.seen).sum()


class InPlace(torchmetrics.Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros(()), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        self.total += values.sum()

    def compute(self) -> Tensor:
        return self.total


def accuracy() -> torchmetrics.Metric:
    return classification.MulticlassAccuracy(4, average="micro")


METRICS: dict[str, Callable[[], nn.Module]] = {
    "accuracy": accuracy,
    "mean": lambda: torchmetrics.MeanSquaredError(),
    "list": Listing,
    "in place": InPlace,
    "group": lambda: torchmetrics.MetricCollection(
        {"precision": classification.MulticlassPrecision(4), "recall": classification.MulticlassRecall(4)}
    ),
    "running": lambda: torchmetrics.wrappers.Running(torchmetrics.SumMetric(), window=2),
    "tracker": lambda: torchmetrics.wrappers.MinMaxMetric(accuracy()),
}


class Measured(nn.Module):
    """Updates its metric before, between and after its layers, from what depends on the stream."""

    def __init__(self, metric: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.inner = nn.ModuleDict({"metric": metric})
        self.alias = metric

    def forward(self, scale: float) -> list[Any]:
        x = scale * torch.arange(12.0).reshape(3, 4).sin()
        values = []
        for layer in (nn.Identity(), *self.layers):
            x = layer(x)
            values.append(self.measure(x))
        return values

    def measure(self, x: Tensor) -> Any:
        if isinstance(self.alias, InPlace):
            return self.alias.update(x)
        if isinstance(self.alias, torchmetrics.wrappers.Running):
            return self.alias(x.sum())
        if isinstance(self.alias, torchmetrics.MeanSquaredError):
            return self.alias(x, torch.zeros_like(x))
        return self.alias(x, torch.tensor([0, 1, 2]))


def content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    return [content(item) for item in value] if isinstance(value, (list, tuple)) else value


def left(module: Measured) -> Any:
    states = [
        {name: content(getattr(m, name)) for name in (*m._defaults, "_update_count", "_computed")}
        for m in module.modules()
        if isinstance(m, torchmetrics.Metric)
    ]
    return states, content(module.alias.compute())


@torch.no_grad()
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "updated before"])
@pytest.mark.parametrize("name", METRICS)
def test_metrics_hold_what_the_first_stream_left(name: str, warm: bool) -> None:
    module = Measured(METRICS[name]())
    if warm:
        module(0.5)
    alone = [copy.deepcopy(module) for _ in range(3)]
    expected = [content(each(1.0 - stream)) for stream, each in enumerate(alone)]
    lockstep = Lockstep(module, partition(module, blocks=["Linear"]), Quiet())
    removers = lockstep.install()
    assert content(lockstep.run(lambda stream: module(1.0 - stream), 3)) == expected
    for remove in removers:
        remove()
    lockstep.close()
    assert left(module) == left(alone[0])
    assert content(module(2.0)) == content(alone[0](2.0))
    assert left(module) == left(alone[0])


def test_plain_attributes_of_metrics_are_kept_apart() -> None:
    module = Measured(Listing())
    alone = copy.deepcopy(module)
    with torch.no_grad():
        alone(0.0)
    lockstep = Lockstep(module, partition(module, blocks=["Linear"]), Quiet())
    lockstep.run(module, 3)
    assert alone.alias.calls > 0
    assert (module.alias.calls, module.alias.notes) == (alone.alias.calls, alone.alias.notes)
    lockstep.close()


def test_metrics_after_a_failure_are_those_of_stream_0() -> None:
    module = Measured(accuracy())
    lockstep = Lockstep(module, partition(module, blocks=["Linear"]), Quiet())
    removers = lockstep.install()

    def forward(stream: int) -> None:
        module.measure(torch.eye(4)[:3] * (1 - stream))
        module.layers(torch.ones(1, 4))
        raise ValueError(stream)

    with pytest.raises(ValueError, match="0"):
        lockstep.run(forward, 3)
    for remove in removers:
        remove()
    lockstep.close()
    assert (module.alias._update_count, module.alias.compute().item()) == (1, 1.0)


class Logged(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.lockstep = Lockstep(self, partition(self, blocks=["Linear"]), Quiet())
        self.seen: list[Tensor] = []
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        def forward(stream: int) -> Tensor:
            loss = self.layers(batch).sum() + stream
            self.log("loss", loss)
            self.log_dict({"stream": float(stream)})
            self.print("stream", stream)
            return loss

        self.seen.append(self.lockstep.run(forward, 3)[0])

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.rand(2, 4))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_only_the_first_stream_logs_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    module = Logged()
    removers = module.lockstep.install()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module)
    assert trainer.logged_metrics == {"loss": module.seen[-1], "stream": torch.tensor(0.0)}
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("stream")] == ["stream 0"] * 2
    for remove in removers:
        remove()
    module.lockstep.close()
    assert not {"log", "log_dict", "print"} & set(vars(module))


def test_a_method_of_the_instance_comes_back() -> None:
    module = Logged()
    heard: list[int] = []
    module.log = lambda name, value: heard.append(value)  # type: ignore[method-assign]
    mine = module.log
    module.lockstep.run(lambda stream: module.log("stream", stream), 3)
    module.lockstep.close()
    assert heard == [0]
    assert module.log is mine
