"""Sparse adapters on models of many families: what they change, what they leave alone, and what padding may not do."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_offload.methods.ffn import find_ffns
from lightning_offload.methods.sparse_adapter import Fetched, SparseAdapter, attach_parameters, default_key_std, detach
from lightning_offload.numerics.adapter import Picks
from lightning_offload.text import TINY_PATH, CausalLM
from lightning_offload.text.loss import next_token_loss
from tests.families import FAMILIES
from tests.zoo import HIDDEN, LAYERS, VOCAB, ZOO, first_tensor

BUILD = ZOO | FAMILIES
DECODERS = ["opt", "opt_350m_like", "gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "mixtral", "phi", "falcon"]
DECODERS += ["bloom", "mpt", "gptj"]
MORE = ["rwkv", "granitemoe", "xglm", "albert", "t5", "bart"]
SETTINGS: dict[str, Any] = {"width": 24, "experts": 6, "active_experts": 2, "top_k": 5}


def build(name: str, **settings: Any) -> tuple[nn.Module, dict[str, Tensor], list[SparseAdapter]]:
    model, inputs = BUILD[name]()
    return model, inputs, attach_parameters(model, **SETTINGS | settings)


def awake(adapters: list[SparseAdapter]) -> None:
    """Values that are not zero, so that the adapters do something."""
    for index, adapter in enumerate(adapters):
        nn.init.normal_(adapter.values, std=0.5, generator=torch.Generator().manual_seed(index))


def gradients(adapters: list[SparseAdapter]) -> list[Tensor | None]:
    return [p.grad for adapter in adapters for p in adapter.parameters()]


@contextmanager
def recorded(adapters: list[SparseAdapter]) -> Iterator[list[tuple[str, Picks]]]:
    """Every selection that is made, by path."""
    seen: list[tuple[str, Picks]] = []

    class Recording:
        def __init__(self, adapter: SparseAdapter) -> None:
            self.adapter = adapter

        def start(self, x: Tensor) -> None:
            self.adapter.start(x)

        def rows(self) -> Fetched:
            fetched = self.adapter.rows()
            seen.append((self.adapter.path, fetched.picks))
            return fetched

        def again(self, picks: Picks) -> Fetched:
            return self.adapter.again(picks)

    for adapter in adapters:
        adapter.source = Recording(adapter)
    yield seen
    for adapter in adapters:
        adapter.source = None


@pytest.mark.parametrize("name", DECODERS + MORE)
def test_untouched_at_first_and_one_step_lowers_the_loss(name: str) -> None:
    model, inputs = BUILD[name]()
    with torch.no_grad():
        expected = model(**inputs)
    adapters = attach_parameters(model, **SETTINGS)
    assert [adapter.path for adapter in adapters] == [ffn.path for ffn in find_ffns(model)]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{a.path}.meft.{n}" for a in adapters for n in ("keys", "values", "router")
    }
    before = model(**inputs)
    assert torch.equal(before.logits.view(torch.int32), expected.logits.view(torch.int32))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before.loss.backward()
    assert all(not a.keys.grad.any() and not a.router.grad.any() for a in adapters)
    assert all(a.values.grad.any() for a in adapters)
    optimizer.step()
    with torch.no_grad():
        assert first_tensor(model(**inputs)) < before.loss


@pytest.mark.parametrize("scope", ["token", "union"])
def test_all_rows_and_no_gate_is_the_dense_parallel_adapter(scope: str) -> None:
    model, inputs, adapters = build("llama", width=16, experts=1, active_experts=1, top_k=16, gate="none", scope=scope)
    awake(adapters)
    other, _ = BUILD["llama"]()
    dense = [nn.ParameterList([a.keys.detach().clone(), a.values.detach().clone()]) for a in adapters]
    for layer, (keys, values) in zip(other.model.layers, dense, strict=True):
        layer.mlp.register_forward_hook(
            lambda _, args, y, k=keys, v=values: y + torch.relu(args[0].view(-1, HIDDEN) @ k.T).mm(v).view(y.shape)
        )
    loss, expected = model(**inputs).loss, other(**inputs).loss
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    for adapter, (keys, values) in zip(adapters, dense, strict=True):
        assert torch.equal(adapter.keys.grad, keys.grad)
        assert torch.equal(adapter.values.grad, values.grad)


def padded(name: str, side: str = "right") -> dict[str, Tensor]:
    """Two sentences, of which the second ends (or begins) with five padded tokens."""
    inputs = BUILD[name]()[1]
    at = slice(-5, None) if side == "right" else slice(None, 5)
    inputs["attention_mask"][1, at] = 0
    inputs["labels"][1, at] = -100
    return inputs


def exchange(ids: Tensor, mask: Tensor) -> Tensor:
    """Other tokens where there is padding."""
    return torch.where(mask.bool(), ids, (ids + 7) % VOCAB)


@pytest.mark.parametrize("scope", ["token", "union"])
@pytest.mark.parametrize("name", DECODERS)
def test_what_is_padding_changes_nothing(name: str, scope: str) -> None:
    model, _, adapters = build(name, scope=scope)
    awake(adapters)
    inputs = padded(name)
    others = inputs | {"input_ids": exchange(inputs["input_ids"], inputs["attention_mask"])}
    results = []
    for batch in (inputs, others):
        with recorded(adapters) as seen, torch.no_grad():
            results.append((model(**batch), [picks for _, picks in seen]))
    (one, picks), (two, again) = results
    real = inputs["attention_mask"].bool()
    assert [len(p.places) for p in picks] == [int(real.sum())] * LAYERS
    assert torch.equal(one.logits[real], two.logits[real])
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(picks, again, strict=True))


def test_padding_does_not_enlarge_the_union() -> None:
    model, _, adapters = build("llama", width=96, experts=24)
    inputs = padded("llama")

    def first_union(**batch: Tensor) -> Tensor:
        with recorded(adapters) as seen, torch.no_grad():
            model(**batch)
        return seen[0][1].rows

    real = [{"input_ids": inputs["input_ids"][:1]}, {"input_ids": inputs["input_ids"][1:, :-5]}]
    alone = torch.cat([first_union(**sentence) for sentence in real]).unique()
    assert torch.equal(first_union(**inputs), alone)
    assert len(first_union(input_ids=inputs["input_ids"])) > len(alone)


def test_padded_tokens_get_the_networks_output_alone() -> None:
    model, _, adapters = build("llama")
    awake(adapters)
    inputs, seen = padded("llama"), []
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        model(**inputs)
        (x, y), real = seen[0], inputs["attention_mask"].bool()
        plain = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert torch.equal(y[~real], plain[~real])
    assert not torch.equal(y[real], plain[real])


def test_a_mask_that_says_nothing_drops_nothing() -> None:
    model, inputs, adapters = build("llama")
    ids = inputs["input_ids"]
    four = torch.zeros(2, 1, *(ids.shape[1],) * 2)
    for mask, tokens in ((None, 24), (torch.ones_like(ids), 24), (four, 24), (padded("llama")["attention_mask"], 19)):
        for call in (partial(model, ids, mask), partial(model, input_ids=ids, attention_mask=mask)):
            with recorded(adapters) as seen, torch.no_grad():
                call()
            assert {len(picks.places) for _, picks in seen} == {tokens}


def test_encoder_and_decoder_have_their_own_padding() -> None:
    model, _, adapters = build("t5")
    inputs = padded("t5")
    decoder_mask = torch.ones_like(inputs["labels"])
    decoder_mask[0, -2:] = 0
    for mask, tokens in ((None, 24), (decoder_mask, 22)):
        with recorded(adapters) as seen, torch.no_grad():
            model(**inputs, decoder_attention_mask=mask)
        assert [len(picks.places) for _, picks in seen] == [19] * LAYERS + [tokens] * LAYERS


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mixtral"])
def test_generation_with_a_cache(name: str) -> None:
    model, inputs, adapters = build(name)
    awake(adapters)
    ids = inputs["input_ids"][:, 5:]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    with recorded(adapters) as seen:
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)
    assert [len(picks.places) for _, picks in seen[::LAYERS]] == [14] + [2] * 5
    left = torch.cat([torch.full((2, 3), 0), ids], 1)
    with recorded(adapters) as seen:
        new = model.generate(left, attention_mask=(left != 0).long(), **options)[:, 3:]
    assert torch.equal(new, expected)
    assert [len(picks.places) for _, picks in seen[::LAYERS]] == [14] + [2] * 5


BOTH_WAYS = [(name, reentrant) for name in ("opt", "llama", "mixtral", "bloom", "gpt2") for reentrant in (False, True)]


# the reentrant form adds up what reaches BART's encoder in another order, with adapters or without
@pytest.mark.parametrize(("name", "reentrant"), [*BOTH_WAYS, ("bart", False)])
def test_checkpointing_changes_no_bit(name: str, reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        model, _, adapters = build(name)
        awake(adapters)
        model.train()
        model.config.use_cache = False
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for _ in range(2):  # the second forward knows nothing of the first
            torch.manual_seed(0)  # BART drops out
            with recorded(adapters) as seen:
                loss = model(**padded(name)).loss
                loss.backward()
        results.append((loss.detach(), gradients(adapters), seen))
    (one, plain, picks), (two, again, picks_again) = results
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert [path for path, _ in picks] == [path for path, _ in picks_again]  # a recomputation selects nothing
    assert all(torch.equal(a.rows, b.rows) for (_, a), (_, b) in zip(picks, picks_again, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_finds_its_own_call(reentrant: bool) -> None:
    """One network called twice in each of two forwards, whose backwards come in the order of the forwards."""
    model, _, adapters = build("llama", width=96, experts=24)
    awake(adapters)
    mlp = model.model.layers[0].mlp
    xs = torch.randn(2, 2, 6, HIDDEN, generator=torch.Generator().manual_seed(3)).requires_grad_()

    class Around(nn.Module):
        def forward(self, call: Any, x: Tensor) -> Tensor:
            return call(x)

    around = Around()
    adapters[0].forwards.watch([around])

    def twice(x: Tensor) -> Tensor:
        return mlp(mlp(x).tanh())

    grads = []
    for call in (twice, partial(checkpoint, twice, use_reentrant=reentrant)):
        model.zero_grad()
        xs.grad = None
        for y in [around(call, x) for x in xs]:
            y.square().sum().backward()
        grads.append([xs.grad, *(p.grad for p in adapters[0].parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_selections_go_with_the_graph_they_are_for() -> None:
    model, inputs, adapters = build("llama")
    for _ in range(3):
        loss = model(**inputs).loss
        assert all(sum(kept() is not None for kept in a._kept) <= 2 for a in adapters)
    del loss
    gc.collect()
    assert all(kept() is None for a in adapters for kept in a._kept)
    with torch.no_grad():
        model(**inputs)
    assert not any(a._kept or a._kept_by_checkpoint for a in adapters)


@pytest.mark.parametrize("name", DECODERS)
def test_detaching_restores_the_module(name: str) -> None:
    model, inputs = BUILD[name]()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    with torch.no_grad():
        expected = first_tensor(model(**inputs))
    before = {n: dict(m.__dict__, _modules=None, _parameters=None) for n, m in model.named_modules()}
    names, children = list(model.state_dict()), [n for n, _ in model.named_modules()]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = copy.deepcopy({n: {k: v for k, v in d.items() if "hooks" in k} for n, d in before.items()})
    awake(attach_parameters(model, **SETTINGS))
    with torch.no_grad():
        assert not torch.equal(first_tensor(model(**inputs)), expected)
    detach(model)
    with torch.no_grad():
        assert torch.equal(first_tensor(model(**inputs)), expected)
    assert not frozen.requires_grad
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert (list(model.state_dict()), [n for n, _ in model.named_modules()]) == (names, children)
    after = {n: {k: v for k, v in m.__dict__.items() if "hooks" in k} for n, m in model.named_modules()}
    assert after == before
    assert "_meft" not in model.__dict__
    with pytest.raises(ValueError, match="No adapters were attached"):
        detach(model)


def test_attaching_again_gives_what_is_there() -> None:
    model, _, adapters = build("opt")
    around = nn.ModuleDict({"network": model})
    assert attach_parameters(model, **SETTINGS) == adapters
    assert attach_parameters(around, **SETTINGS) == adapters
    with pytest.raises(ValueError, match="top_k=6, but adapters with top_k=5"):
        attach_parameters(model, **SETTINGS | {"top_k": 6})
    with pytest.raises(ValueError, match=r"layers= name 1 .* attached to \['model.decoder.layers.0'"):
        attach_parameters(model, **SETTINGS, layers=[0])
    detach(around)
    assert not any(isinstance(child, SparseAdapter) for child in model.modules())


def test_numbers_depend_on_seed_and_path_alone() -> None:
    whole = build("llama")[2]
    torch.manual_seed(99)
    model, _ = BUILD["llama"]()
    state = torch.get_rng_state()
    (last,) = attach_parameters(model, **SETTINGS, layers=[-1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(last.keys, whole[-1].keys)
    assert not torch.equal(whole[0].keys, whole[1].keys)
    assert not torch.equal(build("llama", seed=1)[2][0].keys, whole[0].keys)
    assert not any(adapter.values.any() for adapter in whole)
    wide = build("llama", width=4096, experts=64)[2][0].keys
    assert abs(wide.std().item() / default_key_std(wide.shape[1]) - 1) < 0.01
    assert default_key_std(4096) == 0.02, "the paper's"
    assert abs(build("llama", width=4096, experts=64, key_std=0.02)[2][0].keys.std().item() / 0.02 - 1) < 0.01
    assert torch.equal(whole[0].router[1], 50 * whole[0].keys[4:8].mean(0))
    normal = build("llama", width=4096, experts=1024, router_init="normal", key_std=0.02)[2][0]
    assert abs(normal.router.std().item() / 0.02 - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_backbone_keeps_fp32_rows(dtype: torch.dtype) -> None:
    model, inputs = BUILD["llama"]()
    model.to(dtype)
    with torch.no_grad():
        expected = model(**inputs).logits
    adapters = attach_parameters(model, **SETTINGS)
    output = model(**inputs)
    assert torch.equal(output.logits, expected)
    assert output.logits.dtype == dtype
    awake(adapters)
    model(**inputs).loss.backward()
    assert all(grad is not None and grad.dtype == torch.float32 and grad.any() for grad in gradients(adapters))


def test_autocast() -> None:
    model, inputs, adapters = build("llama")
    awake(adapters)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert all(grad is not None and grad.any() for grad in gradients(adapters))
    torch.testing.assert_close(loss, model(**inputs).loss, rtol=0.02, atol=0.02)


def through_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_stands_on_its_own(copied: Any) -> None:
    model, _, adapters = build("opt")
    awake(adapters)
    inputs = padded("opt")
    loss = model(**inputs).loss  # a graph is alive
    twin = copied(model)
    assert torch.equal(twin(**inputs).loss, loss)
    loss.backward()
    theirs = [child for child in twin.modules() if isinstance(child, SparseAdapter)]
    assert gradients(theirs) == [None] * 3 * LAYERS
    nn.init.zeros_(adapters[0].values)
    assert torch.equal(twin(**inputs).loss, loss)
    detach(twin)
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)
    assert not torch.equal(twin(**inputs).loss, model(**inputs).loss)


def test_state_dict_round_trip() -> None:
    model, inputs, adapters = build("mixtral")
    awake(adapters)
    other, _, _ = build("mixtral", seed=5)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(**inputs).loss, model(**inputs).loss)


def test_inside_a_sequential() -> None:
    body = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)]
    model = nn.Sequential(*body)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    adapters = attach_parameters(model, **SETTINGS, targets=r"\d")
    assert torch.equal(model(x), expected)
    awake(adapters)
    assert not torch.equal(model(x), expected)


def test_another_size_than_the_blocks_is_refused() -> None:
    model = build("llama")[0]
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp' is \(2, 3\).*last size of 32.*targets="):
        model.model.layers[1].mlp(torch.ones(2, 3))


def test_inside_a_lightning_module_and_peft() -> None:
    pytest.importorskip("peft", reason="adapters inside PEFT's need peft")
    from peft import LoraConfig, get_peft_model

    module = CausalLM(path=str(TINY_PATH), gradient_checkpointing=True)
    peft: Any = get_peft_model(BUILD["opt"]()[0], LoraConfig(target_modules=["fc1", "q_proj"]))
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][0, 6:] = 0
    for around, loss_of in (
        (module, lambda: next_token_loss(module.network, batch, chunk_tokens=4).mean),
        (peft, lambda: peft(**batch).loss),
    ):
        adapters = attach_parameters(around, **SETTINGS)
        awake(adapters)
        with recorded(adapters) as seen:
            loss_of().backward()
        assert [len(picks.places) for _, picks in seen] == [15] * len(adapters)
        assert all(grad is not None for grad in gradients(adapters))
        assert not any(p.grad is not None for n, p in around.named_parameters() if ".meft." not in n)


def test_an_error_in_a_forward_leaves_nothing_behind() -> None:
    model, _, adapters = build("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(**padded("llama"))
    mlp.forward = forward
    copy.deepcopy(model)  # what the call held belongs to a graph, and could not be copied
    with recorded(adapters) as seen, torch.no_grad():
        model(input_ids=padded("llama")["input_ids"])
    assert {len(picks.places) for _, picks in seen} == {24}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 10, "experts": 3}, "`width` must be a multiple of experts=3, got 10"),
        ({"active_experts": 99}, "`active_experts` must be 1 to experts=.*got 99"),
        ({"top_k": 0}, "`top_k` must be 1 to width=.*got 0"),
    ],
)
def test_sizes_that_do_not_go_together_are_named(sizes: dict[str, int], message: str) -> None:
    model, _ = BUILD["llama"]()
    with pytest.raises(ValueError, match=message):
        attach_parameters(model, **{**SETTINGS, **sizes})
    assert not any(isinstance(module, SparseAdapter) for module in model.modules())
