"""Who trains in the quality bench: the same weights by every method, and competitors of equal memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_offload.bench.arms import galore_why_not, not_installed, state_bytes
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.lanes import InlineLanes
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.lsp import LSP, LSPSettings
from lightning_offload.methods.meft import MEFTSettings
from lightning_offload.methods.sparse_adapter import attach_parameters

Loss = Callable[[], Tensor]


class Fit(Protocol):
    """A network that is being trained."""

    @property
    def optimizer(self) -> Optimizer:
        """Carries the rate."""
        ...

    @property
    def device_bytes(self) -> int:
        """Beside the network's own weights and gradients, after the first step."""
        ...

    @property
    def host_bytes(self) -> int:
        """Of what stays on the host."""
        ...

    def step(self, loss: Loss, calibration: Loss) -> None:
        """One optimizer step; ``calibration`` is of a batch that is not trained on."""
        ...

    def settle(self) -> None:
        """Make the network's weights those after the last step."""
        ...


@dataclass
class Plain:
    """What torch's own loop trains; everything is on the device."""

    optimizer: Optimizer
    added: list[nn.Parameter] = field(default_factory=list)
    host_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """Added weights, moments and projectors."""
        return sum(p.numel() * p.element_size() for p in self.added) + state_bytes(self.optimizer)

    def step(self, loss: Loss, calibration: Loss) -> None:
        """See ``Fit``."""
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settle(self) -> None:
        """Nothing is in flight."""


@dataclass
class Offloaded:
    """What the engine trains, host and device being one memory."""

    engine: Engine

    @property
    def optimizer(self) -> Optimizer:
        """Carries the rate."""
        return self.engine.optimizer

    @property
    def device_bytes(self) -> int:
        """Projectors, buffers of the link, and what is stepped on the device."""
        return self.engine.device_bytes

    @property
    def host_bytes(self) -> int:
        """The arenas."""
        return self.engine.host_bytes(self.engine.trained)

    def step(self, loss: Loss, calibration: Loss) -> None:
        """See ``Fit``."""
        if self.engine.calibration_due:
            self.engine.calibrate(lambda: calibration().backward())
        with self.engine.micro_batch():
            value = loss()
        self.engine.stepping = True
        value.backward()
        self.engine.step()

    def settle(self) -> None:
        """Have every update applied."""
        self.engine.flush()


@dataclass(frozen=True, kw_only=True)
class QualityArm:
    """A way to train, and the learning rate to look around.

    Attributes:
        make: From the network, the rate and ``settings`` to what trains it.
        settings: By name.
        rate: The method's usual one.
        base: The arm whose gain is all there is to gain: the same trained weights.
        why_not: Why this machine cannot run it, if it cannot.
        note: What its name does not say.
    """

    make: Callable[..., Fit]
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: float
    base: str = "adamw"
    why_not: Callable[[], str | None] = lambda: None
    note: str = ""


def block_linears(network: Any) -> list[nn.Parameter]:
    """The parameters that every arm trains: those of linear layers, without the head."""
    head = network.get_output_embeddings()
    linear = [part for part in network.modules() if isinstance(part, nn.Linear) and part is not head]
    return [weight for part in linear for weight in part.parameters(recurse=False)]


def only(network: nn.Module, trained: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Freeze everything else."""
    kept = list(trained)
    network.requires_grad_(False)
    for parameter in kept:
        parameter.requires_grad_()
    return kept


def _adamw(network: Any, rate: float) -> Fit:
    return Plain(AdamW(only(network, block_linears(network)), lr=rate, weight_decay=0.0, fused=True))


def _adamw_all(network: Any, rate: float) -> Fit:
    return Plain(AdamW(network.parameters(), lr=rate, weight_decay=0.0, fused=True))


def add_lora(network: Any, rank: int, alpha: int, targets: str | list[str]) -> list[nn.Parameter]:
    """Freeze the network and add LoRA to it; what there is to train."""
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    return [p for p in network.parameters() if p.requires_grad]


def _lora(
    network: Any, rate: float, *, rank: int, alpha: int | None = None, targets: str | list[str] = "all-linear"
) -> Fit:
    added = add_lora(network, rank, rank if alpha is None else alpha, targets)
    return Plain(AdamW(added, lr=rate, weight_decay=0.0, fused=True), added)


def _galore(network: Any, rate: float, **settings: Any) -> Fit:
    from galore_torch import GaLoreAdamW

    group = {"params": only(network, block_linears(network)), "proj_type": "std", **settings}
    return Plain(GaLoreAdamW([group], lr=rate, no_deprecation_warning=True))


def _lsp(network: Any, rate: float, **settings: Any) -> Fit:
    optimizer = AdamW(network.parameters(), lr=rate, weight_decay=0.0, fused=True)
    method = LSP(LSPSettings(seed=torch.initial_seed() % 2**63, **settings))
    return Offloaded(Engine(network, optimizer, method, InlineLanes(HostMemory(pin=False)), DTypes()))


def add_meft(network: nn.Module, **settings: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Freeze the network and add adapters to it; their rows, and the routers where they are trained."""
    asked = MEFTSettings(seed=torch.initial_seed() % 2**63, **settings).of_adapters()
    adapters = attach_parameters(network, **asked)
    rows = [p for adapter in adapters for p in (adapter.keys, adapter.values)]
    return rows, [adapter.router for adapter in adapters] if asked["gate"] == "logit" else []


def dense_adapter(width: int) -> dict[str, Any]:
    """Settings at which the adapter is the parallel one: every token uses all rows."""
    return {"width": width, "experts": 1, "active_experts": 1, "top_k": width, "gate": "none"}


def _meft(network: Any, rate: float, **settings: Any) -> Fit:
    rows, routers = add_meft(network, **settings)
    added = [*rows, *routers]
    return Plain(AdamW(added, lr=rate, weight_decay=0.0, fused=True), added)


def _meft_arm(width: int, rows: str = "its defaults", **settings: Any) -> QualityArm:
    note = f"width {width}, {rows}, resident; with placement='host' only routers are on the device"
    return QualityArm(make=_meft, settings={"width": width, **settings}, rate=1.5e-3, note=note)


def _dense_arm(width: int) -> QualityArm:
    return QualityArm(
        make=_meft, settings=dense_adapter(width), rate=3e-3, note=f"the parallel adapter of width {width}"
    )


def _lora_arm(rank: int, note: str, *, rate: float = 1.2e-2, **settings: Any) -> QualityArm:
    why_not, settings = partial(not_installed, "peft", "peft"), {"rank": rank, **settings}
    return QualityArm(make=_lora, settings=settings, rate=rate, why_not=why_not, note=f"rank {rank}: {note}")


def _galore_arm(rank: int, note: str) -> QualityArm:
    settings = {"rank": rank, "update_proj_gap": 50, "scale": 0.25}
    note = f"rank {rank}: {note}; projectors renewed every 50 steps"
    return QualityArm(make=_galore, settings=settings, rate=2.4e-2, why_not=galore_why_not, note=note)


def _lsp_arm(note: str, *, base: str = "adamw", **settings: Any) -> QualityArm:
    return QualityArm(make=_lsp, settings={"dim": 0.5, **settings}, rate=3e-3, base=base, note=note)


PAPER_LORA: Mapping[str, Any] = {"alpha": 16, "targets": ["q_proj", "v_proj"]}
"""As MEFT's authors ran it."""

DEVICE, BOTH = (
    "the device bytes of lsp_pca, or just above",
    "device bytes as lsp_pca's on device and host, or above",
)

QUALITY_ARMS: Mapping[str, QualityArm] = {
    "adamw": QualityArm(make=_adamw, rate=3e-3, note="on the linear weights of the blocks, all others frozen"),
    "adamw_all": QualityArm(make=_adamw_all, rate=3e-3, base="adamw_all", note="on all weights"),
    "lsp_learned": _lsp_arm("fitted values at random positions", projector="learned", others="frozen"),
    "lsp_pca": _lsp_arm("closed form in blocks", projector="pca", others="frozen"),
    "lsp_block": _lsp_arm("random in blocks", projector="block", others="frozen"),
    "lsp_paper": _lsp_arm("preset='paper'", preset="paper", others="frozen"),
    "lsp_others": _lsp_arm("default projectors; AdamW on all other weights", base="adamw_all"),
    "lora_device": _lora_arm(7, DEVICE),
    "lora_total": _lora_arm(27, BOTH),
    "galore_device": _galore_arm(12, DEVICE),
    "galore_total": _galore_arm(49, BOTH),
    "meft_512": _meft_arm(512),
    "meft_1024": _meft_arm(1024),
    "meft_quarter": _meft_arm(1024, "a quarter of the rows for each token", active_experts=32, top_k=256),
    "lora_meft_512": _lora_arm(56, "trained parameters as meft_512", rate=6e-3),
    "lora_meft_1024": _lora_arm(112, "trained parameters as meft_1024", rate=3e-3),
    "dense_512": _dense_arm(512),
    "dense_1024": _dense_arm(1024),
    "lora_meft_step": _lora_arm(41, "the device bytes of meft_1024 while a step runs", rate=6e-3),
    "lora_qv_device": _lora_arm(32, "q and v, alpha 16, the device bytes of meft_1024", rate=2.4e-2, **PAPER_LORA),
    "lora_qv_meft": _lora_arm(544, "q and v, alpha 16, parameters as meft_1024", rate=2.4e-2, **PAPER_LORA),
}
"""By name; weight decay is 0 in all of them."""
