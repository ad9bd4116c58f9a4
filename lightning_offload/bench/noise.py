"""What counter-based noise costs on the CPU without a compiler, beside torch's own generator."""

from __future__ import annotations

from statistics import median

import torch

from lightning_offload.bench.measure import ratio, round_robin, timed
from lightning_offload.bench.report import Row, Table
from lightning_offload.numerics.mezo import MezoSequence, mezo_plus
from lightning_offload.numerics.noise import Draw, noise, random_bits
from lightning_offload.numerics.zeroth import Update, perturb, update_

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
    arms = {
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
    samples, _ = round_robin({name: timed(arm) for name, arm in arms.items()}, rounds)
    rows = tuple(
        Row(name, {"ns_per_element": median(own) / numel * 1e9, **ratio(own, samples[_BASE])}, tuple(own))
        for name, own in samples.items()
    )
    return Table("noise", f"noise, {numel / 1e6:.1f} M elements, {torch.get_num_threads()} threads", rows)
