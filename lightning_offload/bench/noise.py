"""What counter-based noise costs on the CPU, by torch's operations and compiled, beside torch's own generator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from lightning_offload.bench.measure import ratio, round_robin, timed
from lightning_offload.bench.report import Row, Table
from lightning_offload.methods.zo2 import ZO2Settings
from lightning_offload.numerics.mezo import MezoSequence, mezo_plus
from lightning_offload.numerics.native import Kernels
from lightning_offload.numerics.noise import Draw, noise, random_bits
from lightning_offload.numerics.zeroth import Copy, Update, advance_, perturb, update_

_BASE = "torch.normal, fp32"


def noise_cost(numel: int, rounds: int) -> Table:
    """Draws, perturbations and updates of a bf16 weight, with the threads that torch has now.

    Args:
        numel: elements of the weight.
        rounds: each runs every arm once.

    Returns:
        Per arm ``ns_per_element``, its median over rounds, and its ratio to torch's own draw.
    """
    weight = torch.zeros(numel, dtype=torch.bfloat16)
    out, draw = torch.empty_like(weight), Draw(0, 1, 0)
    updates = [Update(draw, 1.0, 1e-6, 0.1)]
    mezo = MezoSequence([((numel,), torch.bfloat16)], "cpu")
    arms: dict[str, Callable[[], object]] = {
        _BASE: lambda: torch.normal(0.0, 1.0, (numel,)),
        "popcount": lambda: noise(draw, 0, numel, "popcount", device="cpu"),
        "gaussian": lambda: noise(draw, 0, numel, "gaussian", device="cpu"),
        "rademacher": lambda: noise(draw, 0, numel, "rademacher", device="cpu"),
        "bits for stochastic rounding": lambda: random_bits(draw, 0, numel, device="cpu"),
        "MeZO perturbs, bf16": lambda: mezo_plus(weight, mezo.z(0, 0), 1e-3),
        "perturb, bf16, popcount": lambda: perturb(weight, draw, 1e-3, out, "popcount"),
        "update, bf16, popcount, nearest": lambda: update_(weight, updates, "popcount", "nearest"),
        "update, bf16, popcount, stochastic": lambda: update_(weight, updates, "popcount", "stochastic"),
    }
    kernels = ZO2Settings().kernels
    if kernels is not None:
        arms |= _compiled(weight, out, kernels)
    samples, _ = round_robin({name: timed(arm) for name, arm in arms.items()}, rounds)
    rows = tuple(
        Row(name, {"ns_per_element": median(own) / numel * 1e9, **ratio(own, samples[_BASE])}, tuple(own))
        for name, own in samples.items()
    )
    return Table("noise", f"noise, {numel / 1e6:.1f} M elements, {torch.get_num_threads()} threads", rows)


def _compiled(weight: Tensor, out: Tensor, kernels: Kernels) -> dict[str, Callable[[], object]]:
    draw, other = Draw(0, 1, 0), torch.empty_like(out)
    updates = [Update(draw, 1.0, 1e-6, 0.1)]
    copies = [Copy(1e-3, out), Copy(-1e-3, other)]
    arms: dict[str, Callable[[], object]] = {}
    for name in ("popcount", "gaussian", "rademacher"):
        one = partial(advance_, weight, (), draw, copies[:1], name, "nearest", kernels)
        arms[f"perturb, bf16, {name}, compiled"] = one
    arms |= {
        "both signs, bf16, popcount, compiled": partial(
            advance_, weight, (), draw, copies, "popcount", "nearest", kernels
        ),
        "update, bf16, popcount, nearest, compiled": partial(update_, weight, updates, "popcount", "nearest", kernels),
        "update, bf16, popcount, stochastic, compiled": partial(
            update_, weight, updates, "popcount", "stochastic", kernels
        ),
        "update and both signs, bf16, popcount, compiled": partial(
            advance_, weight, updates, draw, copies, "popcount", "nearest", kernels
        ),
    }
    return arms
