"""Adapters as files: a folder in the form of PEFT's, and back onto a model, for which no Trainer is needed.

``adapter_model.safetensors`` holds ``base_model.model.<feed-forward network>.meft.{keys,values,router}``,
``adapter_config.json`` what they are and what they belong to. PEFT itself refuses the type: ``KeyError: 'MEFT'``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_offload.agreement import compare_logits
from lightning_offload.checkpoint import compare_weights
from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.folders import written_whole
from lightning_offload.memory.hashing import digest
from lightning_offload.methods.ffn import FFN, find_ffns
from lightning_offload.methods.sparse_adapter import AdapterSettings, SparseAdapter, attach_parameters
from lightning_offload.stock import bare, is_stock

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TYPE = "MEFT"
_PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
_SAMPLE = 1024  # values of each parameter

Module = TypeVar("Module", bound=nn.Module)


def save_meft_adapter(module: nn.Module, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
    """Write the adapters of a model; a causal language model's are loaded again and compared by logits.

    The folder is written beside and renamed; nothing appears unless logits agree. The model beside which the adapters
    were trained is not written: it has not changed, and the folder tells it from others by a hash of its names, its
    shapes and 1024 values of each parameter.

    Args:
        module: Has adapters: a transformers model, or any module around one. While it is fitted give the
            LightningModule, so that no update is still on its way.
        folder: To write. An earlier adapter there is replaced.
        dtype: To store. Default: each weight's own; rows that were trained are float32.

    Returns:
        The folder.

    Raises:
        ValueError: ``module`` has no adapters.
        FileExistsError: ``folder`` holds something that is no adapter.
        OffloadError: The logits differ after loading, or are not finite.
    """
    from safetensors.torch import save_file

    module.state_dict()  # before which an engine waits for all that is on its way
    network, target = network_of(module), Path(folder)
    adapters = adapters_by_path(network)
    if not adapters:
        raise ValueError(
            f"this {type(module).__name__} has no adapters to save: a fit by `meft_offload` puts them on it, and so "
            "does `load_meft_adapter`"
        )
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in _named(adapters)}
    with written_whole(target, mark=CONFIG, what="adapter", files=[WEIGHTS]) as staging:
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        (staging / CONFIG).write_text(json.dumps(_describe(network, adapters, tensors), indent=2) + "\n")
        if _is_checked(network, adapters):
            compare_logits(network, load_meft_adapter(bare(network), staging), what="adapter", dtype=dtype)
    return target


def load_meft_adapter(model: Module, folder: str | os.PathLike[str], *, check_base: bool = True) -> Module:
    """Put adapters from a folder on the model that they were trained beside.

    ::

        model = load_meft_adapter(AutoModelForCausalLM.from_pretrained("facebook/opt-1.3b"), "my_adapter")
        model.generate(**inputs)

    Rows take the dtype that they are stored in and the device of the feed-forward network that they are beside; it
    computes in its own dtype. Where the model has adapters with these settings, they take the values.

    Args:
        model: In evaluation or in training mode, which stays; or a LightningModule around it, to train on. All but
            the adapters is frozen.
        folder: Written by ``save_meft_adapter``.
        check_base: Whether ``model`` must have the weights that the adapters were trained beside.

    Returns:
        ``model``.

    Raises:
        CheckpointError: ``folder`` holds no such adapter, a damaged one, or one of another model. Nothing has been
            put on ``model`` then.
        ValueError: ``model`` has adapters with other settings.
    """
    files = _read(Path(folder))
    network = network_of(model)
    before = adapters_by_path(network)
    _refuse_engine(before.values())
    if check_base:
        _check_base(network, files)
    ffns = _ffns(network, files)
    expected = {
        f"{_PREFIX}{ffn.path.replace(_COMPILED, '')}.meft.{name}": torch.empty(rows, ffn.hidden_size, device="meta")
        for ffn in ffns
        for name, rows in (
            ("keys", files.settings.width),
            ("values", files.settings.width),
            ("router", files.settings.experts),
        )
    }
    compare_weights(expected, files.tensors, source=f"The adapter in {files.folder}")
    _check_values(files)
    attach_parameters(network, targets=_pattern(ffn.path for ffn in ffns), layers="named", **asdict(files.settings))
    for name, parameter in _named(adapters_by_path(network)):
        stored = files.tensors[name].to(parameter.device)
        parameter.data = stored if not before else stored.to(parameter.dtype)
    return model


def network_of(module: nn.Module) -> Any:
    """The transformers model in ``module``: the first in which all its adapters are; without one ``module``."""
    own = {id(part) for part in module.modules() if isinstance(part, SparseAdapter)}
    for part in module.modules():
        if is_stock(part) and own <= {id(child) for child in part.modules()}:
            return part
    return module


def adapters_by_path(network: nn.Module) -> dict[str, SparseAdapter]:
    """The adapters in ``network`` by the paths of the feed-forward networks that they are beside."""
    return {
        name.removesuffix("meft").removesuffix(".").replace(_COMPILED, ""): part
        for name, part in network.named_modules()
        if isinstance(part, SparseAdapter)
    }


def adapted_ffns(network: nn.Module) -> list[FFN]:
    """The feed-forward networks that adapters are beside."""
    paths = [name for name, part in network.named_modules() if isinstance(part._modules.get("meft"), SparseAdapter)]
    return find_ffns(network, targets=_pattern(paths), layers="named")


def fingerprint(network: nn.Module, dtype: torch.dtype) -> str:
    """Of names, shapes and some values of all parameters but adapters', whatever the dtype that they are in.

    Args:
        network: The model.
        dtype: To which values are rounded, before they are rounded to bfloat16: the one in which the adapters were
            trained.
    """
    own = {id(p) for adapter in adapters_by_path(network).values() for p in adapter.parameters()}
    total = hashlib.blake2b(digest_size=16)
    for name, parameter in network.named_parameters():
        if id(parameter) in own:
            continue
        total.update(f"{name.replace(_COMPILED, '')} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        some = flat[len(flat) // 2 :][:_SAMPLE].cpu()  # the first rows of an embedding are seldom trained
        if some.is_floating_point():
            some = some.to(dtype).bfloat16()
        if len(some):
            total.update(digest(some.contiguous().view(torch.uint8)))
    return total.hexdigest()


@dataclass(frozen=True, eq=False)
class _Files:
    """What is in a folder."""

    folder: str
    config: Mapping[str, Any]
    settings: AdapterSettings
    tensors: Mapping[str, Tensor]


def _named(adapters: Mapping[str, SparseAdapter]) -> Iterator[tuple[str, nn.Parameter]]:
    for path, adapter in adapters.items():
        for name, parameter in adapter.named_parameters():
            yield f"{_PREFIX}{path}.meft.{name}", parameter


def _describe(network: Any, adapters: Mapping[str, SparseAdapter], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    from lightning_offload import __version__

    base = _dtype_of(network)
    return {
        "peft_type": TYPE,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(network, "config", None), "_name_or_path", None) or None,
        "base_class": type(network).__name__,
        "base_dtype": _word(base),
        "base_hash": fingerprint(network, base),
        "target_modules": list(adapters),
        "hidden_size": next(iter(adapters.values())).keys.shape[1],
        **asdict(next(iter(adapters.values())).settings),
        "activation": "relu",
        "dtype": _word(next(iter(tensors.values())).dtype),
        "weights_hash": _hash(tensors),
        "lightning_offload_version": __version__,
    }


def _read(folder: Path) -> _Files:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            there = f"it has no {name}" if folder.is_dir() else "there is no such folder"
            raise CheckpointError(f"no adapter at {str(folder)!r}: {there}; `save_meft_adapter` writes one")
    config = _read_config(folder / CONFIG)
    return _Files(repr(str(folder)), config, _settings(config, folder / CONFIG), _read_tensors(folder / WEIGHTS))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != TYPE:
        raise CheckpointError(
            f"{str(file)!r} has peft_type={kind!r}, not {TYPE!r}: `peft.PeftModel.from_pretrained` loads those of PEFT"
        )
    return config


def _settings(config: Mapping[str, Any], file: Path) -> AdapterSettings:
    names = [field.name for field in fields(AdapterSettings)]
    missing = [n for n in ("target_modules", "base_hash", "base_dtype", *names) if n not in config]
    if missing:
        raise CheckpointError(f"{str(file)!r} has no {missing[0]!r}: it is damaged, or of another version")
    for name, good in _VALUES.items():
        if not good(config[name]):
            raise CheckpointError(f"{str(file)!r} has {name}={config[name]!r}: it is damaged, or of another version")
    try:
        return AdapterSettings(**{name: config[name] for name in names})
    except ValueError as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {error}") from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value != ""


_VALUES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("width", "experts", "active_experts", "top_k"), _is_count),
    "gate": lambda value: value in ("logit", "none"),
    "scope": lambda value: value in ("token", "union"),
    "router_init": lambda value: value in ("keys", "normal"),
    "key_std": lambda value: value is None or (_is_number(value) and value > 0),
    "seed": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "target_modules": lambda value: isinstance(value, list) and value != [] and all(map(_is_path, value)),
    "base_dtype": lambda value: isinstance(getattr(torch, str(value), None), torch.dtype),
}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
        return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is damaged, copy it again: {error}") from error


def _hash(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        total.update(name.encode() + digest(tensors[name].reshape(-1).view(torch.uint8)))
    return total.hexdigest()


def _check_values(files: _Files) -> None:
    """Folders of earlier versions have no hash."""
    expected = files.config.get("weights_hash")
    if expected is not None and _hash(files.tensors) != expected:
        raise CheckpointError(
            f"The adapter in {files.folder} is damaged, copy it again: the values in {WEIGHTS} are not those that were "
            f"saved (if they were changed on purpose, take weights_hash out of {CONFIG})"
        )


def _check_base(network: nn.Module, files: _Files) -> None:
    config = files.config
    found = fingerprint(network, getattr(torch, config["base_dtype"]))
    if found == config["base_hash"]:
        return
    name = getattr(getattr(network, "config", None), "_name_or_path", None)
    raise CheckpointError(
        f"The adapter in {files.folder} was trained beside another model: {config.get('base_class')} "
        f"{config.get('base_model_name_or_path')!r} in {config['base_dtype']}, of hash {config['base_hash']}; this "
        f"{type(network).__name__} {name!r} has {found}. Load that one; or, if you know that these weights are to "
        "be used with it (rounded in another way, a vocabulary that grew), pass check_base=False"
    )


def _ffns(network: nn.Module, files: _Files) -> list[FFN]:
    """What the adapters belong beside, each where it was."""
    names = {name.replace(_COMPILED, ""): name for name, _ in network.named_modules()}
    missing = [path for path in files.config["target_modules"] if path not in names]
    if missing:
        raise CheckpointError(
            f"The adapter in {files.folder} belongs beside `{missing[0]}`, which this {type(network).__name__} does "
            f"not have; it was trained with {files.config.get('base_class')} "
            f"{files.config.get('base_model_name_or_path')!r}"
        )
    return find_ffns(network, targets=_pattern(names[path] for path in files.config["target_modules"]), layers="named")


def _pattern(paths: Iterable[str]) -> str:
    return "|".join(map(re.escape, paths))


def _refuse_engine(adapters: Any) -> None:
    if any(adapter.source is not None for adapter in adapters):
        raise OffloadError(
            "the rows of these adapters are in the hands of a Trainer; load them before it fits or after"
        )


def _is_checked(network: nn.Module, adapters: Mapping[str, SparseAdapter]) -> bool:
    """Whether the model can be asked for logits by itself: its rows are its own, all of it is in one place."""
    plain = is_stock(network) and not getattr(network.config, "is_encoder_decoder", False)
    in_one_place = len({parameter.device for parameter in network.parameters()}) == 1
    return plain and in_one_place and all(adapter.source is None for adapter in adapters.values())


def _dtype_of(network: nn.Module) -> torch.dtype:
    own = {id(p) for adapter in adapters_by_path(network).values() for p in adapter.parameters()}
    return next((p.dtype for p in network.parameters() if id(p) not in own and p.is_floating_point()), torch.float32)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
