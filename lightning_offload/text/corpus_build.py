"""How the corpus snapshot is made from an interpreter: the standard library, split into prose and code.

Standard library only and no imports of this package: `build` runs this file as a script in an isolated interpreter
(``python -I -S``), so that nothing an environment adds to ``builtins`` or ``sys`` reaches the text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import lzma
import re
import sys
import sysconfig
import tokenize
import types
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

#: what the committed snapshot was made with
PINNED_PYTHON = "3.11.7"
PINNED_PLATFORM = "linux"

#: folders whose text is tests, generated tables, installers or other people's packages
LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "pydoc_data", "ensurepip", "turtledemo", "__phello__"}
)
#: modules that print, open a browser, or hold tables and machine-specific values
LEFT_OUT_MODULES = frozenset({"this", "antigravity", "__hello__", "stringprep", "entities"})
MIN_CHARS = 200
#: words per shingle; documents sharing this fraction of the smaller one's shingles are the same, or related
SHINGLE_WORDS = 8
SAME, RELATED = 0.5, 0.05
#: upper bounds of the split by hash, in percent
SHARES = {
    "docs": (("heldout", 8), ("train", 18), ("pretrain", 100)),
    "code": (("heldout", 10), ("train", 100)),
}

Document = tuple[str, str]  # name, text


def fingerprint(text: str) -> str:
    """First 128 bits of the text's SHA-256, in hex: a document's name in the list of splits."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def python_files(stdlib: Path) -> list[Path]:
    """The library's source files that are read, in a fixed order."""
    found = []
    for path in stdlib.rglob("*.py"):
        relative = path.relative_to(stdlib)
        own = relative.stem not in LEFT_OUT_MODULES and not relative.stem.startswith(("_sysconfigdata", "_test"))
        if own and not LEFT_OUT.intersection(relative.parts) and not relative.parts[0].startswith("config-"):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(stdlib).as_posix())


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Every class and function under `node` with its qualified name; expressions are not entered."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield f"{prefix}{child.name}", child
            yield from definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from definitions(child, prefix)


def docstring_statements(tree: ast.Module) -> Iterator[tuple[ast.Expr, bool]]:
    """Each docstring's statement, and whether removing it would leave an empty body."""
    for node in (tree, *(definition for _, definition in definitions(tree))):
        if ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield first, len(node.body) == 1 and node is not tree


def bare_code(source: str) -> str:
    """`source` without docstrings and comments; it still parses."""
    lines = source.splitlines(keepends=True)
    for statement, alone in docstring_statements(ast.parse(source)):
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        head = lines[first].encode()[: statement.col_offset].decode()
        tail = lines[last].encode()[statement.end_col_offset or 0 :].decode()
        filler = "pass" if alone else "0" if tail.lstrip().startswith(";") or head.strip() else ""
        lines[first : last + 1] = [head + filler + tail] + [""] * (last - first)
    return tidy(without_comments("".join(lines)))


def without_comments(source: str) -> str:
    """`source` with each comment cut out of its line."""
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip() + "\n"
    return "".join(lines)


def tidy(text: str) -> str:
    """No trailing blanks, no form feeds, at most two empty lines in a row, one newline at the end."""
    text = "\n".join(line.rstrip() for line in text.replace("\f", "").splitlines())
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def code_documents(stdlib: Path) -> Iterator[Document]:
    """One document per source file."""
    for path in python_files(stdlib):
        with tokenize.open(path) as file:
            yield path.relative_to(stdlib).as_posix(), bare_code(file.read())


def source_docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of a module (named "") and of everything defined in it."""
    tree = ast.parse(source)
    yield "", ast.get_docstring(tree) or ""
    for name, definition in definitions(tree):
        yield name, ast.get_docstring(definition) or ""


def own_doc(value: object) -> str:
    """The docstring of a live object, dedented; empty where there is none."""
    doc = getattr(value, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def compiled_docstrings(module: types.ModuleType) -> Iterator[tuple[str, str]]:
    """The same for a module written in C, from its live objects."""
    yield "", own_doc(module)
    for name, value in sorted(vars(module).items()):
        if inspect.isbuiltin(value):
            yield name, own_doc(value)
        elif inspect.isclass(value) and value.__module__ in (module.__name__, module.__name__.lstrip("_")):
            yield name, own_doc(value)
            for attribute, member in sorted(vars(value).items()):
                if inspect.isroutine(member) or inspect.isdatadescriptor(member):
                    yield f"{name}.{attribute}", own_doc(member)


def compiled_modules() -> Iterator[types.ModuleType]:
    """The library's modules that have no Python source, on this platform."""
    for name in sorted(sys.stdlib_module_names - LEFT_OUT_MODULES):
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec else None
        if origin == "built-in" or (origin and not origin.endswith((".py", "frozen"))):
            try:
                yield importlib.import_module(name)
            except ImportError:  # built, but its shared library is not here: reported by `build` as missing documents
                continue


def page(name: str, entries: Iterable[tuple[str, str]], seen: set[str]) -> Document:
    """A module's documentation as one text; docstrings already seen elsewhere (inherited, copied) are left out."""
    parts = [name]
    for qualified, docstring in entries:
        if docstring and docstring not in seen:
            seen.add(docstring)
            body = "\n".join(f"    {line}" if line and qualified else line for line in docstring.splitlines())
            parts.append(f"{qualified}\n{body}" if qualified else body)
    return name, tidy("\n\n".join(parts)) if len(parts) > 1 else ""


def docs_documents(stdlib: Path) -> Iterator[Document]:
    """One document per topic of ``help()``, and one per module."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"topic:{name}", tidy(topics[name])
    seen: set[str] = set()
    for path in python_files(stdlib):
        name = path.relative_to(stdlib).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        with tokenize.open(path) as file:
            yield page(name, source_docstrings(file.read()), seen)
    for module in compiled_modules():
        yield page(module.__name__, compiled_docstrings(module), seen)


def shingles(text: str) -> set[str]:
    """All runs of `SHINGLE_WORDS` words."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def overlaps(documents: list[Document]) -> Iterator[tuple[int, int, float]]:
    """Pairs of documents that share text: smaller, larger, the share of the smaller that is in the larger."""
    sets = [shingles(text) for _, text in documents]
    holders: dict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(sets):
        for shingle in own:
            holders[shingle].append(index)
    shared: Counter[tuple[int, int]] = Counter()
    for indices in holders.values():
        shared.update((a, b) for a in indices for b in indices if (len(sets[a]), a) < (len(sets[b]), b))
    for (small, large), count in sorted(shared.items()):
        yield small, large, count / len(sets[small])


def families(documents: list[Document]) -> list[list[Document]]:
    """Documents without near-identical copies, grouped so that related ones stay together."""
    pairs = list(overlaps(documents))
    copies = {small for small, _, share in pairs if share >= SAME}
    root = list(range(len(documents)))

    def find(index: int) -> int:
        while root[index] != index:
            index = root[index]
        return index

    for small, large, share in pairs:
        if share >= RELATED and not copies & {small, large}:
            root[find(small)] = find(large)
    groups: dict[int, list[Document]] = defaultdict(list)
    for index, document in enumerate(documents):
        if index not in copies:
            groups[find(index)].append(document)
    return list(groups.values())


def assign(domain: str, documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """The split of each document that is kept: drawn by the hash of its family's first member."""
    kept = [(name, text) for name, text in documents if len(text) >= MIN_CHARS]
    for family in families(kept):
        percent = int(min(fingerprint(text) for _, text in family)[:8], 16) % 100
        split = next(split for split, bound in SHARES[domain] if percent < bound)
        for document in family:
            yield split, document


def notices(stdlib: Path) -> str:
    """The copyright notices that stand in comments and docstrings of the files read, which the snapshot drops."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in python_files(stdlib):
        with tokenize.open(path) as file:
            source = file.read()
        comments = re.findall(r"(?:^[ \t]*#.*\n)+", source, flags=re.MULTILINE)
        docstrings = [text for _, text in source_docstrings(source)]
        for block in comments + docstrings:
            if re.search(r"copyright|licen[sc]e agreement|\(c\) \d{4}", block, flags=re.IGNORECASE):
                found[tidy(block)].append(path.relative_to(stdlib).as_posix())
    return "\n".join(f"== {', '.join(paths)}\n\n{block}" for block, paths in found.items())


def collect(domain: str) -> list[tuple[str, Document]]:
    """All documents of a domain in this interpreter, each with its split, by name."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    documents = docs_documents(stdlib) if domain == "docs" else code_documents(stdlib)
    return sorted(assign(domain, documents), key=lambda item: item[1][0])


def split_list(collected: dict[str, list[tuple[str, Document]]]) -> str:
    """The list of splits: hash, domain, split and name of each document."""
    rows = [
        f"{fingerprint(text)}\t{domain}\t{split}\t{name}\n"
        for domain, documents in collected.items()
        for split, (name, text) in documents
    ]
    return "".join(["# hash\tdomain\tsplit\tname\n", *rows])


def write(folder: Path, collected: dict[str, list[tuple[str, Document]]]) -> None:
    """The snapshot: a compressed file per domain, the list of splits, and the notices."""
    for domain, documents in collected.items():
        lines = [json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n" for _, (name, text) in documents]
        packed = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
        (folder / f"{domain}.jsonl.xz").write_bytes(packed)
    (folder / "splits.tsv").write_text(split_list(collected), encoding="utf-8")
    (folder / "NOTICES.txt").write_text(notices(Path(sysconfig.get_path("stdlib"))), encoding="utf-8")


if __name__ == "__main__":
    # one argument: where to write the snapshot; none: print the list of splits alone
    built = {domain: collect(domain) for domain in SHARES}
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), built)
    else:
        sys.stdout.write(split_list(built))
