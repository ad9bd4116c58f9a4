"""full: exact AdamW, offloaded. What every other method is judged by, and the safe default.

``W <- AdamW(W, G)`` as ``torch.optim.AdamW(fused=True)`` does it, on fp32 masters, with the state, the masters and
the arithmetic on the host. Gradients go down during backward; once the last norm is known the host steps, lowest
unit first, and each unit's new weights go up; the next forward waits per unit, for its own arrival only. Source:
ZeRO-Offload (arXiv 2101.06840); differs from it in overlapping the host step with the next forward without ever
using a stale weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_offload.methods.method import Method
from lightning_offload.methods.settings import GradientSettings


@dataclass(frozen=True, kw_only=True)
class FullSettings(GradientSettings):
    """Settings of ``full``: those that all methods have."""


class Full(Method):
    """The method ``full``: claims nothing, for the common path is exact."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "full"
    settings_type: ClassVar[type[GradientSettings]] = FullSettings
