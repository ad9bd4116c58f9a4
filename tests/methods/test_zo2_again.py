"""zo2 used again: weights that come back as they were, forwards outside of fit, a first forward that leaves nothing."""

from __future__ import annotations

import itertools
import random
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_offload import OffloadPrecision, ZO2OffloadStrategy, replay
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.blocks import Unit, partition
from lightning_offload.memory.lanes import InlineLanes
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.forwards import StreamedForwards
from lightning_offload.methods.streaming import Streaming
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from tests.helpers import Net, lanes_of, mostly_slow
from tests.lit import trainer
from tests.methods.test_zo2_independence import Kept
from tests.zeroth import assert_equal, built, by_engine, by_oracle, make_engine, net_loss, token_batches
from tests.zo2 import ZLit, same_weights, zfit, zo2


def forwards_on(module: nn.Module, dtypes: DTypes | None = None, **settings: Any) -> StreamedForwards:
    method = ZO2(ZO2Settings(min_numel=0, seed=0, **settings))
    lanes = InlineLanes(HostMemory(pin=False))
    return StreamedForwards(module, method, lanes, dtypes or DTypes(), partition(module))


def dtypes_of(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters()}


# A wire of 16 bits.


@pytest.mark.parametrize("lanes", ["checked", "shuffled"])
def test_weights_that_were_kept_in_16_bits_come_back_as_wide_as_they_were(lanes: str) -> None:
    made, narrow = Net(depth=4), DTypes(wire=torch.float16, rounding="stochastic")
    for _ in range(2):
        engine = make_engine(made, lanes=lanes_of(lanes), dtypes=narrow)
        assert {leaf.compute for leaf in engine.trained} == {torch.float32}
        assert dtypes_of(made) == {torch.float16}
        engine.micro_batch(made.loss, [token_batches(1)[0]])
        engine.step()
        engine.flush()
        at_rest = {name: p.detach().clone() for name, p in made.named_parameters()}
        engine.detach()
        assert dtypes_of(made) == {torch.float32}
        assert {leaf.rest.dtype for leaf in engine.trained} == {torch.float16}  # what the log says of it
        for name, p in made.named_parameters():
            assert torch.equal(p, at_rest[name].float()), name
    made.loss(token_batches(1)[0]).backward()


def test_weights_that_were_kept_in_more_bits_lose_none() -> None:
    made = Net(depth=3).bfloat16()
    engine = make_engine(made, dtypes=DTypes(compute=torch.bfloat16, wire=torch.float32))
    engine.micro_batch(made.loss, [token_batches(1)[0]])
    engine.step()
    engine.flush()
    after = {name: p.detach().clone() for name, p in made.named_parameters()}
    engine.detach()
    assert all(torch.equal(p, after[name]) for name, p in made.named_parameters())
    assert dtypes_of(made) == {torch.float32}


def test_forwards_alone_with_a_narrow_wire_come_twice() -> None:
    made, batch = Net(depth=4), token_batches(1)[0]
    losses = []
    for _ in range(2):
        forwards = forwards_on(made, DTypes(wire=torch.float16))
        losses.append(made.loss(batch))
        forwards.detach()
        assert dtypes_of(made) == {torch.float32}
    assert torch.equal(*losses)
    assert torch.equal(losses[0], made.loss(batch))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_validate_fit_and_save_with_a_narrow_wire(tmp_path: Path, precision: Any) -> None:
    def strategy(log: str | None = None) -> ZO2OffloadStrategy:
        plugin = OffloadPrecision(precision, wire="float16")
        return zo2(precision_plugin=plugin, log_file=None if log is None else tmp_path / log)

    module = ZLit()
    run = zfit(module, strategy("a.log"), max_epochs=1, limit_val_batches=1.0)
    assert dtypes_of(module) == {torch.float32}
    run.save_checkpoint(tmp_path / "a.ckpt")
    rounded = {name: value.half().float() for name, value in module.net.state_dict().items()}
    assert all(torch.equal(value, rounded[name]) for name, value in module.net.state_dict().items())
    base = replay(ZLit().net, tmp_path / "a.log")
    assert all(torch.equal(p, rounded[name]) for name, p in base.float().named_parameters())
    assert same_weights(base, replay(ZLit().net, run.strategy).float())
    (first,) = run.validate(module, module.val_dataloader(), verbose=False)
    (again,) = trainer(strategy(), limit_val_batches=1.0).validate(module, module.val_dataloader(), verbose=False)
    assert first == again
    zfit(module, strategy(), max_steps=2)
    assert dtypes_of(module) == {torch.float32}
    other = ZLit()
    zfit(other, strategy(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    straight = ZLit()
    zfit(straight, strategy(), max_epochs=2)
    assert same_weights(other.net, straight.net)


# The first forward.


class Counted(L.LightningModule):
    """Logs, counts, draws at random, and uses its head outside any call if asked."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.net = Net(depth=4, tied=functional, functional_head=functional)
        self.seen = torchmetrics.MeanMetric()
        self.drawn: list[tuple[float, float, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
        loss = self.net.loss(batch)
        self.seen.update(loss.detach())
        self.log("loss", loss, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("steps", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("functional", [False, True])
def test_the_forward_that_finds_out_leaves_nothing(functional: bool) -> None:
    module = Counted(functional)
    data = torch.utils.data.DataLoader(torch.cat(token_batches(4)), batch_size=2)  # type: ignore[arg-type]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    run = trainer(zo2(), max_epochs=1)
    run.fit(module, data)
    assert run.callback_metrics["steps"] == 4
    assert module.seen.weight == 4
    assert float(module.seen.mean_value) == pytest.approx(float(run.callback_metrics["loss"]))
    rehearsed, *rest = module.drawn
    assert rehearsed == rest[0] == rest[1]  # of l+ and l-
    assert len(module.drawn) == 1 + 2 * 4
    assert len(set(rest)) == 4


def test_an_exception_in_the_first_forward_teaches_nothing() -> None:
    batches = token_batches(3)
    made = Kept()
    engine = make_engine(made)

    def failing(batch: Tensor) -> Tensor:
        made.embed(batch)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        engine.micro_batch(failing, [batches[0]])
    engine.drop()
    for batch in batches:
        engine.micro_batch(made.loss, [batch])
        engine.step()
    engine.detach()
    wanted = by_oracle(Kept(), batches, distribution="popcount").weights
    for name, p in made.named_parameters():
        assert torch.equal(p, wanted[name]), name


# What comes up ahead outside of fit.


def found_on_the_device(streaming: Streaming, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each visit of a streamed unit from now on: whether its copy had been asked for before."""
    found: list[bool] = []
    arrive = streaming.arrive

    def spied(unit: Unit) -> None:
        berth = streaming._berths[unit.index]
        if not berth.resident:
            found.append(berth.slot is not None)
        arrive(unit)

    monkeypatch.setattr(streaming, "arrive", spied)
    return found


@pytest.mark.parametrize("family", ["net", "t5", "gpt2"])
def test_forwards_outside_of_fit_bring_up_what_comes_next(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "net":
        module, batch = Net(depth=6), {"tokens": token_batches(1)[0]}
    else:
        module, (batch,) = built(family, torch.float32, 1)  # type: ignore[assignment]
    forwards = forwards_on(module)
    found = found_on_the_device(forwards.streaming, monkeypatch)
    with torch.no_grad():
        for _ in range(3):  # of T5's two halves, which begin with the same unit, the second is known a forward later
            module(**batch)
        assert not all(found)
        found.clear()
        module(**batch)
    assert found
    assert all(found)
    forwards.detach()


def test_a_unit_that_is_never_seen_again_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_offload.methods.streaming._MOST_HEARD", 40)
    module, batch = Net(depth=6), token_batches(1)[0]
    forwards = forwards_on(module)
    with torch.no_grad():
        module.norm(torch.zeros(1, module.norm.normalized_shape[0]))
        module.norm = nn.Identity()  # type: ignore[assignment]
        for _ in range(8):
            module(batch)
        assert not forwards.streaming._heard
        found = found_on_the_device(forwards.streaming, monkeypatch)
        for _ in range(5):
            module(batch)
    assert len(found) == 30
    assert found.count(False) <= 2  # where what was heard ends and begins
    forwards.detach()


# Units that do not run, and orders that change.


class Sleeper(Net):
    """The last block never runs."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks[:-1]:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


@pytest.mark.parametrize(
    ("lanes", "every"), mostly_slow(itertools.product(["checked", "shuffled"], [1, 9]), lambda at, row: at in (0, 3))
)
def test_a_unit_that_never_runs_does_not_keep_all_updates(
    lanes: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_offload.methods.perturbed.MOST_KEPT", 5)
    batches, kept = token_batches(24), []
    ours = by_engine(
        Sleeper(depth=4),
        batches,
        lanes=lanes_of(lanes),
        write_back_every=every,
        after_step=lambda engine, step: kept.append(len(engine.streaming.updates)),
    )
    assert max(kept) == max(5, every)
    assert ours.zeroth.streaming.head == 24
    assert_equal(ours, by_oracle(Sleeper(depth=4), batches, distribution="popcount"))


class Turned(Net):
    """Every third forward of a step's batch takes the blocks the other way round."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        turned = int(tokens[0, 0]) == 1
        for block in reversed(self.blocks) if turned else self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def test_steps_in_another_order_are_counted_and_said_once() -> None:
    batches = token_batches(6)
    for step, batch in enumerate(batches):
        batch[0, 0] = step in (2, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = by_engine(Turned(depth=4), batches)
    assert [str(warning.message)[:36] for warning in said] == ["method `zo2`: forwards of step 3 vis"]
    assert [report.reordered_total for report in ours.reports] == [0, 0, 1, 2, 3, 4]
    assert_equal(ours, by_oracle(Turned(depth=4), batches, net_loss, distribution="popcount"))
