"""Sparse projectors against dense matrices in fp64, and what the method needs of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_offload.methods.meter import Meter
from lightning_offload.numerics import projector as module
from lightning_offload.numerics.adam import adam_
from lightning_offload.numerics.projector import (
    Projector,
    apply_,
    columns_of,
    compress,
    compress_activations,
    decompress,
    draw_block,
    draw_sparse,
    lift,
    matching_scale,
    project,
    transfer,
    transition,
)
from tests.numerics.projectors import DRAWS, SHAPES, Draw, dense, pair, seeded

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2}
both_layouts = pytest.mark.parametrize("draw", DRAWS)


def close(found: Tensor, expected: Tensor, relative: float | None = None) -> None:
    """In norm, within what the dtype of ``found`` can hold."""
    assert found.shape == expected.shape
    assert found.is_contiguous()
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (relative or TOLERANCE[found.dtype]), error


@both_layouts
@pytest.mark.parametrize("nnz", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_the_dense_ones(draw: Draw, nnz: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    left, right = (p.to(dtype=dtype) for p in pair(draw, m, n, nnz))
    p, q, d = dense(left), dense(right), left.dim
    gradient = torch.randn(m, n, generator=seeded(1)).to(dtype)
    delta = torch.randn(d, d, generator=seeded(2)).to(dtype)
    outputs, inputs = torch.randn(7, m, generator=seeded(3)).to(dtype), torch.randn(7, n, generator=seeded(4)).to(dtype)
    close(project(left, gradient), p.t() @ gradient.double())
    close(lift(left, delta), p @ delta.double())
    close(compress(left, right, gradient), p.t() @ gradient.double() @ q)
    close(compress(left, right, gradient.t().contiguous().t()), p.t() @ gradient.double() @ q)
    close(decompress(left, right, delta), p @ delta.double() @ q.t())
    close(compress_activations(left, right, outputs, inputs), (outputs.double() @ p).t() @ (inputs.double() @ q))


@both_layouts
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decompressing_is_the_adjoint_of_compressing(draw: Draw, data: st.DataObject) -> None:
    nnz = data.draw(st.integers(1, 5))
    dim = nnz * data.draw(st.integers(1, 6))
    m, n = (data.draw(st.integers(dim, 70)) for _ in range(2))
    left, right = (p.to(dtype=torch.float64) for p in pair(draw, m, n, nnz, dim=dim))
    gradient = torch.randn(m, n, dtype=torch.float64, generator=seeded(1))
    delta = torch.randn(dim, dim, dtype=torch.float64, generator=seeded(2))
    one, other = (compress(left, right, gradient) * delta).sum(), (gradient * decompress(left, right, delta)).sum()
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(nnz=st.integers(1, 9), band=st.integers(1, 20), spare=st.integers(0, 50), seed=st.integers(0, 99))
def test_positions_are_distinct_in_rows_and_balanced_over_columns(nnz: int, band: int, spare: int, seed: int) -> None:
    dim = nnz * band
    drawn = draw_sparse(dim + spare, dim, nnz, generator=seeded(seed))
    columns = columns_of(drawn)
    assert (columns.sort(1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(columns.flatten(), minlength=dim)
    assert counts.max() - counts.min() <= 1
    torch.testing.assert_close(drawn.values.abs(), torch.full_like(drawn.values, 1 / math.sqrt(nnz)))


@both_layouts
def test_a_seed_decides_every_bit(draw: Draw) -> None:
    first, again, other = (draw(100, 24, 4, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.values, again.values)
    assert torch.equal(columns_of(first), columns_of(again))
    assert not torch.equal(first.values, other.values)
    assert (draw is draw_block) == torch.equal(columns_of(first), columns_of(other))


@pytest.mark.parametrize("values", ["signs", "gaussian"])
def test_random_projectors_are_unbiased(values: Any) -> None:
    generator, draws, mean = seeded(), 4000, torch.zeros(12, 12, dtype=torch.float64)
    for _ in range(draws):
        p = dense(draw_sparse(12, 8, 2, generator=generator, values=values))
        mean += p @ p.t() / draws
    deviation = mean - torch.eye(12)
    # variances of one entry off the diagonal (at most 1/4: two of the columns meet) and on it (gaussian: 2 r / r^2)
    assert deviation.abs().max() < 5 * math.sqrt((1 if values == "gaussian" else 0.25) / draws)


@pytest.mark.parametrize(("m", "n", "dim"), [(256, 256, 128), (448, 160, 64), (200, 300, 96)])
def test_random_signs_miss_what_the_formula_says(m: int, n: int, dim: int) -> None:
    errors = []
    for seed in range(6):
        p, q = map(dense, pair(draw_sparse, m, n, 8, dim=dim, seed=seed))
        gradient = torch.randn(m, n, dtype=torch.float64, generator=seeded(seed + 50))
        errors.append(float((p @ p.t() @ gradient @ q @ q.t() - gradient).norm() / gradient.norm()))
    assert sum(errors) / len(errors) == pytest.approx(math.sqrt((1 + m / dim) * (1 + n / dim) - 1), rel=0.05)


@pytest.mark.parametrize(("rows", "dim", "nnz"), [(19, 16, 8), (160, 80, 2), (448, 8, 8), (38, 38, 1)])
def test_blocks_are_orthonormal(rows: int, dim: int, nnz: int) -> None:
    p = dense(draw_block(rows, dim, nnz, generator=seeded()))
    torch.testing.assert_close(p.t() @ p, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-6)


def test_signs_of_blocks_are_those_of_what_was_drawn() -> None:
    first = draw_block(96, 24, 4, generator=seeded()).values[:, 0]
    drawn = torch.randn(96, 4, generator=seeded())[:, 0]
    assert ((first * drawn).view(6, 16).sum(1) > 0).all()


def test_bytes_are_four_per_nonzero_and_two_in_blocks() -> None:
    sparse, block = (draw(300, 64, 8, generator=seeded(), dtype=torch.bfloat16) for draw in DRAWS)
    assert sparse.nbytes == 4 * 300 * 8
    assert block.nbytes == 2 * 300 * 8
    assert draw_sparse(33_000, 8, 1, generator=seeded()).nbytes == 8 * 33_000  # rows beyond int16
    assert sparse.to(dtype=torch.float32).nbytes == 6 * 300 * 8


def test_what_cannot_be_drawn_is_refused() -> None:
    for rows, dim, nnz in [(10, 12, 2), (10, 7, 2), (10, 4, 8)]:
        for draw in DRAWS:
            with pytest.raises(AssertionError, match="dim="):
                draw(rows, dim, nnz, generator=seeded())


@both_layouts
@pytest.mark.parametrize("nnz", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_applying_equals_the_dense_update(draw: Draw, nnz: int, shape: tuple[int, int]) -> None:
    left, right = pair(draw, *shape, nnz)
    before = torch.randn(shape, generator=seeded(1)).to(torch.bfloat16)
    delta, scale = torch.randn(left.dim, left.dim, generator=seeded(2)).to(torch.bfloat16), torch.tensor(0.37)
    expected = 0.9 * before.double() + float(scale) * (dense(left) @ delta.double() @ dense(right).t())
    fp32 = before.float()
    apply_(fp32, left, right, delta, decay=0.9, scale=scale)
    close(fp32, expected)
    nearest, stochastic = before.clone(), before.clone()
    apply_(nearest, left, right, delta, decay=0.9, scale=scale)
    apply_(stochastic, left, right, delta, decay=0.9, scale=scale, generator=seeded())
    assert (nearest != fp32.to(torch.bfloat16)).float().mean() < 1e-3  # on either side of a tie
    ulp = torch.finfo(torch.bfloat16).eps * (expected.abs() + before.abs())  # both, where the sign changes
    assert ((stochastic - expected).abs() <= ulp + 1e-6).all()
    assert not torch.equal(stochastic, nearest)


@both_layouts
def test_the_mean_of_many_applications_is_the_update(draw: Draw) -> None:
    left, right = pair(draw, 24, 40, 2)
    size = 1.3 + 0.4 * torch.rand(24, 40, generator=seeded(1))
    before = (size * (torch.randint(0, 2, size.shape, generator=seeded(3)) * 2 - 1)).to(torch.bfloat16)
    delta = 0.01 * torch.randn(left.dim, left.dim, generator=seeded(2))
    expected = before.double() + dense(left) @ delta.double() @ dense(right).t()
    assert (expected - before).abs().max() > 2 * torch.finfo(torch.bfloat16).eps  # several ulps
    generator, draws, total = seeded(), 2000, torch.zeros(24, 40, dtype=torch.float64)
    for _ in range(draws):
        weight = before.clone()
        apply_(weight, left, right, delta, decay=1.0, generator=generator)
        total += weight
    share = (expected / 2**-7).remainder(1)
    sigma = 2**-7 * (share * (1 - share) / draws).sqrt()
    assert ((total / draws - expected).abs() <= 5 * sigma + 1e-6).all()


@both_layouts
def test_a_delta_of_zeros_changes_nothing(draw: Draw) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    before = every[every.isfinite()].view(255, 256)
    left, right = pair(draw, 255, 256, 8)
    for seed in range(5):
        weight = before.clone()
        apply_(weight, left, right, torch.zeros(left.dim, left.dim), decay=1.0, generator=seeded(seed))
        assert torch.equal(weight, before)


KINDS = [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, 5)]


@both_layouts
@pytest.mark.parametrize(("dtype", "seed"), KINDS)
def test_what_is_skipped_keeps_its_bits_and_what_is_not_has_the_same(
    draw: Draw, dtype: torch.dtype, seed: int | None
) -> None:
    left, right = pair(draw, 38, 19, 2)
    before = torch.randn(38, 19, generator=seeded(1)).to(dtype)
    delta = torch.randn(left.dim, left.dim, generator=seeded(2))

    def applied(delta: Tensor, **skip: Any) -> Tensor:
        weight = before.clone()
        generator = None if seed is None else seeded(seed)
        apply_(weight, left, right, delta, decay=0.9, scale=torch.tensor(2.0), generator=generator, **skip)
        return weight

    assert torch.equal(applied(torch.full_like(delta, math.nan), skip=torch.tensor(True)), before)
    assert torch.equal(applied(delta, skip=torch.tensor(False)), applied(delta))
    assert not torch.equal(applied(delta), before)
    assert applied(torch.full_like(delta, math.nan)).isnan().all()


@pytest.mark.parametrize("skip", [None, torch.tensor(False)])
def test_applying_to_bf16_moves_18_bytes_per_element_beside_its_factors(skip: Tensor | None) -> None:
    left, right = (p.to(dtype=torch.bfloat16) for p in pair(draw_block, 512, 768, 8, dim=256))
    weight, delta, spent = torch.zeros(512, 768, dtype=torch.bfloat16), torch.ones(256, 256, dtype=torch.bfloat16), []
    with Meter(lambda work: spent.append(work.bytes)):
        apply_(weight, left, right, delta, decay=0.9, skip=skip, generator=seeded())
    inner = (2 + 4 + 4) * delta.numel() + 2 * 4 * 768 * 256  # D cast and read, D Q^T written and read
    factors = (2 + 4 + 4) * 8 * (512 + 768)
    per_element = 18 if skip is None else 20
    assert sum(spent) == per_element * weight.numel() + inner + factors + (0 if skip is None else 1)


@both_layouts
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("columns", [1, 32, 100])
def test_pieces_change_nothing(
    draw: Draw, shape: tuple[int, int], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = pair(draw, *shape, 2)
    whole = torch.randn(shape, generator=seeded(1))
    delta = torch.randn(left.dim, left.dim, generator=seeded(2))
    pieces, wide = whole.clone(), torch.zeros(shape[0], shape[1] + 9)
    wide[:, 4:-5] = whole
    apply_(whole, left, right, delta, decay=0.9)
    monkeypatch.setattr(module, "CHUNK_NUMEL", columns * shape[0])
    apply_(pieces, left, right, delta, decay=0.9)
    apply_(wide[:, 4:-5], left, right, delta, decay=0.9)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(wide[:, 4:-5], pieces)
    assert wide[:, :4].count_nonzero() == wide[:, -5:].count_nonzero() == 0


@both_layouts
def test_memory_to_apply_is_that_of_a_piece(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = pair(draw, 512, 512, 8, dim=256)
    weight, delta = torch.zeros(512, 512, dtype=torch.bfloat16), torch.ones(256, 256, dtype=torch.bfloat16)
    piece = 1 << 14
    monkeypatch.setattr(module, "CHUNK_NUMEL", piece)
    with Meter() as meter:
        apply_(weight, left, right, delta, decay=0.9, generator=seeded())
    indices = 0 if left.order is None else 4 * 8 * left.values.numel()
    assert 4 * 256**2 < meter.peak.bytes <= 4 * 256**2 + indices + 16 * piece < 4 * weight.numel()


@both_layouts
@pytest.mark.parametrize(("dtype", "seed"), KINDS)
def test_autocast_changes_no_bit(draw: Draw, dtype: torch.dtype, seed: int | None) -> None:
    left, right = pair(draw, 160, 448, 8)
    before = torch.randn(160, 448, generator=seeded(1))
    inside, outside = before.to(dtype), before.to(dtype)
    generators = [None if seed is None else seeded(seed) for _ in range(2)]
    apply_(outside, left, right, compress(left, right, before), decay=0.9, generator=generators[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = compress(left, right, before)
        assert found.dtype == torch.float32
        assert compress_activations(left, right, before.t(), torch.ones(448, 448)).dtype == torch.float32
        apply_(inside, left, right, found, decay=0.9, generator=generators[1])
    assert torch.equal(inside, outside)


@both_layouts
def test_no_piece_is_larger_than_asked(draw: Draw) -> None:
    p = draw(1001, 24, 8, generator=seeded())  # groups of 333 and 334 rows
    for most in (1, 100, 400, 700, 5000):
        spans = [rows for rows, _ in module._chunks(p, most)]
        assert max(rows.stop - rows.start for rows in spans) <= most
        assert [i for rows in spans for i in range(rows.start, rows.stop)] == list(range(1001))


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 64), (38, 19)])
def test_permutations_give_adamws_bits(signs: bool, m: int, n: int) -> None:
    generator = seeded()

    def permutation(rows: int) -> Projector:
        values = torch.randint(0, 2, (rows, 1), generator=generator) * 2.0 - 1 if signs else torch.ones(rows, 1)
        return Projector(values, rows, torch.randperm(rows, generator=generator).to(torch.int16).unsqueeze(0))

    left, right = permutation(m), permutation(n)
    weight = torch.randn(m, n, generator=generator)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True)
    moments, step = [[torch.zeros(m, n)] for _ in range(2)], torch.zeros(())
    hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    for _ in range(50):
        theirs.grad = torch.randn(m, n, generator=generator)
        delta = torch.zeros(m, n)
        adam_([delta], [compress(left, right, theirs.grad)], *moments, [step], **hyper, decoupled=True)
        apply_(weight, left, right, delta, decay=1 - 1e-2 * 0.1)
        optimizer.step()
        if m * n % 512 == 0:
            assert torch.equal(weight, theirs)
        else:  # torch's kernel rounds the elements after the last whole vector differently
            torch.testing.assert_close(weight, theirs.data, rtol=1e-6, atol=1e-7)


@both_layouts
def test_projectors_are_drawn_on_the_cpu_whatever_the_default_device_is(draw: Draw) -> None:
    expected = draw(38, 8, 2, generator=seeded())
    with torch.device("meta"):
        found = draw(38, 8, 2, generator=seeded())
    assert torch.equal(found.values, expected.values)
    assert expected.order is None or torch.equal(found.order, expected.order)


@pytest.mark.parametrize("draw", [*DRAWS, lambda *sizes, **rest: draw_sparse(*sizes, **rest, values="gaussian")])
def test_the_scale_keeps_the_size_of_an_update(draw: Draw) -> None:
    left, right = pair(draw, 448, 160, 8)
    left, right = Projector(3 * left.values, left.dim, left.order), right
    delta = torch.randn(left.dim, left.dim, generator=seeded(2))
    update = matching_scale(left, right) * decompress(left, right, delta)
    assert float(update.square().mean().sqrt()) == pytest.approx(float(delta.square().mean().sqrt()), rel=0.05)


@pytest.mark.parametrize("new", DRAWS)
@pytest.mark.parametrize("old", DRAWS)
def test_transitions_equal_the_dense_ones(new: Draw, old: Draw) -> None:
    a, b = new(38, 8, 2, generator=seeded(1)), old(38, 12, 4, generator=seeded(2), dtype=torch.bfloat16)
    found = transition(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense(a).t() @ dense(b), rtol=1e-5, atol=1e-6)
    assert torch.equal(found, transition(a, b))


def moments(dim: int) -> tuple[Tensor, Tensor]:
    m = torch.randn(dim, dim, generator=seeded(7))
    return m, torch.randn(dim, dim, generator=seeded(8)).square()


@pytest.mark.parametrize("rule", ["transfer", "paper"])
def test_unchanged_orthonormal_projectors_keep_the_moments(rule: Any) -> None:
    left, right = pair(draw_block, 160, 448, 8)
    m, v = moments(left.dim)
    new_m, new_v = transfer(m, v, transition(left, left), transition(right, right), rule=rule)
    torch.testing.assert_close(new_m, m, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_v, v, rtol=1e-4, atol=1e-5)


@both_layouts
def test_moments_against_the_formulas(draw: Draw) -> None:
    (p, q), (p_new, q_new) = (pair(draw, 160, 448, 8, seed=seed) for seed in (1, 2))
    m, v = moments(p.dim)
    a, c = dense(p_new).t() @ dense(p), dense(q).t() @ dense(q_new)
    paper = a.square() @ v.double() @ c.square()
    weights = a.square().sum(1, keepdim=True) * c.square().sum(0, keepdim=True)
    steps = transition(p_new, p), transition(q, q_new)
    for rule, expected in (("paper", paper), ("transfer", paper / weights)):
        new_m, new_v = transfer(m, v, *steps, rule=rule)  # type: ignore[arg-type]
        torch.testing.assert_close(new_m.double(), a @ m.double() @ c, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new_v.double(), expected, rtol=1e-4, atol=1e-6)
        assert new_v.min() >= 0
    assert v.min() * 0.999 <= new_v.min() <= new_v.max() <= v.max() * 1.001  # transfer averages


@pytest.mark.parametrize("rule", ["transfer", "paper"])
@pytest.mark.parametrize(("m", "n"), [(40, 60), (38, 61)])
def test_between_blocks_moments_follow_block_by_block(rule: Any, m: int, n: int) -> None:
    """With equal and unequal groups, and directions that the old blocks miss; d^2 r products instead of d^3."""
    (p, q), (p_new, q_new) = (pair(draw_block, m, n, 4, seed=seed, dim=20) for seed in (1, 2))
    p_new.values[:8, 1] = 0
    q_new.values[:, 3] = 0
    mean, square = moments(20)
    left, right = transition(p_new, p), transition(q, q_new)
    with FlopCounterMode(display=False) as counter:
        new_mean, new_square = transfer(mean, square, left, right, rule=rule)
    assert counter.get_total_flops() == 4 * 2 * 20**2 * 4
    a, c = dense(p_new).t() @ dense(p), dense(q).t() @ dense(q_new)
    torch.testing.assert_close(torch.block_diag(*left).double(), a, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.block_diag(*right).double(), c, rtol=1e-4, atol=1e-6)
    rows, columns = a.square(), c.square()
    if rule == "transfer":
        rows = torch.where(rows.sum(1, keepdim=True) > 0, rows / rows.sum(1, keepdim=True), 1 / 20)
        columns = torch.where(columns.sum(0) > 0, columns / columns.sum(0), 1 / 20)
    torch.testing.assert_close(new_mean.double(), a @ mean.double() @ c, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_square.double(), rows @ square.double() @ columns, rtol=1e-4, atol=1e-6)


def test_a_direction_never_seen_gets_the_mean() -> None:
    m, v = moments(6)
    left, right = torch.eye(6), torch.eye(6)
    left[2] = 0
    right[:, 4] = 0
    new_m, new_v = transfer(m, v, left, right, rule="transfer")
    torch.testing.assert_close(new_v[2, 4], v.mean())
    torch.testing.assert_close(new_v[2, 0], v[:, 0].mean())
    assert torch.equal(new_v[0, :4], v[0, :4])
    assert new_m[2].count_nonzero() == new_m[:, 4].count_nonzero() == 0
    nothing = torch.zeros(6, 6)
    torch.testing.assert_close(transfer(m, v, nothing, nothing, rule="transfer")[1], v.mean().expand(6, 6))


@both_layouts
def test_fake_tensors_go_all_the_way(draw: Draw) -> None:
    with FakeTensorMode():
        left, right = pair(draw, 38, 19, 2)
        gradient, weight = (torch.empty(38, 19, dtype=torch.bfloat16) for _ in range(2))
        delta = compress(left, right, gradient)
        assert compress_activations(left, right, gradient.new_empty(5, 38), gradient.new_empty(5, 19)).shape == (8, 8)
        assert decompress(left, right, delta).shape == (38, 19)
        for generator in (None, seeded()):
            for skip in (None, delta[0, 0].isnan()):
                scale = matching_scale(left, right)
                apply_(weight, left, right, delta, decay=0.9, skip=skip, scale=scale, generator=generator)
        steps = transition(left, left), transition(right, right)
        assert transfer(delta.float(), delta.float(), *steps, rule="transfer")[1].shape == (8, 8)
