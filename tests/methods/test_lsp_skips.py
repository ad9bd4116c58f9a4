"""Non-finite gradients under lsp: a matrix by itself, or the whole step where something is decided by all norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.errors import NonFiniteError
from lightning_offload.methods.base import Clip, DTypes, Verdict
from lightning_offload.methods.verdict import Tally
from tests.helpers import Net, Run, adamw, assert_same, lanes_of, train
from tests.methods.test_lsp import IDENTITY, NARROW, square
from tests.projected import lsp, projected_names

BAD = "blocks.1.up.weight"
Make = Callable[[nn.Module], torch.optim.Optimizer]


def spoiling(steps: set[int], *, value: float = float("nan"), name: str = BAD, per_step: int = 1) -> Make:
    """One element of a gradient is ``value`` in these steps (from 1) as it arrives; gradients leave at once."""

    def make(module: nn.Module) -> torch.optim.Optimizer:
        seen = 0

        def spoil(grad: Tensor) -> Tensor:
            nonlocal seen
            seen += 1
            if (seen - 1) // per_step + 1 not in steps:
                return grad
            return grad.index_put((torch.tensor([3]), torch.tensor([2])), torch.tensor(value, dtype=grad.dtype))

        module.get_parameter(name).register_hook(spoil)
        return adamw(module)

    return make


def owned(run: Run) -> dict[str, dict[str, Any]]:
    assert run.engine is not None
    extras: dict[str, dict[str, Any]] = run.engine.extras()["state"]
    return extras


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("kind", ["inline", "checked", "shuffled"])
@pytest.mark.parametrize("dtypes", [DTypes(), NARROW], ids=["wide", "narrow"])
def test_without_clipping_the_matrix_is_skipped_alone(kind: str, accumulate: str, value: float, dtypes: DTypes) -> None:
    changes = {"accumulate": accumulate, "refit_every": float("inf"), "min_numel": 60, "projector": "block"}
    common = {"dtypes": dtypes, "micro_batches": 2}
    make = spoiling({3}, value=value, per_step=2)
    two = train(Net(), lanes_of(kind), steps=2, method=lsp(**changes), **common)
    clean = train(Net(), lanes_of(kind), steps=3, method=lsp(**changes), **common)
    ours = train(Net(), lanes_of(kind), steps=3, method=lsp(**changes), make_optimizer=make, **common)
    assert torch.equal(ours.weights[BAD], two.weights[BAD])  # no decay either
    before, after = owned(two)[BAD], owned(ours)[BAD]
    assert int(after["step"]) == 2
    assert all(torch.equal(after[key], before[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert not torch.equal(clean.weights[BAD], two.weights[BAD])
    for name, weight in clean.weights.items():
        assert name == BAD or torch.equal(ours.weights[name], weight), name
    assert ours.losses == clean.losses
    report = ours.reports[-1]
    assert (report.skipped, report.skipped_in_a_row, report.skipped_total) == (True, 1, 1)
    assert report.grad_norm != report.grad_norm or report.grad_norm == float("inf")


@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("kind", ["inline", "checked", "shuffled"])
@pytest.mark.parametrize("clip", [Clip(0.05), Clip(0.01, "value")], ids=["norm", "value"])
@pytest.mark.parametrize("bad", [BAD, "head.weight", "norm.bias"])
def test_with_clipping_the_whole_step_is_skipped(kind: str, accumulate: str, clip: Clip, bad: str) -> None:
    def make(module: nn.Module) -> torch.optim.Optimizer:
        seen: list[int] = []
        spoil = lambda grad: seen.append(1) or (grad * float("nan") if len(seen) == 3 else grad)  # noqa: E731
        module.get_parameter(bad).register_hook(spoil)
        return adamw(module)

    changes = {"accumulate": accumulate, "refit_every": float("inf"), "min_numel": 60, "projector": "block"}
    two = train(Net(), lanes_of(kind), steps=2, method=lsp(**changes), clip=clip)
    ours = train(Net(), lanes_of(kind), steps=3, method=lsp(**changes), clip=clip, make_optimizer=make)
    for name, weight in two.weights.items():
        assert torch.equal(ours.weights[name], weight), name
    for name, state in owned(two).items():
        assert all(torch.equal(owned(ours)[name][key], state[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert (ours.reports[-1].skipped, ours.reports[-1].skipped_total) == (True, 1)
    third = train(Net(), lanes_of(kind), steps=3, method=lsp(**changes), clip=clip)
    assert not any(torch.equal(third.weights[name], two.weights[name]) for name in projected_names(Net()))


@pytest.mark.parametrize("bad", ["head.weight", "norm.bias"])
def test_without_clipping_others_are_skipped_alone_or_with_the_small_ones(bad: str) -> None:
    """On the host by their own norm; small ones are decided on the device, all together."""

    def make(module: nn.Module) -> torch.optim.Optimizer:
        seen: list[int] = []
        spoil = lambda grad: seen.append(1) or (grad * float("nan") if len(seen) == 3 else grad)  # noqa: E731
        module.get_parameter(bad).register_hook(spoil)
        return adamw(module)

    two = train(Net(), lanes_of("inline"), steps=2, method=lsp(min_numel=60))
    clean = train(Net(), lanes_of("inline"), steps=3, method=lsp(min_numel=60))
    ours = train(Net(), lanes_of("inline"), steps=3, method=lsp(min_numel=60), make_optimizer=make)
    small = {name for name, p in Net().named_parameters() if p.numel() < 60}
    stays = {bad} if bad not in small else small
    assert len(small) > 5
    for name in clean.weights:
        assert torch.equal(ours.weights[name], (two if name in stays else clean).weights[name]), name
        assert not torch.equal(two.weights[name], clean.weights[name]), name
    assert ours.reports[-1].skipped_total == 1


def test_a_norm_is_reported_in_fp32_whatever_the_default_dtype_is() -> None:
    """It may change while a worker counts."""
    tally = Tally(lanes_of("inline"), 0, max_skips=0)
    verdict = Verdict(None, True, 1, names=["a", "b"], own_norms={"a": 1.0, "b": 2**-5})
    torch.set_default_dtype(torch.bfloat16)
    try:
        tally.count(verdict, [])
    finally:
        torch.set_default_dtype(torch.float32)
    assert tally.report.grad_norm == pytest.approx((1 + 2**-10) ** 0.5, rel=1e-6)


def test_skips_are_counted_in_a_row_and_in_total() -> None:
    run = train(Net(), lanes_of("inline"), steps=6, method=lsp(), make_optimizer=spoiling({2, 3, 5}))
    assert [report.skipped_in_a_row for report in run.reports[:6]] == [0, 1, 2, 0, 1, 0]
    assert run.reports[-1].skipped_total == 3
    assert all(weight.isfinite().all() for weight in run.weights.values())
    assert int(owned(run)[BAD]["step"]) == 3


@pytest.mark.parametrize("kind", ["inline", "shuffled"])
@pytest.mark.parametrize("clip", [None, Clip(0.05)])
def test_too_many_skips_are_an_error_that_names_the_matrix(kind: str, clip: Clip | None) -> None:
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .*`blocks\.1\.up\.weight`"):
        train(
            Net(),
            lanes_of(kind),
            steps=9,
            clip=clip,
            method=lsp(max_skips=2),
            make_optimizer=spoiling(set(range(3, 10))),
        )


def test_without_skipping_nan_spreads_as_with_torch() -> None:
    """In the identity setting; P = I, or a NaN times a zero would fill S."""
    method = lsp(**IDENTITY, projector="pca", refit_every=float("inf"), skip_nonfinite=False)
    plain = train(square(), None, steps=4, make_optimizer=spoiling({3}))
    ours = train(square(), lanes_of("inline"), steps=4, make_optimizer=spoiling({3}), method=method)
    assert int(plain.weights[BAD].isnan().sum()) > 0
    for name, weight in plain.weights.items():
        assert torch.equal(weight.nan_to_num(9e9), ours.weights[name].nan_to_num(9e9)), name


@pytest.mark.parametrize("projector", ["learned", "pca", "block"])
@pytest.mark.parametrize("step", [1, 4])
def test_projectors_stay_finite_when_they_are_fitted_to_what_is_not(projector: str, step: int) -> None:
    """In the first fit or in a refit: training goes on, or it would skip this matrix for ever after."""
    moments = "paper" if projector == "block" else "transfer"  # which starts anew with every random pair
    method = lsp(projector=projector, refit_every=1, moments=moments)
    run = train(Net(), lanes_of("inline"), steps=8, method=method, make_optimizer=spoiling({step}))
    state = owned(run)[BAD]
    assert all(state[side]["values"].isfinite().all() for side in ("left", "right"))
    assert all(state[key].isfinite().all() for key in ("exp_avg", "exp_avg_sq"))
    assert int(state["step"]) == 7
    assert run.reports[-1].skipped_total == 1
    assert all(weight.isfinite().all() for weight in run.weights.values())


def test_a_skipped_step_in_any_order_is_the_same() -> None:
    changes = {"refit_every": 1, "projector": "block", "min_numel": 60}
    make = spoiling({2})
    inline = train(Net(depth=2), lanes_of("inline"), method=lsp(**changes), make_optimizer=make, dtypes=NARROW)
    for seed in range(10):
        run = train(Net(depth=2), lanes_of("shuffled", seed), method=lsp(**changes), make_optimizer=make, dtypes=NARROW)
        assert_same(inline, run, state=False)
    assert inline.reports[-1].skipped_total == 1


@pytest.mark.parametrize("make", [lambda: None, lsp], ids=["full", "lsp"])
def test_steps_are_counted_from_one(make: Any) -> None:
    """Rounding noise is keyed by the number, so no two steps may share one."""
    run = train(Net(), lanes_of("inline"), steps=3, method=make(), dtypes=DTypes(compute=torch.bfloat16))
    assert [report.step for report in run.reports] == [1, 2, 3, 3]
