"""Bad input of zo2: every message names the argument, the value and the way out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_offload.errors import CheckpointError, HostMemoryError, OffloadError
from lightning_offload.memory.budget import Machine
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import METHOD, OWN, SETTINGS
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from lightning_offload.precision import OffloadPrecision
from tests.helpers import Net, lanes_of
from tests.zeroth import assert_equal, by_engine, by_oracle, make_engine, sgd, token_batches


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"eps": eps}, rf"eps.*{eps}") for eps in (0, -1e-3, math.inf, math.nan, "small", None, True)],
        *[({name: 0}, rf"{name}.*integer >= 1.*0") for name in ("directions", "micro_batches", "write_back_every")],
        *[({name: 1.5}, rf"{name}.*integer >= 1.*1\.5") for name in ("directions", "micro_batches", "prefetch")],
        ({"directions": True}, r"directions.*integer >= 1.*True"),
        ({"slots": 2}, r"slots.*integer >= 3: one for what forwards see.*prefetch=1.*2"),
        ({"slots": 3, "prefetch": 2}, r"slots.*integer >= 4.*prefetch=2.*3"),
        ({"noise": "gauss"}, r"noise.*'philox' or 'mezo'.*gauss"),
        ({"distribution": "normal"}, r"distribution.*'popcount', 'gaussian', 'rademacher'.*normal"),
        ({"train_mode": 1}, r"train_mode.*true or false.*1"),
        ({"seed": -1}, r"seed.*integer >= 0.*-1"),
        ({"resident": "all"}, r"resident.*'auto', a number of GiB >= 0, or a list of names.*all"),
        ({"resident": -1.0}, r"resident.*'auto'.*-1"),
        ({"resident": math.nan}, r"resident.*'auto'.*nan"),
        ({"resident": [3]}, r"resident.*a list of names of units.*3"),
        ({"noise": "mezo", "directions": 2}, r"`noise='mezo'` has one direction.*`directions=2`; pass noise='philox'"),
        ({"max_skips": -1}, r"max_skips.*-1"),
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + in_any_order(message)):
        ZO2Settings(**settings)


def in_any_order(message: str) -> str:
    return "".join(f"(?=.*{part})" for part in message.split(".*"))


def test_a_name_of_no_unit() -> None:
    with pytest.raises(ValueError, match=r"`resident` names 'layers.7', which is no unit; units: embed, blocks.0, "):
        make_engine(Net(), resident=["blocks.0", "layers.7"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3), r"`AdamW` cannot be used with method `zo2`.*torch.optim.SGD"),
        (lambda p: torch.optim.Adam(p), r"`Adam` cannot be used.*torch.optim.SGD"),
        (
            lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
            r"`SGD\(momentum=...\)` cannot be used.*leave `momentum`",
        ),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True), r"`SGD\(momentum=...\)`"),
        (lambda p: torch.optim.SGD(p, lr=1e-3, maximize=True), r"`SGD\(maximize=...\)` cannot be used"),
    ],
)
def test_optimizers(make: Callable[[Any], torch.optim.Optimizer], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        make_engine(net, make(net.parameters()))
    net.loss(token_batches(1)[0]).backward()  # nothing has been hung on it


def test_momentum_of_the_second_group() -> None:
    net = Net()
    first, *rest = net.parameters()
    groups = [{"params": [first]}, {"params": rest, "dampening": 0.5, "momentum": 0.9}]
    with pytest.raises(ValueError, match="momentum"):
        make_engine(net, torch.optim.SGD(groups, lr=1e-3))


def test_a_parameter_of_another_module() -> None:
    net = Net()
    optimizer = torch.optim.SGD([*net.parameters(), nn.Parameter(torch.zeros(3, 2))], lr=1e-3)
    with pytest.raises(ValueError, match=r"Parameter \d+ of the optimizer's group 0 \(shape \(3, 2\)\) is not"):
        make_engine(net, optimizer)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net, batch: None, "got NoneType"),
        (lambda net, batch: net.loss(batch).item(), "got float"),
        (lambda net, batch: net(batch), r"got Tensor of shape \(2, 6, 41\)"),
        (lambda net, batch: {"loss": net.loss(batch)}, "got dict"),
    ],
)
def test_a_loss_that_is_none(loss: Callable[[Net, Any], Any], message: str) -> None:
    net, (batch,) = Net(), token_batches(1)
    engine = make_engine(net)
    with pytest.raises(OffloadError, match=f"needs a loss from every forward, a tensor of one element; {message}"):
        engine.micro_batch(lambda tokens: loss(net, tokens), [batch])
    engine.drop()
    engine.micro_batch(net.loss, [batch])
    engine.step()
    assert engine.report.step == 1
    engine.detach()


@pytest.mark.parametrize(
    "dtypes",
    [
        DTypes(compute=torch.bfloat16, wire=torch.float32),
        DTypes(compute=torch.float32, wire=torch.float16),
    ],
    ids=["master", "wire"],
)
def test_mezo_keeps_weights_as_forwards_see_them(dtypes: DTypes) -> None:
    with pytest.raises(ValueError, match=r"noise='mezo' keeps weights as forwards see them.*leave `wire` and `master`"):
        make_engine(Net(), noise="mezo", dtypes=dtypes)


@pytest.mark.parametrize("asked", [{"wire": "float16"}, {"master": "float32"}, {"rounding": "stochastic"}], ids=str)
def test_the_precision_of_mezo(asked: dict[str, Any]) -> None:
    (name,) = asked
    precision = OffloadPrecision("bf16-true", **asked)
    with pytest.raises(ValueError, match=rf"`OffloadPrecision\({name}=.*noise='mezo'.*[Ll]eave it out"):
        precision.dtypes(ZO2(ZO2Settings(noise="mezo")))
    assert precision.dtypes(ZO2(ZO2Settings())).compute == torch.bfloat16


@pytest.mark.parametrize("wire", [None, torch.float16])
def test_philox_noise_moves_what_fp32_holds(wire: torch.dtype | None) -> None:
    net, kept = Net().double(), wire or torch.float64
    message = f"`embed.weight` is kept in {kept} and seen in torch.float64: pass a model in float32 or 16 bits.*'mezo'"
    with pytest.raises(ValueError, match=message):
        make_engine(net, dtypes=DTypes(wire=wire))
    assert {p.dtype for p in net.parameters()} == {torch.float64}, "refused before any weight was rounded"
    make_engine(net, noise="mezo").detach()


class Calling(nn.Linear):
    """Calls other blocks that it does not own."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.others: list[nn.Module] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + sum(other(x) for other in self.others)


class Nested(nn.Module):
    """The first block calls the second, which calls the third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Calling() for _ in range(5))
        for at in range(2):
            self.blocks[at].others.append(self.blocks[at + 1])  # type: ignore[union-attr, operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (self.blocks[0], *self.blocks[3:]):
            x = block(x)
        return x.sum()


def test_units_visited_one_inside_the_other_need_more_slots() -> None:
    batches = [torch.ones(2, 4)] * 4
    with pytest.raises(OffloadError, match=r"`blocks.0`, `blocks.1`, .* are visited one inside .* pass slots=5"):
        by_engine(Nested(), batches, call, lanes=lanes_of("checked"))
    ours = by_engine(Nested(), batches, call, lanes=lanes_of("checked"), slots=5)
    assert_equal(ours, by_oracle(Nested(), batches, call, distribution="popcount"))


def call(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = module(batch)
    return loss


def test_host_memory() -> None:
    net = Net()
    tight = replace(Machine.detect(), host_available_bytes=1000, host_total_bytes=1000)
    with pytest.raises(HostMemoryError, match="method `zo2` on"):
        ZerothEngine(net, sgd(net), ZO2(ZO2Settings(seed=0, min_numel=0)), lanes_of("inline"), DTypes(), machine=tight)


@pytest.mark.parametrize(
    "changed", [{"eps": 1e-2}, {"directions": 2}, {"seed": 4}, {"distribution": "gaussian"}], ids=str
)
def test_a_checkpoint_of_other_settings(changed: dict[str, Any]) -> None:
    net = Net()
    engine = make_engine(net)
    extras = engine.extras()
    assert set(extras) == {METHOD, SETTINGS, OWN}
    engine.detach()
    other = make_engine(net, **changed)
    (name,) = changed
    with pytest.raises(CheckpointError, match=rf"made with {name}=.*this run has {name}=.*setting of the checkpoint"):
        other.load_extras(extras)
    other.detach()
