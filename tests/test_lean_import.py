"""What importing the package must not bring along; each time in a fresh interpreter.

Time is printed by ``python -X importtime -c 'import lightning_offload'`` and not tested: beside torch and Lightning,
which are most of it, the package itself should cost less than 0.2 s.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_offload

PACKAGE = Path(lightning_offload.__file__).parent
HEAVY = {"transformers", "datasets", "hydra", "omegaconf", "matplotlib", "safetensors", "peft"}
LEAN = sorted(
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for layer in ("numerics", "memory", "methods")
    for file in (PACKAGE / layer).glob("[!_]*.py")
)


def imported_by(*modules: str, forget: str = "") -> tuple[list[set[str]], bool]:
    """Roots of everything imported after each of `modules`, and whether CUDA is initialised at the end.

    ``forget`` is a package whose ``__init__`` is not run: its submodules are imported without it.
    """
    code = f"""
import json, sys, types
if {forget!r}:
    package = types.ModuleType({forget!r})
    package.__path__ = [{str(PACKAGE)!r}]
    sys.modules[{forget!r}] = package
seen = []
for module in {modules!r}:
    __import__(module)
    seen.append(sorted({{name.split(".")[0] for name in sys.modules}}))
import torch
print(json.dumps([seen, torch.cuda.is_initialized()]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    seen, initialised = json.loads(done.stdout.splitlines()[-1])
    return [set(roots) for roots in seen], initialised


def test_import_is_lean() -> None:
    (before, after), initialised = imported_by("lightning.pytorch", "lightning_offload")
    assert "lightning_offload" in after - before
    assert (after - before) & HEAVY == set()
    assert not initialised


def test_names_imported_when_asked_for_are_there() -> None:
    for name in lightning_offload.__all__:
        assert getattr(lightning_offload, name) is not None
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        _ = lightning_offload.nothing


def test_the_layers_below_import_no_lightning() -> None:
    """All in one interpreter, and last a module that does import it, so that the test is seen to see it."""
    assert {"lightning_offload.numerics.adam", "lightning_offload.memory.lanes"} < set(LEAN)
    modules = (*LEAN, "lightning_offload.precision")
    (*lean, last), initialised = imported_by(*modules, forget="lightning_offload")
    for module, roots in zip(LEAN, lean, strict=True):
        assert roots & ({"lightning", "pytorch_lightning", "torchmetrics"} | HEAVY) == set(), module
    assert "lightning" in last
    assert not initialised
