"""Makes the strategies known to Lightning by name."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lightning_offload.strategies import DDP_STRATEGIES, STRATEGIES


def register() -> None:
    """Register every strategy of this package under its name (``full_offload``); harmless to repeat.

    ``import lightning_offload`` has done it already.
    """
    for strategy in STRATEGIES:
        StrategyRegistry.register(strategy.strategy_name, strategy, description=_summary(strategy), override=True)
    for several in DDP_STRATEGIES:
        for name, start in ((several.strategy_name, "popen"), (f"{several.strategy_name}_spawn", "spawn")):
            StrategyRegistry.register(name, several, description=_summary(several), override=True, start_method=start)


def _summary(strategy: type) -> str:
    return (strategy.__doc__ or "").strip().splitlines()[0]
