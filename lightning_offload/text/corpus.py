"""The pinned corpus: CPython 3.11's own documentation and source, split three ways by a committed list of hashes.

``docs`` is the text of ``help()`` topics and the docstrings of the standard library, C modules included; ``code`` is
its source without docstrings and comments. The text differs between Python versions, so a snapshot ships.

``python -m lightning_offload.text.corpus build`` makes it again from the running interpreter and says what differs.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

from lightning_offload.errors import DataError
from lightning_offload.text import corpus_build
from lightning_offload.text.corpus_build import PINNED_PLATFORM, PINNED_PYTHON, fingerprint

Domain = Literal["docs", "code"]
Split = Literal["pretrain", "train", "heldout"]

FOLDER = Path(__file__).parent / "assets" / "corpus"


@cache
def splits() -> dict[str, tuple[str, str]]:
    """The committed list: fingerprint of a document -> (domain, split)."""
    rows = (line.split("\t") for line in (FOLDER / "splits.tsv").read_text(encoding="utf-8").splitlines()[1:])
    return {digest: (domain, split) for digest, domain, split, _ in rows}


@cache
def _documents(domain: str) -> tuple[tuple[str, str], ...]:
    """Fingerprint and text of a domain's documents, in order of their fingerprints: a fixed, arbitrary order."""
    with lzma.open(FOLDER / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return tuple(sorted((fingerprint(text), text) for text in texts))


def load_corpus(domain: Domain, split: Split) -> list[str]:
    """Documents of one domain that belong to one split.

    ``pretrain`` is what the shipped model and its tokenizer saw: there is none in ``code``.

    Raises:
        ValueError: for another domain or split.
        DataError: when the snapshot and the list of splits disagree.
    """
    if domain not in ("docs", "code") or split not in ("pretrain", "train", "heldout"):
        raise ValueError(
            f"load_corpus({domain!r}, {split!r}): the domain is 'docs' or 'code',"
            " the split 'pretrain', 'train' or 'heldout'."
        )
    listed, documents = splits(), _documents(domain)
    unlisted = sum(digest not in listed for digest, _ in documents)
    if unlisted:
        raise DataError(f"{unlisted} documents of {FOLDER / f'{domain}.jsonl.xz'} are not in splits.tsv beside it.")
    return [text for digest, text in documents if listed[digest] == (domain, split)]


def rebuild(folder: Path | None = None) -> str:
    """The list of splits made from this interpreter; with a `folder`, the whole snapshot is written there."""
    # isolated and without site-packages: what an environment adds to builtins must not reach the text
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(Path(corpus_build.__file__))]
    if folder is None:
        return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, str(folder)], check=True)
    return (folder / "splits.tsv").read_text(encoding="utf-8")


def differences(rebuilt: str) -> list[str]:
    """Documents that differ between a rebuilt list of splits and the committed one."""
    ours = set((FOLDER / "splits.tsv").read_text(encoding="utf-8").splitlines())
    theirs = set(rebuilt.splitlines())
    names = {line: " ".join(line.split("\t")[1:]) for line in ours ^ theirs}
    return [f"only in the snapshot: {names[line]}" for line in sorted(ours - theirs)] + [
        f"only in this Python: {names[line]}" for line in sorted(theirs - ours)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line: rebuild, compare, say what differs; 0 when identical."""
    parser = argparse.ArgumentParser(prog="python -m lightning_offload.text.corpus", description=__doc__)
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--into", type=Path, help="keep the new snapshot in this folder")
    options = parser.parse_args(arguments)
    here, pinned = (platform.python_version(), sys.platform), (PINNED_PYTHON, PINNED_PLATFORM)
    if here != pinned:
        print(f"Python {here[0]} on {here[1]}; the snapshot is of {pinned[0]} on {pinned[1]}: expect differences.")
    with tempfile.TemporaryDirectory() as scratch:
        found = differences(rebuild(options.into or Path(scratch)))
    print("\n".join([*found, f"{len(found)} differences"] if found else ["identical to the shipped snapshot"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
