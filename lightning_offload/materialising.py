"""Models that were made on the meta device: where each weight's values are, found before any of them is read."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_offload.buffers import fill, remake_buffers
from lightning_offload.errors import CheckpointError
from lightning_offload.memory.promises import forget, is_promised, promise, was_promised
from lightning_offload.memory.shards import Shards, Stored
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.homes import settle, settled_dtype
from lightning_offload.windows import copies_module

WEIGHTS = "offload_weights"
"""The attribute of a LightningModule that says where the values of its weights on the meta device are."""

_WAYS_OUT = (
    "make them outside of `torch.device('meta')` and `init_module(empty_init=True)`, or give them values before the "
    "Trainer runs (`module.to_empty(device='cpu')` and an initialisation, or `load_state_dict(state, assign=True)`)"
)
_COMPILED = "_orig_mod."
_SHOWN = 3


@dataclass(eq=False)
class _Absent:
    """A parameter or buffer on the meta device.

    Attributes:
        tensor: Itself.
        owner: The module that it is registered in.
        names: Its full names; tied ones have several.
    """

    tensor: Tensor
    owner: nn.Module
    names: list[str] = field(default_factory=list)

    def take(self, read: Any) -> None:
        """Parameters when they are needed, buffers now."""
        if isinstance(self.tensor, nn.Parameter):
            promise(self.tensor, read)
        else:
            fill(self.owner, self.names[0].rpartition(".")[2], read())


def find_weights(module: LightningModule) -> None:
    """Have every weight on the meta device know where its values are; buffers take theirs.

    Raises:
        MisconfigurationException: Nothing says where they are, or it is not understood.
        CheckpointError: Files that are damaged, that lack some of them, or have them in other shapes or dtypes.
    """
    wanted = [absent for absent in _absent(module) if not _is_promised(absent.tensor)]
    given = getattr(module, WEIGHTS, None)
    if wanted and given is None:
        raise MisconfigurationException(
            f"`{type(module).__name__}` has {_some(wanted)} on the meta device, and nothing says where the values "
            f"are. Set `{WEIGHTS}` of the module to a folder with *.safetensors, or pass `ckpt_path`; or "
            f"{_WAYS_OUT}."
        )
    if wanted:
        _find_in_files(module, given, wanted)
    elif given is not None and not any(map(was_promised, module.parameters())):
        rank_zero_warn(
            f"`{WEIGHTS}={given!r}` has no effect: no weight of `{type(module).__name__}` is on the meta device, so "
            "none is read. Make them under `trainer.init_module(empty_init=True)`."
        )
    _let_go(module)
    remake_buffers(module)


def find_in_checkpoint(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Have tensors on the meta device take their values from a state dict, which may be mapped from a file."""
    for absent in _absent(module):
        values = next((state[name] for name in absent.names if name in state), None)
        if isinstance(values, Tensor) and not values.is_meta and values.shape == absent.tensor.shape:
            absent.take(partial(_itself, values))


def bring_rest(module: nn.Module, device: torch.device, dtypes: DTypes) -> None:
    """What no engine has brought: straight to where it computes, one weight after the other."""
    for parameter in module.parameters():
        if parameter.is_meta:
            settle(parameter, device, settled_dtype(parameter, dtypes))


def refuse_early_copies(module: LightningModule) -> None:
    """Of a module without values: some callbacks copy it before a strategy is set up.

    Raises:
        NotImplementedError: There is such a callback.
    """
    if module.trainer.state.fn == TrainerFn.FITTING and copies_module(module.trainer):
        raise NotImplementedError(
            f"A callback that copies `{type(module).__name__}` to average its weights cannot work with weights on the "
            "meta device, as it copies before they have values. Make the module without `torch.device('meta')` and "
            "`init_module(empty_init=True)`, or remove the callback."
        )


@contextmanager
def quiet_about_meta() -> Iterator[None]:
    """Around ``load_state_dict``, which says of every tensor on the meta device that it was not loaded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter", category=UserWarning)
        yield


def forget_weights(module: nn.Module) -> None:
    """A run has ended before they were read: the next one looks for them again."""
    for parameter in module.parameters():
        forget(parameter)


def is_made(module: nn.Module) -> bool:
    """Whether nothing of it is on the meta device."""
    return not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _absent(module: nn.Module) -> list[_Absent]:
    """What a state dict has and is on the meta device."""
    found: dict[int, _Absent] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        saved = {n: b for n, b in owner._buffers.items() if n not in owner._non_persistent_buffers_set}
        for name, tensor in (owner._parameters | saved).items():
            if tensor is not None and tensor.is_meta:
                found.setdefault(id(tensor), _Absent(tensor, owner)).names.append(f"{path}.{name}".lstrip("."))
    return list(found.values())


def _is_promised(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and is_promised(tensor)


def _find_in_files(module: LightningModule, given: Any, wanted: Sequence[_Absent]) -> None:
    for prefix, place in _places(given):
        inside = [absent for absent in wanted if any(name.startswith(prefix) for name in absent.names)]
        if inside:
            _take_from(Shards(place), module, inside)
        else:
            part = prefix.removesuffix(".")
            rank_zero_warn(f"`{WEIGHTS}[{part!r}]` has no effect: no weight of this part is on the meta device.")
        found = set(inside)
        wanted = [absent for absent in wanted if absent not in found]
    if wanted:
        raise CheckpointError(
            f"`{WEIGHTS}={given!r}` says nothing of {_some(wanted)} of `{type(module).__name__}` on the meta device: "
            f"add their module, or {_WAYS_OUT}"
        )


def _let_go(module: nn.Module) -> None:
    """Of the weak references that recurrent layers keep for ``torch.func``: torch swaps no tensor that has any."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase) and not is_made(part):
            strong: Any = [partial(_itself, weight) for weight in part._flat_weights]
            part._flat_weight_refs = strong


def _places(given: Any) -> list[tuple[str, Path]]:
    """Where to look, by the beginning of names; the longest first."""
    if isinstance(given, (str, os.PathLike)):
        return [("", Path(given).expanduser())]
    if isinstance(given, Mapping) and all(isinstance(place, (str, os.PathLike)) for place in given.values()):
        parts = [(f"{name}.".lstrip("."), Path(place).expanduser()) for name, place in given.items()]
        return sorted(parts, key=lambda part: -len(part[0]))
    raise MisconfigurationException(
        f"`{WEIGHTS}` must be a folder with *.safetensors, one such file, or a dictionary from names of submodules to "
        f"these; got {given!r}."
    )


def _take_from(shards: Shards, module: nn.Module, wanted: Sequence[_Absent]) -> None:
    own, stored = _beginnings([_plain(absent.names[0]) for absent in wanted], shards.tensors)
    missing, used = [], set[str]()
    for absent in wanted:
        names = [stored + _plain(name).removeprefix(own) for name in absent.names if _plain(name).startswith(own)]
        used.update(names)
        there = next((name for name in names if name in shards.tensors), None)
        if there is None:
            missing.append(absent)
            continue
        _check(absent, there, shards.tensors[there])
        absent.take(partial(shards.read, there))
    if missing:
        raise CheckpointError(
            f"{str(shards.place)!r} lacks {_some(missing)} of the {len(wanted)} weights of `{type(module).__name__}` "
            f"that are on the meta device; it has {_first(shards.tensors)}, and names were looked for with "
            f"{stored!r} in place of {own!r}. Give the folder of this model, or {_WAYS_OUT}"
        )
    _warn_of_more(shards, module, own, stored, used)


def _warn_of_more(shards: Shards, module: nn.Module, own: str, stored: str, used: set[str]) -> None:
    """What a file has of buffers that are made anew is known not to be needed."""
    made = {stored + _plain(name).removeprefix(own) for name, _ in module.named_buffers()}
    more = [name for name in shards.tensors if name not in used and name not in made]
    if more:
        rank_zero_warn(
            f"`{type(module).__name__}.{WEIGHTS}`: {len(more)} of the {len(shards.tensors)} tensors in "
            f"{str(shards.place)!r} belong to nothing on the meta device and are not read ({_first(more)})."
        )


def _beginnings(names: Iterable[str], stored: Iterable[str]) -> tuple[str, str]:
    """What stands before the names in the module, and before those in the files: that on which most of them agree."""
    ends = Counter(end for name in stored for end in _ends(name))
    whole = {end: name for name in stored for end in _ends(name)}
    found: Counter[tuple[str, str]] = Counter()
    for name in names:
        end = next((end for end in _ends(name) if ends[end] == 1), None)
        if end is not None:
            found[name.removesuffix(end), whole[end].removesuffix(end)] += 1
    return found.most_common(1)[0][0] if found else ("", "")


def _ends(name: str) -> Iterator[str]:
    """The name, and what is left of it without its first part, its first two, ..."""
    while name:
        yield name
        name = name.partition(".")[2]


def _check(absent: _Absent, there: str, stored: Stored) -> None:
    name, tensor = absent.names[0], absent.tensor
    if stored.shape != tuple(tensor.shape):
        raise CheckpointError(
            f"`{name}` is {tuple(tensor.shape)} in the model, and `{there}` is {stored.shape} in {str(stored.file)!r}: "
            "the weights are of another model, or the config is not theirs"
        )
    if stored.is_floating != tensor.is_floating_point():
        raise CheckpointError(
            f"`{name}` is {tensor.dtype} in the model, and `{there}` is {stored.dtype} in {str(stored.file)!r}: "
            "weights are read from 16 bits and more; of a quantized model give a folder that is not"
        )


def _plain(name: str) -> str:
    """Without what ``torch.compile`` puts into it."""
    return name.replace(_COMPILED, "")


def _some(absent: Sequence[_Absent]) -> str:
    return f"{len(absent)} weights ({_first(one.names[0] for one in absent)})"


def _first(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(f"`{name}`" for name in shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "") or "nothing"


def _itself(values: Any) -> Any:
    return values
