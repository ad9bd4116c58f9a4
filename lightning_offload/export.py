"""Leaving: a Hugging Face folder that loads elsewhere, and the weights of a Lightning checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_offload.checkpoint import compare_adapters, compare_weights
from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.folders import written_whole
from lightning_offload.methods.meft import adapters_of
from lightning_offload.methods.sparse_adapter import ADAPTER, SparseAdapter, backbone_names

_GIB = 1024**3
_CHECK_SHAPE = (2, 16)
_SAME_DTYPE_TOLERANCE = 1e-5
_ROUNDINGS = 16  # of the coarser dtype's epsilon: what a cast may move a logit by, relative to the largest


def export_to_hf(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_gib: float = 2.0,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a Hugging Face folder, reload it and compare logits; nothing appears at ``path`` unless they agree.

    The folder is written beside ``path`` and renamed, so a kill leaves what was there before. Shards are written
    one after another and tied weights once. Peak host memory is one shard while writing; the check then holds a
    second copy of the model, on the model's own device.

    Args:
        module: A ``CausalLM`` (anything with ``.network``) or a transformers ``PreTrainedModel``.
        path: The folder to write. An earlier export there is replaced.
        tokenizer: Saved with the model. Default: ``module.tokenizer``, if there is one.
        max_shard_gib: Largest size of one ``.safetensors`` file, in GiB.
        dtype: Floating-point dtype to store. Default: each weight's own.

    Returns:
        The folder.

    Raises:
        TypeError: ``module`` holds no transformers model.
        FileExistsError: ``path`` holds something that is no exported model.
        OffloadError: The reloaded logits differ; both values are in the message. Or there are adapters in it, which
            no stock architecture has.
    """
    target = Path(path)
    network = _network_of(module)
    _refuse_adapters(network)
    tokenizer = tokenizer if tokenizer is not None else getattr(module, "tokenizer", None)
    with written_whole(target, mark="config.json", what="exported model") as staging, _without_progress_bars():
        network.save_pretrained(staging, max_shard_size=int(max_shard_gib * _GIB))
        if dtype is not None:
            _cast_folder(staging, dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _check_logits(network, staging)
    return target


def has_adapters(module: nn.Module) -> bool:
    """Whether there are sparse adapters in ``module``."""
    return any(isinstance(part, SparseAdapter) for part in module.modules())


def read_checkpoint(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a Lightning checkpoint, memory-mapped, without running code stored in it.

    Raises:
        CheckpointError: The file is missing, damaged or no Lightning checkpoint.
    """
    if not os.path.isfile(checkpoint):
        raise CheckpointError(f"no checkpoint at {os.fspath(checkpoint)!r}")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{os.fspath(checkpoint)!r} cannot be read as a checkpoint; it may have been cut off while it was "
            f"written, so use an earlier one ({reason})"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{os.fspath(checkpoint)!r} is no Lightning checkpoint: it has no 'state_dict'")
    return content


def check_weights(module: nn.Module, checkpoint: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the checkpoint's weights, having checked that they are this module's by name, shape and settings.

    Of a checkpoint of adapters alone (``MEFTOffloadStrategy(adapter_only=True)``) they are all but the backbone.

    Raises:
        CheckpointError: As for `read_checkpoint`, or the first tensor or settings in which checkpoint and model differ.
    """
    content, own, source = read_checkpoint(checkpoint), module.state_dict(), repr(os.fspath(checkpoint))
    stored: dict[str, Tensor] = dict(content["state_dict"])
    for adapter in adapters_of(module)[:1]:
        compare_adapters(asdict(adapter.settings), content, source=source)
    backbone = backbone_names(module)
    if backbone.isdisjoint(stored) and any(ADAPTER in name for name in stored):
        own = {name: value for name, value in own.items() if name not in backbone}
    compare_weights(own, stored, source=source)
    return stored


def load_weights(module: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Copy the weights of a Lightning checkpoint into a fresh module of the same shape (see `check_weights`)."""
    module.load_state_dict(check_weights(module, checkpoint), strict=False)


def _network_of(module: nn.Module) -> Any:
    network = getattr(module, "network", module)
    if not hasattr(network, "save_pretrained"):
        raise TypeError(
            "`export_to_hf` needs a transformers model, or a module with one at `.network`; "
            f"got {type(module).__name__}"
        )
    return network


def _refuse_adapters(network: nn.Module) -> None:
    if has_adapters(network):
        raise OffloadError(
            f"this {type(network).__name__} has sparse adapters, and transformers would leave them out when it loads "
            "the folder: write them beside it with `save_meft_adapter(model, folder)`; where they are an exact part of "
            "its feed-forward networks, `merge_meft_adapter(model)` puts them there before `export_to_hf`"
        )


def _cast_folder(folder: Path, dtype: torch.dtype) -> None:
    """Rewrite shard by shard: casting before saving would hold a second model in memory."""
    from safetensors.torch import load_file, save_file

    total_bytes = 0
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(shard).items()}
        total_bytes += sum(t.nbytes for t in tensors.values())
        save_file(tensors, shard, metadata={"format": "pt"})
    _edit_json(folder / "config.json", {"dtype": str(dtype).removeprefix("torch.")})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        metadata = json.loads(index.read_text())["metadata"]
        _edit_json(index, {"metadata": {**metadata, "total_size": total_bytes}})


def _edit_json(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=2) + "\n")


def _check_logits(network: Any, folder: Path) -> None:
    reloaded = (
        type(network)
        .from_pretrained(folder, dtype="auto", attn_implementation=network.config._attn_implementation)
        .to(network.device)
    )
    compare_logits(network, reloaded, what="model")


def compare_logits(network: Any, reloaded: Any, *, what: str, dtype: torch.dtype | None = None) -> None:
    """Compare what two models make of some tokens.

    Args:
        network: As it was exported.
        reloaded: As it came back.
        what: Was exported.
        dtype: To which some of it was rounded.

    Raises:
        OffloadError: They differ by more than rounding does, or are not finite.
    """
    _take_rounded_buffers(network, reloaded)
    vocabulary = network.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, _CHECK_SHAPE, generator=torch.Generator().manual_seed(0))
    expected, got = (_logits(model, tokens) for model in (network, reloaded))
    if not expected.isfinite().all():
        raise OffloadError("the model's logits are not finite, so its training diverged; nothing was exported")
    worst = int((expected - got).abs().argmax())
    want, have = expected.flatten()[worst].item(), got.flatten()[worst].item()
    allowed = _tolerance(network.dtype, dtype or reloaded.dtype) * expected.abs().max().item()
    if not abs(want - have) <= allowed:
        raise OffloadError(
            f"the exported {what} differs after reloading: logit {want:.6g} became {have:.6g}, allowed is a "
            f"difference of {allowed:.2g}; nothing was exported"
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


def _tolerance(before: torch.dtype, after: torch.dtype) -> float:
    if before == after:
        return _SAME_DTYPE_TOLERANCE
    return _ROUNDINGS * max(torch.finfo(before).eps, torch.finfo(after).eps)


@torch.no_grad()
def _logits(network: Any, tokens: Tensor) -> Tensor:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        logits: Tensor = network(input_ids=tokens.to(network.device), use_cache=False).logits
    finally:
        for module, training in modes.items():
            module.training = training
    return logits.float().cpu()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
