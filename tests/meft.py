"""Small models with sparse adapters, to be trained by `tests.helpers.train` with and without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import InlineLanes, Lanes
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.meft import MEFT, MEFTSettings
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.sparse_adapter import Fetched, SparseAdapter, attach_parameters
from lightning_offload.numerics.adapter import Picks
from tests.adapter import dense
from tests.helpers import VOCAB, WIDTH

PLACEMENTS = ["host", "keys", "device"]
SIZES: dict[str, Any] = {"width": 48, "experts": 12, "active_experts": 3, "top_k": 6, "key_std": 0.02}
"""A token's experts have 12 rows, of which it uses 6."""


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class FFNBlock(nn.Module):
    """Mixes tokens, then has a feed-forward network."""

    def __init__(self, width: int, recompute: str) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width)
        self.recompute = recompute

    def inner(self, x: Tensor) -> Tensor:
        places = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)[:, None]
        x = x + torch.tanh(self.mix(x.cumsum(1) / places))
        return x + self.mlp(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute == "no" or not self.training:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.recompute == "reentrant")


class FFNNet(nn.Module):
    """Embedding, blocks, head; all of it frozen once adapters are attached.

    Attributes:
        used: Whether the last block runs; by call, from 0.
    """

    def __init__(self, *, depth: int = 3, width: int = WIDTH, recompute: str = "no", sometimes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)  # two nets are equal
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(FFNBlock(width, recompute) for _ in range(depth))
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.sometimes, self.calls = sometimes, 0

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        x = self.embed(tokens)
        if torch.is_grad_enabled():
            x.requires_grad_()  # for the reentrant checkpoint
        for block in self.blocks[: -1 if self.sometimes and self.calls % 4 < 3 else None]:
            x = block(x)
        return self.head(x)

    def loss(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = self(tokens, attention_mask)
        return F.cross_entropy(logits.view(-1, VOCAB).float(), tokens.roll(1, -1).reshape(-1))


def adapters_in(module: nn.Module) -> list[SparseAdapter]:
    return [part for part in module.modules() if isinstance(part, SparseAdapter)]


def sizes(settings: dict[str, Any]) -> dict[str, Any]:
    return {**SIZES, **settings}


def adapted(net: nn.Module | None = None, **settings: Any) -> nn.Module:
    """The net with adapters whose values are not zero, so that keys and routers have gradients from the first step."""
    net = net if net is not None else FFNNet()
    of_adapters = MEFTSettings(**{"seed": 5, **sizes(settings)}).of_adapters()
    for index, adapter in enumerate(attach_parameters(net, **of_adapters)):
        nn.init.normal_(adapter.values, std=0.1, generator=torch.Generator().manual_seed(index))
    return net


def meft(placement: str = "host", **settings: Any) -> MEFT:
    """The method, nothing of it left to be resolved."""
    fixed = {"accumulate": "device", "pin_memory": False, "host_threads": 1, "min_numel": 0, "row_optimizer": "dense"}
    return MEFT(MEFTSettings(**{**fixed, **sizes(settings), "placement": placement}))


def trained_in(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def adamw(module: nn.Module, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained_in(module), **{"lr": 1e-2, "weight_decay": 0.1, "fused": True, **kwargs})


def undecayed(module: nn.Module) -> torch.optim.Optimizer:
    return adamw(module, weight_decay=0.0)


def three_groups(module: nn.Module) -> torch.optim.Optimizer:
    """Keys, values and routers with their own lr, decay and betas; keys and values of one adapter are apart."""
    kinds: dict[str, list[nn.Parameter]] = {"keys": [], "values": [], "router": []}
    for name, p in module.named_parameters():
        if p.requires_grad:
            kinds[name.rpartition(".")[2]].append(p)
    groups = [
        {"params": kinds["router"], "lr": 1e-3, "weight_decay": 0.0},
        {"params": kinds["values"], "weight_decay": 0.3},
        {"params": kinds["keys"], "lr": 3e-2, "weight_decay": 0.05, "betas": (0.8, 0.99)},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, fused=True)


def make_engine(
    module: nn.Module,
    placement: str = "host",
    lanes: Lanes | None = None,
    dtypes: DTypes | None = None,
    *,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    expects_clip: bool = False,
    **settings: Any,
) -> Engine:
    """An engine on ``module`` itself."""
    lanes = lanes if lanes is not None else InlineLanes(HostMemory(pin=False))
    optimizer = make_optimizer(module)
    method = meft(placement, **settings)
    return Engine(module, optimizer, method, lanes, dtypes or DTypes(), expects_clip=expects_clip)


def rows_of(engine: Engine | None) -> RowOptimizer:
    assert engine is not None
    assert isinstance(engine.own, RowOptimizer)
    return engine.own


def tokens_of(seed: int, *, batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def step(engine: Engine, *batches: Tensor) -> list[float]:
    """One optimizer step over these micro-batches; their losses."""
    losses = []
    for place, tokens in enumerate(batches):
        losses.append(micro_batch(engine, tokens, last=place == len(batches) - 1))
    engine.step()
    return losses


def micro_batch(engine: Engine, tokens: Tensor, *, last: bool = False, **inputs: Any) -> float:
    with engine.micro_batch():
        loss = engine.module.loss(tokens, **inputs)
    engine.stepping = last
    loss.backward()
    return loss.item()


def adapter_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if ".meft." in name}


def masked(net: nn.Module, **settings: Any) -> nn.Module:
    """The adapted net with its adapters evaluated densely, by masks and plain autograd."""
    of_adapters = sizes(settings)
    gate, scope = of_adapters["gate"], of_adapters["scope"]

    def add(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        x, adapter = args[0].flatten(0, 1), module.meft
        active, top_k = of_adapters["active_experts"], of_adapters["top_k"]
        weights = adapter.keys, adapter.values, adapter.router
        return y + dense(x, *weights, active=active, top_k=top_k, gate=gate, scope=scope).view(y.shape)

    for module in list(net.modules()):
        if "meft" in module._modules:
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            module.register_forward_hook(add)
    return net


@contextmanager
def picked(module: nn.Module) -> Iterator[list[Picks]]:
    """What every call inside selects."""
    seen: list[Picks] = []
    plain = SparseAdapter._output

    def output(self: SparseAdapter, call: Any, rows: Fetched) -> Tensor:
        seen.append(rows.picks)
        return plain(self, call, rows)

    SparseAdapter._output = output  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        SparseAdapter._output = plain  # type: ignore[method-assign]
