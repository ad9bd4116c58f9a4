"""Adapters of PEFT on a model: a folder that PEFT loads, checked by logits, and LoRA added to weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_offload.agreement import Change, compare_logits, compare_values
from lightning_offload.errors import OffloadError
from lightning_offload.folders import written_whole
from lightning_offload.stock import bare, stock_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of PEFT's ``init_lora_weights`` with which weights stay what they are."""


def has_peft(module: nn.Module) -> bool:
    """Whether there are adapters of PEFT in ``module``."""
    return any(_layers(module))


def save_peft_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the adapters of a model in PEFT's format, load them with PEFT on the model without them, and compare.

    ::

        module = CausalLM(path="facebook/opt-1.3b", lora={"rank": 8})  # or a LightningModule around `get_peft_model`
        trainer.fit(module)
        save_peft_adapter(module, "my_adapter")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("facebook/opt-1.3b"), "my_adapter")

    The folder is written beside and renamed; nothing appears unless logits and all values agree.

    Args:
        module: A transformers model with one adapter of PEFT's, or a module with such a model in it.
        folder: To write. An earlier adapter there is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: There are no adapters, or several beside each other.
        TypeError: There is no transformers model.
        FileExistsError: ``folder`` holds something that is no adapter.
        OffloadError: What was loaded differs, the adapters are none of the base (PiSSA), or the disk is full.
    """
    module.state_dict()  # before which an engine waits for all that is on its way
    network, target = stock_model(module), Path(folder)
    top = _wrapper(module) or network
    adapter = _only_adapter(top)
    _refuse_merged(network)
    _refuse_changed_base(top.peft_config[adapter])
    with written_whole(target, mark=CONFIG, what="adapter", files=[WEIGHTS]) as staging:
        _write(top, network, adapter, staging)
        own = _values(top, adapter)
        loaded = _reload(network, own.values(), staging)
        reloaded = loaded.get_base_model() if top is network else loaded
        compare_logits(top, reloaded, what="adapter")
        compare_values(own, _values(reloaded, "default"), what="adapter", change=_same)
    return target


def merged(network: nn.Module) -> Change:
    """What is stored of a weight where LoRA is added to it: ``W + scale B A``, summed in fp32, rounded once.

    Raises:
        ValueError: There is no LoRA, or several adapters beside each other.
        OffloadError: It is not LoRA of linear layers and embeddings alone, or has been merged already.
    """
    from peft.utils import ModulesToSaveWrapper

    adapter, found = _only_adapter(network), dict[str, Any]()
    _refuse_merged(network)
    for path, layer in _layers(network):
        name = path.replace("_orig_mod.", "")
        if isinstance(layer, ModulesToSaveWrapper):
            found |= {f"{name}.{key}": p for key, p in layer.modules_to_save[adapter].named_parameters()}
        else:
            _check_mergeable(path, layer, adapter)
            found[f"{name}.weight"] = layer

    def add(name: str, tensor: Tensor) -> Tensor:
        source = found.get(name)
        if source is None:
            return tensor
        if isinstance(source, Tensor):
            return source.detach().cpu()
        with torch.no_grad():
            added: Tensor = tensor.float() + source.get_delta_weight(adapter).to(tensor.device).float()
            return added.to(tensor.dtype)

    return add


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What PEFT has put into ``module``, by path: adapters, copies of modules that are trained whole, a wrapper."""
    if "peft" not in sys.modules:  # then there is nothing of it
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper, PeftModel)
    yield from ((path, part) for path, part in module.named_modules() if isinstance(part, kinds))


def _wrapper(module: nn.Module) -> Any:
    """The outermost ``PeftModel`` in ``module``, if there is one: adapters may have been put on without."""
    from peft import PeftModel

    return next((part for part in module.modules() if isinstance(part, PeftModel)), None)


def _only_adapter(adapted: Any) -> str:
    names = list(getattr(adapted, "peft_config", {}))
    if len(names) != 1:
        what = f"the adapters {', '.join(names)} of PEFT beside each other" if names else "no adapters of PEFT"
        raise ValueError(f"this {type(adapted).__name__} has {what}; one is exported at a time (`delete_adapter`)")
    return str(names[0])


def _refuse_merged(network: nn.Module) -> None:
    if any(getattr(layer, "merged", False) for _, layer in _layers(network)):
        raise OffloadError(
            f"adapters of this {type(network).__name__} are merged into its weights at the moment: call "
            "`unmerge_adapter()` first"
        )


def _refuse_changed_base(config: Any) -> None:
    """Some ways to begin take what adapters begin with off the weights; on those of the base they are wrong then."""
    start = getattr(config, "init_lora_weights", True)
    if start not in _KEEP_BASE:
        raise OffloadError(
            f"init_lora_weights={start!r} has changed the weights that adapters are beside, so they are none of the "
            "base's: call PEFT's own `save_pretrained` with `path_initial_model_for_weight_conversion`, or export "
            "the model with `export_to_hf(model, folder, merge_lora=True)`"
        )


def _check_mergeable(path: str, layer: Any, adapter: str) -> None:
    from peft.tuners.lora import Embedding, Linear

    plain = type(layer) in (Linear, Embedding) and adapter not in layer.lora_variant and not layer.lora_bias[adapter]
    if not plain:
        raise OffloadError(
            f"`{path}` ({type(layer).__name__}) is no LoRA of a linear layer or an embedding, so it is not merged on "
            "the way out: call PEFT's own `merge_and_unload()` and export what that returns, or keep the adapter"
        )


def _write(top: Any, network: Any, adapter: str, folder: Path) -> None:
    """The two files of PEFT; its own ``save_pretrained`` also writes a card that is to be filled in."""
    from safetensors.torch import save_file

    prefix = "base_model.model." if top is network else ""
    values = {f"{prefix}{name}": value for name, value in _values(top, adapter).items()}
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in values.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})  # clones, as some may be tied
    config = top.peft_config[adapter]
    before = config.inference_mode, config.base_model_name_or_path
    config.inference_mode, config.base_model_name_or_path = True, _place(network)
    mapping = {"base_model_class": type(network).__name__, "parent_library": type(network).__module__}
    try:
        config.save_pretrained(folder, auto_mapping_dict=None if config.task_type else mapping)
    finally:
        config.inference_mode, config.base_model_name_or_path = before


def _place(network: Any) -> str | None:
    """Where the model came from: a folder so that it is found from anywhere, or a hub id."""
    name = getattr(network.config, "_name_or_path", None) or None
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def _values(adapted: Any, adapter: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(adapted, adapter_name=adapter))


def _reload(network: Any, values: Iterable[Tensor], folder: Path) -> Any:
    """By PEFT, on the same weights; adapters in fp32 stay so beside 16-bit weights."""
    from peft import PeftModel

    wide = any(value.dtype == torch.float32 for value in values)
    made = PeftModel.from_pretrained(
        bare(network), str(folder), autocast_adapter_dtype=wide, torch_device=str(network.device)
    )
    return made.train(network.training)


def _same(name: str, tensor: Tensor) -> Tensor:
    return tensor
