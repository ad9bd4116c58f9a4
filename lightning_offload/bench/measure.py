"""Turns, medians and ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles, stdev
from time import perf_counter
from typing import Any, TypeVar

T = TypeVar("T")


class CannotRun(Exception):  # noqa: N818  # an answer, not an error
    """This machine, or what is installed on it, cannot run an arm; the message says why."""


@dataclass(frozen=True)
class Spread:
    """The middle of some values, and where their middle half lies.

    Attributes:
        median: Of the values.
        low: First quartile.
        high: Third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """One value is its own middle half."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)


def round_robin(arms: Mapping[str, Callable[[], T]], rounds: int) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Every round runs every arm once; a first round comes before and does not count.

    Returns:
        What each arm returned, round by round; and why an arm was left out from some round on.
    """
    results: dict[str, list[T]] = {name: [] for name in arms}
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            if name in failed:
                continue
            try:
                result = arm()
            except CannotRun as why:
                failed[name] = str(why)
                del results[name]
                continue
            if turn:
                results[name].append(result)
    return results, failed


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """``function``, which then returns its seconds."""

    def run() -> float:
        start = perf_counter()
        function()
        return perf_counter() - start

    return run


def ratio(samples: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """How much longer than ``base``, round by round: ``ratio``, and ``ratio_low`` and ``ratio_high`` around it."""
    spread = Spread.of([own / other for own, other in zip(samples, base, strict=True)])
    return {"ratio": spread.median, "ratio_low": spread.low, "ratio_high": spread.high}


def seed_spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 where there is none."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
