"""full: exact AdamW, offloaded. What every other method is judged by, and the safe default.

``W <- AdamW(W, G)`` as ``torch.optim.AdamW(fused=True)`` does it, on fp32 masters, with the state, the masters and
the arithmetic on the host. Gradients go down during backward; once the last norm is known the host steps, lowest
unit first, and each unit's new weights go up; the next forward waits per unit, for its own arrival only. Source:
ZeRO-Offload (arXiv 2101.06840); differs from it in overlapping the host step with the next forward without ever
using a stale weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.budget import Machine
from lightning_offload.methods.base import DTypes, Rounding, Trained
from lightning_offload.methods.method import Site, resolve_common
from lightning_offload.methods.rules import Rule
from lightning_offload.methods.sender import Sender
from lightning_offload.methods.settings import GradientSettings


@dataclass(frozen=True, kw_only=True)
class FullSettings(GradientSettings):
    """Settings of ``full``: those that all methods have."""


class Full:
    """The method ``full``: claims nothing, for the common path is exact."""

    name: ClassVar[str] = "full"
    layer_wise: ClassVar[bool] = False
    shards: ClassVar[bool] = True
    rounding: ClassVar[Rounding] = "nearest"

    def __init__(self, settings: FullSettings) -> None:
        self.settings = settings

    def resolve(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        machine: Machine,
        dtypes: DTypes,
        *,
        accumulates: bool,
        before: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """See ``Method.resolve``."""
        self.settings, reasons = resolve_common(
            self.settings, units, machine, dtypes, accumulates=accumulates, before=before
        )
        return reasons

    def decisive(self) -> dict[str, Any]:
        """See ``Method.decisive``."""
        return {"accumulate": self.settings.accumulate}

    def claim(self, module: nn.Module, units: Sequence[Unit]) -> set[int]:
        """See ``Method.claim``."""
        return set()

    def stays(self, module: nn.Module) -> set[int]:
        """See ``Method.stays``."""
        return set()

    def leaves_frozen(self) -> bool:
        """See ``Method.leaves_frozen``."""
        return False

    def host_bytes(self, claimed: Sequence[Trained], rule: Rule, dtypes: DTypes) -> int:
        """See ``Method.host_bytes``."""
        return 0

    def make_part(self, claimed: Sequence[Trained], site: Site) -> Sender | None:
        """See ``Method.make_part``."""
        return None
