"""What a step of zo2 means: which lr, what is dropped whole, what is never touched, what evaluation sees."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_offload.errors import NonFiniteError
from lightning_offload.methods.base import Clip
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.numerics.noise import Draw
from lightning_offload.numerics.noise import noise as drawn
from lightning_offload.numerics.zeroth import Update, update_
from tests.helpers import Net, lanes_of
from tests.mezo import Mezo
from tests.zeroth import (
    EPS,
    SEED,
    assert_equal,
    built,
    by_engine,
    by_oracle,
    by_type,
    make_engine,
    model_loss,
    net_loss,
    philox_noise,
    sgd,
    token_batches,
)

STEPS = 6


def net() -> Net:
    return Net(depth=4)


def trained(net: nn.Module, engine: ZerothEngine, batches: list[Tensor], lrs: list[float] | None = None) -> None:
    assert isinstance(net, Net)
    for at, batch in enumerate(batches):
        if lrs is not None:
            engine.optimizer.param_groups[0]["lr"] = lrs[at]
        engine.micro_batch(net.loss, [batch])
        engine.step()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_weights(module: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, p in module.named_parameters():
        assert torch.equal(p, wanted[name]), name


# Hyper-parameters.


def test_an_update_has_the_lr_of_the_step_that_measured_it() -> None:
    lrs = [1e-3, 0.0, 5e-3, 1e-4]
    batches = token_batches(4)
    ours = net()
    engine = make_engine(ours)
    trained(ours, engine, batches, lrs)
    engine.optimizer.param_groups[0]["lr"] = 77.0  # of the step to come: no pending update may see it
    engine.detach()
    wanted = by_oracle(net(), batches, schedule=lambda step: lrs[step] / 1e-3, distribution="popcount")
    assert [entry.lr for entry in engine.log] == [(lr,) for lr in lrs]
    assert_weights(ours, wanted.weights)


@pytest.mark.parametrize("noise", ["philox", "mezo"])
def test_a_step_without_slope_still_decays(noise: str) -> None:
    made = net()
    before = weights(made)
    engine = make_engine(made, sgd(made, lr=0.5, weight_decay=0.1), noise=noise)
    engine.micro_batch(lambda batch: made.loss(batch) * 0, [token_batches(1)[0]])
    engine.step()
    engine.detach()
    assert engine.log[0].coefficient == 0
    for name, p in made.named_parameters():
        kept = noise == "mezo" and "bias" in name
        assert torch.allclose(p, before[name] * (1 if kept else 0.95), atol=1e-6), name
        assert kept or "bias" in name or not torch.equal(p, before[name]), name


def test_groups_have_their_own_lr_and_decay() -> None:
    batches = token_batches(STEPS)
    made = net()
    engine = make_engine(made, by_type(made))
    trained(made, engine, batches)
    engine.detach()
    plain = net()
    for place, (name, p) in enumerate(plain.named_parameters()):
        lr, decay = (1e-3, 0.1) if p.dim() > 1 else (3e-3, 0.0)
        for entry in engine.log:
            update_(
                p.data, [Update(Draw(SEED, entry.step, place), entry.coefficient, lr, decay)], "popcount", "nearest"
            )
        assert torch.equal(p, made.get_parameter(name)), name


@pytest.mark.parametrize("value", [1e-2, 1.0, 1e9])
def test_clipping_bounds_the_slope(value: float) -> None:
    batches = token_batches(STEPS)
    free = by_engine(net(), batches)
    ours = by_engine(net(), batches[:1], clip=Clip(value))
    slope = free.steps[0][1]
    assert abs(slope) > 1e-2
    assert ours.steps[0][1] == max(-value, min(value, slope))
    assert ours.zeroth.log[0].coefficient == ours.steps[0][1]


# Steps that are dropped.


def poisoned(at: dict[int, tuple[float, float]]) -> Callable[[nn.Module, Any], Tensor]:
    """A loss whose two values are spoiled in the given steps; a batch is (step, tokens)."""
    calls: dict[int, int] = {}

    def loss(module: nn.Module, batch: Any) -> Tensor:
        step, tokens = batch
        turn = calls.get(step, 0)
        calls[step] = turn + 1
        value = net_loss(module, tokens)
        return value * at[step][turn] if step in at else value

    return loss


SPOILED = [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf), (math.inf, math.inf)]


@pytest.mark.parametrize("clip", [None, Clip(1.0)], ids=["free", "clipped"])
@pytest.mark.parametrize("spoiled", SPOILED, ids=str)
@pytest.mark.parametrize("noise", ["philox", "mezo"])
def test_a_loss_that_is_not_finite_drops_the_step_whole(
    noise: str, spoiled: tuple[float, float], clip: Clip | None
) -> None:
    batches = list(enumerate(token_batches(5)))
    ours = by_engine(net(), batches, poisoned({1: spoiled, 3: spoiled}), clip=clip, noise=noise)
    assert [report.skipped for report in ours.reports] == [False, True, False, True, False]
    assert [report.skipped_in_a_row for report in ours.reports] == [0, 1, 0, 1, 0]
    assert ours.reports[-1].skipped_total == 2
    assert [entry.step for entry in ours.zeroth.log] == [1, 3, 5]
    made = net()
    engine = make_engine(made, noise=noise)
    np.random.seed(5)
    for step, tokens in batches:
        if step in (1, 3):  # draws and is forgotten
            engine._steps += 1
            engine.noise.seed()
            continue
        engine.micro_batch(made.loss, [tokens])
        engine.step(clip)
    engine.detach()
    assert_weights(made, ours.weights)


def test_the_step_after_a_dropped_one_draws_anew() -> None:
    made, tokens = net(), token_batches(1)[0]
    losses: list[float] = []

    def loss(batch: Tensor) -> Tensor:
        value = made.loss(batch)
        losses.append(value.item())
        return value * math.nan

    for noise in ("philox", "mezo"):
        losses.clear()
        engine = make_engine(copy.deepcopy(made), noise=noise)
        made = engine.module  # type: ignore[assignment]
        for _ in range(3):
            engine.micro_batch(loss, [tokens])
            engine.step()
        assert len(set(losses[1:])) == 6  # the first was the rehearsal
        engine.detach()


def test_too_many_dropped_steps_in_a_row_are_an_error() -> None:
    made = net()
    before = weights(made)
    engine = make_engine(made, max_skips=2)
    for _ in range(2):
        engine.micro_batch(lambda batch: made.loss(batch) * math.nan, token_batches(1))
        engine.step()
    engine.micro_batch(lambda batch: made.loss(batch) * math.nan, token_batches(1))
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .*step 3: l\+ = nan.*`max_skips`"):
        engine.step()
    engine.detach()
    assert_weights(made, before)
    assert engine.log == []


def test_skip_nonfinite_false_takes_the_step() -> None:
    ours = by_engine(net(), list(enumerate(token_batches(2))), poisoned({1: (math.nan, 1.0)}), skip_nonfinite=False)
    assert not ours.reports[-1].skipped
    assert all(weight.isnan().all() for weight in ours.weights.values())


def test_a_step_without_losses_is_none() -> None:
    made = net()
    engine = make_engine(made)
    engine.step()
    assert engine.report.step == 0
    engine.detach()


@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("noise", ["philox", "mezo"])
@pytest.mark.parametrize("family", ["plain", "held"])
def test_a_step_that_an_exception_interrupts_is_begun_anew(family: str, noise: str, where: int) -> None:
    """At its door, half way, in the second stream: what was made of the first z is not shown for the second."""
    batches = token_batches(4)

    def make() -> Net:
        return Net(depth=4, tied=family == "held", functional_head=family == "held")

    made = make()
    engine = make_engine(made, noise=noise)
    np.random.seed(5)
    for step, batch in enumerate(batches):
        if step == 2:
            with pytest.raises(KeyError):
                interrupted(made, engine, batch, where)
            engine.drop()
            assert not engine._sums
        engine.micro_batch(made.loss, [batch])
        engine.step()
    engine.detach()
    other = make()
    again = make_engine(other, noise=noise)
    np.random.seed(5)
    for step, batch in enumerate(batches):
        if step == 2:
            again.noise.seed()  # the one that was lost
        again.micro_batch(other.loss, [batch])
        again.step()
    again.detach()
    assert engine.log == again.log
    assert_weights(made, weights(other))


def interrupted(net: Net, engine: ZerothEngine, batch: Tensor, where: int) -> None:
    calls: list[int] = []
    module = net.blocks[0] if where < 2 else net.norm

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(0)
        if len(calls) == 1 + where % 2:
            raise KeyError("interrupted")

    remove = module.register_forward_hook(hook)
    try:
        engine.micro_batch(net.loss, [batch])
    finally:
        remove.remove()


# What is not trained.


@pytest.mark.parametrize("noise", ["philox", "mezo"])
def test_frozen_parameters_are_not_touched(noise: str) -> None:
    made = Net(depth=4, frozen=True)
    before = weights(made)
    ours = by_engine(made, token_batches(STEPS), noise=noise)
    streaming = ours.zeroth.streaming
    for name, p in made.named_parameters():
        assert torch.equal(ours.weights[name], before[name]) != p.requires_grad, name
    down = sum(leaf.rest.numel() * 4 for berth in streaming.streamed for leaf in berth.trained)
    assert down < streaming.host_bytes
    assert ours.zeroth.lanes.ledger.moved("d2h", "weights back") == down * STEPS


def test_frozen_parameters_consume_no_noise() -> None:
    """MeZO's sequence is that of the trained parameters; philox noise belongs to a parameter whatever is frozen."""
    batches = token_batches(STEPS)
    frozen = Net(depth=4, frozen=True)
    assert_equal(by_engine(frozen, batches, noise="mezo"), by_oracle(frozen, batches))
    assert_equal(by_engine(frozen, batches), by_oracle(frozen, batches, distribution="popcount"))


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def with_adapters() -> Net:
    made = net().requires_grad_(False)
    for block in made.blocks:
        block.up = LoRA(block.up)
    return made


@pytest.mark.parametrize("lanes", ["inline", "checked"])
def test_adapters_alone_are_trained(lanes: str) -> None:
    made, batches = with_adapters(), token_batches(STEPS)

    def adapters(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)

    ours = by_engine(made, batches, make_optimizer=adapters, lanes=lanes_of(lanes))
    assert_equal(ours, by_oracle(made, batches, lr=1e-2, distribution="popcount"))
    trained_bytes = sum(p.numel() * 4 for p in made.blocks.parameters() if p.requires_grad)
    assert ours.zeroth.lanes.ledger.moved("d2h", "weights back") == trained_bytes * STEPS
    assert ours.zeroth.lanes.ledger.moved("h2d", "weights") > ours.zeroth.streaming.host_bytes * STEPS


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    base, batches = built("llama", torch.float32, STEPS)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    made = peft.get_peft_model(base, config).eval()
    ours = by_engine(made, batches, model_loss, make_optimizer=lambda module: sgd(module, lr=1e-2))
    assert_equal(ours, by_oracle(made, batches, model_loss, lr=1e-2, distribution="popcount"))
    assert 0 < ours.zeroth.lanes.ledger.moved("d2h", "weights back") < ours.zeroth.streaming.host_bytes


# Between the steps.


@pytest.mark.parametrize("every", [1, 4])
def test_evaluation_sees_every_update_and_disturbs_nothing(every: int) -> None:
    batches, held_out = token_batches(STEPS), token_batches(1, seed=99)[0]
    seen: dict[str, list[float]] = {"ours": [], "theirs": []}

    def ours_after(engine: ZerothEngine, step: int) -> None:
        with torch.no_grad():
            seen["ours"].append(net_loss(engine.module, held_out).item())

    def theirs_after(module: nn.Module, step: int) -> None:
        with torch.no_grad():
            seen["theirs"].append(net_loss(module, held_out).item())

    for noise, distribution in (("philox", "popcount"), ("mezo", None)):
        seen["ours"], seen["theirs"] = [], []
        wanted = by_oracle(net(), batches, after_step=theirs_after, distribution=distribution)  # type: ignore[arg-type]
        ours = by_engine(net(), batches, after_step=ours_after, noise=noise, write_back_every=every)
        assert seen["ours"] == seen["theirs"]
        assert len(set(seen["ours"])) == STEPS
        assert_equal(ours, wanted)


@pytest.mark.parametrize("noise", ["philox", "mezo"])
def test_evaluation_and_saving_within_a_step_disturb_nothing(noise: str) -> None:
    batches = token_batches(STEPS, batch=4)

    def halves(batch: Tensor) -> list[list[Tensor]]:
        return [[half] for half in batch.chunk(2)]

    wanted = by_engine(net(), batches, parts=halves, noise=noise)
    made = net()
    engine = make_engine(made, noise=noise, write_back_every=2)
    np.random.seed(5)
    steps = []
    for batch in batches:
        first, second = batch.chunk(2)
        engine.micro_batch(made.loss, [first])
        with torch.inference_mode():
            made.loss(second)
        made.state_dict()
        engine.micro_batch(made.loss, [second])
        engine.step()
        steps.append((engine.report.loss_plus, engine.report.coefficient))
    engine.detach()
    assert steps == wanted.steps
    assert_weights(made, wanted.weights)
    with torch.no_grad():
        made.embed.weight.mul_(2)  # no tensor of inference mode is left behind
    made.loss(batches[0]).backward()


def test_state_dict_has_seen_every_update() -> None:
    batches = token_batches(STEPS)
    states: list[dict[str, Tensor]] = []
    wanted: list[dict[str, Tensor]] = []
    by_engine(
        net(),
        batches,
        after_step=lambda engine, step: states.append(copy.deepcopy(engine.module.state_dict())),
        write_back_every=4,
    )
    by_oracle(net(), batches, after_step=lambda module, step: wanted.append(weights(module)), distribution="popcount")
    for state, weight in zip(states, wanted, strict=True):
        assert all(torch.equal(state[name], value) for name, value in weight.items())


def test_flush_twice_moves_nothing() -> None:
    made = net()
    engine = make_engine(made, write_back_every=4)
    trained(made, engine, token_batches(3))
    engine.flush()
    after = weights(made)
    moved = engine.lanes.ledger.moved("h2d", "weights"), engine.lanes.ledger.moved("d2h", "weights back")
    engine.flush()
    assert moved == (engine.lanes.ledger.moved("h2d", "weights"), engine.lanes.ledger.moved("d2h", "weights back"))
    assert_weights(made, after)
    engine.detach()
    engine.detach()


def test_weights_that_are_loaded_are_the_truth() -> None:
    batches = token_batches(4)
    made = net()
    start = copy.deepcopy(made.state_dict())
    engine = make_engine(made, write_back_every=3)
    trained(made, engine, batches[:2])
    made.load_state_dict(start)
    assert engine.log == []
    trained(made, engine, batches[2:])
    engine.detach()
    hook = philox_noise(plain := net())
    oracle = Mezo(plain, 1e-3, EPS, 0.1, noise=hook)
    oracle.taken = 2
    for batch in batches[2:]:
        oracle.step(lambda module, batch=batch: net_loss(module, batch))  # type: ignore[misc]
    assert_weights(made, weights(plain))


def test_detach_gives_the_plain_module_back() -> None:
    made = net()
    parameters = [id(p) for p in made.parameters()]
    engine = make_engine(made)
    trained(made, engine, token_batches(2))
    engine.flush()
    after = weights(made)
    engine.detach()
    assert [id(p) for p in made.parameters()] == parameters
    for module in made.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._state_dict_pre_hooks
        assert not module._load_state_dict_pre_hooks
        assert not module._load_state_dict_post_hooks
    assert_weights(made, after)
    made.loss(token_batches(1)[0]).backward()


# Directions.


@pytest.mark.parametrize("directions", [2, 5])
def test_directions_are_updates_one_after_the_other(directions: int) -> None:
    """Each is measured from the same weights; their mean is taken, and decay once."""
    batches, lr, decay = token_batches(STEPS), 1e-3, 0.1
    plain = net()
    expected = []
    for step, batch in enumerate(batches, 1):
        rest = weights(plain)
        slopes, plus = [], []
        for direction in range(directions):
            losses = []
            for sign in (1, -1):
                for place, (name, p) in enumerate(plain.named_parameters()):
                    z = drawn(Draw(SEED, step, place, direction), 0, p.numel(), "popcount", device="cpu").view(p.shape)
                    p.data = rest[name] + z * (sign * EPS)
                with torch.no_grad():
                    losses.append(plain.loss(batch))
            plus.append(losses[0].item())
            slopes.append(((losses[0] - losses[1]) / (2 * EPS)).item())
        for place, (name, p) in enumerate(plain.named_parameters()):
            p.data = rest[name]
            for direction, slope in enumerate(slopes):
                z = drawn(Draw(SEED, step, place, direction), 0, p.numel(), "popcount", device="cpu").view(p.shape)
                change = z * (slope / directions) + (p.data * decay if direction == 0 else 0)
                p.data = p.data - change * lr
        expected.append((math.fsum(plus) / directions, sum(slopes) / directions))
    ours = by_engine(net(), batches, directions=directions)
    assert ours.steps == expected
    assert_weights(plain, ours.weights)
    assert len(ours.zeroth.log) == directions * STEPS


class Linear1000(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(500, 1, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = sum(layer(part) for layer, part in zip(self.layers, x.chunk(2), strict=True))  # type: ignore[assignment]
        return total


@pytest.mark.parametrize("distribution", ["popcount", "gaussian", "rademacher"])
@pytest.mark.parametrize("directions", [1, 16])
def test_the_estimate_points_along_the_gradient_as_far_as_it_must(directions: int, distribution: str) -> None:
    made = Linear1000()
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    engine = make_engine(made, optimizer, directions=directions, distribution=distribution, eps=0.1)
    cosines = []
    for _ in range(320 // directions if directions > 1 else 100):
        before = torch.cat([p.detach().flatten() for p in made.parameters()])
        engine.micro_batch(lambda x: made(x).sum(), [gradient])
        engine.step()
        engine.flush()
        moved = before - torch.cat([p.detach().flatten() for p in made.parameters()])
        cosines.append(torch.cosine_similarity(moved, gradient, dim=0).item())
    engine.detach()
    if directions == 1:  # |cosine| of one direction: the mean of a half normal
        assert np.mean(cosines) == pytest.approx(math.sqrt(2 / (math.pi * 1000)), rel=0.35)
    else:
        assert np.mean(cosines) == pytest.approx(math.sqrt(directions / (directions + 1001)), rel=0.2)


# Dropout.


@pytest.mark.parametrize("directions", [1, 3])
def test_streams_of_a_step_drop_out_alike(directions: int) -> None:
    made = Net(depth=4, dropout=0.3).train()
    before = weights(made)
    engine = make_engine(made, sgd(made, weight_decay=0.0), eps=1e-30, directions=directions)
    torch.manual_seed(0)
    losses = []
    for _ in range(4):
        engine.micro_batch(made.loss, token_batches(1))
        engine.step()
        losses.append(engine.report.loss_plus)
        assert engine.report.loss_plus == engine.report.loss_minus
    engine.detach()
    assert len(set(losses)) == 4
    assert_weights(made, before)


def test_dropout_draws_what_one_plain_forward_draws() -> None:
    made = Net(depth=4, dropout=0.3).train()
    batch = token_batches(1)[0]
    torch.manual_seed(0)
    with torch.no_grad():
        plain = made.loss(batch).item()
    after = torch.get_rng_state()
    torch.manual_seed(0)
    engine = make_engine(made, eps=1e-30)
    assert engine.micro_batch(made.loss, [batch]).item() == plain
    assert torch.equal(torch.get_rng_state(), after)
    engine.detach()


def test_the_loss_may_have_any_shape_of_one_element() -> None:
    made, batch = net(), token_batches(1)[0]
    engine = make_engine(made)
    assert engine.micro_batch(lambda tokens: made.loss(tokens).reshape(1, 1), [batch]).shape == ()
    engine.detach()
