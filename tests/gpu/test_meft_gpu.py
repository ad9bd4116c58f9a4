"""Method ``meft`` on a CUDA device: the bits of inline lanes on that device, under random delays on every stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload import MEFTOffloadStrategy
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import InlineLanes, Lanes
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.engine import Engine
from tests.gpu.test_full_gpu import cuda, device, synchronization_is_an_error
from tests.helpers import VOCAB
from tests.lit import assert_equal_modules, fit
from tests.meft import FFNNet, adamw, adapted, make_engine, rows_of
from tests.meft_lit import MEFT, MLit, attach
from tests.test_meft_hooks import CustomClipping, ReadsGradients, UserManual

__all__ = ["device"]  # a fixture
gpu = pytest.mark.gpu
STEPS, WIDTH, TOKENS = 5, 64, 4 * 16
SIZES: dict[str, Any] = {"width": 512, "experts": 64, "active_experts": 4, "top_k": 16}


def slowly(module: nn.Module) -> torch.optim.Optimizer:
    return adamw(module, lr=1e-3)


@dataclass(frozen=True)
class Case:
    """One way to train; ``str`` is a test's name."""

    placement: str
    narrow: bool = False
    prunes: bool = True
    micro_batches: int = 1
    clip: bool = False
    rows: str = "dense"
    recompute: str = "no"
    pin: bool = True

    def __str__(self) -> str:
        on = [name for name in ("narrow", "prunes", "clip") if getattr(self, name)]
        pinned = "pinned" if self.pin else "pageable"
        return "-".join([self.placement, self.rows, f"{self.micro_batches}x", self.recompute, *on, pinned])

    def engine(self, lanes: Lanes) -> Engine:
        settings = {**SIZES, **({} if self.prunes else {"top_k": 32}), "row_optimizer": self.rows}
        module = adapted(FFNNet(depth=4, width=WIDTH, recompute=self.recompute), **settings)
        dtypes = DTypes.of("bf16-true" if self.narrow else "32-true")
        settings |= {"pin_memory": self.pin}
        limit = {"expects_clip": self.clip}
        return make_engine(module, self.placement, lanes, dtypes, make_optimizer=slowly, **limit, **settings)

    def batches(self, where: torch.device) -> list[list[Tensor]]:
        """The same in every step."""
        draw = torch.Generator().manual_seed(11)
        drawn = [torch.randint(0, VOCAB, (4, 16), generator=draw).to(where) for _ in range(self.micro_batches)]
        return [drawn] * STEPS


CASES = [
    Case("host"),
    Case("host", narrow=True, micro_batches=3, clip=True),
    Case("host", prunes=False, rows="deferred", clip=True),
    Case("host", rows="deferred", micro_batches=2, recompute="non-reentrant"),
    Case("host", narrow=True, pin=False),
    Case("keys"),
    Case("keys", narrow=True, rows="deferred", micro_batches=2, clip=True),
    Case("keys", prunes=False, recompute="reentrant"),
    Case("keys", clip=True, pin=False),
    Case("device", clip=True, micro_batches=3),
    Case("device", narrow=True, prunes=False),
]


def one_step(engine: Engine, case: Case, batches: list[Tensor]) -> list[Tensor]:
    losses = []
    for at, tokens in enumerate(batches):
        with engine.micro_batch():
            loss = engine.module.loss(tokens)
        engine.stepping = at == len(batches) - 1
        loss.backward()
        losses.append(loss.detach())
    engine.step(Clip(0.05) if case.clip else None)
    return losses


def trained(case: Case, lanes: Lanes, where: torch.device) -> tuple[list[float], dict[str, Tensor], dict[str, int]]:
    """Losses, weights with moments, and bytes by lane and tag."""
    engine = case.engine(lanes)
    losses = [loss for batches in case.batches(where) for loss in one_step(engine, case, batches)]
    state = engine.optimizer_state()["state"]
    held = {f"{t.name}.{key}": value.clone() for t in engine.trained for key, value in state[t.position].items()}
    held |= {name: p.detach().clone() for name, p in engine.module.named_parameters() if ".meft." in name}
    numbers, moved = [loss.item() for loss in losses], {}
    for lane, tag in (("d2h", "tokens"), ("d2h", "row gradients"), ("h2d", "rows"), ("h2d", "rows that stay")):
        moved[tag] = lanes.ledger.moved(lane, tag)
    engine.detach()
    return numbers, held, moved


def check_bytes(case: Case, moved: dict[str, int]) -> None:
    """Of what does not depend on the union; and gradients are of rows that are up."""
    calls, item = STEPS * case.micro_batches * 4, 2 if case.narrow else 4
    chosen = TOKENS * 4 * (4 + 4)
    on_host = case.placement == "host" and case.prunes
    assert moved["tokens"] == (calls * (TOKENS * WIDTH * item + chosen) if on_host else 0)
    stay = {"host": 0, "keys": 1, "device": 2}[case.placement]
    assert moved["rows that stay"] == stay * 4 * (STEPS + 1) * SIZES["width"] * WIDTH * item
    assert 0 < moved["row gradients"] <= calls * 2 * SIZES["width"] * WIDTH * item
    rows = {"host": 1.0, "keys": 0.5, "device": 0.0}[case.placement] * moved["row gradients"]
    assert moved["rows"] >= rows


@gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_inline_under_random_delays(case: Case, device: torch.device) -> None:
    losses, held, moved = trained(case, InlineLanes(HostMemory(pin=False), device), device)
    check_bytes(case, moved)
    for seed in (None, 1, 2, 3):
        with cuda(device, pin=case.pin, seed=seed) as lanes:
            again, found, count = trained(case, lanes, device)
        assert (again, count) == (losses, moved)
        for name, tensor in held.items():
            assert torch.equal(tensor.cpu(), found[name].cpu()), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cases_train_on_the_cpu(case: Case) -> None:
    losses, _, moved = trained(case, InlineLanes(HostMemory(pin=False)), torch.device("cpu"))
    assert losses[-1] < losses[0]
    check_bytes(case, moved)


@gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.recompute == "no" and case.pin], ids=str)
def test_the_host_waits_for_nothing_but_the_number_of_rows(case: Case, device: torch.device) -> None:
    """That wait is for the worker, by an event of its own: CUDA counts no synchronization."""
    batches = case.batches(device)
    with cuda(device) as lanes:
        engine = case.engine(lanes)
        for step in range(2):  # workspaces, the caching allocator, the order of execution
            one_step(engine, case, batches[step])
        lanes.synchronize()
        before = lanes.ledger.moved("d2h", "row gradients")
        with synchronization_is_an_error():
            for step in range(2, STEPS):
                one_step(engine, case, batches[step])
        lanes.synchronize()
        assert lanes.ledger.moved("d2h", "row gradients") > before
        engine.detach()


@gpu
@pytest.mark.parametrize("narrow", [False, True])
def test_device_memory_is_flat_in_the_width_for_host(narrow: bool, device: torch.device) -> None:
    """At the same number of rows in use: what is up is of the union, not of the table."""
    peaks = []
    for width in (1024, 8192):
        case = Case("host", narrow=narrow)
        module = adapted(FFNNet(depth=4, width=WIDTH), width=width, experts=64, active_experts=1, top_k=1)
        dtypes = DTypes.of("bf16-true" if narrow else "32-true")
        sizes = {"width": width, "experts": 64, "active_experts": 1, "top_k": 1}
        with cuda(device) as lanes:
            engine = make_engine(module, "host", lanes, dtypes, **sizes)
            for batches in case.batches(device):
                one_step(engine, case, batches)
            lanes.synchronize()
            peaks.append(rows_of(engine).resident_bytes)
            assert engine.own is not None
            assert engine.own.device_bytes <= 4 * 2 * (2 * TOKENS * WIDTH * 4 + 2 * TOKENS * 4)
            engine.detach()
    assert peaks == [0, 0]


# The Trainer.


class Streamed(MEFTOffloadStrategy):
    """On lanes of the test's choice."""

    lanes: Any

    def _make_lanes(self, machine: Any, settings: Any) -> Any:
        return self.lanes


RUN: dict[str, Any] = {"accelerator": "cuda", "limit_val_batches": 2, "val_check_interval": 4}


@gpu
@pytest.mark.parametrize("kind", [MLit, ReadsGradients, CustomClipping, UserManual])
@pytest.mark.parametrize("placement", ["host", "keys", "device"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_delays_change_nothing_under_the_trainer(
    kind: Any, placement: str, precision: Any, device: torch.device
) -> None:
    step = {} if kind is UserManual else {"accumulate_grad_batches": 2}
    if kind is MLit and precision != "bf16-mixed":
        step["gradient_clip_val"] = 0.05
    modules = []
    for seed in (None, 1, 2):
        with cuda(device, seed=seed) as lanes:
            strategy = Streamed(**MEFT, placement=placement)
            strategy.lanes = lanes
            modules.append(kind())
            fit(modules[-1], strategy, precision=precision, **RUN, **step)
            assert lanes.ledger.moved("d2h", "row gradients") > 0
    for module in modules[1:]:
        assert_equal_modules(modules[0], module)


@gpu
@pytest.mark.parametrize("kind", [MLit, ReadsGradients])
@pytest.mark.parametrize("placement", ["host", "keys", "device"])
def test_training_is_that_of_resident_adapters(kind: Any, placement: str, device: torch.device) -> None:
    """Their AdamW runs on the device, with other rounding; all rows of the experts are used, so nothing flips."""
    plain, ours = kind(), kind()
    attach(plain, top_k=12)
    fit(plain, max_steps=4, **RUN)
    fit(ours, MEFTOffloadStrategy(**{**MEFT, "top_k": 12}, placement=placement), max_steps=4, **RUN)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-3)
