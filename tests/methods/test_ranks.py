"""Engines on several ranks: the bits of one rank that runs their micro-batches one after another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.peers import owners
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.methods.method import Method
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from tests.helpers import VOCAB, Net, adamw, lanes_of, pairwise, row_id, two_groups
from tests.meft import FFNNet, adapted, meft, undecayed
from tests.meft import adamw as of_adapters
from tests.projected import lsp
from tests.ranks import ThreadPeers, on_ranks

STEPS = 5


def full(**settings: Any) -> Method:
    return Full(FullSettings(**{"min_numel": 0, "accumulate": "device", **settings}))


def batches(step: int, world: int) -> list[Tensor]:
    """Those of the ranks."""
    data = torch.Generator().manual_seed(step)
    return [torch.randint(0, VOCAB, (2, 6), generator=data) for _ in range(world)]


class Trainee:
    """A module with an engine, and what it has done."""

    def __init__(self, net: nn.Module, make: Callable[[], Method], **how: Any) -> None:
        self.net, self.clip = copy.deepcopy(net), how.get("clip")
        self.optimizer = how.get("make_optimizer", adamw)(self.net)
        self.lanes = lanes_of(how.get("lanes", "inline"), how.get("seed", 0))
        dtypes = how.get("dtypes", DTypes())
        self.engine = Engine(
            self.net,
            self.optimizer,
            make(),
            self.lanes,
            dtypes,
            expects_clip=self.clip is not None,
            peers=how.get("peers"),
        )
        self.engine.gradients_visible = how.get("visible", False)

    def backward(self, tokens: Tensor, share: int, *, last: bool, number: int = 0) -> float:
        self.net.calls = number
        with self.engine.micro_batch():
            loss = self.net.loss(tokens)
        self.engine.stepping = last
        (loss / share).backward()
        return float(loss.detach())

    def step(self) -> None:
        if self.engine.gradients_visible:
            self.engine.meet(visible=True)
        self.engine.step(self.clip)

    def weights(self) -> dict[str, Tensor]:
        self.engine.flush()
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}


def alone(net: nn.Module, make: Callable[[], Method], world: int, **how: Any) -> tuple[Trainee, list[list[float]]]:
    trainee = Trainee(net, make, **how)
    losses = []
    for step in range(how.get("steps", STEPS)):
        torch.manual_seed(step)
        parts = batches(step, world)
        losses.append(
            [trainee.backward(t, world, last=at == world - 1, number=step * world + at) for at, t in enumerate(parts)]
        )
        trainee.step()
    trainee.engine.flush()
    return trainee, losses


def together(net: nn.Module, make: Callable[[], Method], world: int, **how: Any) -> list[tuple[Trainee, list[float]]]:
    def run(peers: ThreadPeers) -> tuple[Trainee, list[float]]:
        trainee = Trainee(net, make, peers=peers, **how)
        losses = []
        checking = trainee.lanes.checking() if isinstance(trainee.lanes, CheckedLanes) else torch.enable_grad()
        with checking:
            for step in range(how.get("steps", STEPS)):
                mine, number = batches(step, world)[peers.rank], step * world + peers.rank
                losses.append(trainee.backward(mine, 1, last=True, number=number))
                trainee.step()
            trainee.engine.flush()
        return trainee, losses

    return on_ranks(world, run)


def compare(net: nn.Module, make: Callable[[], Method], world: int, **how: Any) -> list[Trainee]:
    """Ranks are identical, and of the bits of one alone; of three they have its numbers: thirds are rounded."""
    one, expected = alone(net, make, world, **how)
    ranks = together(net, make, world, **how)
    weights, state = one.weights(), one.engine.optimizer_state()["state"]
    merged = on_ranks(world, lambda peers: with_peers(ranks[peers.rank][0], peers).optimizer_state()["state"])[0]
    assert merged.keys() == state.keys()
    for rank, (trainee, losses) in enumerate(ranks):
        assert_equal(ranks[0][0].net, trainee.net)
        if world != 3:
            assert losses == [of_step[rank] for of_step in expected]
    if world == 3 and how["dtypes"].compute is not None:  # thirds in 16 bits
        return [trainee for trainee, _ in ranks]
    pairs = [(p.detach(), weights[name]) for name, p in ranks[0][0].net.named_parameters()]
    assert_as(pairs, world, 1e-6)
    for position, held in state.items():  # squares of what is nearly zero
        assert_as([(merged[position][key], value) for key, value in held.items()], world, 1e-5)
    return [trainee for trainee, _ in ranks]


def assert_as(pairs: list[tuple[Tensor, Tensor]], world: int, relative: float) -> None:
    if world != 3:
        assert all(torch.equal(found, expected) for found, expected in pairs)
    differences = torch.stack([(found - expected).norm() for found, expected in pairs])
    assert differences.norm() <= relative * torch.stack([expected.norm() for _, expected in pairs]).norm()


def with_peers(trainee: Trainee, peers: ThreadPeers) -> Engine:
    """In another room than the one that it was trained in."""
    trainee.engine.peers = peers
    return trainee.engine


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


FACTORS: dict[str, list[Any]] = {
    "net": [
        {},
        {"tied": True},
        {"frozen": True},
        {"recompute": "reentrant"},
        {"recompute": "yes"},
        {"functional_head": True},
    ],
    "clip": [None, Clip(0.05, "norm"), Clip(1e-3, "value")],
    "compute": [None, torch.bfloat16],
    "world": [2, 3, 4],
    "visible": [False, True],
    "min_numel": [0, 200],
    "make_optimizer": [adamw, two_groups],
    "lanes": ["inline", "checked", "shuffled"],
}


@pytest.mark.parametrize("row", pairwise(FACTORS, seed=1), ids=row_id)
def test_full(row: dict[str, Any]) -> None:
    row = dict(row)
    net, least, compute = Net(**row.pop("net")), row.pop("min_numel"), row.pop("compute")
    compare(net, lambda: full(min_numel=least), dtypes=DTypes(compute=compute), **row)


LSP: dict[str, list[Any]] = {
    "settings": [
        {"refit_every": 2},
        {"projector": "pca", "refit_every": 3, "bias_threshold": 0.5},
        {"projector": "learned", "fit_steps": 3},
        {"form": "activations"},
        {"share": "type"},
        {"others": "frozen"},
    ],
    "net": [{}, {"tied": True}, {"recompute": "yes"}],
    "clip": [None, Clip(0.05, "norm")],
    "compute": [None, torch.bfloat16],
    "visible": [False, True],
    "world": [2, 3, 4],
    "lanes": ["inline", "checked", "shuffled"],
}


@pytest.mark.parametrize("row", pairwise(LSP, seed=1), ids=row_id)
def test_lsp_ranks_are_identical(row: dict[str, Any]) -> None:
    row = dict(row)
    net, settings, compute = Net(**row.pop("net")), row.pop("settings"), row.pop("compute")
    if settings.get("form") == "activations":
        row["visible"] = False
    dtypes = DTypes(compute=compute, rounding="stochastic")
    ranks = together(net, lambda: lsp(**settings), row.pop("world"), dtypes=dtypes, **row)
    for trainee, _ in ranks:
        assert_equal(ranks[0][0].net, trainee.net)
    assert not torch.equal(ranks[0][0].net.blocks[0].up.weight, net.blocks[0].up.weight)


@pytest.mark.parametrize("world", [2, 4])
def test_lsp_with_given_projectors_is_one_that_sees_all(world: int) -> None:
    """Fixed projectors of one nonzero a row: sums in a subspace are in the order of those in the whole."""
    settings = {"projector": "block", "refit_every": None, "nnz": 1}
    one, _ = alone(Net(), lambda: lsp(**settings), world, dtypes=DTypes())
    ranks = together(Net(), lambda: lsp(**settings), world, dtypes=DTypes())
    weights = one.weights()
    pairs = [(p.detach(), weights[name]) for name, p in ranks[0][0].net.named_parameters()]
    assert_as(pairs, 3, 1e-6)


MEFT: dict[str, list[Any]] = {
    "placement": ["host", "keys", "device"],
    "row_optimizer": ["dense", "lazy"],
    "clip": [None, Clip(0.05, "norm")],
    "compute": [None, torch.bfloat16],
    "visible": [False, True],
    "world": [2, 4],
    "lanes": ["inline", "checked", "shuffled"],
}


@pytest.mark.parametrize("row", pairwise(MEFT, seed=1), ids=row_id)
def test_meft(row: dict[str, Any]) -> None:
    row = dict(row)
    placement, way, compute = row.pop("placement"), row.pop("row_optimizer"), row.pop("compute")
    how = {"make_optimizer": undecayed if way == "lazy" else of_adapters, "dtypes": DTypes(compute=compute), **row}
    compare(adapted(FFNNet(width=24)), lambda: meft(placement, row_optimizer=way), **how)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("kind", ["full", "meft"])
def test_a_rank_without_a_gradient_counts_as_zeros(kind: str, who: int) -> None:
    rows = kind == "meft"
    net = adapted(FFNNet(width=24)) if rows else Net()
    how: dict[str, Any] = {"make_optimizer": of_adapters if rows else adamw}

    def make() -> Method:
        return meft("host") if rows else full()

    one = Trainee(net, make, **how)
    for step in range(STEPS):
        parts = batches(step, 2)
        present = [1 - who] if step == 2 else [0, 1]
        for at in present:
            one.backward(parts[at], 2, last=at == present[-1])
        one.step()
    expected = one.weights()

    def run(peers: ThreadPeers) -> dict[str, Tensor]:
        trainee = Trainee(net, make, peers=peers, **how)
        for step in range(STEPS):
            if step != 2 or peers.rank != who:
                trainee.backward(batches(step, 2)[peers.rank], 1, last=True)
            trainee.step()
        return trainee.weights()

    for weights in on_ranks(2, run):
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("checks", [True, False])
def test_a_parameter_that_nobody_uses_is_left_alone(checks: bool) -> None:
    net = Net()
    net.spare = nn.Linear(4, 4)

    def run(peers: ThreadPeers) -> list[Tensor]:
        trainee = Trainee(net, lambda: full(skip_nonfinite=checks), peers=peers)
        for step in range(3):
            trainee.backward(batches(step, 2)[peers.rank], 1, last=True)
            trainee.step()
        trainee.engine.flush()
        mine = [t for t in trainee.engine.host.trained if t.owner == peers.rank and "spare" in t.name]
        masters = [trainee.engine.host._home[t.name].master.view(t.parameter.shape) for t in mine]
        assert all(torch.equal(m, t.parameter.detach()) for m, t in zip(masters, mine, strict=True))
        return [p.detach() for p in trainee.net.spare.parameters()]

    for found in on_ranks(2, run):
        assert all(torch.equal(a, b) for a, b in zip(found, net.spare.parameters(), strict=True))


METHODS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Method], Any]] = {
    "full": (Net, full, adamw),
    "lsp": (Net, lambda: lsp(projector="block", refit_every=None), adamw),
    "meft": (lambda: adapted(FFNNet(width=24)), lambda: meft("host"), of_adapters),
}


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_what_n_ranks_have_saved_is_continued_by_m(
    method: str, before: int, after: int, compute: torch.dtype | None
) -> None:
    """In the middle of a window of two micro-batches; the step after it is that of ranks that never stopped."""
    build, make, make_optimizer = METHODS[method]
    net, how = build(), {"make_optimizer": make_optimizer, "dtypes": DTypes(compute=compute, rounding="stochastic")}

    def first(peers: ThreadPeers) -> dict[str, Any]:
        trainee = Trainee(net, make, peers=peers, **how)
        for step in range(2):
            trainee.backward(batches(step, before)[peers.rank], 1, last=True)
            trainee.step()
        trainee.backward(batches(2, before)[peers.rank], 2, last=False)
        engine = trainee.engine
        engine.flush()
        return {
            "weights": {name: p.detach().clone() for name, p in trainee.net.named_parameters()},
            "state": copy.deepcopy(engine.optimizer_state()),
            "extras": copy.deepcopy(engine.extras()),
        }

    saved = on_ranks(before, first)[0]

    def second(peers: ThreadPeers) -> dict[str, Tensor]:
        trainee = Trainee(net, make, peers=peers, **how)
        trainee.net.load_state_dict(saved["weights"])
        trainee.engine.load_optimizer_state(copy.deepcopy(saved["state"]))
        trainee.engine.load_extras(copy.deepcopy(saved["extras"]))
        trainee.backward(batches(3, 4)[0], 2, last=True)  # of all ranks the same, however many there are
        trainee.step()
        return trainee.weights()

    found, expected = on_ranks(after, second), on_ranks(1, second)[0]
    for weights in found:
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    assert any(not torch.equal(expected[name], weight) for name, weight in saved["weights"].items())


@pytest.mark.parametrize("settings", [{}, {"directions": 2, "direction_ranks": 2}], ids=str)
@pytest.mark.parametrize("after", [1, 2, 4])
def test_losses_of_all_ranks_are_in_a_window_that_is_continued(after: int, settings: dict[str, Any]) -> None:
    """By as many ranks or others, each of which adds its own."""
    start = Net()
    alike = {name: value for name, value in settings.items() if name != "direction_ranks"}
    given = settings if after > 1 else alike

    def run(peers: ThreadPeers | None, how: dict[str, Any], saved: Any) -> tuple[Any, list[Any]]:
        net = copy.deepcopy(start)
        engine = zeroth(net, ZO2Settings(seed=3, min_numel=0, **how), peers, None)
        rank, share = (0, 1) if peers is None else (peers.rank, how.get("direction_ranks", 1))
        if saved is None:
            engine.micro_batch(net.loss, [batches(0, 2)[rank // share]])
            return engine.extras(), []
        engine.load_extras(copy.deepcopy(saved))
        engine.micro_batch(net.loss, [batches(1, 4)[rank // share]])
        engine.step()
        return None, engine.log

    saved = on_ranks(2, lambda peers: run(peers, settings, None))[0][0]
    share = given.get("direction_ranks", 1)
    found = on_ranks(after, lambda peers: run(peers, given, saved))
    net = copy.deepcopy(start)
    engine = zeroth(net, ZO2Settings(seed=3, min_numel=0, **alike), None, None)
    for tokens in (*batches(0, 2)[: 2 // settings.get("direction_ranks", 1)], *batches(1, 4)[: after // share]):
        engine.micro_batch(net.loss, [tokens])
    engine.step()
    assert all(log == engine.log for _, log in found)


def test_what_is_exchanged() -> None:
    """Of `full` gradients and weights; of `lsp` subspaces, and small parameters."""
    for make in (full, lambda: lsp(projector="block", refit_every=None)):
        ranks = [trainee for trainee, _ in together(Net(), make, 2, dtypes=DTypes())]
        engine = ranks[0].engine
        small = sum(4 * t.parameter.numel() for t in (*engine.host.trained, *engine.resident.trained))
        sent = [trainee.engine.peers.sent_bytes for trainee in ranks]
        assert sent[0].get("gradients") == STEPS * small
        assert sum(of_rank.get("weights", 0) for of_rank in sent) == STEPS * small
        if engine.own is not None:
            squares = sum(4 * home.delta[0] for home in engine.own._home.values())
            assert sent[0]["compressed gradients"] == STEPS * squares
            assert sum(of_rank["deltas"] for of_rank in sent) == STEPS * squares
            fits = sum(4 * t.parameter.numel() for t in engine.own.trained)
            assert sent[0].get("gradients to fit to", 0) in (0, fits)


def test_host_memory_is_shared_out() -> None:
    """Every parameter has masters and moments on one host alone."""
    ranks = [trainee.engine for trainee, _ in together(Net(), full, 3, dtypes=DTypes())]
    whole = Trainee(Net(), full).engine
    held = [sum(engine.host.holdings.values()) for engine in ranks]
    assert sum(held) == sum(whole.host.holdings.values())
    assert held == [engine.host_bytes(engine.trained) for engine in ranks]
    assert max(held) <= sum(held) / 2


def test_owners_have_about_as_much_each() -> None:
    assert owners([5, 3, 3, 2, 2, 1], 2) == [0, 1, 1, 0, 1, 0]
    assert owners([], 3) == []
    assert owners([7, 7, 7], 4) == [0, 1, 2]


# Without gradients.


def zeroth(
    net: nn.Module, settings: ZO2Settings, peers: ThreadPeers | None, compute: torch.dtype | None
) -> ZerothEngine:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, weight_decay=0.1)
    dtypes = DTypes(compute=compute, rounding="stochastic")
    return ZerothEngine(net, optimizer, ZO2(settings), lanes_of("inline"), dtypes, peers=peers)


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, {}),
        (3, {"directions": 2}),
        (4, {"write_back_every": 3}),
        (2, {"directions": 4, "direction_ranks": 2}),
        (4, {"directions": 4, "direction_ranks": 2}),
        (3, {"directions": 3, "direction_ranks": 3}),
    ],
    ids=str,
)
def test_zo2_has_the_bits_of_one_rank_that_sees_all(
    world: int, settings: dict[str, Any], compute: torch.dtype | None
) -> None:
    """Of any number: losses are summed exactly. Groups that share out directions see one batch."""
    share = settings.get("direction_ranks", 1)
    alike = {name: value for name, value in settings.items() if name != "direction_ranks"}

    def weights(net: nn.Module, engine: ZerothEngine) -> list[Tensor]:
        engine.flush()
        return [p.detach().clone() for p in net.parameters()]

    start = Net()  # threads share the random state
    net = copy.deepcopy(start)
    engine = zeroth(net, ZO2Settings(seed=3, min_numel=0, **alike), None, compute)
    for step in range(4):
        for tokens in batches(step, world // share):
            engine.micro_batch(net.loss, [tokens])
        engine.step()
    expected, log = weights(net, engine), engine.log

    def run(peers: ThreadPeers) -> tuple[list[Tensor], list[Any], dict[str, int]]:
        net = copy.deepcopy(start)
        engine = zeroth(net, ZO2Settings(seed=3, min_numel=0, **settings), peers, compute)
        for step in range(4):
            engine.micro_batch(net.loss, [batches(step, world // share)[peers.rank // share]])
            engine.step()
        return weights(net, engine), engine.log, peers.sent_bytes

    for mine, entries, sent in on_ranks(world, run):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
        assert entries == log
        assert sum(sent.values()) / 4 < 1024  # a step


def test_mezo_draws_its_seeds_once() -> None:
    """Every rank has a generator of its own, and uses that of rank 0."""

    start = Net()

    def run(peers: ThreadPeers) -> tuple[list[Any], list[Tensor]]:
        net = copy.deepcopy(start)
        engine = zeroth(net, ZO2Settings(noise="mezo", min_numel=0), peers, None)
        for step in range(3):
            engine.micro_batch(net.loss, [batches(step, 2)[peers.rank]])
            engine.step()
        engine.flush()
        return engine.log, [p.detach() for p in net.parameters()]

    (log, weights), (other_log, others) = on_ranks(2, run)
    assert log == other_log
    assert len({entry.seed for entry in log}) == 3
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_directions_are_shared_out_among_ranks_that_are_there() -> None:
    settings = ZO2Settings(seed=3, min_numel=0, directions=2, direction_ranks=2)
    with pytest.raises(ValueError, match=r"`direction_ranks=2` does not divide 1 rank.*zo2_offload_ddp"):
        zeroth(Net(), settings, None, None)
    with pytest.raises(ValueError, match=r"`direction_ranks=2` cannot share out `directions=3` evenly"):
        ZO2Settings(directions=3, direction_ranks=2)
