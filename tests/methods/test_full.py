"""Method full against torch's own AdamW, bit for bit, on the ten-line loop."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_offload.errors import NonFiniteError, OffloadError
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.full import Full, FullSettings
from tests.helpers import (
    VOCAB,
    WIDTH,
    Net,
    Run,
    adamw,
    assert_moved,
    assert_same,
    lanes_of,
    pairwise,
    row_id,
    train,
    two_groups,
)

CLIPS = {"none": None, "norm": Clip(0.05), "value": Clip(0.01, "value")}
OPTIMIZERS = {
    "adamw": adamw,
    "groups": two_groups,
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, fused=True),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True),
}
FACTORS: dict[str, list[Any]] = {
    "lanes": ["inline", "checked", "shuffled"],
    "micro_batches": [1, 2, 3],
    "clip": ["none", "norm", "value"],
    "model": ["plain", "tied", "frozen", "sometimes_unused", "functional_head"],
    "optimizer": list(OPTIMIZERS),
    "dropout": [0.0, 0.2],
    "recompute": ["no", "non-reentrant", "reentrant"],
    "accumulate": ["device", "host"],
    "skip_nonfinite": [True, False],
    "schedule": [False, True],
    "late": [False, True],
    "min_numel": [0, 60],
}


def run_row(row: dict[str, Any], *, seed: int = 0) -> tuple[Run, Run]:
    if row["model"] == "sometimes_unused" and row["optimizer"] in ("momentum", "nesterov"):
        row = {**row, "optimizer": "adamw"}  # torch's fused SGD fails on buffers of which only some exist
    flags = {} if row["model"] == "plain" else {row["model"]: True}
    net = Net(dropout=row["dropout"], recompute=row["recompute"], **flags)
    common = {
        "micro_batches": row["micro_batches"],
        "clip": CLIPS[row["clip"]],
        "make_optimizer": OPTIMIZERS[row["optimizer"]],
        "schedule": row["schedule"],
    }
    settings = {key: row[key] for key in ("accumulate", "skip_nonfinite", "min_numel")}
    ours = train(net, lanes_of(row["lanes"], seed), settings=settings, late=row["late"], **common)
    return train(net, None, **common), ours


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=row_id)
def test_equals_torch(row: dict[str, Any]) -> None:
    plain, ours = run_row(row)
    assert_same(plain, ours)
    assert ours.engine is not None
    assert ours.engine.lanes.ledger.moved("h2d", "weights") > 0


@pytest.mark.slow
@pytest.mark.parametrize("index", range(400))
def test_equals_torch_on_random_rows(index: int) -> None:
    product = list(itertools.islice(itertools.product(*FACTORS.values()), index * 97 % 9973, None, 9973))
    row = dict(zip(FACTORS, product[index % len(product)], strict=True))
    assert_same(*run_row(row, seed=index))


@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("clip", ["none", "norm"])
def test_any_order_gives_the_same_bits(accumulate: str, clip: str) -> None:
    net = Net(depth=2, tied=True)
    common = {"micro_batches": 2, "clip": CLIPS[clip], "steps": 3}
    plain = train(net, None, **common)
    for seed in range(75):
        settings = {"accumulate": accumulate, "skip_nonfinite": seed % 3 > 0, "min_numel": 60 * (seed % 2)}
        assert_same(plain, train(net, lanes_of("shuffled", seed), settings=settings, **common))


def test_every_byte_moves_once_a_step() -> None:
    run = train(Net(), lanes_of("inline"), steps=4, micro_batches=3)
    assert_moved(run, steps=4)
    assert run.engine is not None
    parameters = sum(p.numel() for p in Net().parameters())
    assert run.engine.lanes.ledger.moved("d2h", "gradients") == 4 * 4 * parameters


def test_host_accumulation_moves_gradients_every_micro_batch() -> None:
    run = train(Net(), lanes_of("inline"), steps=4, micro_batches=3, settings={"accumulate": "host"})
    parameters = sum(p.numel() for p in Net().parameters())
    assert run.engine is not None
    assert run.engine.lanes.ledger.moved("d2h", "gradients") == 3 * 4 * 4 * parameters
    assert run.engine.lanes.ledger.moved("h2d", "weights") == 4 * 4 * parameters


def test_large_gradients_go_down_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(Net(), None, clip=Clip(0.05))
    monkeypatch.setattr("lightning_offload.methods.part.SLOT_NUMEL", 100)
    for kind in ("checked", "shuffled"):
        run = train(Net(), lanes_of(kind), clip=Clip(0.05))
        assert_same(plain, run)
        assert run.engine is not None
        ledger = run.engine.lanes.ledger
        assert ledger.kinds["d2h", "gradients"].operations > 5 * len(run.engine.trained)


class TwiceFired(nn.Module):
    """One weight in two reentrant checkpoints: its gradient arrives twice in one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def loss(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            x = checkpoint(self.shared, x, use_reentrant=True)
        return nn.functional.cross_entropy(self.head(x).view(-1, VOCAB), tokens.view(-1))


@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("kind", ["inline", "checked", "shuffled"])
@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_a_gradient_that_arrives_twice(kind: str, accumulate: str, skip_nonfinite: bool) -> None:
    net = TwiceFired()
    settings = {"accumulate": accumulate, "skip_nonfinite": skip_nonfinite}
    plain = train(net, None, clip=Clip(0.1), micro_batches=2)
    assert_same(plain, train(net, lanes_of(kind), clip=Clip(0.1), micro_batches=2, settings=settings))


def test_a_second_gradient_after_an_early_step_is_refused() -> None:
    class Late(TwiceFired):
        calls = 0

        def loss(self, tokens: Tensor) -> Tensor:
            Late.calls += 1
            x = self.embed(tokens)
            for _ in range(1 if Late.calls < 3 else 3):
                x = checkpoint(self.shared, x, use_reentrant=True)
            return nn.functional.cross_entropy(self.head(x).view(-1, VOCAB), tokens.view(-1))

    with pytest.raises(OffloadError, match=r"`shared\.(weight|bias)` received a second gradient.*skip_nonfinite=True"):
        train(Late(), lanes_of("inline"), settings={"skip_nonfinite": False})


def bf16_reference(net: nn.Module, *, steps: int, clip: float | None) -> tuple[list[float], dict[str, Tensor]]:
    """AdamW on fp32 masters of bf16 weights, in ten lines."""
    net = copy.deepcopy(net)
    masters = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters.values(), lr=3e-2, weight_decay=0.1, fused=True)
    torch.manual_seed(7)
    data = torch.Generator().manual_seed(11)
    losses = []
    for _ in range(steps):
        loss = net.loss(torch.randint(0, VOCAB, (2, 6), generator=data)) / 1
        net.zero_grad()
        loss.backward()
        losses.append(loss.item())
        grads = {name: p.grad for name, p in net.named_parameters()}
        if clip is not None:
            total = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads.values()])
            )
            coefficient = torch.clamp(clip / (total + 1e-6), max=1.0)
            grads = {name: g * coefficient for name, g in grads.items()}
        for name, master in masters.items():
            master.grad = grads[name].float()
        optimizer.step()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(masters[name])
    return losses, masters


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("min_numel", [0, 60])
@pytest.mark.parametrize("kind", ["inline", "checked", "shuffled"])
def test_bf16_weights_with_fp32_masters(
    kind: str, min_numel: int, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_offload.methods.homes.CHUNK_NUMEL", 128)  # several chunks per weight
    net = Net()
    losses, masters = bf16_reference(net, steps=5, clip=clip)
    ours = train(
        net,
        lanes_of(kind),
        clip=Clip(clip) if clip else None,
        settings={"min_numel": min_numel},
        dtypes=DTypes(compute=torch.bfloat16),
    )
    assert ours.losses == losses
    assert ours.engine is not None
    extras = ours.engine.extras()["masters"]
    for name, master in masters.items():
        assert torch.equal(ours.weights[name], master.to(torch.bfloat16)), name
        assert torch.equal(extras[name], master), name


def test_weights_that_are_16_bit_already_get_masters() -> None:
    net = Net().to(torch.bfloat16)
    ours = train(net, lanes_of("inline"))
    assert ours.engine is not None
    assert all(m.dtype == torch.float32 for m in ours.engine.extras()["masters"].values())
    assert len(ours.engine.extras()["masters"]) == len(list(net.parameters()))


class MixedBlock(nn.Module):
    """Both dtypes in one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.tanh(self.wide(x)).bfloat16()).float()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(MixedBlock() for _ in range(2))

    def loss(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy((x @ self.embed.weight.T).view(-1, VOCAB), tokens.view(-1))


def test_one_unit_may_hold_several_dtypes() -> None:
    runs = [train(Mixed(), lanes_of(kind), clip=Clip(0.1)) for kind in ("inline", "checked", "shuffled")]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    assert runs[0].engine is not None
    masters = runs[0].engine.extras()["masters"]
    assert masters.keys() == {name for name, p in Mixed().named_parameters() if p.dtype == torch.bfloat16}
    assert runs[0].losses[-1] < runs[0].losses[0]


def spoil_gradient(value: float, steps: set[int]) -> Any:
    def spoil(module: nn.Module, step: int) -> None:
        if step in steps:
            module.blocks[1].up.weight.grad[0, 0] = value

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("kind", ["inline", "checked", "shuffled"])
@pytest.mark.parametrize("min_numel", [0, 60])
def test_a_non_finite_gradient_changes_nothing(kind: str, accumulate: str, value: float, min_numel: int) -> None:
    settings = {"accumulate": accumulate, "min_numel": min_numel}
    for dtypes in (DTypes(), DTypes(compute=torch.bfloat16)):
        before = train(Net(), lanes_of(kind), steps=2, settings=settings, dtypes=dtypes)
        after = train(
            Net(),
            lanes_of(kind),
            steps=3,
            settings=settings,
            dtypes=dtypes,
            late=True,
            spoil=spoil_gradient(value, {2}),
        )
        for name, weight in before.weights.items():
            assert torch.equal(weight, after.weights[name]), name
        assert before.state["state"].keys() == after.state["state"].keys()
        for index, state in before.state["state"].items():
            for key, tensor in state.items():
                assert torch.equal(tensor, after.state["state"][index][key]), (index, key)
        assert after.reports[-1].skipped
        assert after.reports[-1].skipped_total == 1


def test_skips_are_counted_in_a_row_and_in_total() -> None:
    run = train(Net(), lanes_of("inline"), steps=6, late=True, spoil=spoil_gradient(float("nan"), {1, 2, 4}))
    assert [report.skipped_in_a_row for report in run.reports[:6]] == [0, 1, 2, 0, 1, 0]
    assert run.reports[-1].skipped_total == 3


@pytest.mark.parametrize("kind", ["inline", "shuffled"])
def test_too_many_skips_are_an_error_that_names_the_parameter(kind: str) -> None:
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .*`blocks\.1\.up\.weight`"):
        train(
            Net(),
            lanes_of(kind),
            steps=9,
            late=True,
            spoil=spoil_gradient(float("nan"), set(range(9))),
            settings={"max_skips": 2},
        )


def test_without_skipping_nan_spreads_as_with_torch() -> None:
    spoil = spoil_gradient(float("nan"), {1})
    plain = train(Net(), None, steps=3, spoil=spoil)
    ours = train(Net(), lanes_of("inline"), steps=3, spoil=spoil, late=True, settings={"skip_nonfinite": False})
    for name, weight in plain.weights.items():
        assert torch.equal(weight.nan_to_num(9e9), ours.weights[name].nan_to_num(9e9)), name
    assert any(weight.isnan().any() for weight in plain.weights.values())


def test_weights_written_by_others_are_adopted() -> None:
    for dtypes in (DTypes(), DTypes(compute=torch.bfloat16)):
        run = train(Net(), lanes_of("inline"), steps=2, dtypes=dtypes, settings={"min_numel": 60})
        assert run.engine is not None
        assert run.module is not None
        fine = {
            t.name: m.clone() for t in run.engine.trained if (m := run.engine._part_of[id(t)].master_of(t)) is not None
        }
        with torch.no_grad():
            run.module.head.weight[0, 0] = 5.0
            run.module.norm.weight[0] = 7.0
        run.engine.adopt()
        state = {t.name: w for t, w in run.engine.weights()}
        assert state["head.weight"][0, 0] == 5.0
        if dtypes.compute is not None:
            masters = run.engine.extras()["masters"]
            assert masters["head.weight"][0, 0] == 5.0
            assert masters["norm.weight"][0] == 7.0
            assert torch.equal(masters["head.weight"][1:], fine["head.weight"][1:])  # finer than the weight, and kept
            assert not torch.equal(masters["head.weight"][1:], run.module.head.weight[1:].float())


def snapshot(module: nn.Module) -> Any:
    hooks = {
        name: [len(getattr(m, kind)) for kind in vars(m) if kind.endswith("_hooks")]
        for name, m in module.named_modules()
    }
    on_parameters = {name: len(p._post_accumulate_grad_hooks or ()) for name, p in module.named_parameters()}
    return (
        hooks,
        on_parameters,
        [id(p) for p in module.parameters()],
        [(p.dtype, p.device) for p in module.parameters()],
    )


def test_attach_and_detach_leave_nothing_behind() -> None:
    module = Net(tied=True)
    for p in module.parameters():
        p._post_accumulate_grad_hooks  # noqa: B018  # made on first access
    before, bits = snapshot(module), {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = adamw(module)
    engine = Engine(module, optimizer, Full(FullSettings(min_numel=0)), lanes_of("inline"), DTypes())
    assert snapshot(module)[0] != before[0]
    assert snapshot(module)[1] != before[1]
    engine.detach()
    engine.detach()
    assert snapshot(module) == before
    assert "add_param_group" not in vars(optimizer)
    for name, p in module.named_parameters():
        assert torch.equal(p, bits[name])


def test_a_failed_attach_leaves_nothing_behind() -> None:
    module = Net()
    before = snapshot(module)
    with pytest.raises(ValueError, match="cannot be offloaded"):
        Engine(module, torch.optim.Adagrad(module.parameters()), Full(FullSettings()), lanes_of("inline"), DTypes())
    assert snapshot(module)[0] == before[0]
