"""What each method takes of device and host, by the size of the model: planned, on no machine in particular."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lightning_offload.bench.report import Row, Table
from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.methods.meft import MEFTSettings
from lightning_offload.planning.methods import FULL, NATIVE, SPARSE, SUBSPACE, ZEROTH, default_optimizer, settings_of
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.text import CausalLM, batch_by_shape

SIZES = ("opt_1b3", "llama_7b", "opt_13b", "llama3_70b", "opt_175b")
METHODS = (NATIVE, FULL, SUBSPACE, SPARSE, ZEROTH)
LENGTH = 1024


def sizes(
    shape: Callable[[str], dict[str, Any]], machine: Machine, models: Sequence[str] = SIZES, length: int = LENGTH
) -> Iterator[Table]:
    """A table of device memory and one of host memory, a row per method.

    Args:
        shape: The config of a model by its name in ``conf/model``.
        machine: With rates and a GPU; how much memory it has does not matter.
        models: By these names.
        length: Tokens of the one sequence in a step.
    """
    dries = {
        (method, name): Dry(_scenario(method, shape(name), machine, length)) for method in METHODS for name in models
    }
    how = f"bf16-true, 1 x {length} tokens, blocks computed again in backward, defaults; meft with its rows on the host"
    for place in ("device", "host"):
        rows = (
            Row(method, {name: getattr(dries[method, name], place).bytes / GIB for name in models})
            for method in METHODS
        )
        yield Table("sizes", f"{place} memory, GiB", tuple(rows), (f"planned, not measured: {how}",))


def _scenario(method: str, config: dict[str, Any], machine: Machine, length: int) -> Scenario:
    with torch.device("meta"):
        module = CausalLM(
            config=config,
            init="random",
            dtype="bfloat16",
            gradient_checkpointing=method != ZEROTH,
            optimizer=default_optimizer(method),
        )
        tokens = batch_by_shape(1, length, 1)
    settings = MEFTSettings(placement="host") if method == SPARSE else settings_of(method)()
    return Scenario(module, tokens, machine, method=method, settings=settings, precision="bf16-true")
