"""Whether what was written is the model that it was written from: by its logits, and value by value."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_offload.errors import OffloadError

Change = Callable[[str, Tensor], Tensor]
"""From the name and the value of a weight to what is stored."""

_CHECK_SHAPE = (2, 16)
_SAME_DTYPE_TOLERANCE = 1e-5
_ROUNDINGS = 16  # of the coarser dtype's epsilon: what a cast may move a logit by, relative to the largest


def compare_logits(
    network: Any, reloaded: Any, *, what: str, dtype: torch.dtype | None = None, rounds: bool = False
) -> None:
    """Compare what two models make of some tokens.

    Args:
        network: As it was exported.
        reloaded: As it came back.
        what: Was exported.
        dtype: To which some of it was rounded.
        rounds: Whether weights have been added up, and so rounded, even where dtypes are the same.

    Raises:
        OffloadError: They differ by more than rounding does, or are not finite.
    """
    _take_rounded_buffers(network, reloaded)
    tokens = _tokens(network)
    if tokens is None:  # no model of text: its weights are compared
        return
    expected, got = (_outputs(model, tokens) for model in (network, reloaded))
    if not expected.isfinite().all():
        raise OffloadError("the model's logits are not finite, so its training diverged; nothing was exported")
    worst = int((expected - got).abs().nan_to_num(torch.inf).argmax())
    want, have = expected.flatten()[worst].item(), got.flatten()[worst].item()
    allowed = _tolerance(network.dtype, dtype or reloaded.dtype, rounds=rounds) * expected.abs().max().item()
    if not abs(want - have) <= allowed:
        raise OffloadError(
            f"the exported {what} differs after reloading: logit {want:.6g} became {have:.6g}, allowed is a "
            f"difference of {allowed:.2g}; nothing was exported"
        )


def compare_values(own: Mapping[str, Tensor], reloaded: Mapping[str, Tensor], *, what: str, change: Change) -> None:
    """Compare all weights, bit for bit: logits of some tokens depend on few rows of an embedding, on few experts.

    Args:
        own: As they were exported; one at a time is changed and compared.
        reloaded: As they came back.
        what: Was exported.
        change: What was done to them on the way.

    Raises:
        OffloadError: Some differ; names the first.
    """
    for name in [*own, *(name for name in reloaded if name not in own)]:
        if name not in own or name not in reloaded:
            where = "it" if name in reloaded else "the trained one"
            raise OffloadError(
                f"the exported {what} differs after reloading: `{name}` is in {where} alone; nothing was exported"
            )
        here, there = change(name, own[name].detach()), reloaded[name].detach()
        if not torch.equal(here.to(there.dtype), there.to(here.device)):
            raise OffloadError(
                f"the exported {what} differs after reloading: values of `{name}` have changed on the way; nothing was "
                "exported"
            )


def _take_rounded_buffers(network: Any, reloaded: Any) -> None:
    """Let the check compare weights: what a folder does not hold, it cannot restore in another dtype.

    Lightning's ``bf16-true`` also rounds buffers that are computed from the config, such as rotary frequencies.
    """
    own, fresh = dict(network.named_buffers()), dict(reloaded.named_buffers())
    for name in sorted(own.keys() & fresh.keys() - network.state_dict().keys()):
        if own[name].dtype != fresh[name].dtype:
            warnings.warn(
                f"buffer {name!r} is {own[name].dtype} in the trained model and {fresh[name].dtype} in the exported "
                "one, as its config says; their logits differ by what that rounds",
                stacklevel=2,
            )
            fresh[name].data = own[name].data


def _tolerance(before: torch.dtype, after: torch.dtype, *, rounds: bool) -> float:
    if before == after and not rounds:
        return _SAME_DTYPE_TOLERANCE
    return max(_ROUNDINGS * max(torch.finfo(before).eps, torch.finfo(after).eps), _SAME_DTYPE_TOLERANCE)


def _tokens(network: Any) -> Tensor | None:
    if getattr(network, "main_input_name", "input_ids") != "input_ids":
        return None
    vocabulary = len(network.get_input_embeddings().weight)
    return torch.randint(vocabulary, _CHECK_SHAPE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _outputs(network: Any, tokens: Tensor) -> Tensor:
    """Logits, or whatever a model without a head gives first; one sequence at a time, as padding has to be told."""
    modes = {module: module.training for module in network.modules()}
    taken = inspect.signature(network.forward).parameters
    network.eval()
    try:
        outputs = []
        for row in tokens.to(network.device).split(1):
            more: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
            if getattr(network.config, "is_encoder_decoder", False):
                more["decoder_input_ids"] = row
            outputs.append(network(input_ids=row, return_dict=True, **more))
    finally:
        for module, training in modes.items():
            module.training = training
    first = [output["logits"] if "logits" in output else output[0] for output in outputs]
    return torch.cat([values.float().cpu() for values in first])
