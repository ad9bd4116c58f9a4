"""The list of features: a title, a function that tries it, and for each strategy whether it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest

from lightning_offload.strategies import STRATEGIES
from tests.features.arm import Arm

NAMES = tuple(kind.strategy_name for kind in STRATEGIES)
REGISTERED: list[Feature] = []


@dataclass(frozen=True)
class Refusal:
    """What a strategy says instead.

    Attributes:
        error: The exception; of a Warning: it goes on without.
        message: Regular expression; has the way out.
        reason: For the README: why, and what to do.
    """

    error: type[Exception] | tuple[type[Exception], ...]
    message: str
    reason: str


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    Attributes:
        title: As users know it, in Markdown.
        run: Tries it, and asserts what can be seen of it.
        refused: By the name of the strategy.
    """

    title: str
    run: Callable[[Arm], None]
    refused: Mapping[str, Refusal]

    def check(self, arm: Arm) -> None:
        """It works, or is refused as registered."""
        refusal = self.refused.get(arm.name)
        if refusal is None:
            self.run(arm)
            return
        with warnings.catch_warnings():
            if isinstance(refusal.error, type) and issubclass(refusal.error, Warning):
                warnings.filterwarnings("error", category=refusal.error, message=f"(?s).*{refusal.message}")
            with pytest.raises(refusal.error, match=f"(?s){refusal.message}"):
                self.run(arm)


def feature(
    title: str, everywhere: Refusal | None = None, **refused: Refusal
) -> Callable[[Callable[[Arm], None]], Callable[[Arm], None]]:
    """Register the function below under ``title``; the others say where, or ``everywhere``, it is refused."""

    def register(run: Callable[[Arm], None]) -> Callable[[Arm], None]:
        REGISTERED.append(Feature(title, run, dict.fromkeys(NAMES, everywhere) if everywhere else refused))
        return run

    return register


def feature_rows(features: Sequence[Feature]) -> list[str]:
    """The README's table: works, or the number of the reason why not."""
    numbers = {reason: number for number, reason in enumerate(_reasons(features), start=1)}
    rows = []
    for known in features:
        cells = [f"no: {numbers[known.refused[n].reason]}" if n in known.refused else "yes" for n in NAMES]
        rows.append(f"| {known.title} | {' | '.join(cells)} |")
    return rows


def refusal_rows(features: Sequence[Feature]) -> list[str]:
    """What the numbers stand for."""
    return [f"| {number} | {reason} |" for number, reason in enumerate(_reasons(features), start=1)]


def _reasons(features: Sequence[Feature]) -> list[str]:
    """Each once, in the order of the table."""
    found = [known.refused[name].reason for known in features for name in NAMES if name in known.refused]
    return list(dict.fromkeys(found))
