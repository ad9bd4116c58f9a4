"""Small models shaped to show mistakes, and one way to train them with and without an engine."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes, ShuffledLanes
from lightning_offload.memory.lanes import InlineLanes, Lanes
from lightning_offload.methods.base import Clip, DTypes, StepReport
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.methods.method import Method

VOCAB = 41
WIDTH = 19  # no multiple of any vector width: tails must come out right too


class Block(nn.Module):
    """A residual block with dropout, optionally recomputed in backward."""

    def __init__(self, *, dropout: float = 0.0, recompute: str = "no", width: int = WIDTH, inner: int = 0) -> None:
        super().__init__()
        inner = inner or 2 * width
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.recompute = recompute

    def inner(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute == "no" or not self.training:
            return x + self.inner(x)
        return x + checkpoint(self.inner, x, use_reentrant=self.recompute == "reentrant")


class Net(nn.Module):
    """Embedding, blocks, norm, head; tied, partly frozen or partly unused as asked."""

    def __init__(
        self,
        *,
        depth: int = 3,
        tied: bool = False,
        frozen: bool = False,
        sometimes_unused: bool = False,
        dropout: float = 0.0,
        recompute: str = "no",
        functional_head: bool = False,
        width: int = WIDTH,
        inner: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)  # two nets are equal
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(
            Block(dropout=dropout, recompute=recompute, width=width, inner=inner) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.sometimes_unused, self.functional_head, self.calls = sometimes_unused, functional_head, 0
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            self.blocks[1].requires_grad_(False)
            self.embed.requires_grad_(tied)

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            if not (self.sometimes_unused and index == 2 and self.calls % 2):
                x = block(x)
        x = self.norm(x)
        return F.linear(x, self.head.weight) if self.functional_head else self.head(x)

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).view(-1, VOCAB), tokens.roll(1, -1).reshape(-1))


def lanes_of(kind: str, seed: int = 0) -> Lanes:
    memory = HostMemory()
    if kind == "inline":
        return InlineLanes(memory)
    if kind == "checked":
        return CheckedLanes(memory)
    if kind == "shuffled":
        return ShuffledLanes(memory, seed=seed)
    raise ValueError(kind)


@dataclass
class Run:
    """What a training run left behind."""

    losses: list[float]
    weights: dict[str, Tensor]
    reports: list[StepReport] = field(default_factory=list)
    engine: Engine | None = None
    optimizer: torch.optim.Optimizer | None = None
    module: nn.Module | None = None

    @property
    def state(self) -> dict[str, Any]:
        assert self.optimizer is not None
        return self.engine.optimizer_state() if self.engine is not None else self.optimizer.state_dict()


def adamw(module: nn.Module, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), **{"lr": 3e-2, "weight_decay": 0.1, "fused": True, **kwargs})


def two_groups(module: nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 1e-2}], lr=3e-2, fused=True
    )


def train(
    module: nn.Module,
    lanes: Lanes | None,
    *,
    steps: int = 5,
    micro_batches: int = 1,
    clip: Clip | None = None,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    settings: dict[str, Any] | None = None,
    method: Method | None = None,
    dtypes: DTypes | None = None,
    late: bool = False,
    schedule: bool = False,
    spoil: Callable[[nn.Module, int], None] | None = None,
    after_attach: Callable[[Engine], None] | None = None,
) -> Run:
    """The ten-line loop of the engine's docstring, and the plain loop when ``lanes`` is ``None``.

    Args:
        module: Copied, not changed.
        method: Instead of ``full`` with ``settings``.
        late: Gradients stay visible until the step.
        spoil: Called with the module and the step between backward and step.
    """
    module = copy.deepcopy(module)
    optimizer = make_optimizer(module)
    engine = None
    if lanes is not None:
        method = method or Full(FullSettings(**{"min_numel": 0, "accumulate": "device", **(settings or {})}))
        engine = Engine(module, optimizer, method, lanes, dtypes or DTypes(), expects_clip=clip is not None)
        engine.gradients_visible = late
        if after_attach is not None:
            after_attach(engine)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if schedule else None
    run = Run([], {}, engine=engine, optimizer=optimizer, module=module)
    torch.manual_seed(7)
    data = torch.Generator("cpu").manual_seed(11)
    with lanes.checking() if isinstance(lanes, CheckedLanes) else nullcontext():
        for step in range(steps):
            for micro in range(micro_batches):
                tokens = torch.randint(0, VOCAB, (2, 6), generator=data, device="cpu")
                with engine.micro_batch() if engine is not None else nullcontext():
                    loss = module.loss(tokens) / micro_batches
                if engine is not None:
                    engine.stepping = micro == micro_batches - 1
                elif micro == 0:
                    optimizer.zero_grad()
                loss.backward()
                run.losses.append(loss.item())
            if spoil is not None:
                spoil(module, step)
            if engine is not None:
                engine.step(clip)
                run.reports.append(engine.report)
            else:
                _plain_step(module, optimizer, clip)
            if scheduler is not None:
                optimizer._opt_called = True
                scheduler.step()
        if engine is not None:
            engine.flush()
            run.reports.append(engine.report)
    run.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return run


def _plain_step(module: nn.Module, optimizer: torch.optim.Optimizer, clip: Clip | None) -> None:
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if clip is not None and clip.algorithm == "norm":
        nn.utils.clip_grad_norm_(trained, clip.value)
    elif clip is not None:
        nn.utils.clip_grad_value_(trained, clip.value)
    optimizer.step()


def assert_same(one: Run, other: Run, *, state: bool = True) -> None:
    """Bit-equality of losses, weights and optimizer state."""
    assert one.losses == other.losses
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name
    if state:
        left, right = one.state["state"], other.state["state"]
        assert left.keys() == right.keys()
        for index, values in left.items():
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[index][key])), (index, key)


def assert_moved(run: Run, *, steps: int, per_step: int | None = None) -> None:
    """The run really offloaded: gradients went down and weights came up, every byte of them in every step."""
    assert run.engine is not None
    offloaded = sum(t.parameter.numel() * t.parameter.element_size() for t in run.engine.host.trained)
    expected = offloaded * steps if per_step is None else per_step * steps
    assert offloaded > 0
    ledger = run.engine.lanes.ledger
    assert ledger.moved("h2d", "weights") == expected
    assert ledger.moved("d2h", "gradients") >= expected


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pairwise(factors: dict[str, list[Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that contain every pair of values of every two factors; greedy and reproducible."""
    names = list(factors)
    pick = random.Random(seed)
    open_pairs = {
        (a, i, b, j)
        for n, a in enumerate(names)
        for b in names[n + 1 :]
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows = []
    while open_pairs:
        best: tuple[int, dict[str, int]] = (-1, {})
        for _ in range(60):
            row = {name: pick.randrange(len(factors[name])) for name in names}
            gain = sum((a, row[a], b, row[b]) in open_pairs for n, a in enumerate(names) for b in names[n + 1 :])
            best = max(best, (gain, row), key=lambda pair: pair[0])
        row = best[1]
        open_pairs -= {(a, row[a], b, row[b]) for n, a in enumerate(names) for b in names[n + 1 :]}
        rows.append({name: factors[name][index] for name, index in row.items()})
    return rows


def mostly_slow(rows: Iterable[Any], quick: Callable[[int, Any], bool]) -> list[Any]:
    """All rows of a large matrix; those for which ``quick(position, row)`` is false are left to the long runs."""
    return [
        row if quick(at, row) else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
        for at, row in enumerate(rows)
    ]


def every(nth: int, rows: Iterable[Any]) -> list[Any]:
    """All rows; the long runs have all of them, the others each ``nth``."""
    return mostly_slow(rows, lambda at, row: at % nth == 0)


def product(**factors: list[Any]) -> list[Any]:
    """All rows of values; the long runs have all of them, the others a pairwise part."""
    quick = [tuple(row.values()) for row in pairwise(factors)]
    return mostly_slow(itertools.product(*factors.values()), lambda at, row: row in quick)


def row_id(row: dict[str, Any]) -> str:
    """The same in every process: a function by its name, not its address."""
    return "-".join(getattr(value, "__name__", str(value)) for value in row.values())
