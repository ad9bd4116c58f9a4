"""Fine-tune language models that do not fit on the GPU, from PyTorch Lightning, by changing one argument.

Importing this package registers its strategies: ``Trainer(strategy="lsp_offload")``. For the Trainer of
``pytorch_lightning``, import that first, or ``lightning_offload.pl``.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lightning_offload.callbacks import OffloadStats, OffloadSummary
from lightning_offload.method_mixins import LSPMixin, MEFTMixin, ZO2Mixin
from lightning_offload.mixins import OffloadMixin
from lightning_offload.precision import OffloadPrecision
from lightning_offload.registry import register
from lightning_offload.strategies import (
    FullOffloadDDPStrategy,
    FullOffloadStrategy,
    LSPOffloadDDPStrategy,
    LSPOffloadStrategy,
    MEFTOffloadDDPStrategy,
    MEFTOffloadStrategy,
    ZO2OffloadDDPStrategy,
    ZO2OffloadStrategy,
)
from lightning_offload.tracing import OffloadTimeline

if TYPE_CHECKING:
    from lightning_offload.adapters import load_meft_adapter, save_meft_adapter
    from lightning_offload.export import export_to_hf
    from lightning_offload.lora import save_peft_adapter
    from lightning_offload.merging import merge_meft_adapter
    from lightning_offload.methods.full import FullSettings
    from lightning_offload.methods.lsp import LSPSettings
    from lightning_offload.methods.meft import MEFTSettings
    from lightning_offload.methods.zo2 import ZO2Settings
    from lightning_offload.own_method import OffloadDDPStrategy, OffloadStrategy
    from lightning_offload.planning import Plan, draw_schedules, plan
    from lightning_offload.replaying import replay

__version__ = "0.1.0"
__all__ = [
    "FullOffloadDDPStrategy",
    "FullOffloadStrategy",
    "FullSettings",
    "LSPMixin",
    "LSPOffloadDDPStrategy",
    "LSPOffloadStrategy",
    "LSPSettings",
    "MEFTMixin",
    "MEFTOffloadDDPStrategy",
    "MEFTOffloadStrategy",
    "MEFTSettings",
    "OffloadDDPStrategy",
    "OffloadMixin",
    "OffloadPrecision",
    "OffloadStats",
    "OffloadStrategy",
    "OffloadSummary",
    "OffloadTimeline",
    "Plan",
    "ZO2Mixin",
    "ZO2OffloadDDPStrategy",
    "ZO2OffloadStrategy",
    "ZO2Settings",
    "draw_schedules",
    "export_to_hf",
    "load_meft_adapter",
    "merge_meft_adapter",
    "plan",
    "register",
    "replay",
    "save_meft_adapter",
    "save_peft_adapter",
]

_HOME = {
    "FullSettings": "methods.full",
    "LSPSettings": "methods.lsp",
    "MEFTSettings": "methods.meft",
    "OffloadDDPStrategy": "own_method",
    "OffloadStrategy": "own_method",
    "Plan": "planning",
    "ZO2Settings": "methods.zo2",
    "draw_schedules": "planning",
    "export_to_hf": "export",
    "load_meft_adapter": "adapters",
    "merge_meft_adapter": "merging",
    "plan": "planning",
    "replay": "replaying",
    "save_meft_adapter": "adapters",
    "save_peft_adapter": "lora",
}

register()
if "pytorch_lightning" in sys.modules:
    importlib.import_module("lightning_offload.pl")


def __getattr__(name: str) -> Any:
    """Names that only a few need are imported when asked for."""
    if name not in _HOME:
        raise AttributeError(f"module `lightning_offload` has no attribute `{name}`")
    return getattr(importlib.import_module(f"lightning_offload.{_HOME[name]}"), name)
