"""Amounts as people read them."""

from __future__ import annotations

from lightning_offload.memory.budget import GIB

MIB = 1024**2


def count(number: float) -> str:
    """``1.92 M``, ``8.03 B``: three digits, and what they count in."""
    for name, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{_digits(number / scale)} {name}"
    return f"{number:,.0f}"


def flop_rate(flops_per_s: float) -> str:
    """``63.0 GFLOP/s``, ``10.2 TFLOP/s``."""
    name, scale = ("T", 1e12) if flops_per_s >= 1e12 else ("G", 1e9)
    return f"{_digits(flops_per_s / scale)} {name}FLOP/s"


def seconds(seconds: float) -> str:
    """``210 ms``, ``5.57 s``."""
    return f"{_digits(seconds)} s" if seconds >= 1 else f"{_digits(seconds * 1e3)} ms"


def gigabytes(nbytes: float) -> str:
    """``53.6 MB``, ``16.1 GB``."""
    return f"{_digits(nbytes / 1e9)} GB" if nbytes >= 1e9 else f"{_digits(nbytes / 1e6)} MB"


def size(nbytes: float) -> str:
    """``134.0 MiB``, ``19.59 GiB``."""
    unit = memory_unit(nbytes)
    return f"{in_unit(nbytes, unit)} {unit}"


def size_of_limit(nbytes: float, limit_bytes: float | None) -> str:
    """``19.59 of 23.50 GiB``; the limit left out where it is not known."""
    if limit_bytes is None:
        return size(nbytes)
    unit, limit_unit = memory_unit(nbytes), memory_unit(limit_bytes)
    own = in_unit(nbytes, unit) if unit == limit_unit else size(nbytes)
    return f"{own} of {size(limit_bytes)}"


def memory_unit(nbytes: float) -> str:
    """The unit in which a size is read best."""
    return "GiB" if nbytes >= 0.995 * GIB else "MiB"


def in_unit(nbytes: float, unit: str) -> str:
    """The number alone."""
    if unit == "GiB":
        return f"{nbytes / GIB:,.2f}"
    return f"{nbytes / MIB:,.1f}"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}"
