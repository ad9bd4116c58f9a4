"""The same strategies, mixins and callbacks for those who write ``import pytorch_lightning``.

``lightning.pytorch`` and ``pytorch_lightning`` are two copies of one code base, each with a registry and classes of its
own. So is what this package has for them: the modules that know Lightning are compiled once more, with the other names
in their imports, as ``lightning_offload.pl.<module>``. Engines and numerics know no Lightning and are the same.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import lightning_offload

FACING = frozenset(
    {
        "attaching",
        "attachment",
        "behaviour",
        "buffers",
        "calibration",
        "callbacks",
        "checkpoint",
        "gradient_behaviour",
        "materialising",
        "meft_behaviour",
        "method_mixins",
        "mixins",
        "own_method",
        "precision",
        "progress",
        "ranks",
        "registry",
        "resting",
        "resuming",
        "savings",
        "shortage",
        "strategies",
        "tracing",
        "windows",
        "zeroth_attaching",
        "zeroth_attachment",
        "zeroth_behaviour",
    }
)
"""Modules of ``lightning_offload`` that know Lightning."""

_NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
_NAMES |= {f"lightning_offload.{module}": f"{__name__}.{module}" for module in FACING}


class _Renamed(ast.NodeTransformer):
    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        for name, other in _NAMES.items():
            if node.module == name or (node.module or "").startswith(f"{name}."):
                node.module = other + (node.module or "").removeprefix(name)
                break
        return node


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Never of the bytecode that is kept beside the source: it is the other's."""
        tree = _Renamed().visit(ast.parse(self.get_data(self.path)))
        return compile(tree, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = fullname.rpartition(".")
        if package != __name__ or module not in FACING:
            return None
        source = str(Path(__file__).parents[1] / f"{module}.py")
        return spec_from_file_location(fullname, source, loader=_Loader(fullname, source))


if not any(type(finder).__qualname__ == _Finder.__qualname__ for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
importlib.import_module(f"{__name__}.registry").register()


def __getattr__(name: str) -> Any:
    """What ``lightning_offload`` has under this name, for ``pytorch_lightning``."""
    if name not in lightning_offload.__all__:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    made = getattr(lightning_offload, name)
    home = made.__module__.removeprefix("lightning_offload.")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name) if home in FACING else made
