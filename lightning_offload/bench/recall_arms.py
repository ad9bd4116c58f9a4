"""Who learns facts in the bench of recall: adapters beside feed-forward networks, LoRA, and all weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW

from lightning_offload.bench.arms import not_installed
from lightning_offload.bench.quality_arms import PAPER_LORA, add_lora, add_meft, dense_adapter


@dataclass
class Trained:
    """What torch's own loop trains, counted with its weights.

    Attributes:
        optimizer: Carries the rate.
        on_device: What is trained there.
        on_host: What ``meft`` keeps on the host.
    """

    optimizer: AdamW
    on_device: list[nn.Parameter]
    on_host: list[nn.Parameter] = field(default_factory=list)

    def step(self, loss: Tensor) -> None:
        """One step."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def device_bytes(self) -> int:
        """Weights and moments on the device, once there was a step."""
        return self._bytes(self.on_device)

    @property
    def host_bytes(self) -> int:
        """Likewise, on the host."""
        return self._bytes(self.on_host)

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in (*self.on_device, *self.on_host))

    def _bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        kept = [(p, *self.optimizer.state[p].values()) for p in parameters]
        return sum(t.numel() * t.element_size() for own in kept for t in own if t.dim())


@dataclass(frozen=True, kw_only=True)
class RecallArm:
    """A way to train.

    Attributes:
        make: From the network, the rate and ``settings`` to what trains it.
        settings: By name.
        rate: Highest learning rate; chosen with seed 0 on validation facts.
        why_not: Why this machine cannot run it, if it cannot.
        note: What its name does not say.
    """

    make: Callable[..., Trained]
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: float
    why_not: Callable[[], str | None] = lambda: None
    note: str


def _all(network: Any, rate: float) -> Trained:
    parameters = list(network.parameters())
    return Trained(_adamw(parameters, rate), parameters)


def _lora(network: Any, rate: float, *, rank: int, alpha: int, targets: str | list[str]) -> Trained:
    added = add_lora(network, rank, alpha, targets)
    return Trained(_adamw(added, rate), added)


def _meft(network: Any, rate: float, *, on_host: bool = True, **settings: Any) -> Trained:
    """Plain torch on the adapters, which the engine equals bit for bit; bytes are those of ``placement="host"``."""
    rows, routers = add_meft(network, **settings)
    optimizer = _adamw(rows + routers, rate)
    return Trained(optimizer, routers, rows) if on_host else Trained(optimizer, rows + routers)


def _adamw(parameters: list[nn.Parameter], rate: float) -> AdamW:
    return AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)


def _meft_arm(width: int, experts: int, note: str, *, rate: float = 1.5e-3, **settings: Any) -> RecallArm:
    """A quarter of the experts and of the rows for each token, unless said otherwise."""
    usual = {"key_std": 0.1, "experts": experts, "active_experts": experts // 4, "top_k": width // 4}
    return RecallArm(make=_meft, settings={"width": width, **usual, **settings}, rate=rate, note=note)


def _dense_arm(width: int, rate: float, note: str) -> RecallArm:
    settings = {**dense_adapter(width), "key_std": 0.1, "on_host": False}
    return RecallArm(make=_meft, settings=settings, rate=rate, note=note)


def _lora_arm(rank: int, rate: float, note: str, *, alpha: int, targets: str | list[str] = "all-linear") -> RecallArm:
    settings = {"rank": rank, "alpha": alpha, "targets": targets}
    why_not = partial(not_installed, "peft", "peft")
    return RecallArm(
        make=_lora, settings=settings, rate=rate, why_not=why_not, note=f"rank {rank}, alpha {alpha}: {note}"
    )


_FEW = {"active_experts": 8, "top_k": 64}
QUARTER = "keys N(0, 0.1), a quarter of the rows for each token"

RECALL_ARMS: Mapping[str, RecallArm] = {
    "meft 256": _meft_arm(256, 64, QUARTER),
    "meft 512": _meft_arm(512, 64, QUARTER),
    "meft 1024": _meft_arm(1024, 128, QUARTER),
    "meft 2048": _meft_arm(2048, 128, QUARTER),
    "meft defaults 1024": _meft_arm(1024, 128, "its defaults: 64 rows for each token", **_FEW),
    "meft published 1024": _meft_arm(1024, 128, "likewise with keys N(0, 0.02)", rate=3e-3, **_FEW, key_std=0.02),
    "meft paper 1024": _meft_arm(1024, 128, f"variant='paper', {QUARTER}", rate=1e-2, variant="paper"),
    "dense 1024": _dense_arm(1024, 1e-2, "the parallel adapter, keys N(0, 0.1), all of it on the device"),
    "lora 7": _lora_arm(7, 6e-3, "all linears, the device bytes of meft 1024, or just above", alpha=14),
    "lora 41": _lora_arm(41, 3e-3, "all linears, the device bytes of meft 1024 while a step runs", alpha=82),
    "lora 112": _lora_arm(112, 3e-3, "all linears, trained parameters as meft 1024", alpha=224),
    "lora qv 32": _lora_arm(32, 1.2e-2, "q and v, the device bytes of meft 1024", **PAPER_LORA),
    "lora qv 544": _lora_arm(544, 1.2e-2, "q and v, trained parameters as meft 1024", **PAPER_LORA),
    "adamw": RecallArm(make=_all, rate=3e-3, note="all weights"),
}
"""By name, and what they add: rows or rank."""
