"""Weights of transformers from a folder or the hub: all of them, or an error that says what is wrong with them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_offload.errors import OffloadError

log = logging.getLogger(__name__)

_LONGEST = 240
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_pretrained(auto: Any, path: str, what: str, *, new_head: bool = False, **options: Any) -> Any:
    """A model by one of transformers' ``Auto`` classes, with every weight that it trains from the files.

    Args:
        auto: the class.
        path: folder or hub id.
        what: kind of model, in words.
        new_head: whether the files may lack what is no part of the base model, and have another head.
        options: for ``from_pretrained``.

    Raises:
        OffloadError: when there is no such model, it is damaged or quantized, or its files lack weights.
    """
    try:
        _refuse_quantized(path)
        with _silent():  # what it reports over many lines is looked at here
            network, found = auto.from_pretrained(
                path, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (MemoryError, torch.OutOfMemoryError, OffloadError):
        raise
    except Exception as error:  # of transformers, safetensors, huggingface_hub, tokenizers: classes of their own
        here = "" if Path(path).exists() else ", which is no folder here"
        raise OffloadError(f"Cannot load a {what} from path={path!r}{here}: {reason(error)}") from error
    _refuse_incomplete(network, path, found, new_head=new_head)
    return network


def reason(error: Exception) -> str:
    """What an error says, in one line of some length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rsplit(' ', 1)[0]} ..."


def has_tokenizer(path: str) -> bool:
    """Whether there are files of one in a folder."""
    return any((Path(path) / name).is_file() for name in _TOKENIZERS)


def check_vocabulary(network: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose tokens the model has no rows for; special ones that no text has may be there.

    Raises:
        OffloadError: names both sizes.
    """
    embeddings = getattr(network, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is None or tokenizer is None:
        return
    added = getattr(tokenizer, "added_tokens_decoder", {})
    unused = {number for number, token in added.items() if token.special}
    unused -= {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    largest = max((number for number in tokenizer.get_vocab().values() if number not in unused), default=0)
    if largest >= rows:
        raise OffloadError(
            f"The tokenizer {tokenizer.name_or_path!r} has tokens up to number {largest:,}, the model rows for "
            f"{rows:,}: they do not belong together. Pass model.tokenizer_path=<folder or hub id> of the model's own."
        )


def check_positions(network: Any, length: int | None) -> None:
    """Refuse sequences longer than a table of learned positions: past its end a lookup fails in the middle of a run.

    Raises:
        OffloadError: names both lengths.
    """
    most = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    if not most or not length:
        return
    words = getattr(network, "get_input_embeddings", lambda: None)()
    tables = [part for part in network.modules() if isinstance(part, nn.Embedding) and part is not words]
    learned = [table for table in tables if table.num_embeddings in (most, most + 2)]  # OPT keeps two more
    kept = max((table.padding_idx + 1 for table in learned if table.padding_idx is not None), default=0)  # RoBERTa's
    most -= kept
    if learned and length > most:
        raise OffloadError(
            f"data.sequence_length={length:,} is more than the model's {most:,} positions: pass"
            f" data.sequence_length={most} or less."
        )


def _refuse_quantized(path: str) -> None:
    from transformers import PretrainedConfig

    quantized = PretrainedConfig.get_config_dict(path)[0].get("quantization_config")
    if quantized:
        kind = quantized.get("quant_method", "") if isinstance(quantized, dict) else ""
        raise OffloadError(
            f"path={path!r} is quantized ({kind or 'quantization_config'} in its config.json), which cannot be "
            "fine-tuned: pass the model that it was made from."
        )


def _refuse_incomplete(network: Any, path: str, found: dict[str, Any], *, new_head: bool) -> None:
    trained = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    other = [(name, held) for name, held, _ in sorted(found["mismatched_keys"]) if name in trained]
    if other:
        name, held = other[0]
        raise OffloadError(
            f"The config.json at path={path!r} does not fit the weights: {name} is {tuple(held)} in the files and "
            f"{trained[name]} by the config ({len(other)} do not fit). Take both from one place."
        )
    needed = f"{network.base_model_prefix}." if new_head else ""
    missing = sorted(name for name in found["missing_keys"] if name in trained and name.startswith(needed))
    if missing:
        raise OffloadError(
            f"The weights at path={path!r} are not those of a {type(network).__name__}: {len(missing)} are missing, "
            f"the first {missing[0]}. Take config.json and *.safetensors from one place."
        )
    if found["unexpected_keys"] and not new_head:
        names = sorted(found["unexpected_keys"])
        log.warning("path=%r: %d tensors of the files are not used, the first %s", path, len(names), names[0])


@contextmanager
def _silent() -> Iterator[None]:
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity(theirs.CRITICAL)
    try:
        yield
    finally:
        theirs.set_verbosity(before)
