"""Method ``zo2`` on a CUDA device: the bits of inline lanes on that device, under random delays on every stream."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_offload import ZO2OffloadStrategy
from lightning_offload.memory.arena import HostMemory, aligned
from lightning_offload.memory.asynchronous import AsyncLanes
from lightning_offload.memory.checked import ShuffledLanes
from lightning_offload.memory.lanes import InlineLanes, Lanes
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.text import CausalLM, batch_by_shape
from tests.gpu.test_full_gpu import STEPS, VOCAB, WIDTH, Case, Wide, cuda, device
from tests.lit import trainer
from tests.zeroth import make_engine, sgd

__all__ = ["device"]  # a fixture
gpu = pytest.mark.gpu
CPU = torch.device("cpu")
BF16 = DTypes(compute=torch.bfloat16, rounding="stochastic")
NEAREST = DTypes(compute=torch.bfloat16, rounding="nearest")
WIRE = DTypes(compute=torch.float32, wire=torch.float16, rounding="stochastic")
CASES: list[tuple[Case, DTypes, dict[str, Any]]] = [
    (Case(), DTypes(), {}),
    (Case(tied=True), BF16, {"slots": 4, "prefetch": 2}),
    (Case(micro_batches=3), WIRE, {"write_back_every": 2}),
    (Case(micro_batches=2), BF16, {"directions": 2, "distribution": "rademacher"}),
    (Case(), DTypes(), {"distribution": "gaussian", "resident": ["blocks.1"], "train_mode": True}),
    (Case(pin=False), BF16, {}),
    (Case(), DTypes(), {"noise": "mezo"}),
    (Case(tied=True, micro_batches=2), NEAREST, {"noise": "mezo", "write_back_every": 3}),
]
EVERY_CASE = pytest.mark.parametrize(("case", "dtypes", "settings"), CASES, ids=lambda value: str(value)[:60])


@dataclass
class Trained:
    """What a training did."""

    numbers: list[float]
    weights: dict[str, Tensor]
    up_bytes: int


def attached(case: Case, dtypes: DTypes, lanes: Lanes, settings: dict[str, Any]) -> ZerothEngine:
    module = case.module()
    return make_engine(module, sgd(module, lr=1e-4), lanes, dtypes, **settings)


def one_step(engine: ZerothEngine, batches: list[Tensor]) -> None:
    """The micro-batches of a step, each in two parts."""
    for tokens in batches:
        engine.micro_batch(engine.module.loss, list(tokens.chunk(2)))  # type: ignore[arg-type]
    engine.step()


def evaluated(module: torch.nn.Module, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(module.eval().loss(tokens).item())  # type: ignore[operator]


def trained(case: Case, dtypes: DTypes, lanes: Lanes, settings: dict[str, Any]) -> Trained:
    """l+, g and a loss of an evaluation in every step, and the weights at rest where they are to be."""
    where, numbers = lanes.device, list[float]()
    batches = case.batches(where)
    torch.manual_seed(7)
    np.random.seed(5)
    engine = attached(case, dtypes, lanes, settings)
    for step in range(STEPS):
        one_step(engine, batches[step])
        numbers += [engine.report.loss_plus, engine.report.coefficient]
        if step % 2:
            engine.flush()
            numbers.append(evaluated(engine.module, batches[0][0]))
            engine.module.train()
    engine.flush()
    assert len(engine.streaming.streamed) == (3 if "resident" in settings else 4)
    for berth in engine.streaming.berths:
        home = where if berth.resident else CPU
        assert all(p.device.type == home.type for p in berth.unit.parameters.values()), berth.unit.name
    weights = {name: p.detach().cpu().clone() for name, p in engine.module.named_parameters()}
    moved = lanes.ledger.moved("h2d", "weights")
    assert moved >= STEPS * case.micro_batches * engine.streaming.host_bytes
    engine.detach()
    return Trained(numbers, weights, moved)


def assert_same(one: Trained, other: Trained) -> None:
    assert (one.numbers, one.up_bytes) == (other.numbers, other.up_bytes)
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name


@EVERY_CASE
def test_the_cases_train_on_the_cpu(case: Case, dtypes: DTypes, settings: dict[str, Any]) -> None:
    expected = trained(case, dtypes, InlineLanes(HostMemory(pin=False)), settings)
    assert len(set(expected.numbers)) == len(expected.numbers)
    for name, weight in case.module().named_parameters():
        assert not torch.equal(weight.to(expected.weights[name].dtype), expected.weights[name]), name
    assert_same(trained(case, dtypes, ShuffledLanes(HostMemory(pin=False), seed=1), settings), expected)


@gpu
@EVERY_CASE
def test_the_bits_of_inline_under_random_delays(
    case: Case, dtypes: DTypes, settings: dict[str, Any], device: torch.device
) -> None:
    expected = trained(case, dtypes, InlineLanes(HostMemory(pin=False), device), settings)
    for seed in (None, 1, 2, 3):
        with cuda(device, pin=case.pin, seed=seed) as lanes:
            assert_same(trained(case, dtypes, lanes, settings), expected)


# Evaluation


def evaluation_streams(case: Case, dtypes: DTypes, lanes: Lanes) -> None:
    """A trained module evaluates as one whose weights are all on the device, and they come up for it."""
    tokens = case.batches(lanes.device)[0][0]
    engine = attached(case, dtypes, lanes, {})
    one_step(engine, [tokens])
    engine.flush()
    before = lanes.ledger.moved("h2d", "weights")
    found = evaluated(engine.module, tokens)
    slots = engine.method.settings.slots - 1
    least = engine.streaming.host_bytes * (4 - slots) // 4
    assert lanes.ledger.moved("h2d", "weights") - before >= least > 0
    engine.detach()
    plain = Wide().to(lanes.device, dtypes.compute)
    plain.load_state_dict(engine.module.state_dict())
    assert found == evaluated(plain, tokens)


@pytest.mark.parametrize("dtypes", [DTypes(), BF16, WIRE], ids=["fp32", "bf16", "wire"])
def test_evaluation_streams_on_the_cpu(dtypes: DTypes) -> None:
    evaluation_streams(Case(), dtypes, ShuffledLanes(HostMemory(pin=False), seed=1))


@gpu
@pytest.mark.parametrize("dtypes", [DTypes(), BF16, WIRE], ids=["fp32", "bf16", "wire"])
def test_evaluation_streams(dtypes: DTypes, device: torch.device) -> None:
    for seed in (None, 1):
        with cuda(device, seed=seed) as lanes:
            evaluation_streams(Case(), dtypes, lanes)


# Memory


@pytest.fixture
def warm(device: torch.device) -> torch.device:
    """What libraries keep for themselves is there: a training has been."""
    with cuda(device) as lanes:
        trained(Case(), DTypes(), lanes, {})
    gc.collect()  # engine and module know each other
    torch.cuda.synchronize()
    return device


STAY_BYTES = 2 * VOCAB * WIDTH * 4
"""Embedding and head, in fp32."""
SLACK_BYTES = 256 * 1024
"""Batches, losses, what the allocator rounds up; a block has 600 KiB."""


def formula_bytes(slots: int) -> int:
    """Weight slots and one scratch buffer of a block, and what is no block."""
    return slots * sum(aligned(4 * p.numel()) for p in Wide().blocks[0].parameters()) + STAY_BYTES


@pytest.mark.parametrize("slots", [3, 4])
def test_the_formula_on_the_cpu(slots: int) -> None:
    engine = attached(Case(), DTypes(), InlineLanes(HostMemory(pin=False)), {"slots": slots})
    assert engine.device_bytes == formula_bytes(slots)
    engine.detach()


@gpu
@pytest.mark.parametrize("slots", [3, 4])
def test_the_device_holds_slots_and_what_stays(slots: int, warm: torch.device) -> None:
    case, before = Case(), torch.cuda.memory_allocated(warm)
    batches = case.batches(warm)
    with cuda(warm) as lanes:
        engine = attached(case, DTypes(), lanes, {"slots": slots})
        expected = formula_bytes(slots)
        assert expected <= torch.cuda.memory_allocated(warm) - before <= expected + SLACK_BYTES
        for step in batches:
            one_step(engine, step)
        engine.flush()
        held = torch.cuda.memory_allocated(warm) - before
        assert engine.device_bytes == expected
        assert expected <= held <= expected + SLACK_BYTES
        engine.detach()
    assert torch.cuda.memory_allocated(warm) - before <= STAY_BYTES + SLACK_BYTES


# A Trainer


class SmallLlama(CausalLM):
    """Random weights and tokens; keeps on which lanes it was trained, and where its blocks were then."""

    def __init__(self, dtype: str) -> None:
        config: dict[str, Any] = {"model_type": "llama", "vocab_size": 331, "hidden_size": 128}
        config |= {"intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4}
        torch.manual_seed(3)
        super().__init__(
            config=config,
            init="random",
            dtype=dtype,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        )
        self.batches = [batch_by_shape(4, 32, 331) for _ in range(4)]
        self.found: list[float] = []
        self.lanes: Lanes | None = None
        self.homes = set[str]()

    def on_train_end(self) -> None:
        self.lanes = self.trainer.strategy.engine.lanes  # type: ignore[attr-defined]
        self.homes = {p.device.type for name, p in self.named_parameters() if ".layers." in name}

    def on_validation_end(self) -> None:
        self.found.append(float(self.trainer.callback_metrics["val/loss"]))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


PRECISIONS = {"32-true": ("float32", 1e-5), "bf16-true": ("bfloat16", 1e-3)}
"""dtype of the model, and how far two forwards of the same weights may be apart."""


def fit_and_validate(accelerator: str, precision: Any) -> SmallLlama:
    """Validations in the middle of a fit and after it have the loss of the same weights without offloading."""
    dtype, apart = PRECISIONS[precision]
    module = SmallLlama(dtype)
    common: dict[str, Any] = {"accelerator": accelerator, "precision": precision, "limit_val_batches": 1.0}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit = trainer(ZO2OffloadStrategy(min_numel=0, seed=4), max_epochs=2, num_sanity_val_steps=0, **common)
    fit.fit(module)
    assert module.homes == {"cpu"}
    assert all(not torch.equal(before[name], p.cpu()) for name, p in module.named_parameters() if p.dim() > 1)
    (streamed,) = trainer(ZO2OffloadStrategy(min_numel=0), **common).validate(module, verbose=False)
    (plain,) = trainer(**common).validate(module, verbose=False)
    assert len(module.found) == 4
    assert module.found[0] != module.found[1]
    for loss in (streamed["val/loss"], module.found[1]):
        assert loss == pytest.approx(plain["val/loss"], rel=apart)
    return module


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_trainer_on_the_cpu(precision: Any) -> None:
    fit_and_validate("cpu", precision)


@gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_trainer_on_the_device(precision: Any, device: torch.device) -> None:
    assert isinstance(fit_and_validate("cuda", precision).lanes, AsyncLanes)
