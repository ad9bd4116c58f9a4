"""`calibration="batch"`: batches apart, that leave no trace but projectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_offload.calibration import Calibration
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.lsp import LSPSettings
from tests.helpers import VOCAB
from tests.lit import Lit, LSPManual, assert_equal_modules, fit, lsp


def batches(count: int = 3, **loading: Any) -> DataLoader[Tensor]:
    tokens = torch.randint(0, VOCAB, (2 * count, 6), generator=torch.Generator().manual_seed(9))
    return DataLoader(tokens, **{"batch_size": 2, "shuffle": True, **loading})


BATCH = {"calibration": "batch", "projector": "pca", "bias_threshold": 0.0}


class Counts(Lit):
    """Everything that a step may leave behind."""

    def __init__(self, **build: Any) -> None:
        super().__init__(**build)
        self.metric, self.statistics, self.calls = MeanMetric(), nn.BatchNorm1d(6), 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls += 1
        self.statistics(batch.float())
        loss = self.net.loss(batch)
        self.metric(loss.detach())
        self.log("metric", self.metric)
        self.log("loss", loss, on_step=True)
        self.losses.append(float(torch.rand(())))  # the stream of random numbers as training sees it
        return loss


def test_nothing_leaks_but_projectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = {}
    modules = {name: Counts(dropout=0.1) for name in ("without", "with")}
    monkeypatch.setattr(Engine, "calibrate", lambda engine, backward: _twice(backward, engine))
    for name, module in modules.items():
        settings = BATCH if name == "with" else {"projector": "block", "refit_every": float("inf")}
        loader = batches() if name == "with" else None
        logger = CSVLogger(tmp_path, name=name)
        fit(module, lsp(**settings, calibration_dataloader=loader), logger=logger, log_every_n_steps=1)
        logged[name] = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    one, other = modules["without"], modules["with"]
    assert one.calls < other.calls
    drawn = iter(other.losses)
    assert all(value in drawn for value in one.losses)  # in this order, with those of calibrations in between
    assert torch.equal(one.statistics.running_mean, other.statistics.running_mean)
    assert float(one.statistics.num_batches_tracked) == float(other.statistics.num_batches_tracked) == 18
    assert one.metric._update_count == other.metric._update_count
    assert logged["without"] == logged["with"]


def test_nothing_leaks_from_a_calibration_that_fails() -> None:
    class Fails(Counts):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("a bad batch")

    module = Fails()
    before = [buffer.clone() for buffer in module.buffers()]
    with pytest.raises(RuntimeError, match="a bad batch"):
        fit(module, lsp(**BATCH, calibration_dataloader=batches()))
    assert module.calls == 1
    assert before
    assert all(torch.equal(buffer, kept) for buffer, kept in zip(module.buffers(), before, strict=True))
    assert "log" not in vars(module)


def _twice(backward: Any, engine: Engine) -> None:
    """As where all are judged together; what the gradients are used for is tested elsewhere."""
    kept = [(p, p.grad) for p in engine.module.parameters()]
    for _ in range(2):
        engine._calibrating = lambda trained: None
        backward()
    engine._calibrating = None
    for parameter, gradient in kept:
        parameter.grad = gradient


@pytest.mark.parametrize("threshold_over", ["matrix", "all"])
@pytest.mark.parametrize("window", [1, 2])
def test_the_mixin_calibrates_as_the_strategy_does(window: int, threshold_over: str) -> None:
    settings = BATCH | {"threshold_over": threshold_over, "projector": "learned"}
    automatic = Lit()
    strategy = lsp(**settings, calibration_dataloader=batches())
    fit(automatic, strategy, accumulate_grad_batches=window)
    assert strategy.engine is not None
    assert strategy.engine.own is not None
    assert min(state["draws"] for state in strategy.engine.own.extras().values()) >= 2
    modules = LSPManual(), LSPManual()
    for module, kind in zip(modules, ("auto", "lsp_offload"), strict=True):
        module.offload |= settings | {"calibration_dataloader": batches(), "accumulate_grad_batches": window}
        fit(module, kind)
    assert_equal_modules(*modules)
    trained = dict(automatic.net.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in modules[0].net.named_parameters())


@pytest.mark.parametrize("window", [1, 2])
def test_it_goes_on_where_it_stopped(tmp_path: Path, window: int) -> None:
    """Three batches are used up between two checkpoints: rounds differ in their order."""

    def run(**more: Any) -> Lit:
        module, strategy = Lit(), lsp(**BATCH, calibration_dataloader=batches())
        made = fit(module, strategy, accumulate_grad_batches=window, **more)
        made.save_checkpoint(tmp_path / f"{made.current_epoch}.ckpt")
        return module

    whole, first = run(max_epochs=4), run(max_epochs=2)
    rest = run(max_epochs=4, ckpt_path=tmp_path / "2.ckpt")
    assert first.losses + rest.losses == whole.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_without_batches_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`calibration='batch'` needs batches"):
        fit(LSPManual(BATCH))
    with pytest.raises(ValueError, match="`calibration_dataloader` has no batch"):
        fit(Lit(), lsp(**BATCH, calibration_dataloader=[]))
    Calibration(None, LSPSettings())


class StepsItself(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.one(batch))
        optimizer.step()


def test_a_module_that_steps_itself_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"`StepsItself\.training_step` steps by itself.*`LSPMixin`"):
        fit(StepsItself(), lsp(**BATCH, calibration_dataloader=batches()))
    fit(StepsItself(), lsp())
