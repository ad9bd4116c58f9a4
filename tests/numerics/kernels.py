"""The fused kernel beside the torch form: on a device, or as a script in Triton's interpreter."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_offload.numerics.noise import Distribution, Draw, noise
from lightning_offload.numerics.noise_kernel import BLOCK, MOST_UPDATES, launch
from lightning_offload.numerics.zeroth import DTYPES, Copy, Rounding, Update, advance_

SEED = 2**63 + 5  # a key and a seed whose upper bits are set
EXACT: tuple[Distribution, ...] = ("popcount", "rademacher")
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
Result = tuple[Tensor, ...]


def weights(dtype: torch.dtype, numel: int) -> Tensor:
    """Some of them subnormal in fp16."""
    wide = torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 0.02
    wide[: numel // 8] *= 1e-4
    return wide.to(dtype)


def updates(count: int) -> list[Update]:
    """Some without decay, one without a gradient, one without a rate."""
    return [Update(Draw(SEED, k, 7, k % 2), 1.7 * (k % 5), 1e-3 * (k % 4), 0.1 * (k % 2)) for k in range(count)]


def agree(
    device: torch.device, dtype: torch.dtype, distribution: Distribution, rounding: Rounding, count: int, copies: int
) -> None:
    """The same bits from ``count`` updates and ``copies`` perturbed copies, one in fp32, and none beyond the end."""
    numel, draw = 2 * BLOCK + 77, Draw(SEED, count, 7, 1)
    found, expected = (_made(dtype, numel, where) for where in (device, torch.device("cpu")))
    for (weight, *outs), form in ((found, launch), (expected, advance_)):
        made = [Copy(scale, out) for scale, out in zip((1e-3, -1e-3), outs, strict=True)]
        form(
            weight[:numel],
            updates(count),
            draw,
            [Copy(m.scale, m.out[:numel]) for m in made][:copies],
            distribution,
            rounding,
        )
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own.cpu(), other), (dtype, distribution, rounding, count, copies)


def _made(dtype: torch.dtype, numel: int, device: torch.device) -> Result:
    wide = weights(dtype, numel + 9)
    return wide.to(device), torch.zeros_like(wide).to(device), torch.zeros(numel + 9, device=device)


def gaussian_is_near(device: torch.device) -> None:
    """Within a few ulps of the largest values."""
    zero, out, draw = torch.zeros(50_000, device=device), torch.empty(50_000, device=device), Draw(SEED, 1, 7)
    launch(zero, (), draw, [Copy(1.0, out)], "gaussian", "nearest")
    expected = noise(draw, 0, 50_000, "gaussian", device="cpu")
    assert (out.cpu() - expected).abs().max() < 4e-6
    assert not zero.any()


def everything(device: torch.device) -> None:
    """All dtypes, distributions and roundings; only updates, only copies, both; more updates than one launch has."""
    for dtype, distribution, rounding in itertools.product(DTYPES, EXACT, ROUNDINGS):
        agree(device, dtype, distribution, rounding, 2, 2)
    for count, copies in ((0, 1), (0, 2), (1, 0), (MOST_UPDATES + 2, 1), (0, 0)):
        agree(device, torch.bfloat16, "popcount", "stochastic", count, copies)
    agree(device, torch.float16, "popcount", "nearest", MOST_UPDATES, 2)
    gaussian_is_near(device)
    launch(torch.zeros(0, device=device), updates(1), None, (), "popcount", "nearest")


if __name__ == "__main__":
    everything(torch.device("cpu"))
    print("the same bits")
