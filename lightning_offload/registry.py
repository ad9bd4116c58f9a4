"""Makes the strategies known to Lightning by name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_offload.behaviour import OffloadBehaviour
from lightning_offload.ranks import SeveralDevices
from lightning_offload.strategies import DDP_STRATEGIES, STRATEGIES


def register() -> None:
    """Register every strategy of this package under its name (``full_offload``); harmless to repeat.

    ``import lightning_offload`` has done it already.
    """
    for strategy in (*STRATEGIES, *DDP_STRATEGIES):
        register_one(strategy)


def register_one(strategy: type[OffloadBehaviour[Any]]) -> None:
    """The same of one; of one for several devices also under ``<name>_spawn``."""
    summary = _summary(strategy)
    if not issubclass(strategy, SeveralDevices):
        StrategyRegistry.register(strategy.strategy_name, strategy, description=summary, override=True)
        return
    for name, start in ((strategy.strategy_name, "popen"), (f"{strategy.strategy_name}_spawn", "spawn")):
        StrategyRegistry.register(name, strategy, description=summary, override=True, start_method=start)


def _summary(strategy: type) -> str:
    return (strategy.__doc__ or "").strip().splitlines()[0]
