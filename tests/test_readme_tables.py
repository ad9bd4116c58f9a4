"""The README says what the code says."""

from __future__ import annotations

from pathlib import Path

import lightning_offload
from tests.readme import README, TREE, render

ROOT = README.parent


def test_generated_tables_are_up_to_date() -> None:
    text = README.read_text()
    assert render(text) == text, "run `python -m tests.readme`"
    assert "`skip_nonfinite` | `True`" in text


def test_the_tree_names_every_module() -> None:
    package = Path(lightning_offload.__file__).parent
    modules = {f"lightning_offload/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    folders = tuple(path for path in TREE if path.startswith("lightning_offload/") and path.endswith("/"))
    alone = {
        m for m in modules if not m.endswith("__init__.py") and not m.startswith((*folders, "lightning_offload/conf/"))
    }
    assert alone == {path for path in TREE if path.endswith(".py")}
    assert all(any(module.startswith(folder) for module in modules) for folder in folders)


def test_public_names_exist() -> None:
    for name in lightning_offload.__all__:
        assert getattr(lightning_offload, name) is not None
