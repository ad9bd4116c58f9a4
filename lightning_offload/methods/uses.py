"""Which weights a forward uses, in what order and through which module: what the structure of a model does not say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_offload.memory.blocks import Unit


@dataclass(frozen=True)
class Uses:
    """What one forward did with the weights, by the names of units, parameters and modules.

    Attributes:
        order: Units in the order of their first call.
        early: Units with a weight that is used before a call announces it, or that no call ever announces; compute
            must wait for these when a forward begins.
        skipped: Units of which no weight was used.
        repeats: Calls of the units that ran more than once (ALBERT's shared layer).
        users: Modules beside the owner's through which a tied parameter was used (a tied head), per parameter.
        functional: Parameters used while no module that holds them was being called (``F.linear(x, other.weight)``).
    """

    order: tuple[str, ...] = ()
    early: frozenset[str] = frozenset()
    skipped: frozenset[str] = frozenset()
    repeats: Mapping[str, int] = field(default_factory=dict)
    users: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    functional: tuple[str, ...] = ()


class Recorder(TorchFunctionMode):
    """Watches one forward: ``with recorder.watching(): module(batch)``, then read ``uses``.

    Not for compiled models: the compiler takes hooks and weights apart as it likes, and a function mode would break
    it.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__()
        self._units = units
        self._owner = {id(p): (unit, name) for unit in units for name, p in unit.parameters.items()}
        self._entered: dict[int, None] = {}
        self._calls: Counter[int] = Counter()
        self._within: dict[int, list[nn.Module]] = {unit.index: [] for unit in units}  # its entry modules being called
        self._early: set[int] = set()
        self._used: set[int] = set()
        self._functional: dict[str, None] = {}
        self._users: dict[str, dict[int, nn.Module]] = {}

    def uses(self, model: nn.Module) -> Uses:
        """What was seen, with the names that ``model`` gives to its modules."""
        unit = {unit.index: unit.name for unit in self._units}
        path = {id(module): name for name, module in model.named_modules()}
        return Uses(
            order=tuple(unit[index] for index in self._entered),
            early=frozenset(unit[index] for index in self._early | set(unit) - set(self._entered)),
            skipped=frozenset(unit[index] for index in set(unit) - self._used),
            repeats={unit[index]: calls for index, calls in self._calls.items() if calls > 1},
            users={name: tuple(path.get(at, "?") for at in modules) for name, modules in self._users.items()},
            functional=tuple(self._functional),
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around one forward."""
        with ExitStack() as stack:
            for unit in self._units:
                for module in unit.entry_modules:
                    enter = module.register_forward_pre_hook(self._enter(unit), prepend=True)
                    leave = module.register_forward_hook(self._leave(unit), always_call=True)
                    stack.callback(enter.remove)
                    stack.callback(leave.remove)
            with self:
                yield

    def _enter(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._entered[unit.index] = None
            self._calls[unit.index] += module is unit.module
            self._within[unit.index].append(module)

        return hook

    def _leave(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._within[unit.index].pop()

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _reads_values(func):
            for value in tree_leaves((args, kwargs)):
                if id(value) in self._owner:
                    self._use(*self._owner[id(value)])
        return func(*args, **(kwargs or {}))

    def _use(self, unit: Unit, name: str) -> None:
        self._used.add(unit.index)
        if unit.index not in self._entered:
            self._early.add(unit.index)
        within = self._within[unit.index]
        if not within:
            self._functional[name] = None
        elif within[-1] is not unit.module:
            self._users.setdefault(name, {})[id(within[-1])] = within[-1]


def _reads_values(func: Any) -> bool:
    """Whether a call of torch may look at the values of its tensors: ``weight.dtype`` and ``weight.size()`` do not."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return name == "__get__" and getattr(func.__self__, "__name__", "") in _VIEWS
    return name not in _SHAPES


_VIEWS = {"T", "mT", "H", "mH", "data", "real", "imag"}
"""Properties of a tensor that give its values."""

_SHAPES = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_inference", "__len__", "requires_grad_"),
}
"""Methods that look at no value."""
