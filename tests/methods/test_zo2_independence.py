"""The bits of zo2 depend on no slot, no lane, no unit and no order: on the weights, the batches and the seed alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_offload.errors import OffloadError
from lightning_offload.methods.base import DTypes
from tests.helpers import Block, Net, lanes_of, mostly_slow, product
from tests.streams import thread_lanes
from tests.zeroth import (
    Trace,
    assert_equal,
    assert_streamed,
    built,
    by_engine,
    by_oracle,
    by_type,
    make_engine,
    model_loss,
    token_batches,
)

STEPS = 6
BF16 = DTypes(compute=torch.bfloat16, rounding="stochastic")
BLOCK_BYTES = sum(p.numel() * 4 for p in Block().parameters())


def deep() -> Net:
    return Net(depth=5, tied=True, frozen=True)


def run(**more: Any) -> Trace:
    return by_engine(deep(), token_batches(STEPS), **{"make_optimizer": by_type, **more})


PLAIN: dict[str, Trace] = {}


def plain(kind: str) -> Trace:
    settings: dict[str, Any] = {"bf16": {"dtypes": BF16}, "mezo": {"noise": "mezo"}}.get(kind, {})
    if kind not in PLAIN:
        PLAIN[kind] = run(**settings)
        assert_streamed(PLAIN[kind], micro_batches=STEPS)
    return PLAIN[kind]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "mezo"])
@pytest.mark.parametrize(
    "settings",
    [
        {"slots": 4},
        {"slots": 4, "prefetch": 2},
        {"slots": 5, "prefetch": 3},
        {"slots": 9, "prefetch": 7},
        {"resident": ["blocks.0", "blocks.3"]},
        {"resident": 2.5 * BLOCK_BYTES / 1024**3},
        {"resident": 1.0},
        {"min_numel": 1000},
        {"min_numel": 10**6},
        {"write_back_every": 2},
        {"write_back_every": 5},
        {"write_back_every": 100, "slots": 4},
        {"blocks": ["blocks.1", "blocks.4", "norm"]},
        {"blocks": ["Linear", "Embedding"], "slots": 4},
    ],
    ids=str,
)
def test_settings_of_the_traffic(kind: str, settings: dict[str, Any]) -> None:
    dtypes = BF16 if kind == "bf16" else DTypes()
    noise = "mezo" if kind == "mezo" else "philox"
    assert_equal(run(dtypes=dtypes, noise=noise, **settings), plain(kind))


@pytest.mark.parametrize("lanes", ["checked", "shuffled"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "mezo"])
def test_lanes(kind: str, lanes: str) -> None:
    dtypes = BF16 if kind == "bf16" else DTypes()
    noise = "mezo" if kind == "mezo" else "philox"
    assert_equal(run(dtypes=dtypes, noise=noise, lanes=lanes_of(lanes)), plain(kind))


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 500), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"slots": 5, "prefetch": 3}, {"write_back_every": 2}], ids=str)
def test_any_order_of_copies(settings: dict[str, Any], seeds: range) -> None:
    batches = token_batches(3)
    wanted = by_engine(Net(depth=4), batches)
    for seed in seeds:
        assert_equal(by_engine(Net(depth=4), batches, lanes=lanes_of("shuffled", seed), **settings), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "albert", "t5"])
def test_any_order_of_copies_on_models(family: str) -> None:
    module, batches = built(family, torch.bfloat16, 4)
    wanted = by_engine(module, batches, model_loss, dtypes=BF16)
    for seed in range(100):
        ours = by_engine(module, batches, model_loss, dtypes=BF16, lanes=lanes_of("shuffled", seed), slots=4)
        assert_equal(ours, wanted)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("settings", [{}, {"slots": 5, "prefetch": 3, "write_back_every": 2}], ids=str)
def test_copies_that_take_their_time(pinned: bool, settings: dict[str, Any]) -> None:
    for seed in range(5):
        with thread_lanes(seed, pinned=pinned) as lanes:
            assert_equal(run(lanes=lanes, **settings), plain("fp32"))


# Batches.


def halves(batch: Tensor) -> list[Tensor]:
    return [*batch.chunk(2)]


@pytest.mark.parametrize("settings", [{}, {"directions": 3}, {"noise": "mezo"}], ids=str)
def test_parts_of_one_visit_are_micro_batches(settings: dict[str, Any]) -> None:
    batches = token_batches(STEPS, batch=6)
    together = by_engine(deep(), batches, parts=lambda batch: [halves(batch)], **settings)
    apart = by_engine(deep(), batches, parts=lambda batch: [[half] for half in halves(batch)], **settings)
    assert_equal(together, apart)
    assert_streamed(together, micro_batches=STEPS)
    assert_streamed(apart, micro_batches=2 * STEPS)


def test_one_z_serves_all_micro_batches_of_a_step() -> None:
    batches = token_batches(STEPS, batch=4)
    wanted = by_oracle(
        deep(),
        batches,
        lambda net, batch: torch.stack([net.loss(half).double() for half in halves(batch)]).mean(),
        distribution="popcount",
    )
    ours = by_engine(deep(), batches, parts=lambda batch: [[half] for half in halves(batch)])
    for (mine, slope), (theirs, other) in zip(ours.steps, wanted.steps, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
        assert slope == pytest.approx(other, abs=1e-3)


def test_parts_count_by_their_weights() -> None:
    net, (batch,) = Net(), token_batches(1, batch=4)
    engine = make_engine(net)
    first, rest = batch[:1], batch[1:]
    loss = engine.micro_batch(net.loss, [first, rest], [1, 3])
    engine.step()
    whole = by_engine(Net(), [batch])
    assert float(loss) == pytest.approx(whole.steps[0][0], rel=1e-6)
    assert engine.report.loss_plus == pytest.approx(whole.steps[0][0], rel=1e-6)
    assert engine.report.coefficient == pytest.approx(whole.steps[0][1], abs=1e-3)


# Units that behave unusually.


class Sometimes(Net):
    """Leaves out a block in some steps, whatever the stream."""

    skipping = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            if not (self.skipping and index == 2):
                x = block(x)
        return self.head(self.norm(x))


def skip(period: int, module: nn.Module, step: int) -> None:
    assert isinstance(module, Sometimes)
    module.skipping = step % period != period - 1


@pytest.mark.parametrize(
    ("noise", "lanes", "period"),
    product(noise=["philox", "mezo"], lanes=["inline", "checked", "shuffled"], period=[2, 4]),
)
def test_a_unit_that_does_not_run_in_some_steps_catches_up(noise: str, lanes: str, period: int) -> None:
    def before(module: nn.Module, step: int) -> None:
        skip(period, module, step)

    batches = token_batches(9)
    distribution: Any = "popcount" if noise == "philox" else None
    wanted = by_oracle(Sometimes(depth=4), batches, before_step=before, distribution=distribution)
    for every in (1, 2):
        ours = by_engine(
            Sometimes(depth=4), batches, before_step=before, lanes=lanes_of(lanes), noise=noise, write_back_every=every
        )
        assert_equal(ours, wanted)


class Kept(Net):
    """A head that other code uses without calling it, and a scale that its own forward uses between the blocks."""

    def __init__(self) -> None:
        super().__init__(depth=3, tied=True, functional_head=True)
        self.scale = nn.Parameter(torch.full((19,), 1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale
        for block in self.blocks:
            x = block(x) * self.scale
        return F.linear(self.norm(x), self.head.weight)


@pytest.mark.parametrize("lanes", ["inline", "checked", "shuffled"])
@pytest.mark.parametrize("noise", ["philox", "mezo"])
def test_weights_used_outside_any_call(noise: str, lanes: str) -> None:
    batches = token_batches(STEPS)
    distribution: Any = "popcount" if noise == "philox" else None
    wanted = by_oracle(Kept(), batches, distribution=distribution)
    ours = by_engine(Kept(), batches, lanes=lanes_of(lanes), noise=noise)
    assert_equal(ours, wanted)
    assert_streamed(ours, micro_batches=STEPS)


@pytest.mark.parametrize(
    ("noise", "family"),
    mostly_slow(
        itertools.product(["philox", "mezo"], ["albert", "t5", "qwen3", "mixtral"]), lambda at, row: at in (2, 3, 4, 5)
    ),
)
def test_models_whose_units_repeat_share_or_tie(family: str, noise: str) -> None:
    module, batches = built(family, torch.float32, STEPS)
    distribution: Any = "popcount" if noise == "philox" else None
    wanted = by_oracle(module, batches, model_loss, distribution=distribution)
    for lanes, settings in (("checked", {}), ("shuffled", {"slots": 4}), ("inline", {"write_back_every": 3})):
        assert_equal(by_engine(module, batches, model_loss, lanes=lanes_of(lanes), noise=noise, **settings), wanted)


class Outside(Net):
    """Uses the weight of a block without calling it."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 0 * self.blocks[1].up.weight.sum()


def test_a_streamed_weight_used_outside_its_call_is_refused_and_may_stay() -> None:
    batches = token_batches(3)
    with pytest.raises(OffloadError, match=r"`blocks.1.up.weight` is used outside.*pass resident=\['blocks.1'\]"):
        by_engine(Outside(depth=4), batches)
    ours = by_engine(Outside(depth=4), batches, resident=["blocks.1"], slots=4)
    assert_equal(ours, by_oracle(Outside(depth=4), batches, distribution="popcount"))


class Loose(nn.Module):
    """Three layers and no list of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def mean_square(module: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = module(batch)
    return out.square().mean()


def test_a_model_without_blocks_streams_its_layers() -> None:
    batches = [torch.rand(2, 5, generator=torch.Generator().manual_seed(step)) for step in range(STEPS)]
    with pytest.warns(UserWarning, match="block"):
        ours = by_engine(Loose(), batches, mean_square)
    assert_equal(ours, by_oracle(Loose(), batches, mean_square, distribution="popcount"))
    assert_streamed(ours, micro_batches=STEPS)


class LayerDrop(Net):
    """Drops a layer by a draw that differs between streams, or by the values that it sees."""

    choose: Callable[[Tensor], bool]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self.choose(x):
                x = block(x)
        return self.head(self.norm(x))


def test_streams_that_disagree_are_refused_and_the_engine_goes_on() -> None:
    net, batches = LayerDrop(depth=4), token_batches(3)
    seen: list[float] = []

    def once(x: Tensor) -> bool:
        seen.append(float(x.sum()))
        return len(seen) != 6

    net.choose = once
    before = copy.deepcopy(net.state_dict())
    engine = make_engine(net)
    with pytest.raises(OffloadError, match="streams of one run disagree"):
        engine.micro_batch(net.loss, [batches[0]])
    engine.drop()
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, before[name]), name
    net.choose = lambda x: True
    for batch in batches:
        engine.micro_batch(net.loss, [batch])
        engine.step()
    engine.detach()
    wanted = by_engine(Net(depth=4), batches)
    for name, weight in net.named_parameters():
        assert torch.equal(weight, wanted.weights[name]), name
