"""Learning-rate schedules as factories, for configs: ``scheduler(optimizer, total_steps=...)``.

`CausalLM` fills in ``total_steps`` with the Trainer's estimate where the config leaves it open.
"""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_decay(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up, then linear decay that would reach 0 one step after the last."""
    return wsd(optimizer, total_steps=total_steps, warmup_steps=warmup_steps, decay=1.0)


def wsd(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, decay: float = 0.5) -> LambdaLR:
    """Warm-up, stable, decay: the rate rises linearly, stays, and falls linearly over the last share of the steps.

    Args:
        optimizer: whose groups' rates are the peak.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of the rise; the first step already moves.
        decay: share of `total_steps` spent falling, in (0, 1].
    """
    if total_steps < 1 or not 0 < decay <= 1 or warmup_steps < 0:
        raise ValueError(
            f"A schedule needs total_steps >= 1, warmup_steps >= 0 and 0 < decay <= 1;"
            f" got total_steps={total_steps}, warmup_steps={warmup_steps}, decay={decay}."
        )

    def factor(step: int) -> float:
        rise = (step + 1) / (warmup_steps + 1)
        fall = (total_steps - step) / (total_steps * decay)
        return max(0.0, min(1.0, rise, fall))

    return LambdaLR(optimizer, factor)
