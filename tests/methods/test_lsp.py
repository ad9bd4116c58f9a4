"""Method lsp where it becomes AdamW, and elsewhere against dense projectors in plain torch."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_offload.methods import projections
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.lsp import LSP
from tests.helpers import Net, Run, adamw, assert_same, lanes_of, pairwise, row_id, train, two_groups
from tests.projected import Dense, assert_projected, dense_train, lsp, projected_names, settings_of

CLIPS = {"none": None, "norm": Clip(0.05), "value": Clip(0.01, "value")}
NARROW = DTypes(compute=torch.bfloat16, rounding="stochastic")
MODELS = ["plain", "tied", "frozen", "sometimes_unused", "functional_head"]


def flags(model: str) -> dict[str, bool]:
    return {} if model == "plain" else {model: True}


def same_weights(one: Run, other: Run) -> None:
    assert_same(one, other, state=False)


# The identity: square weights of 256 elements (no vector tail), d = m = n and r = 1. Signs and permutations (learned:
# values +-1, which fit at once) move a gradient's elements around; AdamW treats all alike.

IDENTITY: dict[str, Any] = {"dim": 1.0, "nnz": 1, "scale": "none"}
SAME_BITS: dict[str, list[Any]] = {
    "lanes": ["inline", "checked", "shuffled"],
    "micro_batches": [1, 2, 3],
    "clip": ["none", "norm", "value"],
    "model": MODELS,
    "groups": [False, True],
    "recompute": ["no", "non-reentrant", "reentrant"],
    "accumulate": ["device", "host"],
    "skip_nonfinite": [True, False],
    "schedule": [False, True],
    "late": [False, True],
    "min_numel": [0, 60],
    "projector": ["learned", "pca", "block"],
    "refit_every": [1, 2, float("inf")],
    "share": ["matrix", "type"],
}


def square(**kwargs: Any) -> Net:
    return Net(width=16, inner=16, **kwargs)


def run_identity(row: dict[str, Any], *, seed: int = 0) -> tuple[Net, Run, Run]:
    if row["clip"] == "norm":
        row = {**row, "projector": "pca"}  # P = I: a sum of squares in another order may round differently
    if row["projector"] == "block":
        row = {**row, "moments": "paper"}  # by default they start anew
    if row["recompute"] == "reentrant" and row["model"] == "frozen":
        row = {**row, "recompute": "non-reentrant"}  # a frozen embedding: reentrant checkpointing would end backward
    net = square(dropout=0.2, recompute=row["recompute"], **flags(row["model"]))
    common = {
        "micro_batches": row["micro_batches"],
        "clip": CLIPS[row["clip"]],
        "make_optimizer": two_groups if row["groups"] else adamw,
        "schedule": row["schedule"],
    }
    names = ("accumulate", "skip_nonfinite", "min_numel", "projector", "refit_every", "share", "moments")
    method = lsp(**IDENTITY, fit_lr=0.0, **{key: row[key] for key in names if key in row})
    ours = train(net, lanes_of(row["lanes"], seed), method=method, late=row["late"], **common)
    return net, train(net, None, **common), ours


@pytest.mark.parametrize("row", pairwise(SAME_BITS), ids=row_id)
def test_identity_is_adamw(row: dict[str, Any]) -> None:
    net, plain, ours = run_identity(row)
    same_weights(plain, ours)
    assert_projected(ours, net, steps=5, exactly=row["model"] != "sometimes_unused")


@pytest.mark.slow
@pytest.mark.parametrize("index", range(300))
def test_identity_is_adamw_on_random_rows(index: int) -> None:
    rows = math.prod(map(len, SAME_BITS.values()))
    product = itertools.islice(itertools.product(*SAME_BITS.values()), index * 9973 % rows, None)
    _, plain, ours = run_identity(dict(zip(SAME_BITS, next(product), strict=True)), seed=index)
    same_weights(plain, ours)


def test_identity_with_refits_really_replaces_projectors_and_moves_moments() -> None:
    """Signed permutations that change in every step: moments must follow, or this is not AdamW."""
    net = square()
    run = train(net, lanes_of("checked"), steps=8, method=lsp(**IDENTITY, projector="learned", refit_every=1, fit_lr=0))
    same_weights(train(net, None, steps=8), run)
    assert run.engine is not None
    drawn = [home.projections.pair.draws for home in run.engine.own._home.values()]
    assert min(drawn) >= 6
    stays = lsp(**IDENTITY, projector="learned", refit_every=1, fit_lr=0, moments="reset")
    assert not torch.equal(
        train(net, lanes_of("inline"), steps=8, method=stays).weights["blocks.0.up.weight"],
        run.weights["blocks.0.up.weight"],
    )


def test_identity_in_chunks_and_with_positive_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_draw = projections.draw_sparse

    def positive(*args: Any, **kwargs: Any) -> Any:
        drawn = plain_draw(*args, **kwargs)
        drawn.values.abs_()
        return drawn

    monkeypatch.setattr(projections, "draw_sparse", positive)
    monkeypatch.setattr("lightning_offload.methods.subspace.CHUNK_NUMEL", 64)
    monkeypatch.setattr("lightning_offload.methods.homes.CHUNK_NUMEL", 64)
    run = train(square(), lanes_of("checked"), method=lsp(**IDENTITY, projector="learned", fit_lr=0))
    assert_projected(run, square(), steps=5)
    same_weights(train(square(), None), run)


def test_identity_of_odd_width_to_round_off() -> None:
    """19 x 19 elements end in a vector tail, which rounds differently; the permutation moves who is in it."""
    net = Net(width=19, inner=19)
    plain = train(net, None, steps=8)
    ours = train(net, lanes_of("inline"), steps=8, method=lsp(**IDENTITY, projector="learned", refit_every=1, fit_lr=0))
    for name, weight in plain.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-6, atol=1e-6)


# Anything else against the dense loop.

DENSE: dict[str, list[Any]] = {
    "lanes": ["inline", "checked", "shuffled"],
    "micro_batches": [1, 2, 3],
    "clip": ["none", "norm", "value"],
    "model": MODELS,
    "projector": ["learned", "pca", "block"],
    "moments": ["transfer", "paper", "reset"],
    "scale": ["match", "none"],
    "accumulate": ["device", "host"],
    "skip_nonfinite": [True, False],
    "recompute": ["no", "non-reentrant", "reentrant"],
    "share": ["matrix", "type"],
    "others": ["adamw", "frozen"],
    "form": ["gradient", "activations"],
    "refit_every": [1, 2, 3, float("inf")],
    "schedule": [False, True],
    "groups": [False, True],
    "shape": [(9, 3), (0.5, 2), (12, 4), (19, 1)],
}


def gentle(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-3)


def gentle_groups(module: torch.nn.Module) -> torch.optim.Optimizer:
    even = [p for index, p in enumerate(module.parameters()) if index % 2 == 0]
    odd = [p for index, p in enumerate(module.parameters()) if index % 2]
    return torch.optim.AdamW(
        [{"params": even, "weight_decay": 0.3}, {"params": odd, "betas": (0.8, 0.9)}], lr=1e-2, eps=1e-3
    )


def run_dense(row: dict[str, Any], *, seed: int = 0) -> tuple[Net, Run, Run, Dense]:
    if row["recompute"] == "reentrant" and "frozen" in (row["others"], row["model"]):
        row = {**row, "recompute": "non-reentrant"}  # as above
    net = Net(recompute=row["recompute"], **flags(row["model"]))
    names = ("projector", "moments", "scale", "accumulate", "skip_nonfinite", "share", "others", "form", "refit_every")
    settings = settings_of(dim=row["shape"][0], nnz=row["shape"][1], **{key: row[key] for key in names})
    common = {
        "micro_batches": row["micro_batches"],
        "clip": CLIPS[row["clip"]],
        "make_optimizer": gentle_groups if row["groups"] else gentle,
        "schedule": row["schedule"],
        "steps": 6,
    }
    ours = train(net, lanes_of(row["lanes"], seed), method=lsp(**vars(settings)), **common)
    expected, dense = dense_train(net, settings, **common)
    return net, ours, expected, dense


def close(ours: Run, expected: Run, *, bound: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(expected.losses), rtol=0, atol=bound)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("row", pairwise(DENSE), ids=row_id)
def test_equals_the_dense_loop(row: dict[str, Any]) -> None:
    net, ours, expected, dense = run_dense(row)
    close(ours, expected)
    assert_projected(ours, net, steps=6, exactly=row["model"] != "sometimes_unused")
    assert (sum(shared.refits for shared in dense.shared.values()) > 0) == (row["refit_every"] != float("inf"))
    assert ours.engine is not None
    for name, home in ours.engine.own._home.items():
        assert home.projections.pair.draws == dense.matrices[name].shared.draws


@pytest.mark.slow
@pytest.mark.parametrize("index", range(300))
def test_equals_the_dense_loop_on_random_rows(index: int) -> None:
    choose = random.Random(index)
    _, ours, expected, _ = run_dense({name: choose.choice(values) for name, values in DENSE.items()}, seed=index)
    close(ours, expected)


@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("clip", ["none", "norm"])
def test_any_order_gives_the_same_bits(accumulate: str, clip: str) -> None:
    """bf16 weights, so that noise and rounding are in it; refits in every step."""
    net = Net(depth=2, tied=True)
    common = {"micro_batches": 2, "clip": CLIPS[clip], "steps": 3, "dtypes": NARROW}
    for moments in ("paper", "reset"):
        changes = {"accumulate": accumulate, "projector": "block", "refit_every": 1, "moments": moments}
        for skip in (True, False):
            method = {**changes, "skip_nonfinite": skip, "min_numel": 60}
            inline = train(net, lanes_of("inline"), method=lsp(**method), **common)
            for seed in range(6):
                same_weights(inline, train(net, lanes_of("shuffled", seed), method=lsp(**method), **common))


@pytest.mark.parametrize("projector", ["learned", "pca", "block"])
def test_narrow_weights_are_within_one_rounding_of_the_exact_step(projector: str) -> None:
    """Stochastic rounding may go either way, but never further than to a neighbour in bf16."""
    settings = settings_of(projector=projector, refit_every=2)
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def note(module: Any, step: int) -> None:
        names = projected_names(Net())
        seen.append(
            {n: (module.get_parameter(n).detach().clone(), module.get_parameter(n).grad.clone()) for n in names}
        )

    def smooth(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.parameters(), lr=0.1, eps=0.1)  # where S cancels its rounding is not blown up

    common = {"steps": 6, "dtypes": NARROW, "make_optimizer": smooth}
    ours = train(Net(), lanes_of("inline"), method=LSP(settings), late=True, spoil=note, **common)
    exact = Net()
    groups = smooth(exact).param_groups
    dense = Dense(exact, settings, groups, torch.bfloat16)
    ups = 0
    for step, noted in enumerate(seen):
        for name, (weight, gradient) in noted.items():
            dense.matrices[name].weight.data = weight.float()
            dense.take(name, gradient, last=True)
            dense.sums[name] = dense.sums[name].bfloat16().float()
        dense.update(groups)
        for name in noted:
            after = seen[step + 1][name][0] if step + 1 < len(seen) else ours.weights[name]
            before, found, wanted = noted[name][0].float(), after.float(), dense.matrices[name].weight.detach()
            ulp = torch.exp2(torch.floor(torch.log2(wanted.abs().maximum(before.abs()).clamp(min=1e-6))) - 7)
            # S and D cross the link in bf16
            slack = 0.02 * (wanted - before).abs().max()
            assert ((found - wanted).abs() <= ulp + slack).all(), (step, name)
            ups += int((found > wanted).sum())
    total = 6 * sum(w.numel() for w, _ in seen[0].values())
    assert 0.45 < ups / total < 0.55  # nearest or truncated would show a direction, and no change of weight at all


def test_every_byte_moves_once_a_step() -> None:
    for accumulate, down in (("device", 1), ("host", 3)):
        run = train(
            Net(), lanes_of("inline"), method=lsp(accumulate=accumulate, refit_every=float("inf")), micro_batches=3
        )
        assert run.engine is not None
        ledger = run.engine.lanes.ledger
        assert ledger.moved("h2d", "deltas") == 5 * 6 * 9 * 9 * 4
        assert ledger.moved("d2h", "compressed gradients") == down * 5 * 6 * 9 * 9 * 4
        assert ledger.moved("d2h", "projectors") == 0
        others = sum(p.numel() for n, p in Net().named_parameters() if n not in projected_names(Net()))
        assert ledger.moved("h2d", "weights") == 5 * 4 * others
        assert ledger.moved("d2h", "gradients") == down * 5 * 4 * others


@pytest.mark.parametrize("others", ["adamw", "frozen"])
@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("projector", ["learned", "pca", "block"])
@pytest.mark.parametrize("wide", [True, False])
def test_host_bytes_are_exact(others: str, accumulate: str, projector: str, wide: bool) -> None:
    for changes in ({}, {"moments": "reset"}, {"refit_every": float("inf")}, {"share": "type"}):
        method = lsp(others=others, accumulate=accumulate, projector=projector, **changes)
        run = train(Net(), lanes_of("inline"), method=method, steps=1, dtypes=DTypes() if wide else NARROW)
        assert run.engine is not None
        held = sum(part.holdings[what] for part in run.engine.senders for what in part.holdings)
        assert held == run.engine.host_bytes(run.engine.trained)
