"""Who may import whom, checked from the syntax tree."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lightning_offload

PACKAGE = Path(lightning_offload.__file__).parent
NAME = "lightning_offload"


@dataclass(frozen=True)
class May:
    """What a layer may import beside itself and the standard library.

    Attributes:
        layers: Parts of this package.
        third: Third-party packages.
        lazy: What only a function may import, or the type checker: parts of this package start with a dot.
    """

    layers: str = ""
    third: str = ""
    lazy: str = ""


RULES = {
    "errors": May(),
    "numerics": May("errors", "torch", "triton"),
    "memory": May("errors", "torch psutil", "safetensors"),
    "methods": May("errors numerics memory", "torch", "numpy"),
    "words": May("memory"),
    "writing": May("words"),
    "windows": May("", "lightning"),
    "precision": May("errors methods", "torch lightning typing_extensions"),
    "checkpoint": May("errors memory writing", "torch lightning typing_extensions"),
    "tables": May("memory methods words", "torch"),
    "savings": May("memory methods precision tables", "torch lightning"),
    "shortage": May("errors memory savings tables words", "torch"),
    "calibration": May("methods", "torch lightning"),
    "resuming": May("errors methods calibration", "torch lightning"),
    "attaching": May("memory methods resuming windows savings shortage", "torch lightning"),
    "parts": May("", "torch"),
    "buffers": May("", "torch lightning"),
    "materialising": May("errors memory methods windows buffers", "torch lightning"),
    "behaviour": May(
        "memory methods windows precision checkpoint attaching materialising savings shortage",
        "torch lightning typing_extensions",
    ),
    "gradient_behaviour": May(
        "methods calibration resuming attaching behaviour shortage",
        "torch lightning typing_extensions",
    ),
    "zeroth_attaching": May(
        "errors memory methods windows resuming parts attaching savings shortage", "torch lightning"
    ),
    "zeroth_behaviour": May(
        "memory methods windows resting zeroth_attaching shortage", "torch lightning typing_extensions"
    ),
    "attachment": May(
        "methods windows precision calibration resuming attaching savings", "torch lightning typing_extensions"
    ),
    "zeroth_attachment": May("methods attaching attachment zeroth_attaching", "torch lightning typing_extensions"),
    "ranks": May("memory methods behaviour", "torch lightning typing_extensions"),
    "resting": May("behaviour shortage", "lightning typing_extensions"),
    "meft_behaviour": May(
        "memory methods windows checkpoint resuming attaching resting gradient_behaviour",
        "torch lightning typing_extensions",
    ),
    "strategies": May(
        "behaviour gradient_behaviour meft_behaviour zeroth_behaviour ranks methods",
        "torch lightning typing_extensions",
    ),
    "pl": May("__init__"),
    "registry": May("behaviour ranks strategies", "lightning"),
    "own_method": May("methods gradient_behaviour ranks registry strategies", "lightning"),
    "mixins": May(
        "gradient_behaviour zeroth_behaviour attachment zeroth_attachment memory methods shortage", "torch lightning"
    ),
    "method_mixins": May("meft_behaviour behaviour precision attachment zeroth_attachment mixins methods", "lightning"),
    "callbacks": May("behaviour attaching attachment memory methods tables", "torch lightning typing_extensions"),
    "progress": May("errors", "lightning typing_extensions", "transformers"),
    "timeline": May("memory writing", "", "matplotlib"),
    "tracing": May("behaviour memory methods timeline", "torch lightning typing_extensions"),
    "planning": May("errors memory methods parts timeline words", "torch", "yaml .text"),
    "__init__": May(
        "registry strategies precision mixins method_mixins callbacks tracing",
        "",
        ".export .methods .planning .replaying .adapters .lora .merging .own_method",
    ),
    "replaying": May("errors methods numerics", "torch"),
    "folders": May("errors", "", "safetensors"),
    "stock": May("", "torch"),
    "agreement": May("errors", "torch"),
    "lora": May("errors folders stock agreement", "torch", "peft safetensors"),
    "export": May("errors memory checkpoint folders methods stock agreement lora", "torch", "transformers safetensors"),
    "adapters": May("errors memory methods checkpoint folders stock agreement", "torch", "safetensors .__init__"),
    "merging": May("errors checkpoint methods adapters stock", "torch"),
    "bench": May(
        "errors memory methods numerics planning behaviour strategies text",
        "torch lightning typing_extensions",
        "yaml matplotlib torchao galore_torch peft",
    ),
    "text": May(
        "errors", "torch lightning torchmetrics typing_extensions", "transformers tokenizers datasets pyarrow peft"
    ),
    "doctor": May("memory", "torch"),
    "plots": May("errors runs writing", "", "matplotlib yaml"),
    "comparing": May("memory plots words writing"),
    "runs": May("errors"),
    "cli": May(
        "errors memory methods behaviour callbacks strategies planning tracing stock export lora adapters merging "
        "replaying plots comparing progress runs doctor bench writing conf __init__ text",
        "torch lightning hydra omegaconf typing_extensions yaml",
    ),
}
"""The layers of the design; a new module is added here, with what it may import."""

THREADS = {"threading", "_thread", "concurrent", "multiprocessing", "queue"}
STREAMS = {"Stream", "Event", "ExternalStream", "current_stream", "set_stream", "cudart", "record_stream"}
"""Threads, streams, events and pinned memory are the business of `memory` alone."""


@dataclass(frozen=True)
class Import:
    """One imported module: its root, and for this package the layer in it."""

    name: str
    line: int
    lazy: bool

    @property
    def root(self) -> str:
        return self.name.split(".")[0]

    @property
    def layer(self) -> str:
        return [*self.name.split("."), "__init__"][1]


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST, *, lazy: bool = False) -> Iterator[Import]:
    """Every import below `tree`; inside functions and under `TYPE_CHECKING` they are lazy."""
    for node in ast.iter_child_nodes(tree):
        inner = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inner = True
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
            # `from package import layer` imports the layer
            names = [f"{NAME}.{alias.name}" for alias in node.names] if node.module == NAME else [node.module or ""]
            for name in names:
                yield Import(name, node.lineno, lazy)
        else:
            yield from imports(node, lazy=inner)


def violations(layer: str, source: str) -> list[str]:
    """What the rules forbid in `source`, as a file of `layer`."""
    if layer not in RULES:
        return [f"`{layer}` has no rule: say in RULES what it may import"]
    may, tree = RULES[layer], ast.parse(source)
    lazy = may.lazy.split()
    found = []
    for at in imports(tree):
        if at.root == NAME:
            own = at.layer if at.layer in RULES or at.layer == "conf" else "__init__"
            allowed = own in [layer, *may.layers.split()] or (at.lazy and f".{own}" in lazy)
        elif at.root in sys.stdlib_module_names:
            allowed = layer == "memory" or at.root not in THREADS
        else:
            allowed = at.root in may.third.split() or (at.lazy and at.root in lazy)
        if not allowed:
            found.append(f"line {at.line}: `{layer}` must not import `{at.name}`{' here' * (at.root in lazy)}")
    if layer != "memory":
        found += [
            f"line {node.lineno}: `{layer}` must not touch `{node.attr}`"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in STREAMS
        ]
    return found


FILES = sorted(file for file in PACKAGE.rglob("*.py") if "conf" not in file.relative_to(PACKAGE).parts)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_file_keeps_to_its_layer(file: Path) -> None:
    assert violations(layer_of(file), file.read_text()) == []


def test_every_rule_has_a_file() -> None:
    assert set(RULES) == {layer_of(file) for file in FILES}


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("errors", "from lightning_offload.memory import arena"),
        ("numerics", "import lightning"),
        ("numerics", "from lightning_offload.memory.lanes import Lanes"),
        ("numerics", "import triton"),  # not at the top
        ("memory", "from lightning_offload.numerics.adam import adam_"),
        ("memory", "def f():\n    import lightning.pytorch as pl"),
        ("memory", "from lightning_offload import methods"),
        ("methods", "from lightning.pytorch import Trainer"),
        ("methods", "def f():\n    from lightning_offload.strategies import FullOffloadStrategy"),
        ("methods", "import psutil"),
        ("methods", "import threading"),
        ("methods", "import torch\ntorch.cuda.Stream()"),
        ("strategies", "def f():\n    from lightning_offload.planning import plan"),
        ("strategies", "from lightning_offload.export import export_to_hf"),
        ("strategies", "from lightning_offload.numerics import adam"),
        ("strategies", "import torch\ntorch.cuda.current_stream().synchronize()"),
        ("checkpoint", "from lightning_offload.methods.engine import Engine"),
        ("__init__", "from lightning_offload.export import export_to_hf"),  # not at the top
        ("__init__", "import transformers"),
        ("export", "import transformers"),  # not at the top
        ("export", "class A:\n    from transformers import AutoModel"),  # a class body runs at import
        ("export", "try:\n    import transformers\nexcept ImportError:\n    pass"),
        ("text", "import hydra"),
        ("text", "def f():\n    from omegaconf import OmegaConf"),
        ("plots", "import matplotlib.pyplot as plt"),
        ("runs", "from lightning_offload.cli import main"),
        ("runs", "from lightning_offload import cli"),
        ("runs", "import lightning_offload.cli"),
        ("brand_new", "import torch"),
    ],
)
def test_each_violation_is_caught(layer: str, source: str) -> None:
    assert len(violations(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("numerics", "def f():\n    import triton\n    import torch, math"),
        ("memory", "import threading\nimport torch\ntorch.cuda.Stream()"),
        ("strategies", "from lightning_offload.methods.engine import Engine\nimport lightning.pytorch"),
        ("export", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("__init__", "def __getattr__(name):\n    from lightning_offload.export import export_to_hf"),
    ],
)
def test_what_is_allowed_is_not_caught(layer: str, source: str) -> None:
    assert violations(layer, source) == []
