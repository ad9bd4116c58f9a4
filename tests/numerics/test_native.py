"""The compiled kernels compute what torch's operations compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_offload.numerics.adam import adam_
from lightning_offload.numerics.native import Kernels
from lightning_offload.numerics.noise import Distribution, Draw
from lightning_offload.numerics.norms import gradient_norm
from lightning_offload.numerics.row_adam import History, catch_up_, deferred_, lazy_, missed_steps
from lightning_offload.numerics.zeroth import Copy, Rounding, Update, advance_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 8, 15, 16, 17, 511, 512, 513, 5003, 70_001]
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of so many threads, whatever the size."""
    monkeypatch.setattr("lightning_offload.numerics.native.kernels.THREAD_NUMEL", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def moments(sizes: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights and moments as after some steps; zeros, denormals and large values among them."""
    weights, firsts = [torch.randn(n) for n in sizes], [0.1 * torch.randn(n) for n in sizes]
    for m in firsts:
        m[:1] = 0.0
    seconds = [m.square() * torch.rand(len(m)) for m in firsts]
    return weights, firsts, seconds


def gradients(sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    grads = [(torch.randn(n) * torch.logspace(-6, 2, n)).to(dtype) for n in sizes]
    for g in grads:
        g[:1] = -0.0
    return grads


def clones(*kinds: list[Tensor]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in kind] for kind in kinds]


def assert_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("beta1", [0.9, 0.3, 0.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adam_has_the_bits_of_torch(
    kernels: Kernels, threads: int, dtype: torch.dtype, decoupled: bool, weight_decay: float, beta1: float
) -> None:
    hyper = {**HYPER, "beta1": beta1, "weight_decay": weight_decay, "decoupled": decoupled}
    ours = moments(SIZES)
    theirs = clones(*ours)
    steps, counts = ([torch.tensor(float(at)) for at in range(len(SIZES))] for _ in range(2))
    for _ in range(3):
        grads = gradients(SIZES, dtype)
        wires = [g.clone() for g in grads]
        kernels.adam_(ours[0], wires, ours[1], ours[2], steps, wires, **hyper)
        adam_(theirs[0], [g.float() for g in grads], theirs[1], theirs[2], counts, **hyper)
        for mine, yours in zip((*ours, steps), (*theirs, counts), strict=True):
            assert_bits(mine, yours)
        assert_bits(wires, [w.to(dtype) for w in theirs[0]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_clipped_as_torch_clips_and_left_as_they_are(kernels: Kernels, dtype: torch.dtype) -> None:
    ours = moments(SIZES)
    theirs, grads = clones(*ours), gradients(SIZES, dtype)
    kept, coefficient = [g.clone() for g in grads], 0.123456789
    hyper: dict[str, Any] = {**HYPER, "weight_decay": 0.1, "decoupled": True}
    steps, counts = ([torch.tensor(4.0) for _ in SIZES] for _ in range(2))
    kernels.adam_(ours[0], grads, ours[1], ours[2], steps, [], **hyper, coefficient=coefficient)
    assert_bits(grads, kept)
    kept = [g.mul_(coefficient) for g in kept]
    adam_(theirs[0], [g.float() for g in kept], theirs[1], theirs[2], counts, **hyper)
    assert_bits(ours[0], theirs[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_weights_the_delta_is_shown(kernels: Kernels, dtype: torch.dtype) -> None:
    _, *ours = moments(SIZES)
    theirs, grads = clones(*ours), gradients(SIZES, dtype)
    zeros, hyper = [torch.zeros(n) for n in SIZES], {**HYPER, "weight_decay": 0.0, "decoupled": True}
    steps, counts = ([torch.tensor(4.0) for _ in SIZES] for _ in range(2))
    adam_(zeros, [g.float() for g in grads], *theirs, counts, **hyper)
    kernels.adam_([], grads, *ours, steps, grads, **hyper)
    assert_bits(grads, [z.to(dtype) for z in zeros])
    assert_bits(ours[0], theirs[0])
    assert_bits(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_of_16_bits_is_read_and_every_distance_is_rounded(kernels: Kernels, dtype: torch.dtype) -> None:
    """Through perturbed copies: ``1 w + 0 z``."""
    whole = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(2**16)
    kernels.advance_(whole, [], Draw(0, 1, 0), [Copy(0.0, wide)], "rademacher", "nearest")
    finite = whole.isfinite()
    assert torch.equal(wide[finite], whole.float()[finite])
    assert torch.equal(wide.isnan(), whole.isnan())

    bits = torch.arange(0, 2**32, 65_521, dtype=torch.int64)
    near_ties = torch.arange(2**16)[:, None] * 2**16 + torch.tensor(
        [0, 1, 2**12, 2**12 + 1, 2**15 - 1, 2**15, 2**15 + 1]
    )
    for some in (bits, near_ties.flatten()):
        values = (some - 2**32 * (some >= 2**31)).to(torch.int32).view(torch.float32).contiguous()
        out = torch.empty(len(values), dtype=dtype)
        kernels.advance_(values, [], Draw(0, 1, 0), [Copy(0.0, out)], "rademacher", "nearest")
        expected, held = values.to(dtype), ~values.isnan()
        assert torch.equal(out[held], expected[held])
        assert torch.equal(out.isnan(), expected.isnan())


# Rows.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_rows_are_added_up(kernels: Kernels, threads: int, dtype: torch.dtype) -> None:
    rows = torch.randperm(300)[:77]
    total, touched = torch.randn(300, 24), torch.zeros(300, dtype=torch.bool)
    expected, gradient = total.clone(), torch.randn(77, 24).to(dtype)
    gradient[5], gradient[6, 1:], gradient[7] = 0.0, 0.0, -0.0
    kernels.add_rows_(total, touched, rows, gradient)
    expected[rows] += gradient
    assert torch.equal(total, expected)
    assert touched.nonzero().flatten().tolist() == sorted(r for i, r in enumerate(rows.tolist()) if i not in (5, 7))


def test_a_long_row_is_added_whole(kernels: Kernels) -> None:
    total, touched = torch.ones(2, 5000), torch.zeros(2, dtype=torch.bool)
    gradient = torch.zeros(1, 5000)
    gradient[0, 4999] = math.nan
    kernels.add_rows_(total, touched, torch.tensor([1]), gradient)
    assert touched.tolist() == [False, True]
    assert bool(total[1, 4999].isnan())
    assert int((total != 1).sum()) == 1


@pytest.mark.parametrize("shown_dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 1032])
def test_all_rows_step_as_a_table(kernels: Kernels, threads: int, width: int, shown_dtype: torch.dtype | None) -> None:
    p, m, v = (t.view(50, width) for (t,) in moments([50 * width]))
    theirs = [[t.clone().flatten()] for t in (p, m, v)]
    touched = torch.rand(50) < 0.3
    total = torch.randn(50, width) * touched[:, None]
    grads = [(total * 0.7).flatten()]
    shown = None if shown_dtype is None else torch.empty(50, width, dtype=shown_dtype)
    hyper: dict[str, Any] = {**HYPER, "weight_decay": 0.1, "decoupled": True}
    adam_(theirs[0], grads, theirs[1], theirs[2], [torch.tensor(6.0)], **hyper)
    kernels.step_rows_(p, m, v, total=total, touched=touched, shown=shown, way="adam", step=7, coefficient=0.7, **hyper)
    for mine, yours in zip((p, m, v), theirs, strict=True):
        assert torch.equal(mine.flatten(), yours[0])
    assert not total.any()
    assert not touched.any()
    if shown is not None:
        assert torch.equal(shown, p.to(shown.dtype))


def rows_state(count: int, width: int) -> list[Tensor]:
    p, m, v = (t.view(count, width) for (t,) in moments([count * width]))
    return [p, m, v]


def assert_near(ours: Tensor, theirs: Tensor, start: Tensor, steps: int) -> None:
    """Of each element: a step moves it by other ulps of the movement and may then round it to a neighbour."""
    ulp = torch.finfo(torch.float32).eps
    largest = torch.maximum(theirs.abs(), start.abs()) + 1e-2 * steps
    assert bool(((ours - theirs).abs() <= steps * ulp * largest).all())
    assert (ours - theirs).norm() <= 1e-6 * (theirs - start).norm()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_deferred_rows(kernels: Kernels, threads: int, weight_decay: float) -> None:
    """Relative to the movement: square roots of torch's large tensors are an ulp off in a fifth of the elements."""
    ours, lr = rows_state(60, 24), 1e-2
    start, theirs = ours[0].clone(), [t.clone() for t in ours]
    lasts, history = [torch.zeros(60, dtype=torch.int64) for _ in range(2)], History((0.9, 0.999))
    for _ in range(40):
        rows = (torch.rand(60) < 0.2).nonzero().flatten()
        total = torch.zeros(60, 24).index_copy_(0, rows, torch.randn(len(rows), 24))
        touched = torch.zeros(60, dtype=torch.bool).index_fill_(0, rows, True)
        state = {"history": history, "lr": lr, "eps": 1e-8, "weight_decay": weight_decay}
        grads = total[rows]
        deferred_(*theirs, rows, grads, last=lasts[0], **state)
        missed = missed_steps(lasts[1][rows], history, 1e-8, torch.float32)
        hyper = {**HYPER, "lr": lr, "weight_decay": weight_decay, "step": history.step + 1}
        kernels.step_rows_(*ours, total=total, touched=touched, rows=rows, missed=missed, way="adam", **hyper)
        lasts[1][rows] = history.step + 1
        history.advance(lr=lr, weight_decay=weight_decay)
        assert not total.any()
    assert torch.equal(*lasts)
    assert_near(ours[0], theirs[0], start, 40)
    kernels.step_rows_(
        *ours, rows=torch.arange(60), missed=missed_steps(lasts[1], history, 1e-8, torch.float32), way="none"
    )
    catch_up_(*theirs, torch.arange(60), last=lasts[0], history=history, eps=1e-8)
    assert_near(ours[0], theirs[0], start, 41)
    for mine, yours in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(mine, yours)


def test_lazy_rows(kernels: Kernels, threads: int) -> None:
    ours = rows_state(60, 24)
    start, theirs = ours[0].clone(), [t.clone() for t in ours]
    for step in range(1, 20):
        rows = (torch.rand(60) < 0.3).nonzero().flatten()
        total = torch.zeros(60, 24).index_copy_(0, rows, torch.randn(len(rows), 24))
        touched = torch.zeros(60, dtype=torch.bool).index_fill_(0, rows, True)
        lazy_(*theirs, rows, total[rows], step=step, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
        kernels.step_rows_(
            *ours, total=total, touched=touched, rows=rows, way="lazy", step=step, **{**HYPER, "lr": 1e-2}
        )
    assert_near(ours[0], theirs[0], start, 19)
    for mine, yours in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(mine, yours)


# Noise.

UPDATES = [Update(Draw(3, step, 5, step % 3), 0.3 * step, 1e-2, 0.1 * (step % 2)) for step in range(1, 4)]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", ["popcount", "rademacher"])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_updates_and_copies_have_the_bits_of_torch(
    kernels: Kernels,
    threads: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    distribution: Distribution,
    rounding: Rounding,
) -> None:
    for numel in (1, 513, 4099, 140_000):
        weight = torch.randn(numel).to(dtype)
        pairs = [[weight, torch.empty(numel, dtype=out_dtype), torch.empty(numel, dtype=out_dtype)]]
        pairs.append([tensor.clone() for tensor in pairs[0]])
        for (w, plus, minus), chosen in zip(pairs, (None, kernels), strict=True):
            copies = [Copy(1e-2, plus), Copy(-1e-2, minus)]
            advance_(w, UPDATES, Draw(3, 9, 5), copies, distribution, rounding, kernels=chosen)
        assert_bits(*pairs)


def test_gaussian_noise(kernels: Kernels) -> None:
    """Both are fp32; measured, 4.8e-7 where z is of size 1."""
    both = [torch.empty(200_000) for _ in range(2)]
    for out, chosen in zip(both, (None, kernels), strict=True):
        advance_(torch.zeros(200_000), [], Draw(3, 9, 5), [Copy(1.0, out)], "gaussian", "nearest", kernels=chosen)
    assert (both[0] - both[1]).abs().max() < 1e-6
    assert abs(float(both[1].var()) - 1) < 0.02


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stochastic_rounding_is_unbiased(kernels: Kernels, dtype: torch.dtype) -> None:
    """An update of a quarter of an ulp, many times: its mean within 5 standard errors."""
    numel = 1 << 20
    weight = torch.ones(numel, dtype=dtype)
    ulp = torch.finfo(dtype).eps
    update = Update(Draw(1, 1, 0), 0.25 * ulp, 1.0, 0.0)
    kernels.advance_(weight, [update], None, [], "rademacher", "stochastic")
    moved = (weight.double() - 1) / ulp
    z = torch.empty(numel)
    kernels.advance_(torch.zeros(numel), [], Draw(1, 1, 0), [Copy(1.0, z)], "rademacher", "nearest")
    assert abs(float((moved * -z.double()).mean()) - 0.25) < 5 * 0.5 / math.sqrt(numel)


def test_norms(kernels: Kernels, threads: int) -> None:
    for dtype in DTYPES:
        for numel in (0, 1, 15, 1025, 3_000_001):
            x = (torch.randn(numel) * 3).to(dtype)
            expected = float(x.double().norm())
            assert kernels.norm(x) == pytest.approx(expected, rel=1e-12)
            assert kernels.norm(x) == pytest.approx(float(gradient_norm(x)), rel=1e-4)  # torch sums in fp32
            for bad in (math.inf, -math.inf, math.nan):
                if numel:
                    x[-1] = bad
                    assert not math.isfinite(kernels.norm(x))


# What is refused, before anything is changed.


def test_a_call_that_is_refused_changes_nothing(kernels: Kernels) -> None:
    weights, firsts, seconds = moments([16, 8])
    before = clones(weights, firsts, seconds)
    steps = [torch.tensor(3.0) for _ in range(2)]
    hyper: dict[str, Any] = {**HYPER, "weight_decay": 0.1, "decoupled": True}
    for grads in (gradients([16, 7], torch.bfloat16), [torch.zeros(16), torch.zeros(8).half()]):
        with pytest.raises(AssertionError, match=r"7 elements beside 8|several dtypes"):
            kernels.adam_(weights, grads, firsts, seconds, steps, [], **hyper)
    assert [float(step) for step in steps] == [3.0, 3.0]
    for now, then in zip((weights, firsts, seconds), before, strict=True):
        assert_bits(now, then)


@pytest.mark.parametrize("row", [-1, 60])
def test_rows_that_a_table_does_not_have(kernels: Kernels, row: int) -> None:
    p, m, v = rows_state(60, 8)
    rows, touched = torch.tensor([3, row]), torch.zeros(60, dtype=torch.bool)
    with pytest.raises(IndexError, match=f"row {row} of a table of 60"):
        kernels.add_rows_(torch.zeros(60, 8), touched, rows, torch.ones(2, 8))
    with pytest.raises(IndexError, match=f"row {row} of a table of 60"):
        kernels.step_rows_(p, m, v, total=torch.ones(60, 8), touched=touched, rows=rows, way="adam", **HYPER)
