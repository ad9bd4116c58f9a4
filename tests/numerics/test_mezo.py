"""MeZO's sequence out of order, and its arithmetic: bit-equal to a literal MeZO on stock models."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_offload.numerics.mezo import (
    MezoSequence,
    decays,
    mezo_minus,
    mezo_plus,
    mezo_restore,
    mezo_update,
)
from lightning_offload.numerics.noise import Draw, noise
from lightning_offload.numerics.zeroth import Update, perturb, update_
from tests.mezo import Mezo

STEPS, EPS, SEED = 12, 1e-3, 11
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((33, 7), torch.float32),
    ((3,), torch.float32),  # below 16 elements torch draws in another way
    ((5, 4), torch.bfloat16),
    ((), torch.float32),
    ((64,), torch.float16),
    ((129,), torch.float32),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=40))


def built(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    return build().to(dtype).eval()


def batch_loss(step: int) -> Callable[[nn.Module], Tensor]:
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(step))
    return lambda model: model(input_ids=ids, labels=ids).loss


def in_order() -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.normal(0.0, 1.0, shape, generator=generator, dtype=dtype) for shape, dtype in SHAPES]


@pytest.mark.parametrize("order", [[5, 0, 3, 1, 4, 2], [0, 1, 2, 3, 4, 5], [2, 2, 5, 5, 0, 0]])
def test_any_order_gives_the_draws_of_canonical_order(order: list[int]) -> None:
    sequence, expected = MezoSequence(SHAPES, "cpu"), in_order()
    for turn in range(2):
        sequence.z(SEED + 1 + turn, 3)  # of another step, in between
        for place in order:
            assert torch.equal(sequence.z(SEED, place), expected[place])
            assert sequence.z(SEED, place).dtype == SHAPES[place][1]


def test_states_are_those_before_each_parameter_and_are_kept_for_the_last_seeds() -> None:
    sequence, generator = MezoSequence(SHAPES, "cpu", keep=2), torch.Generator().manual_seed(SEED)
    states = sequence.states(SEED)
    assert len(states) == len(SHAPES) + 1
    for state, (shape, dtype) in zip(states, SHAPES, strict=False):
        assert torch.equal(state, generator.get_state())
        torch.normal(0.0, 1.0, shape, generator=generator, dtype=dtype)
    assert torch.equal(states[-1], generator.get_state())
    sequence.states(SEED + 1)
    assert sequence.states(SEED) is states
    sequence.states(SEED + 2)
    sequence.states(SEED + 3)
    assert sequence.states(SEED) is not states


def test_torchs_own_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    MezoSequence(SHAPES, "cpu").z(SEED, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_in_canonical_order_nothing_is_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = MezoSequence._draw
    monkeypatch.setattr(MezoSequence, "_draw", lambda self, place: (drawn.append(place), draw(self, place))[1])
    sequence = MezoSequence(SHAPES, "cpu")
    for place in range(len(SHAPES)):
        sequence.z(SEED, place)
    assert drawn == list(range(len(SHAPES)))


def test_the_names_that_mezo_does_not_decay() -> None:
    assert decays("model.layers.0.mlp.weight")
    assert decays("model.norm.weight")
    for name in ("fc1.bias", "decoder.final_layer_norm.weight", "a.layernorm.weight"):
        assert not decays(name)


@pytest.mark.parametrize("build", [llama, opt], ids=["llama", "opt"])
@every_dtype
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twelve_steps_in_random_order_are_those_of_mezo(
    build: Callable[[], nn.Module], dtype: torch.dtype, weight_decay: float
) -> None:
    """OPT's head and embedding are tied; the rate falls."""
    model = built(build, dtype)
    stock = copy.deepcopy(model)
    oracle = Mezo(stock, 1e-3, EPS, weight_decay)
    named = list(model.named_parameters())
    sequence = MezoSequence([(p.shape, p.dtype) for _, p in named], "cpu")
    np.random.seed(1)
    shuffled, gs = random.Random(0), set()

    def walk(change: Callable[[nn.Parameter, Tensor, str], Tensor]) -> None:
        for place in shuffled.sample(range(len(named)), len(named)):
            name, p = named[place]
            p.data = change(p.data, sequence.z(oracle.seed, place), name)

    for step in range(STEPS):
        oracle.lr *= 0.9
        expected = oracle.step(batch_loss(step))
        with torch.no_grad():
            walk(lambda p, z, _: mezo_plus(p, z, EPS))
            plus = batch_loss(step)(model).float()
            walk(lambda p, z, _: mezo_minus(p, z, EPS))
            minus = batch_loss(step)(model).float()
            walk(lambda p, z, _: mezo_restore(p, z, EPS))
            g = ((plus - minus) / (2 * EPS)).item()
            walk(
                lambda p, z, name, g=g: mezo_update(p, z, g, oracle.lr, weight_decay if decays(name) else None)  # type: ignore[misc]
            )
        assert (plus.item(), g) == expected
        gs.add(g)
    assert len(gs) == STEPS
    for (name, own), theirs in zip(named, stock.parameters(), strict=True):
        assert torch.equal(own.view(_bits(dtype)), theirs.view(_bits(dtype))), name


def _bits(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int16


@every_dtype
def test_the_oracle_fed_philox_noise_is_perturb_and_update(dtype: torch.dtype) -> None:
    model = built(llama, dtype)
    stock = copy.deepcopy(model)

    def z(step: int, place: int, p: Tensor) -> Tensor:
        return noise(Draw(SEED, step, place), 0, p.numel(), "popcount", device="cpu").view_as(p)

    oracle = Mezo(stock, 1e-3, EPS, 0.1, noise=z)
    for step in range(1, STEPS + 1):
        expected = oracle.step(batch_loss(step))
        rest, losses = [p.data for p in model.parameters()], []
        for sign in (1, -1):
            for place, (p, w) in enumerate(zip(model.parameters(), rest, strict=True)):
                p.data = torch.empty_like(w)
                perturb(w, Draw(SEED, step, place), sign * EPS, p.data, "popcount")
            with torch.no_grad():
                losses.append(batch_loss(step)(model).float())
        g = ((losses[0] - losses[1]) / (2 * EPS)).item()
        assert (losses[0].item(), g) == expected
        for place, (p, w) in enumerate(zip(model.parameters(), rest, strict=True)):
            p.data = w
            update_(w, [Update(Draw(SEED, step, place), g, oracle.lr, 0.1)], "popcount", "nearest")
    for own, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_undoing_drifts_as_mezo_does_and_untouched_weights_do_not(dtype: torch.dtype) -> None:
    """Nearly half of 16-bit weights change in one cycle of +1 -2 +1."""
    weight = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    z = MezoSequence([((20_000,), dtype)], "cpu").z(SEED, 0)
    cycled = mezo_restore(mezo_minus(mezo_plus(weight, z, EPS), z, EPS), z, EPS)
    assert 0.4 < (cycled != weight).float().mean() < 0.5
    before = weight.clone()
    perturb(weight, Draw(SEED, 1, 0), EPS, torch.empty_like(weight), "gaussian")
    assert torch.equal(weight, before)
