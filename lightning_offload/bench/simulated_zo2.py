"""``zo2`` on OPT models as ZO2's authors ran it (arXiv 2503.12668): planned memory beside theirs, and planned steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from lightning_offload.bench.report import Row, Table
from lightning_offload.memory.budget import Machine
from lightning_offload.methods.zo2 import ZO2Settings
from lightning_offload.planning.methods import ZEROTH
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.text import CausalLM, batch_by_shape

PUBLISHED_GB = {
    "opt_1b3": 3.75,
    "opt_2b7": 4.14,
    "opt_6b7": 4.99,
    "opt_13b": 6.18,
    "opt_30b": 8.86,
    "opt_66b": 12.07,
    "opt_175b": 18.04,
}
"""Device memory in use that ZO2's repository gives for fp16 and 1 x 2048 tokens; host memory for 175B: 600 GB."""

LENGTH = 2048
LEAST_CHUNK = 128
"""Tokens whose logits exist at the same time, where memory is what counts."""


def scenario(
    config: dict[str, Any], machine: Machine, *, chunk: int = 1024, batch: int = 1, **changed: Any
) -> Scenario:
    """One of these trainings.

    Args:
        config: The model by shape.
        machine: With rates.
        chunk: Tokens of a chunk of the loss.
        batch: Sequences of 2048 tokens.
        changed: Settings of the method.
    """
    sgd = partial(torch.optim.SGD, lr=1e-6)
    with torch.device("meta"):
        module = CausalLM(config=config, init="random", dtype="float16", loss_chunk_tokens=chunk, optimizer=sgd)
        tokens = batch_by_shape(batch, LENGTH, 1)
    settings = ZO2Settings(seed=0, **changed)
    return Scenario(module, tokens, machine, method=ZEROTH, settings=settings, precision="16-true")


def beside_zo2(
    shape: Callable[[str], dict[str, Any]], machines: dict[str, Machine], models: Sequence[str] = tuple(PUBLISHED_GB)
) -> Iterator[Table]:
    """Memory of all models, then the steps on each machine.

    Args:
        shape: The config of a model by its name in ``conf/model``.
        machines: By name.
        models: Of ``PUBLISHED_GB``.
    """
    first = next(iter(machines.values()))
    yield Table(
        "published_zo2",
        f"zo2, fp16, 1 x {LENGTH} tokens: GB",
        tuple(Row(name, _memory(shape(name), first) | {"published": PUBLISHED_GB[name]}) for name in models),
        ("simulated, not measured; context and the allocator's rounding included",),
    )
    for where, machine in machines.items():
        made = {name: Dry(scenario(shape(name), machine)) for name in models}
        yield Table(
            "published_zo2",
            f"zo2 on {where}, fp16, 1 x {LENGTH} tokens",
            tuple(Row(name, _step(dry)) for name, dry in made.items()),
            (
                *(f"{name} does not fit" for name, dry in made.items() if not (dry.device.fits and dry.host.fits)),
                "simulated, not measured; in memory: the same arithmetic with all weights on the device, whether or "
                "not they fit; break-even: tokens per step from which on it is as fast as that",
            ),
        )


def _memory(config: dict[str, Any], machine: Machine) -> dict[str, float]:
    dry = Dry(scenario(config, machine, chunk=LEAST_CHUNK))
    plain = Dry(scenario(config, machine))
    held = dry.device.holds
    return {
        "slots": held.get("slots", 0) / 1e9,
        "scratch": held.get("scratch", 0) / 1e9,
        "resident": held.get("resident weights", 0) / 1e9,
        f"device_chunks_of_{LEAST_CHUNK}": dry.device.bytes / 1e9,
        "device": plain.device.bytes / 1e9,
        "host": dry.host.bytes / 1e9,
    }


def _step(dry: Dry) -> dict[str, float]:
    plan = dry.plan()
    timing, tokens = dry.timing, plan.tokens
    fixed_s = timing.compute_s - timing.module_s  # noise and updates do not grow with tokens
    return {
        "step_s": plan.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "link_s": plan.lanes["h2d"].busy_s if "h2d" in plan.lanes else 0.0,
        "bound_s": plan.bound_s,
        "percent_of_bound": 100 * plan.bound_s / plan.step_s,
        "in_memory_s": timing.compute_s,
        "noise_s": fixed_s,
        "break_even_tokens": tokens * (plan.bound_s - fixed_s) / timing.module_s,
    }
