"""From a folder, a hub id or a shape to a transformers model and its tokenizer, with errors that name the way out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lightning_offload.errors import OffloadError
from lightning_offload.text.pretrained import has_tokenizer, load_pretrained, reason

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_WAY_OUT = (
    "Pass path=<folder with config.json and *.safetensors> or path=<hub id> (model.path=... on the command line)."
)


CAUSAL = "AutoModelForCausalLM"
CLASSIFIER = "AutoModelForSequenceClassification"
_KINDS = {CAUSAL: "causal language model", CLASSIFIER: "sequence classifier"}


def build_network(
    *,
    path: str | None,
    config: dict[str, Any] | None,
    init: str,
    dtype: str,
    auto: str = CAUSAL,
    extra: Mapping[str, Any] | None = None,
) -> Any:
    """A transformers model with weights from `path`, or with random ones where there are none or `init` says so.

    Args:
        path: see `TextModule`, also for the next three.
        config: the model by shape.
        init: where weights come from.
        dtype: of the weights.
        auto: the class of transformers that knows the kind of model.
        extra: what else its config is to say.

    Raises:
        ValueError: when not exactly one of `path` and `config` is given, or `init`, `dtype` or the shape is not known.
        OffloadError: when `path` holds no model.
    """
    import transformers

    if (path is None) == (config is None):
        raise ValueError(f"Give either path or config, not {'both' if path else 'neither'}. {_WAY_OUT}")
    if init not in ("pretrained", "random"):
        raise ValueError(f"init={init!r}: the choice is 'pretrained' or 'random'.")
    kind = getattr(torch, str(dtype), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no floating-point dtype: use 'float32', 'bfloat16' or 'float16'.")
    make = getattr(transformers, auto)
    if path is not None and init == "pretrained":
        check_folder(path)
        try:
            # loaded models come in eval mode, which Lightning keeps: no dropout, no gradient checkpointing
            return load_pretrained(
                make, path, _KINDS[auto], new_head=auto != CAUSAL, dtype=kind, **(extra or {})
            ).train()
        except OffloadError as error:
            raise OffloadError(f"{error} {_WAY_OUT}") from error
    return make.from_config(shape(path, config, extra), dtype=kind, trust_remote_code=False)


def shape(path: str | None, config: dict[str, Any] | None, extra: Mapping[str, Any] | None = None) -> Any:
    """The transformers config of a model by shape, or of the one at `path`, with what `extra` adds to it.

    Raises:
        ValueError: A shape without an architecture, or one that the architecture cannot have.
        OffloadError: `path` holds no model.
    """
    from transformers import AutoConfig

    if path is not None:
        check_folder(path)
        try:
            return AutoConfig.from_pretrained(path, trust_remote_code=False, **(extra or {}))
        except (OSError, ValueError) as error:
            raise OffloadError(f"Cannot load a model's config from path={path!r}: {error} {_WAY_OUT}") from error
    assert config is not None
    if "model_type" not in config:
        raise ValueError("config has no model_type: name the architecture, e.g. {'model_type': 'llama', ...}.")
    try:
        return AutoConfig.for_model(**{**_plain(config), **(extra or {})})
    except Exception as error:  # of a class of its own, and over several lines
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"config is no shape of a {config['model_type']} model: {reason}") from error


def take_generation(network: Any, path: str) -> None:
    """Have a model how to generate from the files that its run began with, which its shape does not say."""
    from transformers import GenerationConfig

    if network.can_generate():
        with suppress(OSError):  # there is no such file
            network.generation_config = GenerationConfig.from_pretrained(path)


def check_flags(**flags: Any) -> None:
    """Refuse what is neither true nor false: any word, "off" too, would be true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: give true or false.")


def recompute_blocks(network: Any) -> None:
    """Have each block's activations computed again in the backward pass."""
    network.config.use_cache = False
    options = {"use_reentrant": False}
    if hasattr(network, "activation_checkpointing_enable"):  # the name in transformers 6; both exist before
        network.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _plain(value: Any) -> Any:
    """Nested mappings and sequences of any kind (as a config library hands them over) as dicts and lists."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value


def check_folder(path: str) -> None:
    """Raise when `path` is meant as a folder but holds no model; anything that can be a hub id passes."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
            raise OffloadError(
                f"path={path!r} is an adapter, no model: give the model that it was trained beside, and put it on that "
                f"by `load_meft_adapter(model, {path!r})`. {_WAY_OUT}"
            )
        if not (folder / "config.json").is_file():
            raise OffloadError(f"The folder path={path!r} holds no config.json, so no model. {_WAY_OUT}")
    elif not _HUB_ID.fullmatch(path):
        raise OffloadError(f"There is no folder at path={path!r}. {_WAY_OUT}")


def load_tokenizer(tokenizer_path: str | None, path: str | None) -> Any:
    """The tokenizer at `tokenizer_path`, else the one beside the model, else None.

    Raises:
        OffloadError: when `tokenizer_path` is given and holds none.
    """
    from transformers import AutoTokenizer

    place = tokenizer_path or path
    if place is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # of tokenizers too, which has classes of its own
        if tokenizer_path is not None or has_tokenizer(place):
            where = f"tokenizer_path={place!r}" if tokenizer_path else f"path={place!r}"
            raise OffloadError(
                f"Cannot load a tokenizer from {where}: {reason(error)} Pass model.tokenizer_path=<folder or hub id>."
            ) from error
        return None  # data that needs one says so
