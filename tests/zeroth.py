"""One way to train with zo2's engine, and the same training by the oracle of `tests.mezo`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import InlineLanes, Lanes
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.zeroth import ZerothEngine, ZerothReport
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from lightning_offload.numerics.noise import Distribution, Draw
from lightning_offload.numerics.noise import noise as drawn
from tests.helpers import VOCAB, Net
from tests.mezo import Mezo, Noise
from tests.zoo import ZOO, _llama_like, _seeded, first_tensor, text_inputs

SEED = 3
EPS = 1e-3
Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]


def bert_classifier() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    inputs = {**text_inputs(), "labels": torch.tensor([0, 2])}
    return BertForSequenceClassification(BertConfig(**_llama_like(num_labels=3), **drop)), inputs


MODELS = {**ZOO, "bert_classifier": _seeded(bert_classifier)}


def model_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own where it has one, else the mean square of its output."""
    loss = first_tensor(module(**batch))
    return loss if loss.dim() == 0 else loss.float().square().mean()


def built(family: str, dtype: torch.dtype, steps: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model and another batch for every step."""
    model, inputs = MODELS[family]()
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    rolled = [{name: x.roll(step, -1) if x.dim() > 1 else x for name, x in inputs.items()} for step in range(steps)]
    return model.to(dtype), rolled


def net_loss(net: nn.Module, tokens: Tensor) -> Tensor:
    assert isinstance(net, Net)
    return net.loss(tokens)


def token_batches(steps: int, *, batch: int = 2, seed: int = 11) -> list[Tensor]:
    data = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (batch, 6), generator=data) for _ in range(steps)]


def sgd(module: nn.Module, lr: float = 1e-3, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=lr, weight_decay=weight_decay)


def by_type(module: nn.Module) -> torch.optim.Optimizer:
    """Matrices decay; the rest has another lr."""
    wide = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() < 2]
    return torch.optim.SGD([{"params": wide, "weight_decay": 0.1}, {"params": rest, "lr": 3e-3}], lr=1e-3)


def make_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    lanes: Lanes | None = None,
    dtypes: DTypes | None = None,
    **settings: Any,
) -> ZerothEngine:
    method = ZO2(ZO2Settings(**{"seed": SEED, "min_numel": 0, **settings}))
    lanes = lanes if lanes is not None else InlineLanes(HostMemory(pin=False))
    return ZerothEngine(module, optimizer or sgd(module), method, lanes, dtypes or DTypes())


@dataclass
class Trace:
    """What a run did: l+ and g of every step, and what is left."""

    steps: list[tuple[float, float]]
    weights: dict[str, Tensor]
    reports: list[ZerothReport] = field(default_factory=list)
    engine: ZerothEngine | None = None
    module: nn.Module | None = None

    @property
    def zeroth(self) -> ZerothEngine:
        assert self.engine is not None
        return self.engine


def halved(step: int) -> float:
    """A decaying schedule: what lr is multiplied by in a step, from 0."""
    return 0.5 ** (step // 3)


def constant(step: int) -> float:
    return 1.0


def by_engine(
    module: nn.Module,
    batches: Sequence[Batch],
    loss: Loss = net_loss,
    *,
    lanes: Lanes | None = None,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    schedule: Callable[[int], float] = constant,
    dtypes: DTypes | None = None,
    clip: Clip | None = None,
    parts: Callable[[Batch], list[list[Batch]]] = lambda batch: [[batch]],
    before_step: Callable[[nn.Module, int], None] = lambda module, step: None,
    after_step: Callable[[ZerothEngine, int], None] = lambda engine, step: None,
    **settings: Any,
) -> Trace:
    """Train a copy of ``module``.

    Args:
        parts: The micro-batches of a step's batch, each a list of parts.
    """
    module = copy.deepcopy(module)
    optimizer = make_optimizer(module)
    base = [group["lr"] for group in optimizer.param_groups]
    engine = make_engine(module, optimizer, lanes, dtypes, **settings)
    np.random.seed(5)
    trace = Trace([], {}, engine=engine, module=module)
    with lanes.checking() if isinstance(lanes, CheckedLanes) else nullcontext():
        for step, batch in enumerate(batches):
            before_step(module, step)
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * schedule(step)
            for micro_batch in parts(batch):
                engine.micro_batch(lambda part: loss(module, part), micro_batch)
            engine.step(clip)
            trace.reports.append(engine.report)
            trace.steps.append((engine.report.loss_plus, engine.report.coefficient))
            after_step(engine, step)
        engine.flush()
    trace.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return trace


def philox_noise(module: nn.Module, distribution: Distribution = "popcount", seed: int = SEED) -> Noise:
    """The oracle's hook: z by the place of the parameter among all of the module's."""
    places = {id(p): place for place, p in enumerate(module.parameters())}

    def hook(step: int, place: int, p: Tensor) -> Tensor:
        flat = drawn(Draw(seed, step, places[id(p)]), 0, p.numel(), distribution, device="cpu")
        return flat.view(p.shape)

    return hook


def by_oracle(
    module: nn.Module,
    batches: Sequence[Batch],
    loss: Loss = net_loss,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    schedule: Callable[[int], float] = constant,
    distribution: Distribution | None = None,
    eps: float = EPS,
    before_step: Callable[[nn.Module, int], None] = lambda module, step: None,
    after_step: Callable[[nn.Module, int], None] = lambda module, step: None,
) -> Trace:
    """The same by `Mezo`, or with philox noise of ``distribution``."""
    module = copy.deepcopy(module)
    hook = philox_noise(module, distribution) if distribution is not None else None
    oracle = Mezo(module, lr, eps, weight_decay, noise=hook)
    np.random.seed(5)
    trace = Trace([], {}, module=module)
    for step, batch in enumerate(batches):
        before_step(module, step)
        oracle.lr = lr * schedule(step)
        trace.steps.append(oracle.step(lambda model, batch=batch: loss(model, batch)))  # type: ignore[misc]
        after_step(module, step)
    trace.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return trace


def assert_equal(one: Trace, other: Trace) -> None:
    """Bit-equality of l+, g and weights."""
    assert one.steps == other.steps
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def assert_streamed(trace: Trace, *, micro_batches: int) -> None:
    """Weights really crossed the link, up in every micro-batch and down."""
    ledger = trace.zeroth.lanes.ledger
    stored = trace.zeroth.streaming.host_bytes
    assert stored > 0
    assert ledger.moved("h2d", "weights") >= stored * micro_batches
    assert ledger.moved("d2h", "weights back") > 0
