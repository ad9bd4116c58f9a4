import ast
import platform
import sys
from itertools import combinations
from pathlib import Path

import pytest

from lightning_offload import text
from lightning_offload.errors import DataError
from lightning_offload.text import corpus
from lightning_offload.text.corpus_build import (
    PINNED_PLATFORM,
    PINNED_PYTHON,
    RELATED,
    bare_code,
    families,
    fingerprint,
    overlaps,
)

PLACES = [(domain, split) for domain in ("docs", "code") for split in ("pretrain", "train", "heldout")]


@pytest.fixture(scope="module")
def texts():
    return {place: corpus.load_corpus(*place) for place in PLACES}


def test_the_snapshot_is_the_committed_one(texts):
    found = {fingerprint(document): place for place, documents in texts.items() for document in documents}
    assert found == corpus.splits()
    assert fingerprint((corpus.FOLDER / "splits.tsv").read_text()) == "a3c6637f0859814cee64ba577d328a58"
    assert sum(file.stat().st_size for file in corpus.FOLDER.iterdir()) < 3 * 2**20


def test_every_domain_has_what_it_needs(texts):
    sizes = {place: sum(len(document.encode()) for document in documents) for place, documents in texts.items()}
    assert sizes[("code", "pretrain")] == 0
    assert all(size > 200_000 for place, size in sizes.items() if place != ("code", "pretrain"))
    assert sizes[("docs", "pretrain")] > 2_000_000
    assert sizes[("code", "train")] > 5_000_000


@pytest.mark.parametrize("domain", ["docs", "code"])
def test_no_document_nor_a_near_copy_is_in_two_splits(texts, domain):
    for one, other in combinations(("pretrain", "train", "heldout"), 2):
        assert not set(texts[(domain, one)]) & set(texts[(domain, other)])
    of_split = [("", document) for split in ("pretrain", "train", "heldout") for document in texts[(domain, split)]]
    bounds = [len(texts[(domain, "pretrain")]), len(texts[(domain, "pretrain")]) + len(texts[(domain, "train")])]
    split_of = [sum(index >= bound for bound in bounds) for index in range(len(of_split))]
    across = [share for small, large, share in overlaps(of_split) if split_of[small] != split_of[large]]
    assert max(across) < RELATED


def test_code_parses_and_has_no_comments_left(texts):
    for source in texts[("code", "heldout")]:
        assert all(
            ast.get_docstring(node) is None
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        )


def test_bare_code():
    source = '"""Module."""\nimport os  # why\n\n\ndef f():\n    """é."""\n'
    source += '\n\nclass A:\n    """Of\n    two."""\n    x = "#"\n'
    assert bare_code(source) == 'import os\n\n\ndef f():\n    pass\n\n\nclass A:\n\n    x = "#"\n'


def test_families_drop_copies_and_join_relatives():
    words = [f"w{i}" for i in range(400)]
    long, copy = " ".join(words[:200]), " ".join(words[:150])
    relative = " ".join(words[180:320])
    other = " ".join(reversed(words))
    found = families([("long", long), ("copy", copy), ("relative", relative), ("other", other)])
    assert sorted(sorted(name for name, _ in family) for family in found) == [["long", "relative"], ["other"]]


@pytest.mark.skipif(
    (platform.python_version(), sys.platform) != (PINNED_PYTHON, PINNED_PLATFORM),
    reason=f"the snapshot is the text of Python {PINNED_PYTHON} on {PINNED_PLATFORM}",
)
def test_the_snapshot_can_be_made_again():
    assert corpus.differences(corpus.rebuild()) == []


def test_differences_are_named():
    listed = (corpus.FOLDER / "splits.tsv").read_text()
    assert corpus.differences(listed) == []
    first = listed.splitlines()[1]
    found = corpus.differences(listed.replace(first, f"{first}x"))
    name = first.split("\t", 1)[1].replace("\t", " ")
    assert found == [f"only in the snapshot: {name}", f"only in this Python: {name}x"]


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"load_corpus\('prose', 'train'\).*'docs' or 'code'"):
        corpus.load_corpus("prose", "train")
    monkeypatch.setattr(corpus, "splits", dict)
    with pytest.raises(DataError, match=r"are not in splits\.tsv"):
        corpus.load_corpus("docs", "train")


def test_transformers_is_imported_in_functions_only():
    # the installed torchmetrics imports it by itself, so sys.modules says nothing
    for file in Path(text.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names if name} & {"transformers", "tokenizers"}, file


def test_all_public_names_are_there():
    assert all(getattr(text, name) is not None for name in text.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = text.nothing
