"""Methods on lanes that really run side by side, with random delays: the bits of ``InlineLanes``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.errors import NonFiniteError
from lightning_offload.methods.base import Clip, DTypes
from tests.helpers import Net, Run, adamw, assert_moved, assert_same, every, lanes_of, product, train
from tests.projected import assert_projected, lsp
from tests.streams import thread_lanes

pytestmark = pytest.mark.timeout(60)
STEPS = 4


@dataclass(frozen=True)
class Case:
    """One way to train; ``str`` is a test's name."""

    tied: bool
    micro_batches: int
    accumulate: str
    clip: str
    skip_nonfinite: bool
    narrow: bool
    spoil: bool
    pinned: bool
    late: bool
    recompute: str

    def __str__(self) -> str:
        on = [name for name in ("tied", "skip_nonfinite", "narrow", "spoil", "pinned", "late") if getattr(self, name)]
        return "-".join([f"{self.micro_batches}x{self.accumulate}", f"clip_{self.clip}", self.recompute, *on])

    def train(self, lanes: Any) -> Run:
        torch.manual_seed(3)
        module = Net(tied=self.tied, dropout=0.1, recompute=self.recompute, sometimes_unused=True)
        return train(
            module,
            lanes,
            steps=STEPS,
            micro_batches=self.micro_batches,
            clip=None if self.clip == "none" else Clip(0.05, self.clip),
            settings={"accumulate": self.accumulate, "skip_nonfinite": self.skip_nonfinite},
            dtypes=DTypes(compute=torch.bfloat16) if self.narrow else None,
            make_optimizer=_spoiling(self.micro_batches) if self.spoil else adamw,
            late=self.late,
        )


def _spoiling(micro_batches: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """In the second step one gradient holds a NaN as it arrives."""

    def make(module: nn.Module) -> torch.optim.Optimizer:
        seen = 0

        def spoil(grad: Tensor) -> Tensor:
            nonlocal seen
            seen += 1
            return grad * float("nan") if seen == 1 + micro_batches else grad

        module.blocks[0].up.weight.register_hook(spoil)
        return adamw(module)

    return make


def _cases(count: int, seed: int) -> list[Case]:
    choose = random.Random(seed)
    cases = []
    for index in range(count):
        skip = choose.random() < 0.6
        cases.append(
            Case(
                tied=choose.random() < 0.5,
                micro_batches=choose.choice([1, 3]),
                accumulate=choose.choice(["device", "host"]),
                clip=("none", "norm", "value")[index % 3],
                skip_nonfinite=skip,
                narrow=choose.random() < 0.5,
                spoil=skip and choose.random() < 0.5,
                pinned=choose.random() < 0.8,
                late=choose.random() < 0.2,
                recompute=choose.choice(["no", "no", "reentrant", "non_reentrant"]),
            )
        )
    return cases


CASES = _cases(36, seed=5)


def test_the_cases_cover_what_they_should() -> None:
    for narrow in (True, False):
        for accumulate in ("device", "host"):
            for clip in ("none", "norm", "value"):
                chosen = [c for c in CASES if (c.narrow, c.accumulate, c.clip) == (narrow, accumulate, clip)]
                assert chosen, (narrow, accumulate, clip)
    assert {(c.spoil, c.micro_batches) for c in CASES} == {(True, 1), (True, 3), (False, 1), (False, 3)}
    assert {(c.tied, c.skip_nonfinite) for c in CASES} == {(a, b) for a in (True, False) for b in (True, False)}


@pytest.mark.parametrize("case", every(2, CASES), ids=str)
def test_the_bits_of_inline(case: Case) -> None:
    expected = case.train(lanes_of("inline"))
    for seed in range(2):
        with thread_lanes(seed, pinned=case.pinned, pauses=12) as lanes:
            run = case.train(lanes)
            assert_same(run, expected)
            assert [report.skipped for report in run.reports[-1:]] == [False]
            assert run.reports[-1].skipped_total == expected.reports[-1].skipped_total == int(case.spoil)
            moved = run.engine.lanes.ledger.moved("h2d", "weights")
            assert moved == expected.engine.lanes.ledger.moved("h2d", "weights") > 0
            assert lanes.memory.report() == expected.engine.lanes.memory.report()


def test_every_byte_moves_once_a_step() -> None:
    with thread_lanes(1) as lanes:
        assert_moved(train(Net(), lanes, steps=3), steps=3)


def test_the_default_dtype_does_not_matter() -> None:
    torch.manual_seed(3)
    module = Net()
    expected = train(module, lanes_of("inline"), steps=3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with thread_lanes(1) as lanes:
            run = train(module, lanes, steps=3)
            assert {state["step"].dtype for state in run.state["state"].values()} == {torch.float32}
            assert_same(run, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_too_many_skipped_steps_end_the_run_and_the_engine_can_be_closed() -> None:
    """The error comes from the worker, while other work is on its way."""

    def spoil(module: nn.Module, step: int) -> None:
        module.head.weight.grad.fill_(float("nan"))

    kept = []
    with thread_lanes(1) as lanes:
        with pytest.raises(NonFiniteError, match=r"`head\.weight`"):
            train(Net(), lanes, steps=9, settings={"max_skips": 2}, late=True, spoil=spoil, after_attach=kept.append)
        (engine,) = kept
        engine.drop()
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        engine.step()  # nothing to step; and nothing that waits for the failed report
        engine.detach()
    assert all(torch.equal(p, weights[name]) for name, p in engine.module.named_parameters())
    assert all(p.isfinite().all() for p in weights.values())


@pytest.mark.parametrize("seed", range(5))
def test_after_a_failed_host_step_every_weight_still_equals_its_master(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_offload.methods import host

    plain, calls = host.host_step, []

    def step(rule: Any, homes: Any, *args: Any) -> None:
        calls.append(homes[0].trained.unit.index)
        if len(calls) == 8:
            raise OSError("the host step failed")
        plain(rule, homes, *args)

    monkeypatch.setattr(host, "host_step", step)
    kept = []
    with thread_lanes(seed, pauses=30) as lanes:
        with pytest.raises(OSError, match="host step failed"):
            train(Net(), lanes, steps=9, after_attach=kept.append)
        (engine,) = kept
        engine.drop()
        for trained, weight in engine.weights():
            assert torch.equal(trained.parameter, weight), trained.name


@pytest.mark.parametrize(
    ("form", "accumulate", "clip", "skip_nonfinite"),
    product(
        form=["gradient", "activations"],
        accumulate=["device", "host"],
        clip=[None, Clip(0.05)],
        skip_nonfinite=[True, False],
    ),
)
def test_lsp_has_the_bits_of_inline(form: str, accumulate: str, clip: Clip | None, skip_nonfinite: bool) -> None:
    """Five units in three slots; projectors are replaced in every step, moments carried over in its wake."""
    changes = {"form": form, "accumulate": accumulate, "skip_nonfinite": skip_nonfinite, "refit_every": 1}
    module = Net(depth=5, dropout=0.1, tied=True)
    common = {"steps": STEPS, "micro_batches": 2, "clip": clip}
    for dtypes in (DTypes(), DTypes(compute=torch.bfloat16, rounding="stochastic")):
        method = {**changes, "projector": "block", "moments": "paper", "min_numel": 60}
        expected = train(module, lanes_of("inline"), method=lsp(**method), dtypes=dtypes, **common)
        assert_projected(expected, module, steps=STEPS)
        for seed in range(2):
            with thread_lanes(seed, pauses=12) as lanes:
                run = train(module, lanes, method=lsp(**method), dtypes=dtypes, **common)
                assert_same(run, expected, state=False)
                moments = zip(expected.engine.own.extras().items(), run.engine.own.extras().values(), strict=True)
                for (name, wanted), found in moments:
                    assert torch.equal(found["exp_avg_sq"], wanted["exp_avg_sq"]), name
                assert lanes.memory.report() == expected.engine.lanes.memory.report()
