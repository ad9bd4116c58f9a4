"""The README says what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from lightning.pytorch.trainer.connectors import accelerator_connector

import lightning_offload
from tests.readme import PAGES, README, TREE, render, tables

ROOT = README.parent


def test_generated_tables_are_up_to_date() -> None:
    texts = [page.read_text() for page in PAGES]
    for page, text in zip(PAGES, texts, strict=True):
        assert render(text) == text, f"{page.name}: run `python -m tests.readme`"
    for marker in tables():
        assert sum(text.count(f"<!-- {marker}") for text in texts) == 1, marker
    assert any("`skip_nonfinite` | `True`" in text for text in texts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        place, _, part = target.partition("#")
        if "://" in place:
            continue
        file = page.parent / place if place else page
        assert file.exists(), target
        if part:
            assert part in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Of its headings, as they are linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_linked_from_the_front_page() -> None:
    linked = README.read_text()
    assert all(f"{page.name})" in linked for page in PAGES[1:])


def test_what_the_faq_quotes_is_said_somewhere() -> None:
    section = README.read_text().partition("## When something goes wrong")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| (`{1,2})(.+?)\1 \|", section, re.MULTILINE)
    assert len(quoted) >= 10
    sources = [*Path(lightning_offload.__file__).parent.rglob("*.py"), Path(accelerator_connector.__file__)]
    said = [text for source in sources for text in literals(source)]
    for _, message in quoted:
        pieces = [piece.strip() for piece in message.split("...") if piece.strip()]
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        assert any(pattern.search(text) for text in said), message


def literals(source: Path) -> list[str]:
    """The texts in a file, of f-strings what is not filled in."""
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


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
