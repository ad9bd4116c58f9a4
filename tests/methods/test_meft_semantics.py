"""What a user may do between forwards, backwards and steps while rows live in host memory."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.row_optimizer import PATIENCE
from tests.meft import (
    PLACEMENTS,
    FFNNet,
    adamw,
    adapted,
    adapter_weights,
    adapters_in,
    make_engine,
    micro_batch,
    picked,
    rows_of,
    step,
    tokens_of,
    trained_in,
)

Plain = tuple[nn.Module, torch.optim.Optimizer]


def plain_of(net: nn.Module) -> Plain:
    return net, adamw(net)


def plain_step(plain: Plain, *losses: Tensor) -> None:
    for loss in losses:
        loss.backward()
    plain[1].step()
    plain[1].zero_grad()


def assert_same_weights(engine: Engine, plain: nn.Module) -> None:
    engine.flush()
    weights = dict(plain.named_parameters())
    for name, p in engine.module.named_parameters():
        assert torch.equal(p, weights[name]), name


@pytest.fixture(params=PLACEMENTS)
def placement(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_step_that_is_not_finite_changes_nothing(placement: str) -> None:
    engine, (net, optimizer) = make_engine(adapted(), placement), plain_of(adapted())
    for seed in range(6):
        if seed in (0, 3):
            before = adapter_weights(engine.module)
            with engine.micro_batch():
                loss = engine.module.loss(tokens_of(seed))
            loss.backward()
            with engine.micro_batch():
                loss = engine.module.loss(tokens_of(seed)) * float("inf")
            loss.backward()
            engine.step()
            engine.flush()
            assert engine.report.skipped
            assert all(torch.equal(p, before[name]) for name, p in adapter_weights(engine.module).items())
            assert not any(table.total.any() or table.touched.any() for table in rows_of(engine)._table.values())
        step(engine, tokens_of(seed))
        plain_step((net, optimizer), net.loss(tokens_of(seed)))
    assert_same_weights(engine, net)
    theirs = optimizer.state_dict()["state"]
    for position, state in engine.optimizer_state()["state"].items():
        assert float(state["step"]) == float(theirs[position]["step"]) == 6
    assert engine.report.skipped_total == 2


def test_an_exception_inside_a_window_is_forgotten(placement: str) -> None:
    engine, plain = make_engine(adapted(), placement), plain_of(adapted())

    def fail(gradient: Tensor) -> Tensor:
        raise RuntimeError("inside backward")

    step(engine, tokens_of(0))
    micro_batch(engine, tokens_of(1))
    with engine.micro_batch():
        x = engine.module.embed(tokens_of(2)).requires_grad_()
        x = engine.module.blocks[0](x)
        x.register_hook(fail)
        loss = engine.module.head(engine.module.blocks[2](engine.module.blocks[1](x))).square().mean()
    with pytest.raises(RuntimeError, match="inside backward"):
        loss.backward()  # the later blocks' gradients have left
    engine.drop()
    trained = [p for p in engine.module.parameters() if p.grad is not None]
    for parameter in trained:
        parameter.grad = None  # as the caller's zero_grad would
    step(engine, tokens_of(3))
    for seed in (0, 3):
        plain_step(plain, plain[0].loss(tokens_of(seed)))
    assert_same_weights(engine, plain[0])


def test_evaluation_in_between_changes_nothing(placement: str) -> None:
    def evaluate(engine: Engine, seed: int) -> None:
        with torch.no_grad():
            engine.module.loss(tokens_of(seed, length=2 + seed % 7))
            engine.module(tokens_of(seed, batch=5))

    engines = [make_engine(adapted(), placement) for _ in range(2)]
    for seed in range(4):
        for engine in engines:
            micro_batch(engine, tokens_of(seed))
            if engine is engines[0]:
                evaluate(engine, seed)
            micro_batch(engine, tokens_of(seed + 50), last=True)
            if engine is engines[0]:
                evaluate(engine, seed + 1)
            engine.step()
            if engine is engines[0]:
                evaluate(engine, seed + 2)
    engines[1].flush()
    assert_same_weights(engines[0], engines[1].module)


def test_evaluation_sees_the_weights_of_the_last_step(placement: str) -> None:
    engine, plain = make_engine(adapted(), placement), plain_of(adapted())
    for seed in range(3):
        step(engine, tokens_of(seed))
        plain_step(plain, plain[0].loss(tokens_of(seed)))
        with torch.no_grad():
            assert torch.equal(engine.module(tokens_of(9)), plain[0](tokens_of(9)))


def test_two_forwards_before_one_backward(placement: str) -> None:
    """And the forward of an evaluation inside the training step."""
    engine, plain = make_engine(adapted(), placement), plain_of(adapted())
    for seed in range(3):
        one, two = tokens_of(seed), tokens_of(seed + 50, length=9)
        with engine.micro_batch():
            first = engine.module.loss(one)
            with torch.no_grad():
                engine.module.loss(tokens_of(99))
            loss = first + 2 * engine.module.loss(two)
        loss.backward()
        engine.step()
        plain_step(plain, plain[0].loss(one) + 2 * plain[0].loss(two))
    assert_same_weights(engine, plain[0])


def test_several_backwards(placement: str) -> None:
    engine, plain = make_engine(adapted(), placement), plain_of(adapted())
    for seed in range(3):
        batches = tokens_of(seed), tokens_of(seed + 50)
        with engine.micro_batch():
            losses = [engine.module.loss(batch) for batch in batches]
        losses[0].backward(retain_graph=True)
        losses[0].backward()
        losses[1].backward()
        engine.step()
        expected = [plain[0].loss(batch) for batch in batches]
        expected[0].backward(retain_graph=True)
        plain_step(plain, *expected)
    assert_same_weights(engine, plain[0])


def test_an_adapter_that_is_not_reached_is_not_stepped(placement: str) -> None:
    engine = make_engine(adapted(FFNNet(sometimes=True)), placement)
    plain = plain_of(adapted(FFNNet(sometimes=True)))
    counts = []
    for seed in range(5):
        step(engine, tokens_of(seed))
        plain_step(plain, plain[0].loss(tokens_of(seed)))
        state = engine.optimizer_state()["state"]
        counts.append(sorted({int(held["step"]) for held in state.values()}))
        assert len(state) == len(plain[1].state_dict()["state"])
    assert counts == [[1], [2], [1, 3], [1, 4], [1, 5]]
    assert_same_weights(engine, plain[0])


@pytest.mark.parametrize("top_k", [6, 12])
@pytest.mark.parametrize("scope", ["token", "union"])
def test_a_micro_batch_of_padding_alone(placement: str, scope: str, top_k: int) -> None:
    settings = {"scope": scope, "top_k": top_k}
    engine, plain = make_engine(adapted(**settings), placement, **settings), plain_of(adapted(**settings))
    none = torch.zeros(2, 6, dtype=torch.int64)
    for seed in range(3):
        micro_batch(engine, tokens_of(seed))
        micro_batch(engine, tokens_of(seed + 50), attention_mask=none, last=True)
        engine.step()
        net = plain[0]
        plain_step(plain, net.loss(tokens_of(seed)), net.loss(tokens_of(seed + 50), none))
    assert_same_weights(engine, net)


@pytest.mark.parametrize("top_k", [4, 12])
def test_a_union_of_all_rows_is_never_cut(placement: str, top_k: int) -> None:
    settings = {"width": 12, "experts": 3, "active_experts": 3, "top_k": top_k}
    engine, plain = make_engine(adapted(**settings), placement, **settings), plain_of(adapted(**settings))
    with picked(engine.module) as seen:
        for seed in range(3):
            step(engine, tokens_of(seed, batch=8, length=9))
            plain_step(plain, plain[0].loss(tokens_of(seed, batch=8, length=9)))
    assert {len(picks.rows) for picks in seen} == {12}
    assert_same_weights(engine, plain[0])


def test_buffers_grow_with_the_micro_batch_and_stay(placement: str) -> None:
    settings = {"width": 96, "experts": 24}
    engine, plain = make_engine(adapted(**settings), placement, **settings), plain_of(adapted(**settings))
    held = []
    for length in (1, 2, 5, 17, 3, 17, 1, 16):
        step(engine, tokens_of(length, length=length))
        plain_step(plain, plain[0].loss(tokens_of(length, length=length)))
        held.append((rows_of(engine).holdings["rows and tokens on their way"], rows_of(engine).device_bytes))
    assert held[0] < held[2] < held[3] or placement == "device"
    assert held[4][0] == held[-1][0]
    assert_same_weights(engine, plain[0])


def test_a_frozen_router_stays(placement: str) -> None:
    nets = adapted(), adapted()
    for net in nets:
        for adapter in adapters_in(net):
            adapter.router.requires_grad_(False)
    engine, plain = make_engine(nets[0], placement), plain_of(nets[1])
    before = [adapter.router.clone() for adapter in adapters_in(nets[0])]
    for seed in range(3):
        step(engine, tokens_of(seed))
        plain_step(plain, plain[0].loss(tokens_of(seed)))
    assert_same_weights(engine, plain[0])
    assert all(torch.equal(a.router, kept) for a, kept in zip(adapters_in(nets[0]), before, strict=True))


def test_adapters_that_are_frozen_whole_take_their_own_rows(placement: str) -> None:
    nets = adapted(), adapted()
    for net in nets:
        for parameter in adapters_in(net)[1].parameters():
            parameter.requires_grad_(False)
    engine, plain = make_engine(nets[0], placement), plain_of(nets[1])
    assert [adapter.source is None for adapter in adapters_in(nets[0])] == [False, True, False]
    for seed in range(3):
        step(engine, tokens_of(seed))
        plain_step(plain, plain[0].loss(tokens_of(seed)))
    assert_same_weights(engine, plain[0])


@pytest.mark.parametrize("frozen", ["keys", "values"])
def test_keys_without_values_are_refused(frozen: str) -> None:
    net = adapted()
    getattr(adapters_in(net)[1], frozen).requires_grad_(False)
    with pytest.raises(ValueError, match=r"`blocks\.1\.mlp\.meft` only `(keys|values)` are trained.*lr=0"):
        make_engine(net)


def test_routers_alone_are_refused() -> None:
    net = adapted()
    routers = [adapter.router for adapter in adapters_in(net)]
    with pytest.raises(ValueError, match="No keys and values"):
        make_engine(net, make_optimizer=lambda m: torch.optim.AdamW(routers))


def test_a_trained_backbone_is_refused() -> None:
    net = adapted()
    net.head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"`head\.weight` is to be trained.*lsp_offload"):
        make_engine(net)


def test_a_net_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found no adapters in FFNNet: call `lightning_offload.*attach\(module"):
        make_engine(FFNNet(), make_optimizer=lambda m: torch.optim.AdamW(m.parameters()))


@pytest.mark.parametrize("dtypes", [DTypes(), DTypes.of("bf16-true")])
@pytest.mark.parametrize("recompute", ["reentrant", "non_reentrant"])
def test_checkpointing_changes_no_bit(placement: str, recompute: str, dtypes: DTypes) -> None:
    engines = [make_engine(adapted(FFNNet(recompute=kind)), placement, dtypes=dtypes) for kind in ("no", recompute)]
    for seed in range(4):
        one, two = (step(engine, tokens_of(seed), tokens_of(seed + 50)) for engine in engines)
        assert one == two
    engines[1].flush()
    assert_same_weights(engines[0], engines[1].module)
    moved = [engine.lanes.ledger.moved("h2d") for engine in engines]
    assert moved[0] == moved[1]  # a recomputation fetches nothing


@pytest.mark.parametrize("dtypes", [DTypes(), DTypes.of("bf16-true")])
def test_weights_that_others_write_are_adopted(placement: str, dtypes: DTypes) -> None:
    engine, plain = make_engine(adapted(), placement, dtypes=dtypes), make_engine(adapted(), "host", dtypes=dtypes)
    for one in (engine, plain):
        step(one, tokens_of(0))
        one.flush()
        with torch.no_grad():
            for name, p in one.module.named_parameters():
                if ".meft." in name:
                    p.mul_(0.5)
        one.adopt()
    with torch.no_grad():
        assert torch.equal(engine.module(tokens_of(1)), plain.module(tokens_of(1)))
    halved = adapter_weights(engine.module)
    loaded = adapted()
    loaded.load_state_dict({name: p.float() for name, p in engine.module.state_dict().items()})
    if dtypes.compute is None:
        with torch.no_grad():
            assert torch.equal(engine.module(tokens_of(1)), loaded(tokens_of(1)))
    losses = [step(one, tokens_of(2)) for one in (engine, plain)]
    assert losses[0] == losses[1]
    assert any(not torch.equal(p, halved[name]) for name, p in adapter_weights(engine.module).items())


def hooks_of(module: nn.Module) -> list[tuple[str, int]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    return [(name, len(getattr(part, name, {}))) for part in module.modules() for name in names]


def test_detach_leaves_a_plain_module(placement: str) -> None:
    net = adapted()
    before, identities = hooks_of(net), [id(p) for p in net.parameters()]
    engine, plain = make_engine(net, placement), plain_of(adapted())
    for seed in range(2):
        step(engine, tokens_of(seed))
        plain_step(plain, plain[0].loss(tokens_of(seed)))
    assert all(adapter.source is not None for adapter in adapters_in(net))
    engine.detach()
    assert all(adapter.source is None for adapter in adapters_in(net))
    assert hooks_of(net) == before
    assert [id(p) for p in net.parameters()] == identities
    with torch.no_grad():
        assert torch.equal(net(tokens_of(9)), plain[0](tokens_of(9)))
    continued = torch.optim.AdamW(trained_in(net), fused=True)
    plain_step((net, continued), net.loss(tokens_of(5)))  # as any module
    assert rows_of(engine).device_bytes == 0


class Wide:
    """Steps until the warning comes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def steps(self, count: int, *, length: int, batch: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seed in range(count):
                step(self.engine, tokens_of(seed, length=length, batch=batch))
        return [str(warning.message) for warning in caught]


WIDE: dict[str, Any] = {"width": 16, "experts": 4, "active_experts": 2, "top_k": 8}
NARROW: dict[str, Any] = {"width": 480, "experts": 60, "active_experts": 2, "top_k": 3}


@pytest.mark.parametrize("held", ["host", "keys"])
def test_unions_that_stay_wide_are_warned_of_once(held: str) -> None:
    run = Wide(make_engine(adapted(**WIDE), held, **WIDE))
    assert run.steps(PATIENCE - 1, length=9, batch=4) == []
    (message,) = run.steps(1, length=9, batch=4)
    for way_out in ("shorter or fewer sequences", "`width=`", "placement='device'", "more than 50%"):
        assert way_out in message
    assert run.steps(2 * PATIENCE, length=9, batch=4) == []


def test_one_narrow_step_begins_the_count_anew() -> None:
    settings = {"width": 64, "experts": 16, "active_experts": 2, "top_k": 8}
    run = Wide(make_engine(adapted(**settings), **settings))
    with picked(run.engine.module) as seen:
        assert run.steps(PATIENCE - 1, length=12, batch=8) == []
    assert min(len(picks.rows) for picks in seen) > 32
    rows_of(run.engine).take_union_share()  # whoever logs it does not disturb the count
    assert run.steps(1, length=1, batch=1) == []
    assert run.steps(PATIENCE - 1, length=12, batch=8) == []
    assert len(run.steps(1, length=12, batch=8)) == 1


def test_rows_on_the_device_or_few_of_them_are_not_warned_of() -> None:
    assert Wide(make_engine(adapted(**WIDE), "device", **WIDE)).steps(PATIENCE + 1, length=9, batch=4) == []
    assert Wide(make_engine(adapted(**NARROW), **NARROW)).steps(PATIENCE + 1, length=6, batch=2) == []


def test_the_share_of_rows_used_is_counted() -> None:
    engine = make_engine(adapted())
    with picked(engine.module) as seen:
        step(engine, tokens_of(0), tokens_of(1))
    share = rows_of(engine).take_union_share()
    assert share == sum(len(picks.rows) for picks in seen) / (48 * len(seen))
    assert rows_of(engine).take_union_share() == 0.0
