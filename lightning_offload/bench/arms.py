"""What is measured: the methods, plain Lightning, and the peers that are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_offload.bench.bounds import Counts, full_bound_s, lsp_bound_s, zo2_bound_s
from lightning_offload.bench.measure import CannotRun
from lightning_offload.memory.rates import Rates
from lightning_offload.strategies import (
    FullOffloadStrategy,
    LSPOffloadStrategy,
    MEFTOffloadStrategy,
    ZO2OffloadStrategy,
)
from lightning_offload.text import CausalLM

LR = 1e-4
RANK = 16
"""Of the adapters."""

GALORE_RANK = 256
"""As GaLore's authors run it up to 1B parameters; they take 1024 for 7B."""


def _plain(module: CausalLM) -> Optimizer:
    return AdamW([p for p in module.parameters() if p.requires_grad], lr=LR, fused=True)


def _sgd(module: CausalLM) -> Optimizer:
    return SGD([p for p in module.parameters() if p.requires_grad], lr=1e-6)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train.

    Attributes:
        name: In the table.
        strategy: Makes what the Trainer gets.
        prepare: Changes the network before training.
        optimizer: Made from the module, once its weights are where they are trained.
        steps_itself: The optimizer is not one that Lightning can drive: the module steps it.
        clips: Whether clipping of gradients has an effect.
        why_not: Why this machine cannot run it, if it cannot.
        bound_s: Least seconds of a step, for a method that has such a bound.
        note: What has to be known beside its numbers.
    """

    name: str
    strategy: Callable[[], Any] = lambda: "auto"
    prepare: Callable[[CausalLM], None] = lambda module: None
    optimizer: Callable[[CausalLM], Optimizer] = _plain
    steps_itself: bool = False
    clips: bool = True
    why_not: Callable[[], str | None] = lambda: None
    bound_s: Callable[[Counts, Rates], float] | None = None
    note: str = ""

    def require(self) -> None:
        """Raises ``CannotRun`` where this machine cannot run it."""
        why = self.why_not()
        if why is not None:
            raise CannotRun(why)


NATIVE = Arm(name="native: plain Trainer, AdamW(fused=True)")
METHODS = (
    Arm(name="full_offload", strategy=FullOffloadStrategy, bound_s=full_bound_s),
    Arm(name="lsp_offload", strategy=LSPOffloadStrategy, bound_s=lsp_bound_s),
    Arm(name="zo2_offload", strategy=ZO2OffloadStrategy, optimizer=_sgd, bound_s=zo2_bound_s),
    Arm(name="meft_offload", strategy=MEFTOffloadStrategy, note="trains adapters of 1,024 rows, not the weights"),
)
"""One arm per method of this package."""


def not_installed(module: str, package: str) -> str | None:
    """Why an arm that takes this package cannot run, if it cannot."""
    return None if find_spec(module) else f"not installed (pip install {package})"


def _torchao_why_not() -> str | None:
    if not torch.cuda.is_available():
        return "runs on CUDA and XPU devices alone"
    return not_installed("torchao", "torchao")


def _torchao(module: CausalLM) -> Optimizer:
    from torchao.optim import CPUOffloadOptimizer

    made: Optimizer = CPUOffloadOptimizer(list(module.parameters()), AdamW, offload_gradients=True, lr=LR, fused=True)
    return made


def galore_why_not() -> str | None:
    """The same of GaLore."""
    missing = not_installed("galore_torch", "galore-torch")
    return missing or not_installed("bitsandbytes", "bitsandbytes")  # which its import takes, whatever is used


def _galore(module: CausalLM) -> Optimizer:
    """Projects the linear weights within the blocks, as its authors do.

    The projectors are drawn, not fitted: an SVD per matrix would take minutes and comes once in 200 steps, and the
    time of all other steps depends on the shape alone. Two fields of its state make it take them as those of step 1.
    """
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    outside = [part for part in module.network.modules() if isinstance(part, nn.Embedding)]
    ends = {id(part.weight) for part in (*outside, module.network.get_output_embeddings())}
    projected = [p for p in module.parameters() if p.ndim == 2 and id(p) not in ends]
    others = [p for p in module.parameters() if p.ndim != 2 or id(p) in ends]
    settings = {"rank": GALORE_RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    made: Optimizer = GaLoreAdamW(
        [{"params": others}, {"params": projected, **settings}], lr=LR, no_deprecation_warning=True
    )
    for weight in projected:
        projector = GaLoreProjector(**settings)
        projector.ortho_matrix = _drawn_projector(weight, GALORE_RANK)
        made.state[weight] = {"step": 1, "projector": projector}
    return made


def _drawn_projector(weight: Tensor, rank: int) -> Tensor:
    """Orthogonal, of the shape that GaLore takes for this weight: on the shorter side."""
    rows, columns = weight.shape
    shorter, rank = min(rows, columns), min(rank, rows, columns)
    drawn: Tensor = torch.linalg.qr(torch.randn(shorter, rank, device=weight.device))[0].to(weight.dtype)
    return drawn.t().contiguous() if rows >= columns else drawn


def _add_lora(module: CausalLM) -> None:
    """Adapters on every linear weight within the blocks; the network stays a transformers model."""
    from peft import LoraConfig

    module.network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))


PEERS = (
    Arm(
        name="torchao CPUOffloadOptimizer",
        optimizer=_torchao,
        steps_itself=True,
        clips=False,
        why_not=_torchao_why_not,
        note="offload_gradients=True, which excludes clipping and accumulation; moments in the weights' dtype",
    ),
    Arm(
        name=f"GaLore AdamW, rank {GALORE_RANK}",
        optimizer=_galore,
        why_not=galore_why_not,
        note="steps between two renewals of the projectors (an SVD of every matrix, each 200 steps); not its quality",
    ),
    Arm(
        name=f"LoRA, rank {RANK}, all linears",
        prepare=_add_lora,
        why_not=lambda: not_installed("peft", "peft"),
        note="trains adapters, not the weights",
    ),
)
_EVERYTHING_GIB = 1e6
IN_MEMORY = (
    Arm(
        name="zo2, everything on the device",
        strategy=partial(ZO2OffloadStrategy, resident=_EVERYTHING_GIB),
        optimizer=_sgd,
        note="two forwards and no backward; a step of zo2 teaches far less than one of the others",
    ),
    Arm(
        name="the same, rademacher noise",
        strategy=partial(ZO2OffloadStrategy, resident=_EVERYTHING_GIB, distribution="rademacher"),
        optimizer=_sgd,
    ),
    Arm(
        name="zo2, everything on the device, native='off'",
        strategy=partial(ZO2OffloadStrategy, resident=_EVERYTHING_GIB, native="off"),
        optimizer=_sgd,
        note="noise by torch's operations",
    ),
    Arm(
        name="MeZO: everything on the device, noise='mezo'",
        strategy=partial(ZO2OffloadStrategy, resident=_EVERYTHING_GIB, noise="mezo"),
        optimizer=_sgd,
        note="MeZO's arithmetic bit for bit, on this engine",
    ),
)
"""What streaming costs zo2, and what counter-based noise does."""

ARMS = (NATIVE, *METHODS, *IN_MEMORY, *PEERS)


def state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors in an optimizer's state, projectors included; 0 where it keeps them elsewhere."""
    return sum(t.numel() * t.element_size() for own in getattr(optimizer, "state", {}).values() for t in _tensors(own))


def _tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    for value in state.values():
        tensor = getattr(value, "ortho_matrix", value)
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
            yield tensor
