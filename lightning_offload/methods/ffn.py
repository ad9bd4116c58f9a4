"""Finds the feed-forward networks of any decoder by structure: one in each repeated block."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_offload.memory.blocks import partition

Layers = str | Sequence[int]

_NAMES = {"mlp", "mlp_block", "feed_forward", "feedforward", "ffn", "ff", "ffw", "block_sparse_moe", "moe"}
_NAMES |= {"DenseReluDense"}
_CLASSES = re.compile("MLP|Mlp|FeedForward|SparseMoe|FFN")
_PAIRS = (("fc1", "fc2"), ("ffn", "ffn_output"))
_INPUTS = ("hidden_states", "x", "hidden", "input")


@dataclass(frozen=True, eq=False)
class FFN:
    """A feed-forward network of a block.

    Attributes:
        path: Of ``holder`` in the model.
        block: Index of its block, in module order.
        block_path: Of its block in the model.
        hidden_size: Width d of its input and of its output.
        holder: The network; the block itself where it is a pair of linears of the block (OPT).
        entry: The module whose call shows x: ``holder``, or the first of the pair.
        exit: The module whose call returns y: ``holder``, or the second of the pair.
    """

    path: str
    block: int
    block_path: str
    hidden_size: int
    holder: nn.Module
    entry: nn.Module
    exit: nn.Module


def find_ffns(model: nn.Module, *, targets: str | Sequence[str] | None = None, layers: Layers = "all") -> list[FFN]:
    """The feed-forward network of each repeated block, encoder's and decoder's alike.

    In a block it is the shallowest child that goes by a usual name (``mlp``, ``feed_forward``, ``block_sparse_moe``,
    ...), else by a usual class (``...MLP``, ``...FeedForward``), else a pair of linears ``fc1``, ``fc2``.

    Args:
        model: Any module; a LightningModule or a wrapper around the language model will do.
        targets: Instead of the usual names, as PEFT reads them: the end of a path, several of them, or a regular
            expression that matches whole paths.
        layers: "all", indices of blocks (negative ones count from the end), or "named": those with ``targets`` inside.

    Raises:
        ValueError: Not exactly one in each of those blocks, or a bad ``targets`` or ``layers``.
    """
    wanted = None if targets is None else _matching(model, targets)
    blocks = _blocks(model, wanted)
    found = {}
    for index in _named(blocks, wanted) if layers == "named" else _chosen(layers, len(blocks)):
        name, block = blocks[index]
        found[index] = _in_block(block, name) if wanted is None else _inside(block, wanted)
    _check(found, blocks, targets)
    return [_ffn(path, module, index, *blocks[index]) for index, [(path, module)] in sorted(found.items())]


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Gives x of a call: the first positional argument, or the keyword that usually names it."""
    for value in (*args[:1], *(kwargs[name] for name in _INPUTS if name in kwargs)):
        if isinstance(value, Tensor):
            return value
    raise TypeError(
        f"A feed-forward network was called with no tensor in front and none named {', '.join(_INPUTS)} "
        f"(got {[*map(type, args)]} and {[*kwargs]}); leave it out with layers= or name another with targets="
    )


def with_output(output: Any, y: Tensor) -> Any:
    """What a call returned, with ``y`` in place of its tensor (element 0 of a tuple)."""
    return (y, *output[1:]) if isinstance(output, tuple) else y


def output_of(output: Any) -> Tensor:
    """Gives y of what a call returned: a tensor, or element 0 of a tuple (mixtures of experts, RWKV)."""
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, Tensor), type(tensor)
    return tensor


Named = tuple[str, nn.Module]


def _blocks(model: nn.Module, wanted: list[Named] | None) -> list[Named]:
    """The repeated blocks; where none holds what is wanted, that is a block of its own each."""
    found = {unit.name: unit.module for unit in partition(model) if unit.is_block}
    found |= _other_blocks(model, {id(module) for block in found.values() for module in block.modules()})
    blocks = [(name, module) for name, module in model.named_modules() if name in found]
    if wanted and not any(_inside(block, wanted) for _, block in blocks):
        return wanted
    return blocks


def _other_blocks(model: nn.Module, inside: set[int]) -> dict[str, nn.Module]:
    """Children of other lists that hold networks: of two lists (encoder, decoder) discovery may take the larger."""
    others: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not inside & {id(part) for part in module.modules()}:
            blocks = {f"{path}.{name}": child for name, child in module.named_children() if _in_block(child, name)}
            inside |= {id(part) for block in blocks.values() for part in block.modules()}
            others |= blocks
    return others


def _named(blocks: list[Named], wanted: list[Named] | None) -> list[int]:
    return [index for index, (_, block) in enumerate(blocks) if _inside(block, wanted or [])]


def _chosen(layers: Layers, count: int) -> list[int]:
    if layers == "all":
        return list(range(count))
    indices = [*layers] if isinstance(layers, Sequence) and not isinstance(layers, str) else []
    if not indices:
        raise ValueError(f"layers={layers!r}: pass 'all' or a list of indices, such as layers=[0, -1]")
    if wrong := [index for index in indices if not -count <= index < count]:
        raise ValueError(f"layers={indices}: {wrong} are not among the {count} blocks, -{count} to {count - 1}")
    return sorted({index % count for index in indices})


def _matching(model: nn.Module, targets: str | Sequence[str]) -> list[Named]:
    if not isinstance(targets, (str, Sequence)):
        raise ValueError(f"targets={targets!r}: pass the end of a path, several of them, or a regular expression")
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    try:
        whole = re.compile(targets).fullmatch if isinstance(targets, str) else lambda path: None
    except re.error as error:
        raise ValueError(f"targets={targets!r} is not a regular expression: {error}") from error
    return [
        (path, module)
        for path, module in model.named_modules()
        if path and (whole(path) or any(path == name or path.endswith(f".{name}") for name in names))
    ]


def _inside(block: nn.Module, wanted: list[Named]) -> list[Named]:
    inside = {id(module) for module in block.modules()}
    return [(path, module) for path, module in wanted if id(module) in inside]


def _in_block(block: nn.Module, name: str) -> list[Named]:
    level: list[Named] = [(name, block)]
    while level:
        below = [(f"{path}.{n}" if path else n, child) for path, m in level for n, child in m.named_children()]
        networks = [(path, module) for path, module in below if _is_network(module)]
        found = [(path, module) for path, module in networks if _name(path) in _NAMES]
        found = found or [(path, module) for path, module in networks if _CLASSES.search(type(module).__name__)]
        found = found or [(path, module) for path, module in level if _pair(module) is not None]
        if found:
            return found
        level = below
    return []


def _is_network(module: nn.Module) -> bool:
    """Whether it holds weights and is more than one linear: ALBERT calls its first linear ``ffn``."""
    return not hasattr(module, "in_features") and any(p.ndim > 1 for p in module.parameters())


def _is_usual(path: str, module: nn.Module) -> bool:
    return _name(path) in _NAMES or _CLASSES.search(type(module).__name__) is not None


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _pair(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    for first, second in _PAIRS:
        pair = getattr(module, first, None), getattr(module, second, None)
        if all(hasattr(linear, "in_features") for linear in pair):
            return pair  # type: ignore[return-value]
    return None


def _check(found: dict[int, list[Named]], blocks: list[Named], targets: str | Sequence[str] | None) -> None:
    where = "by name and class" if targets is None else f"by targets={targets!r}"
    if not any(found.values()):
        kinds = sorted({type(module).__name__ for _, module in blocks})
        inside = f"blocks of class {', '.join(kinds)}" if kinds else "no repeated blocks"
        raise ValueError(
            f"No feed-forward network was found {where}; the model has {inside}. Name them: targets='mlp', or a "
            "regular expression for whole paths such as targets=r'.*layers\\.\\d+\\.mlp' (print(model) shows them)"
        )
    without = [index for index, modules in found.items() if not modules]
    if without:
        raise ValueError(
            f"Feed-forward networks were found {where} in {len(found) - len(without)} of {len(found)} blocks, "
            f"the first {next(m for m in found.values() if m)[0][0]!r}; none in {blocks[without[0]][0]!r}. Name them "
            f"with targets=, or leave blocks out: layers={[index for index in found if index not in without]}"
        )
    for index, modules in found.items():
        if len(modules) > 1:
            raise ValueError(
                f"{len(modules)} feed-forward networks were found {where} in block {blocks[index][0]!r}: "
                f"{', '.join(repr(path) for path, _ in modules)}. Choose one with targets={_name(modules[0][0])!r}"
            )


def _ffn(path: str, holder: nn.Module, index: int, block_path: str, block: nn.Module) -> FFN:
    pair = None if holder is not block and _is_usual(path, holder) else _pair(holder)
    entry, leave = pair or (holder, holder)
    return FFN(path, index, block_path, _hidden_size(entry, block), holder, entry, leave)


def _hidden_size(entry: nn.Module, block: nn.Module) -> int:
    """What the first linear reads; where there is none, the size that most of the block's weights have in common."""
    for module in entry.modules():
        if isinstance(size := getattr(module, "in_features", None), int):
            return size
    weights = [p for p in block.parameters() if p.is_floating_point()]  # packed ones have other shapes
    sizes = Counter(size for weight in weights for size in {*weight.shape})
    return int(sizes.most_common(1)[0][0])
