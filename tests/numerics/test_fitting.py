"""Bias against its definition; fits and principal directions against oracles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_offload.numerics import fitting
from lightning_offload.numerics.adam import adam_
from lightning_offload.numerics.fitting import CHECK_EVERY, Bias, bias, error_and_gradients, fit, pca
from lightning_offload.numerics.projector import Projector, columns_of, draw_block, draw_sparse
from tests.numerics.projectors import DRAWS, SHAPES, Draw, dense, pair, seeded

both_layouts = pytest.mark.parametrize("draw", DRAWS)


def gradient_like(m: int, n: int, *, seed: int = 1) -> Tensor:
    """A few strong directions in noise."""
    generator = seeded(seed)
    strong = torch.randn(m, 6, generator=generator) @ torch.randn(6, n, generator=generator)
    return strong + torch.randn(m, n, generator=generator)


def dense_relative(left: Projector, right: Projector, gradient: Tensor) -> Tensor:
    p, q, g = dense(left), dense(right), gradient.double()
    return (p @ p.t() @ g @ q @ q.t() - g).norm() / g.norm()


@both_layouts
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_what_its_definition_says(draw: Draw, shape: tuple[int, int], dtype: torch.dtype) -> None:
    left, right = pair(draw, *shape, 2)
    gradient = gradient_like(*shape).to(dtype)
    p, q, g = dense(left), dense(right), gradient.double()
    kept = p @ p.t() @ g @ q @ q.t()
    cosine = (kept * g).sum() / kept.norm() / g.norm()
    found = bias(left, right, gradient)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    expected = Bias((kept - g).norm() / g.norm(), cosine, (1 - cosine**2).sqrt())
    for name in ("relative", "cosine", "scaled"):
        assert getattr(found, name).dtype == torch.float32
        assert float(getattr(found, name)) == pytest.approx(float(getattr(expected, name)), rel=tolerance)


def test_bias_at_its_ends() -> None:
    everything = [Projector(torch.ones(rows, 1), rows) for rows in (20, 30)]
    nothing = [Projector(torch.zeros(rows, 1), rows) for rows in (20, 30)]
    gradient = gradient_like(20, 30)
    for projectors, against, expected in [
        (everything, gradient, (0.0, 1.0, 0.0)),
        (nothing, gradient, (1.0, 0.0, 1.0)),
        (everything, torch.zeros(20, 30), (0.0, 1.0, 0.0)),
    ]:
        found = bias(*projectors, against)
        assert [float(found.relative), float(found.cosine), float(found.scaled)] == pytest.approx(expected, abs=2e-3)


@both_layouts
@pytest.mark.parametrize(("m", "n", "nnz"), [(38, 19, 4), (19, 38, 1), (40, 48, 2)])
def test_gradients_of_a_fit_equal_autograds(draw: Draw, m: int, n: int, nnz: int) -> None:
    left, right = (p.to(dtype=torch.float64) for p in pair(draw, m, n, nnz))
    gradient = gradient_like(m, n).double()
    relative, found = error_and_gradients(left, right, gradient)
    leaves = [p.values.clone().requires_grad_() for p in (left, right)]
    error = dense_relative(
        Projector(leaves[0], left.dim, left.order), Projector(leaves[1], right.dim, right.order), gradient
    )
    error.backward()
    torch.testing.assert_close(relative, error.detach(), rtol=1e-10, atol=0)
    for mine, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-8, atol=1e-12)


@both_layouts
@pytest.mark.parametrize("shape", [(256, 96), (96, 256)])
def test_a_fit_misses_less_than_the_best_scaled_random_one(draw: Draw, shape: tuple[int, int]) -> None:
    left, right = (p.to(dtype=torch.bfloat16) for p in pair(draw, *shape, 8))
    gradient = gradient_like(*shape)
    before = bias(left, right, gradient)
    fitted = fit(left, right, gradient)
    again = fit(left, right, gradient)
    after = dense_relative(*fitted, gradient)
    assert after < 1
    assert after < 0.8 * before.scaled <= 0.8 * before.relative
    for start, end, repeated in zip((left, right), fitted, again, strict=True):
        assert end.values.dtype == torch.bfloat16
        assert end.order is start.order
        assert torch.equal(end.values, repeated.values)
        assert not torch.equal(end.values, start.values)


def test_a_fit_stops_when_it_is_told() -> None:
    left, right = pair(draw_sparse, 64, 48, 4)
    gradient = gradient_like(64, 48)
    seen: list[float] = []

    def reached(relative: Tensor) -> bool:
        seen.append(float(relative))
        return len(seen) == 4

    stopped = fit(left, right, gradient, reached=reached)
    assert len(seen) == 4
    assert seen[0] == pytest.approx(float(dense_relative(left, right, gradient)), rel=1e-5)
    assert seen[3] == pytest.approx(float(dense_relative(*stopped, gradient)), rel=1e-4)
    assert seen == sorted(seen, reverse=True)
    seen.clear()
    fit(left, right, gradient, steps=2 * CHECK_EVERY, reached=lambda relative: bool(seen.append(0.0)))
    assert len(seen) == 2
    unmoved = fit(left, right, gradient, reached=lambda relative: True)
    assert torch.equal(unmoved[0].values, left.values)


def test_weight_decay_keeps_values_small() -> None:
    left, right = pair(draw_sparse, 64, 48, 4)
    free, held = (fit(left, right, gradient_like(64, 48), weight_decay=decay)[0].values for decay in (0.0, 1.0))
    assert held.norm() < 0.9 * free.norm()


@both_layouts
def test_a_fit_to_nothing_stays_finite(draw: Draw) -> None:
    for fitted in fit(*pair(draw, 38, 19, 2), torch.zeros(38, 19)):
        assert fitted.values.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nnz", [1, 2, 8])
def test_principal_directions_are_orthonormal_and_reproducible(shape: tuple[int, int], nnz: int) -> None:
    gradient = gradient_like(*shape)
    for dim in (nnz, min(shape) // nnz * nnz):
        first, again = pca(gradient, dim, nnz), pca(gradient, dim, nnz)
        for p, same in zip(first, again, strict=True):
            torch.testing.assert_close(dense(p).t() @ dense(p), torch.eye(dim).double(), rtol=0, atol=1e-5)
            assert torch.equal(p.values, same.values)


def test_the_largest_entry_of_a_principal_direction_is_positive() -> None:
    for p in pca(gradient_like(40, 24), 16, 4):
        groups = p.values.view(4, -1, 4)
        assert torch.equal(groups.amax(1), groups.abs().amax(1))


@pytest.mark.parametrize("gradient", [torch.zeros(38, 19), torch.ones(38, 19), torch.full((38, 19), math.nan)])
def test_groups_without_rank_are_filled(gradient: Tensor) -> None:
    for p in pca(gradient, 12, 4):
        torch.testing.assert_close(dense(p).t() @ dense(p), torch.eye(12).double(), rtol=0, atol=1e-5)


def test_principal_directions_miss_less_with_more_of_them_and_less_than_random_ones() -> None:
    gradient = gradient_like(240, 192)
    by_nnz = [float(bias(*pca(gradient, 48, nnz), gradient).relative) for nnz in (1, 2, 4, 8, 16)]
    by_dim = [float(bias(*pca(gradient, dim, 8), gradient).relative) for dim in (16, 32, 48, 96)]
    assert by_nnz == sorted(by_nnz, reverse=True)
    assert by_dim == sorted(by_dim, reverse=True)
    assert by_nnz[3] < float(bias(*pair(draw_block, 240, 192, 8, dim=48), gradient).scaled)


@pytest.mark.parametrize(("m", "n"), [(160, 448), (38, 19)])
def test_principal_directions_keep_what_has_their_rank_in_each_block(m: int, n: int) -> None:
    left, right = pair(draw_block, m, n, 4)
    core = torch.randn(left.dim, left.dim, generator=seeded(3)).double()
    gradient = (dense(left) @ core @ dense(right).t()).float()
    assert float(dense_relative(*pca(gradient, left.dim, 4), gradient)) < 1e-5


@both_layouts
def test_fake_tensors_go_all_the_way(draw: Draw) -> None:
    with FakeTensorMode():
        left, right = pair(draw, 38, 19, 2)
        gradient = torch.empty(38, 19, dtype=torch.bfloat16)
        assert bias(left, right, gradient).relative.shape == ()
        fitted = fit(left, right, gradient, steps=11, reached=lambda relative: relative.dim() > 0)
        assert columns_of(fitted[0]).shape == (38, 2)
        assert pca(gradient, 8, 2)[1].values.shape == (19, 2)


def test_a_fit_is_the_same_under_any_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused AdamW reads its counts of steps as fp32."""
    counts: list[Tensor] = []

    def spy(*lists: list[Tensor], **rest: Any) -> None:
        counts.extend(lists[4])
        adam_(*lists, **rest)

    sides, gradient = pair(draw_sparse, 38, 19, 2), gradient_like(38, 19)
    expected = fit(*sides, gradient, steps=3)
    monkeypatch.setattr(fitting, "adam_", spy)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = fit(*sides, gradient, steps=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {count.dtype for count in counts} == {torch.float32}
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.values, other.values)
