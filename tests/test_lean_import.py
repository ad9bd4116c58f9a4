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


def imported_by(*modules: str, forget: str = "") -> tuple[set[str], bool]:
    """Roots of everything imported by `modules`, and whether CUDA is initialised after it.

    ``forget`` is a package whose ``__init__`` is not run: its submodules are imported without it.
    """
    code = f"""
import json, sys, types
if {forget!r}:
    package = types.ModuleType({forget!r})
    package.__path__ = [{str(PACKAGE)!r}]
    sys.modules[{forget!r}] = package
for module in {modules!r}:
    __import__(module)
import torch
print(json.dumps([sorted({{name.split(".")[0] for name in sys.modules}}), torch.cuda.is_initialized()]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    roots, initialised = json.loads(done.stdout.splitlines()[-1])
    return set(roots), initialised


def test_import_is_lean() -> None:
    before, _ = imported_by("lightning.pytorch")
    after, initialised = imported_by("lightning_offload")
    assert (after - before) & HEAVY == set()
    assert "lightning_offload" in after
    assert not initialised


def test_names_imported_when_asked_for_are_there() -> None:
    for name in lightning_offload.__all__:
        assert getattr(lightning_offload, name) is not None
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        _ = lightning_offload.nothing


def test_the_layers_below_import_no_lightning() -> None:
    """All in one interpreter: were one of them to import it, it would be there."""
    assert {"lightning_offload.numerics.adam", "lightning_offload.memory.lanes"} < set(LEAN)
    roots, initialised = imported_by(*LEAN, forget="lightning_offload")
    assert roots & ({"lightning", "pytorch_lightning", "torchmetrics"} | HEAVY) == set()
    assert not initialised


def test_the_test_sees_what_is_imported() -> None:
    roots, _ = imported_by("lightning_offload.precision", forget="lightning_offload")
    assert "lightning" in roots
