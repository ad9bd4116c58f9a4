"""Compiles the fused kernel for an H100, which takes no GPU; a script, for it puts another driver under Triton."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from lightning_offload.numerics import noise_kernel
from lightning_offload.numerics.noise import Distribution, Draw
from lightning_offload.numerics.zeroth import DTYPES, Copy, Rounding, Update

DISTRIBUTIONS: tuple[Distribution, ...] = ("popcount", "gaussian", "rademacher")
PLACES, DIRECTIONS, STEPS = (0, 1, 2, 16), (0, 1), range(1, 17)


class NoGpu:
    """Of Triton's driver what compiling asks for."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (0, 0, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 227 * 1024}
    )
    launcher_cls = staticmethod(lambda *_: None)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Compiled:
    """Stands for the kernel: compiles as a launch would, and keeps which binary that launch would take."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.taken = kernel, set[str]()

    def __getitem__(self, grid: tuple[int]) -> Any:
        return partial(self._compile, grid)

    def _compile(self, grid: tuple[int], *args: Any, **options: Any) -> None:
        self.taken.add(self.kernel.warmup(*args, grid=grid, **options).hash)


def draws(count: int) -> list[list[Draw]]:
    """For ``count`` updates and the copies: words that are 0, 1, 2, multiples of 16, and any."""
    everywhere = itertools.product(PLACES, DIRECTIONS, STEPS)
    return [[Draw(5, step + k, place, direction) for k in range(count + 1)] for place, direction, step in everywhere]


def binaries(
    kernel: Compiled, dtype: torch.dtype, distribution: Distribution, rounding: Rounding, updates: int, copies: int
) -> int:
    """How many of them ``updates`` updates and ``copies`` copies take, whatever is drawn and by how much it counts."""
    kernel.taken.clear()
    weight, plus, minus = torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=dtype), torch.zeros(64)
    for at, (*before, draw) in enumerate(draws(updates)):
        number = (0, 1, 16, 0.3)[at % 4]  # a rate of 1 need not be a float
        entries = [Update(each, number, number, number) for each in before]
        made = [Copy(1e-3, plus), Copy(-1e-3, minus)][:copies]
        noise_kernel.launch(weight, entries, draw, made, distribution, rounding)
    return len(kernel.taken)


def everything() -> None:
    """One binary for each number of updates and copies, of every dtype, distribution and rounding."""
    from triton.runtime import driver

    driver.set_active(NoGpu())
    kernel = Compiled(noise_kernel._kernel())
    noise_kernel._kernel = lambda: kernel  # type: ignore[assignment]
    counts = [(updates, copies) for updates in range(3) for copies in range(3) if updates or copies]
    most = [(noise_kernel.MOST_UPDATES, 2)]
    for dtype, distribution in itertools.product(DTYPES, DISTRIBUTIONS):
        roundings: tuple[Rounding, ...] = ("nearest", "stochastic") if dtype != torch.float32 else ("nearest",)
        for rounding, (updates, copies) in itertools.product(roundings, counts + most * (distribution == "popcount")):
            found = binaries(kernel, dtype, distribution, rounding, updates, copies)
            assert found == 1, (dtype, distribution, rounding, updates, copies, found)


if __name__ == "__main__":
    everything()
    print("one binary each")
