"""Sparse adapters beside their dense, masked evaluation under autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_offload.numerics.adapter import Gate, Picks, Scope, adapter, route, select, union
from tests.adapter import dense, gathered, picked

COMBINATIONS = list(itertools.product(["logit", "none"], ["token", "union"]))
ALL = pytest.mark.parametrize(("gate", "scope"), COMBINATIONS)
SCOPES = pytest.mark.parametrize("scope", ["token", "union"])


def drawn(
    tokens: int = 7, width: int = 24, experts: int = 6, d: int = 10, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """x, keys, values, router; all of them leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, d), (width, d), (width, d), (experts, d)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def integers(tensors: list[Tensor]) -> list[Tensor]:
    return [(2 * t.detach()).round().requires_grad_() for t in tensors]


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a loss whose gradient in y is made of small integers; zeros where there is none."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(-3, 4, y.shape, generator=generator).to(y.dtype)
    return list(torch.autograd.grad(y, inputs, weights, materialize_grads=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "width", "d"), [(7, 24, 10), (65, 48, 33), (1, 5, 3), (128, 96, 64)])
@SCOPES
def test_with_all_rows_it_is_the_parallel_adapter(
    scope: Scope, tokens: int, width: int, d: int, dtype: torch.dtype
) -> None:
    inputs = drawn(tokens, width, 1, d, dtype)
    x, keys, values, _ = inputs
    expected = F.relu(x @ keys.T) @ values
    y = gathered(*inputs, active=1, top_k=width, gate="none", scope=scope)
    assert torch.equal(y, expected)
    for mine, theirs in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert torch.equal(mine, theirs)


@SCOPES
def test_with_all_experts_and_rows_it_is_the_gated_adapter(scope: Scope) -> None:
    inputs = drawn()
    x, keys, values, router = inputs
    expected = F.relu((x @ router.T).repeat_interleave(4, 1) * (x @ keys.T)) @ values
    y = gathered(*inputs, active=6, top_k=24, gate="logit", scope=scope)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y, F.relu(x @ keys.T) @ values)


@pytest.mark.parametrize("top_k", [1, 3, 8, 100])
@pytest.mark.parametrize("active", [1, 2, 6])
@ALL
def test_closed_forms_are_autograds(gate: Gate, scope: Scope, active: int, top_k: int) -> None:
    inputs = drawn()
    how: dict[str, Any] = {"active": active, "top_k": top_k, "gate": gate, "scope": scope}
    y, expected = gathered(*inputs, **how), dense(*inputs, **how)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    mine, theirs = gradients(y, inputs), gradients(expected, inputs)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    rows = picked(*inputs[:2], inputs[3], active=active, top_k=top_k, gate=gate).rows
    outside = torch.ones(24, dtype=torch.bool).index_fill_(0, rows, False)
    assert not mine[1][outside].any()
    assert not mine[2][outside].any()
    for one, other in zip(mine[1:3], theirs[1:3], strict=True):
        assert torch.equal(one.any(1), other.any(1)), "rows without a gradient are exactly zero"


@ALL
def test_gradients_are_those_of_finite_differences(gate: Gate, scope: Scope) -> None:
    x, keys, _, router = inputs = drawn(tokens=4, width=12, experts=4, d=5)
    picks = picked(x, keys, router, active=2, top_k=4, gate=gate)

    def function(*given: Tensor) -> Tensor:
        x, keys, values = given[:3]
        rows = keys[picks.rows], values[picks.rows]
        return adapter(x, *rows, router, picks, width=12, gate=gate, scope=scope)

    assert torch.autograd.gradcheck(function, inputs if gate == "logit" else inputs[:3])


def test_without_a_gate_the_router_has_no_gradient() -> None:
    for scope in ("token", "union"):
        inputs = drawn()
        gathered(*inputs, active=2, top_k=4, gate="none", scope=scope).sum().backward()
        assert inputs[3].grad is None


def test_as_many_rows_as_are_positive_are_enough() -> None:
    inputs = drawn(width=40, experts=1)
    x, keys, values, _ = inputs
    positive = int((x @ keys.T > 0).sum(1).max())
    expected = F.relu(x @ keys.T) @ values
    for top_k, equal in ((positive, True), (positive - 1, False), (3, False)):
        y = gathered(*inputs, active=1, top_k=top_k, gate="none", scope="token")
        assert torch.allclose(y, expected, rtol=1e-12) is equal


def test_the_union_is_nearer_to_the_dense_adapter() -> None:
    inputs = drawn(tokens=6, width=64, experts=1, d=32)
    expected = dense(*inputs, active=1, top_k=64, gate="none", scope="token")
    picks = picked(*inputs[:2], inputs[3], active=1, top_k=8, gate="none")
    assert 8 < len(picks.rows) < 64
    token, union_ = (
        (gathered(*inputs, active=1, top_k=8, gate="none", scope=scope) - expected).norm()
        for scope in ("token", "union")
    )
    assert 0 < union_ < token


@ALL
def test_values_of_zero_add_nothing_and_learn_first(gate: Gate, scope: Scope) -> None:
    inputs = drawn()
    with torch.no_grad():
        inputs[2].zero_()
    y = gathered(*inputs, active=2, top_k=4, gate=gate, scope=scope)
    assert not y.any()
    of_x, of_keys, of_values, of_router = gradients(y, inputs)
    assert not of_x.any()
    assert not of_keys.any()
    assert not of_router.any()
    assert of_values.any()


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("gate", ["logit", "none"])
def test_selection_is_that_of_brute_force(gate: Gate, by_expert: bool) -> None:
    x, keys, _, router = (t.detach() for t in drawn(tokens=40))
    picks = picked(x, keys, router, active=3, top_k=5, gate=gate, by_expert=by_expert)
    for t in range(40):
        logits = router @ x[t]
        best = sorted(range(6), key=lambda e: -float(logits[e]))[:3]
        assert picks.experts[t].tolist() == best
        scores = {j: float(keys[j] @ x[t]) * (float(logits[j // 4]) if gate == "logit" else 1.0) for j in range(24)}
        own = [j for j in scores if j // 4 in best]
        expected = {j for j in sorted(own, key=lambda j: -scores[j])[:5] if scores[j] > 0}
        mine = picks.rows[picks.places[t]].tolist()
        assert len(set(mine)) == 5
        assert {j // 4 for j in mine} <= set(best)
        assert {j for j in mine if scores[j] > 0} == expected


@pytest.mark.parametrize("gate", ["logit", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_both_forms_of_selection_agree_on_ties_too(gate: Gate, seed: int) -> None:
    x, keys, _, router = (t.detach() for t in integers(drawn(tokens=50, dtype=torch.float32, seed=seed)))
    chosen = route(x, router, 3)
    logits = chosen.logits if gate == "logit" else None
    forms = [select(x, keys, chosen.experts, logits, group=4, top_k=5, by_expert=form) for form in (False, True)]
    assert torch.equal(*forms)
    u = (x @ keys.t() * (x @ router.t()).repeat_interleave(4, 1) if logits is not None else x @ keys.t()).sort(1).values
    assert (u[:, 1:] == u[:, :-1]).any(), "no ties"


@pytest.mark.parametrize("active", [1, 3])
def test_of_equal_experts_and_rows_the_first_are_taken(active: int) -> None:
    x, keys, router = torch.ones(2, 3), torch.ones(12, 3), torch.ones(4, 3)
    chosen = route(x, router, active)
    assert chosen.experts.tolist() == [list(range(active))] * 2
    rows = select(x, keys, chosen.experts, chosen.logits, group=3, top_k=2)
    assert rows.tolist() == [[0, 1]] * 2


def test_where_nothing_is_left_out_nothing_is_scored() -> None:
    x, keys = torch.ones(2, 10), torch.ones(24, 0)
    experts = torch.tensor([[5, 1], [0, 3]])
    rows = select(x, keys, experts, None, group=4, top_k=8)
    assert rows.tolist() == [[20, 21, 22, 23, 4, 5, 6, 7], [0, 1, 2, 3, 12, 13, 14, 15]]


@ALL
def test_rows_gathered_and_rows_at_home_have_the_same_bits_on_integers(gate: Gate, scope: Scope) -> None:
    inputs = integers(drawn(dtype=torch.float32, tokens=5))
    x, keys, values, router = inputs
    picks = picked(x, keys, router, active=2, top_k=3, gate=gate)
    assert len(picks.rows) < 24
    here = Picks(torch.arange(24), picks.rows[picks.places], picks.experts)
    own = adapter(x, keys[picks.rows], values[picks.rows], router, picks, width=24, gate=gate, scope=scope)
    if scope == "union":
        unused = torch.ones(24, 1, dtype=torch.bool).index_fill_(0, picks.rows, False)
        keys = keys.masked_fill(unused, 0.0)
    home = adapter(x, keys, values, router, here, width=24, gate=gate, scope=scope)
    assert own.any()
    assert torch.equal(own, home)
    for mine, theirs in zip(gradients(own, inputs), gradients(home, inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_union_is_sorted_and_points_back() -> None:
    picks = torch.tensor([[9, 2], [2, 4], [0, 9]])
    rows, places = union(picks, 10)
    assert rows.tolist() == [0, 2, 4, 9]
    assert torch.equal(rows[places], picks)


@pytest.mark.parametrize(
    ("tokens", "width", "experts", "active", "top_k"),
    [(0, 24, 6, 2, 4), (1, 24, 6, 2, 4), (3, 1, 1, 1, 1), (1, 2, 2, 1, 1), (5, 24, 6, 2, 100), (5, 24, 24, 3, 2)],
)
@ALL
def test_edges(gate: Gate, scope: Scope, tokens: int, width: int, experts: int, active: int, top_k: int) -> None:
    inputs = drawn(tokens, width, experts)
    how: dict[str, Any] = {"active": active, "top_k": top_k, "gate": gate, "scope": scope}
    y, expected = gathered(*inputs, **how), dense(*inputs, **how)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))
    chosen = route(inputs[0], inputs[3], active)
    group, logits = width // experts, chosen.logits if gate == "logit" else None
    forms = [select(*inputs[:2], chosen.experts, logits, group=group, top_k=top_k, by_expert=b) for b in (False, True)]
    assert torch.equal(*forms)
    assert forms[0].shape == (tokens, min(top_k, active * group))


@ALL
def test_nothing_positive(gate: Gate, scope: Scope) -> None:
    inputs = [t.detach().abs().requires_grad_() for t in drawn()]
    with torch.no_grad():
        inputs[1].neg_()
    y = gathered(*inputs, active=2, top_k=4, gate=gate, scope=scope)
    assert not y.any()
    for gradient in gradients(y, inputs):
        assert not gradient.any()


@ALL
def test_tokens_in_another_order(gate: Gate, scope: Scope) -> None:
    x, *others = drawn(tokens=20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"active": 2, "top_k": 4, "gate": gate, "scope": scope}
    torch.testing.assert_close(gathered(x[order], *others, **how), gathered(x, *others, **how)[order])


def test_one_more_token_changes_no_others_output() -> None:
    x, *others = drawn(tokens=20)
    how: dict[str, Any] = {"active": 2, "top_k": 4, "gate": "logit", "scope": "token"}
    torch.testing.assert_close(gathered(x, *others, **how)[:19], gathered(x[:19], *others, **how))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_16_bits_are_computed_in_32(gate: Gate, scope: Scope, dtype: torch.dtype) -> None:
    wide = [t.detach() for t in drawn(tokens=64, width=256, experts=16, d=128)]
    inputs = [t.to(dtype).requires_grad_() for t in wide[:3]] + [wide[3].float().requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    how: dict[str, Any] = {"active": 8, "top_k": 32, "gate": gate}
    rows = [picked(t[0], t[1], t[3], **how) for t in (inputs, exact)]
    mine, theirs = (p.rows[p.places] for p in rows)
    recall = (mine.unsqueeze(2) == theirs.unsqueeze(1)).any(2).float().mean()
    assert recall >= 0.999
    of_fp32 = picked(wide[0], wide[1], wide[3], **how)
    full = of_fp32.rows[of_fp32.places]
    assert (mine.unsqueeze(2) == full.unsqueeze(1)).any(2).float().mean() >= 0.99, "rounding keys and x moves few picks"
    y, expected = gathered(*inputs, **how, scope=scope), gathered(*exact, **how, scope=scope)
    assert y.dtype == dtype
    of_mine, of_exact = gradients(y, inputs), gradients(expected, exact)
    assert [g.dtype for g in of_mine] == [t.dtype for t in inputs]
    for a, b in zip([y, *of_mine], [expected, *of_exact], strict=True):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()


@ALL
def test_autocast_changes_nothing(gate: Gate, scope: Scope) -> None:
    inputs = drawn(dtype=torch.float32)
    how: dict[str, Any] = {"active": 2, "top_k": 4, "gate": gate, "scope": scope}
    plain = gathered(*inputs, **how)
    expected = [plain, *gradients(plain, inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        y = gathered(*inputs, **how)
        mine = [y, *gradients(y, inputs)]
    for a, b in zip(mine, expected, strict=True):
        assert torch.equal(a, b)


@ALL
def test_what_is_kept_for_backward(gate: Gate, scope: Scope) -> None:
    tokens, top_k, active = 50, 4, 2
    x, keys, values, router = drawn(tokens, 240, 24, dtype=torch.float32)
    picks = picked(x, keys, router, active=active, top_k=top_k, gate=gate)
    mine, theirs = keys[picks.rows], values[picks.rows]
    given = {t.untyped_storage().data_ptr() for t in (x, mine, theirs, router, picks.places, picks.experts)}
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() not in given:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        adapter(x, mine, theirs, router, picks, width=240, gate=gate, scope=scope)
    rows = len(picks.rows)
    assert rows > 10 * top_k
    numbers = tokens * (top_k if scope == "token" else rows) + (tokens * active if gate == "logit" else 0)
    assert sum(kept.values()) == 4 * numbers + 8 * rows


@ALL
def test_backward_twice_and_a_second_time_from_the_start_give_the_same_bits(gate: Gate, scope: Scope) -> None:
    inputs = drawn(tokens=50, width=240, experts=24, dtype=torch.float32)
    how: dict[str, Any] = {"active": 3, "top_k": 8, "gate": gate, "scope": scope}
    y = gathered(*inputs, **how)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad(y, inputs[:3], weights, retain_graph=True) for _ in range(2)]
    grads.append(torch.autograd.grad(gathered(*inputs, **how), inputs[:3], weights))
    for first, *others in zip(*grads, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_a_second_derivative_is_refused() -> None:
    inputs = drawn()
    y = gathered(*inputs, active=2, top_k=4, gate="logit", scope="token")
    (of_x,) = torch.autograd.grad(y, inputs[:1], torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_x.sum().backward()


@pytest.mark.parametrize("gate", ["logit", "none"])
def test_gradients_of_parts_of_a_batch_add_up(gate: Gate) -> None:
    """In scope "token"; a union of fewer tokens is another one."""
    x, *others = drawn(tokens=20)

    def of_rows(part: slice) -> list[Tensor]:
        y = gathered(x[part], *others, active=2, top_k=4, gate=gate, scope="token")
        return list(torch.autograd.grad(y.sum(), others, materialize_grads=True))

    halves = zip(of_rows(slice(10)), of_rows(slice(10, None)), strict=True)
    torch.testing.assert_close([one + other for one, other in halves], of_rows(slice(None)))
