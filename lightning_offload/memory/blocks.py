"""Splits any model into units: repeated blocks, and the modules outside them that own parameters.

A unit is the piece that moves as one. Everything here is matched by object identity and structure, never by a
substring of a name, so tied weights, shared modules and wrappers need no special case.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_offload.errors import PartitionError


@dataclass(frozen=True, eq=False)
class Unit:
    """A piece of the model that moves as one.

    Attributes:
        index: Position in module order, which approximates execution order (it affects the schedule, never numbers).
        name: Path of ``module`` in the model; ``""`` is the model itself.
        module: The block, or the module that owns the parameters.
        is_block: Whether this is a repeated block.
        parameters: Full name in the model to parameter, for the parameters this unit *owns*. Each parameter of the
            model is owned exactly once, by the unit of its first place in ``named_parameters()``.
        entry_modules: The modules whose forward needs this unit's weights: ``module`` first, then every module
            elsewhere that holds one of its parameters (a tied head, a shared layer).
    """

    index: int
    name: str
    module: nn.Module
    is_block: bool
    parameters: dict[str, nn.Parameter]
    entry_modules: tuple[nn.Module, ...]

    @property
    def numel(self) -> int:
        """Elements of the owned parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def partition(model: nn.Module, blocks: Sequence[str | type[nn.Module]] | None = None) -> list[Unit]:
    """Splits ``model`` into units that together own every parameter exactly once.

    Blocks are the modules that ``blocks`` names; without it the classes of the Hugging Face attribute
    ``_no_split_modules`` that occur at least twice; else the children of the ``ModuleList`` or ``Sequential`` that
    owns most parameters. Of nested candidates the outermost wins. Every other module that owns parameters is a small
    unit of its own; one that is never called itself (``ParameterList``, a parametrization) belongs to its parent.

    Args:
        model: The final model; its tensors may be on any device, ``meta`` included.
        blocks: Module paths, class names or classes, when discovery is wrong.

    Returns:
        The units in module order.

    Raises:
        PartitionError: No parameters, a parameter that is not initialised, two parameters that share memory without
            being one object, or a ``blocks`` entry that matches nothing.
    """
    _check_parameters(model)
    roots = _discover(model) if blocks is None else _named_blocks(model, blocks)
    drafts = _assign(model, {id(module) for module in roots})
    units = [
        Unit(index, d.spot.name, d.spot.unit, d.spot.is_block, d.parameters, (d.spot.unit, *d.users.values()))
        for index, d in enumerate(drafts)
    ]
    if not any(unit.is_block for unit in units):
        _warn_no_blocks(model, len(units))
    return units


@dataclass(frozen=True, eq=False)
class _Spot:
    """Where a module stands: the unit around it, and the module whose call uses its parameters."""

    unit: nn.Module
    name: str
    is_block: bool
    home: nn.Module


@dataclass(eq=False)
class _Draft:
    spot: _Spot
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    users: dict[int, nn.Module] = field(default_factory=dict)


def _assign(model: nn.Module, roots: set[int]) -> list[_Draft]:
    """Gives each parameter to the unit where it is met first, and notes every other place that uses it."""
    drafts: dict[int, _Draft] = {}
    owners: dict[int, _Draft] = {}
    for path, module, spot in _walk(model, roots):
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            owner = owners.get(id(parameter))
            if owner is None:
                owner = owners[id(parameter)] = drafts.setdefault(id(spot.unit), _Draft(spot))
                owner.parameters[name] = parameter
            if spot.unit is not owner.spot.unit:
                owner.users[id(spot.home)] = spot.home
    return list(drafts.values())


def _walk(model: nn.Module, roots: set[int]) -> Iterator[tuple[str, nn.Module, _Spot]]:
    """Visits modules in the order of ``named_modules``, but a shared one again for each unit that it stands in."""
    seen: set[tuple[int, int, int]] = set()
    stack: list[tuple[str, nn.Module, _Spot, nn.Module | None]] = [("", model, _Spot(model, "", False, model), None)]
    while stack:
        path, module, around, parent = stack.pop()
        spot = _place(path, module, around, parent, roots)
        key = (id(module), id(spot.home), id(spot.unit))
        if key in seen:
            continue
        seen.add(key)
        yield path, module, spot
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        stack.extend((name, child, spot, module) for name, child in reversed(children))


def _place(path: str, module: nn.Module, around: _Spot, parent: nn.Module | None, roots: set[int]) -> _Spot:
    if not around.is_block and (id(module) in roots or id(_compiled(module)) in roots):
        return _Spot(module, path, True, module)
    if parent is None or not _is_called(module, parent):
        return around
    if around.is_block:
        return _Spot(around.unit, around.name, True, module)
    return _Spot(module, path, False, module)


def _compiled(wrapper: nn.Module) -> nn.Module | None:
    """The module inside ``torch.compile(module)``, whose own hooks would be traced into the graph."""
    return wrapper._modules.get("_orig_mod")


def _has_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _is_called(module: nn.Module, parent: nn.Module) -> bool:
    """Whether hooks on ``module`` see each use of its parameters.

    False for containers, for parametrizations (read through an attribute of the parametrized module), for the output
    projection of ``MultiheadAttention``, whose weight the parent hands to a functional, and inside a compiled wrapper.
    """
    if module is _compiled(parent):
        return False
    if isinstance(module, ParametrizationList) or isinstance(parent, (ParametrizationList, nn.MultiheadAttention)):
        return False
    return _has_forward(module)


def _discover(model: nn.Module) -> list[nn.Module]:
    return _unsplittable(model) or _children_of_largest_list(model)


def _unsplittable(model: nn.Module) -> list[nn.Module]:
    """Modules of the classes in ``_no_split_modules`` that occur twice (the list also names embeddings)."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = [(base.__name__, m) for m in model.modules() for base in type(m).__mro__ if base.__name__ in names]
    count = Counter(name for name, _ in found)
    return [module for name, module in found if count[name] > 1]


def _children_of_largest_list(model: nn.Module) -> list[nn.Module]:
    best: list[nn.Module] = []
    most = 0
    for module in model.modules():  # outer before inner, so that of equal shares the outermost wins
        peers = _peers(module)
        numel = _numel(module) if peers else 0
        if numel > most:
            best, most = peers, numel
    return best


def _peers(module: nn.Module) -> list[nn.Module]:
    """The children that are one another's peers: all of a ``ModuleList``, the repeated class of a ``Sequential``.

    A ``Sequential`` is a pipeline and may hold a stem and a head beside its blocks, so there the class that owns most
    of the parameters is taken, if it occurs at least twice.
    """
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return []
    owning = [child for child in module.children() if _has_forward(child) and _numel(child)]
    if isinstance(module, nn.ModuleList):
        return owning
    classes = Counter(type(child) for child in owning)
    groups = [[child for child in owning if type(child) is kind] for kind, times in classes.items() if times > 1]
    return max(groups, key=lambda group: sum(map(_numel, group)), default=[])


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _named_blocks(model: nn.Module, blocks: Sequence[str | type[nn.Module]]) -> list[nn.Module]:
    entries = [blocks] if isinstance(blocks, (str, type)) else list(blocks)
    if not entries:
        raise PartitionError("blocks=[] names nothing; use blocks=None for discovery")
    found = [module for entry in entries for module in _match(model, entry)]
    for module in found:
        if not _has_forward(module):
            inner = sorted({type(child).__name__ for child in module.children()})
            raise PartitionError(
                f"blocks= names a {type(module).__name__}, which is never called itself; name its children, "
                f"by path or by class: blocks={inner}"
            )
    return found


def _match(model: nn.Module, entry: str | type[nn.Module]) -> list[nn.Module]:
    modules = dict(model.named_modules())
    if isinstance(entry, str) and entry in modules:
        return [modules[entry]]
    if isinstance(entry, str):
        found = [module for module in modules.values() if type(module).__name__ == entry]
    else:
        found = [module for module in modules.values() if isinstance(module, entry)]
    if not found:
        raise PartitionError(_no_match(entry if isinstance(entry, str) else entry.__name__, modules))
    return found


def _no_match(name: str, modules: dict[str, nn.Module]) -> str:
    known = {*filter(None, modules), *(type(module).__name__ for module in modules.values())}
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4)
    hint = f"closest: {', '.join(map(repr, close))}" if close else "print(model) shows the names and classes"
    return f"blocks= names {name!r}, but the model has no module of that path or class; {hint}"


def _check_parameters(model: nn.Module) -> None:
    named = list(model.named_parameters())
    if not named:
        raise PartitionError(f"{type(model).__name__} has no parameters, so there is nothing to offload")
    lazy = [name for name, parameter in named if is_lazy(parameter)]
    if lazy:
        raise PartitionError(f"parameter {lazy[0]!r} has no shape yet; run one forward before training starts")
    _check_memory(named)


def _check_memory(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuses two parameters over the same bytes: each would get a master, and one update would be lost."""
    spans = sorted((span, name) for name, parameter in named if (span := _span(parameter)) is not None)
    last, owner = ("", 0, 0), ""
    for span, name in spans:
        if span[0] == last[0] and span[1] < last[2]:
            raise PartitionError(
                f"parameters {owner!r} and {name!r} share memory but are two objects; tie them by assigning one "
                "Parameter to both modules, or clone one of them"
            )
        if span[0] != last[0] or span[2] > last[2]:
            last, owner = span, name


def _span(parameter: nn.Parameter) -> tuple[str, int, int] | None:
    """Device, first byte and end; ``None`` where there are no bytes (empty, meta, fake, a wrapper subclass)."""
    if parameter.numel() == 0 or parameter.untyped_storage().device.type == "meta" or not parameter.data_ptr():
        return None
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    start = parameter.data_ptr()
    return str(parameter.device), start, start + elements * parameter.element_size()


def _warn_no_blocks(model: nn.Module, units: int) -> None:
    warnings.warn(
        f"{type(model).__name__} has no repeated blocks that can be found: each of the {units} modules that own "
        "parameters moves on its own, in smaller copies that overlap less with compute. The results are the same. "
        "If it has blocks, name them by path or class: blocks=['encoder.stage1', 'MyBlock'].",
        stacklevel=3,
    )


def has_checkpointing(module: nn.Module) -> bool:
    """Whether the model has gradient checkpointing of its own that is off."""
    return (
        any(getattr(part, "supports_gradient_checkpointing", False) for part in module.modules())
        # of every block that has it; the model's own property has another name in each version of transformers
        and not any(getattr(part, "gradient_checkpointing", False) is True for part in module.modules())
    )
