"""Leaving: a Hugging Face folder that loads elsewhere, and the weights of a Lightning checkpoint."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_offload.agreement import Change, compare_logits, compare_values
from lightning_offload.checkpoint import compare_adapters, compare_weights, reason
from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.folders import written_whole
from lightning_offload.lora import has_peft, merged
from lightning_offload.memory.shards import INDEX
from lightning_offload.methods.meft import adapters_of
from lightning_offload.methods.sparse_adapter import ADAPTER, SparseAdapter, backbone_names
from lightning_offload.stock import bare, is_wrapped, stock_model

_GIB = 1024**3
_FILES = (
    "generation_config.json",
    "*.safetensors",
    INDEX,
    "tokenizer*.json",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
"""What transformers writes of a model and its tokenizer, beside ``config.json``."""


def export_to_hf(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_gib: float = 2.0,
    dtype: torch.dtype | None = None,
    merge_lora: bool = False,
) -> Path:
    """Write a Hugging Face folder, reload it and compare; nothing appears at ``path`` unless logits and weights agree.

    The folder is written beside ``path`` and renamed, so a kill leaves what was there before. Shards are written
    one after another and tied weights once. Peak host memory is one shard; the model that is reloaded to be compared
    stays in the files, unless the model is on a GPU, which then holds a second copy.

    Args:
        module: A transformers ``PreTrainedModel`` with any head, or a module with one in it, such as a ``CausalLM``.
        path: The folder to write. An earlier export there is replaced.
        tokenizer: Saved with the model. Default: ``module.tokenizer``, if there is one.
        max_shard_gib: Largest size of one ``.safetensors`` file, in GiB.
        dtype: Floating-point dtype to store. Default: each weight's own.
        merge_lora: Whether LoRA adapters of PEFT are added to the weights that they are beside, in the folder alone:
            ``module`` is not changed.

    Returns:
        The folder.

    Raises:
        TypeError: ``module`` holds no transformers model.
        ValueError: ``max_shard_gib`` is not above 0.
        FileExistsError: ``path`` holds something that is no exported model, or a file that is of none.
        OffloadError: What was reloaded differs; both values are in the message. Or there are adapters in the model,
            which no stock architecture has; or the disk is full.
    """
    if not max_shard_gib > 0:
        raise ValueError(f"max_shard_gib={max_shard_gib}: `max_shard_gib` must be above 0")
    module.state_dict()  # before which an engine waits for all that is on its way
    target, network = Path(path), stock_model(module)
    _refuse_adapters(module, merge_lora=merge_lora)
    change = _changed(merged(network) if merge_lora else _as_it_is, dtype)
    plain = bare(network) if merge_lora or is_wrapped(network) else network
    tokenizer = tokenizer if tokenizer is not None else getattr(module, "tokenizer", None)
    files = [*_FILES, *getattr(tokenizer, "vocab_files_names", {}).values()]
    with (
        written_whole(target, mark="config.json", what="exported model", files=files) as staging,
        _without_progress_bars(),
    ):
        plain.save_pretrained(staging, max_shard_size=int(max_shard_gib * _GIB * _narrower(plain, dtype)))
        if dtype is not None or merge_lora:
            _rewrite(staging, change)
        if dtype is not None:
            _edit_json(staging / "config.json", {"dtype": str(dtype).removeprefix("torch.")})
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        reloaded = _reload(network, staging)
        compare_logits(network, reloaded, what="model", rounds=merge_lora)
        compare_values(plain.state_dict(), reloaded.state_dict(), what="model", change=change)
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
        raise CheckpointError(
            f"{os.fspath(checkpoint)!r} cannot be read as a checkpoint; it may have been cut off while it was "
            f"written, so use an earlier one ({reason(error)})"
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


def map_weights(module: nn.Module, checkpoint: str | os.PathLike[str]) -> bool:
    """Have a module whose weights are on the meta device those of a checkpoint, in its dtypes; they stay in the file.

    Returns:
        Whether all weights are there now: of a checkpoint of adapters alone the others are not.
    """
    module.load_state_dict(check_weights(module, checkpoint), strict=False, assign=True)
    stock_model(module).tie_weights()
    return not any(parameter.is_meta for parameter in module.parameters())


def _refuse_adapters(module: nn.Module, *, merge_lora: bool) -> None:
    if has_adapters(module):
        raise OffloadError(
            f"this {type(module).__name__} has sparse adapters, and transformers would leave them out when it loads "
            "the folder: write them beside it with `save_meft_adapter(model, folder)`; where they are an exact part of "
            "its feed-forward networks, `merge_meft_adapter(model)` puts them there before `export_to_hf`"
        )
    if has_peft(module) and not merge_lora:
        raise OffloadError(
            f"this {type(module).__name__} has adapters of PEFT: write them with `save_peft_adapter(model, folder)`, "
            "or the model with LoRA added to its weights with `export_to_hf(model, folder, merge_lora=True)`"
        )


def _as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _changed(change: Change, dtype: torch.dtype | None) -> Change:
    def change_and_cast(name: str, tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return change(name, tensor).to(wanted)

    return change_and_cast


def _narrower(network: nn.Module, dtype: torch.dtype | None) -> float:
    """How much larger files may be before weights are cast."""
    sizes = [p.element_size() for p in network.parameters() if p.is_floating_point()]
    return min(sizes) / dtype.itemsize if dtype is not None and sizes else 1.0


def _rewrite(folder: Path, change: Change) -> None:
    """Shard by shard: changing weights before saving would hold a second model in memory."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    total_bytes = 0
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors = {name: change(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # no mapping
        total_bytes += sum(t.nbytes for t in tensors.values())
        other = shard.with_suffix(".changed")  # a file that is mapped is not written into
        save_file(tensors, other, metadata={"format": "pt"})
        del tensors
        other.replace(shard)
    index = folder / INDEX
    if index.exists():
        metadata = json.loads(index.read_text())["metadata"]
        _edit_json(index, {"metadata": {**metadata, "total_size": total_bytes}})


def _edit_json(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=2) + "\n")


def _reload(network: Any, folder: Path) -> Any:
    """As it is stored, so that weights stay in the files where the model is in host memory."""
    return (
        type(network)
        .from_pretrained(folder, dtype="auto", attn_implementation=network.config._attn_implementation)
        .to(network.device)
    )


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
