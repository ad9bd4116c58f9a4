"""A run of `zo2` from its log: the weights that it began with, and every update since, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_offload.errors import CheckpointError
from lightning_offload.methods.base import Rounding
from lightning_offload.methods.noises import MezoNoise, Noise, PhiloxNoise
from lightning_offload.methods.settings import CommonSettings
from lightning_offload.methods.steplog import Entry, Header, hash_weights, load_log
from lightning_offload.methods.streaming import Leaf
from lightning_offload.numerics.native import settle
from lightning_offload.numerics.noise import Distribution

Module = TypeVar("Module", bound=nn.Module)
Log = str | os.PathLike[str] | tuple[Header, Sequence[Entry]]


@torch.no_grad()
def replay(base: Module, log: Any) -> Module:
    """Rebuild the weights of a ``zo2`` run from those that it began with and its log.

    ::

        model = replay(AutoModelForCausalLM.from_pretrained("facebook/opt-13b"), "finetune.log")

    The base may be in any dtype that rounds to the run's: fp32 weights, or the 16-bit ones that the run made of them.
    Beside ``base`` it needs one parameter's memory.

    Args:
        base: The module with the weights that the run began with, or the model inside the one that was trained:
            parameters are matched by order and shape. Changed in place: dtypes become those in which the run kept its
            weights.
        log: The path of a log (``ZO2OffloadStrategy(log_file=...)``), a strategy that has fitted with one, or a header
            and its entries.

    Returns:
        ``base``.

    Raises:
        CheckpointError: The log is damaged (position, what can be used), or belongs to other weights; nothing was
            changed then.
    """
    header, entries = _read(log)
    leaves = _leaves(base, header)
    found = hash_weights(_rounded(leaves))
    if found != header.base:
        raise CheckpointError(
            f"The log belongs to other weights: it began with those of hash {header.base}, `base` has {found} (rounded "
            "to the dtypes of the run). Load the weights that the run began with, before any training."
        )
    device = _device(header, leaves)
    for leaf, rounded in zip(leaves, _rounded(leaves), strict=True):
        leaf.parameter.data = rounded
    trained = [leaf for leaf in leaves if leaf.group is not None]
    noise = _noise(header, trained, device)
    # MeZO's z of a parameter comes after those of all before it: step by step, each is drawn once
    for some in [[entry] for entry in entries] if header.noise == "mezo" else [entries]:
        for leaf in trained:
            weight = leaf.parameter.data.to(device if device is not None else leaf.parameter.device).reshape(-1)
            noise.apply(leaf, weight, some)
            leaf.parameter.data = weight.view(leaf.parameter.shape).to(leaf.parameter.device)
    return base


def _read(log: Any) -> tuple[Header, Sequence[Entry]]:
    if isinstance(log, str | os.PathLike):
        return load_log(Path(log))
    if isinstance(log, tuple):
        return log
    engine = getattr(log, "engine", None)
    if not hasattr(engine, "header"):
        raise CheckpointError(
            f"`log` is a path, a strategy that has fitted by `zo2`, or a header and its entries; got "
            f"{type(log).__name__}"
        )
    return engine.header(), engine.log  # type: ignore[union-attr]


def _leaves(base: nn.Module, header: Header) -> list[Leaf]:
    """The parameters of ``base`` under the log's names.

    Raises:
        CheckpointError: They are not those of the log.
    """
    parameters = list(base.parameters())
    wanted = list(header.shapes.items())
    if len(parameters) != len(wanted):
        raise CheckpointError(
            f"The log belongs to another model: it has {len(wanted)} parameters, `base` has {len(parameters)}"
        )
    for parameter, (name, shape) in zip(parameters, wanted, strict=True):
        if tuple(parameter.shape) != shape:
            raise CheckpointError(
                f"The log belongs to another model: its `{name}` is {shape}, in `base` the parameter in that place is "
                f"{tuple(parameter.shape)}"
            )
    group_of = {name: index for index, names in enumerate(header.groups) for name in names}
    return [
        Leaf(name, parameter, place, group_of.get(name), _dtype(header.stored[name]), torch.empty(0))
        for place, (parameter, (name, _)) in enumerate(zip(parameters, wanted, strict=True))
    ]


def _rounded(leaves: Sequence[Leaf]) -> Iterator[Tensor]:
    """One at a time: two copies of a model may not fit."""
    for leaf in leaves:
        yield leaf.parameter.data.to(leaf.compute)


def _noise(header: Header, trained: Sequence[Leaf], device: torch.device | None) -> Noise:
    if header.noise == "mezo":
        return MezoNoise(trained, header.eps, device or torch.device("cpu"))
    distribution, rounding = cast(Distribution, header.distribution), cast(Rounding, header.rounding)
    kernels = CommonSettings().kernels
    if distribution == "gaussian" and header.compiled != (kernels is not None):
        if header.compiled:
            raise CheckpointError(
                "The log was written with compiled kernels, whose `gaussian` noise has bits of its own, and they are "
                f"not to be had here: {settle('auto')[1]}"
            )
        kernels = None
    return PhiloxNoise(0, header.eps, distribution, rounding, kernels)  # every entry has the seed


def _device(header: Header, leaves: Sequence[Leaf]) -> torch.device | None:
    """Where z must be drawn; None: wherever a weight is.

    Raises:
        CheckpointError: There is none of the kind here.
    """
    if header.device is None:
        return None
    here = [leaf.parameter.device for leaf in leaves if leaf.parameter.device.type == header.device]
    if here:
        return here[0]
    if header.device == "cuda" and not torch.cuda.is_available():
        kind = header.noise if header.noise == "mezo" else header.distribution
        raise CheckpointError(
            f"The log was written on a CUDA GPU, and `{kind}` noise has other bits on the CPU: replay it on a GPU."
        )
    return torch.device(header.device)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
