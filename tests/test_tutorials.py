"""The tutorials run from top to bottom, are stored with their outputs, and name nothing that is not there."""

from __future__ import annotations

import ast
import base64
import importlib
import inspect
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.image
import nbformat
import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_offload.conf import schema
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import lightning_offload
from lightning_offload.bench import SECTIONS

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

MACHINE_PATH = re.compile(r"(?<![\w./])(?:/(?:home|root|Users|work|tmp|var|opt|mnt|private)/|[A-Z]:\\\\?Users)")
"""Where a notebook was run is nobody's business, and different on every machine."""
NOISE = re.compile(r"\r|\bit/s\b|\d%\||Warning\b|\bGPU available\b")
"""Progress bars, warnings, and what Lightning says of the machine."""
SHOWS = re.compile(r"^(plt\.show\(|Image\()", re.MULTILINE)
COMMAND = re.compile(r"`lightning-offload\s+(\w+)([^`]*)`")
SPAN = re.compile(r"`([^`]+)`")


def stored_text(notebook: Any) -> str:
    """Everything that the outputs show as text."""
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shown += [output.get("text", ""), *output.get("traceback", [])]
            shown += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/png")]
    return "\n".join(shown)


def faults(notebook: Any) -> list[str]:
    """What is wrong with a notebook as it is stored."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    found = [f"cell {at} was not run" for at, cell in enumerate(code) if cell.execution_count is None]
    counts = [cell.execution_count for cell in code]
    if not found and counts != list(range(1, len(code) + 1)):
        found.append(f"cells were not run once, from top to bottom: {counts}")
    outputs = [output for cell in code for output in cell.outputs]
    if not outputs:
        found.append("no outputs are stored")
    found += [f"a stored output is an error: {output.ename}" for output in outputs if output.output_type == "error"]
    if at := MACHINE_PATH.search(stored_text(notebook)):
        found.append(f"a stored output names a path of the machine: {at.string[at.start() :][:60]!r}")
    if at := NOISE.search(stored_text(notebook)):
        found.append(f"a stored output has noise: {at.string[max(at.start() - 30, 0) :][:60]!r}")
    for at, cell in enumerate(code):
        if SHOWS.search(cell.source) and not any("image/png" in output.get("data", {}) for output in cell.outputs):
            found.append(f"cell {at} shows a picture, and none is stored")
    return found


def prose(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def pictures(notebook: Any) -> Iterator[Any]:
    """What is stored as a picture: rows x columns x colours."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if stored := output.get("data", {}).get("image/png"):
                yield matplotlib.image.imread(io.BytesIO(base64.b64decode(stored)))


def private_names(notebook: Any, *layers: str) -> list[str]:
    """What a notebook takes from the package beside public names, `numerics`' pure functions, and `layers`."""
    found = []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                found += [] if ast.unparse(node).startswith("signsgd.") else [node.attr]  # whose insides are shown
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names if alias.name.startswith("lightning_offload.")]
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_offload"):
                names = [alias.name for alias in node.names]
                found += [f"{node.module}.{name}" for name in names if not is_public(node.module, name, *layers)]
    return found


def is_public(module: str | None, name: str, *layers: str) -> bool:
    if module in ("lightning_offload", "lightning_offload.text"):
        return name in importlib.import_module(module).__all__
    return str(module).split(".")[1] in ("numerics", *layers) and not name.startswith("_")


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every command in backticks, with its overrides; a file or folder that the reader is to name is `somewhere`."""
    for command, rest in COMMAND.findall(text):
        yield command, shlex.split(re.sub(r"<[^>]*>", "somewhere", rest))


def calls(text: str) -> Iterator[tuple[str, ast.Call, Any]]:
    """Every call in backticks of a Trainer or of a public name, and what it would call."""
    for span in SPAN.findall(text):
        try:
            node = ast.parse(span, mode="eval").body
        except SyntaxError:
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name == "Trainer" or name in lightning_offload.__all__:
                yield span, node, L.Trainer if name == "Trainer" else getattr(lightning_offload, name)


def check_command(command: str, overrides: list[str]) -> None:
    schema.register()
    with initialize_config_module("lightning_offload.conf", version_base="1.3"):
        cfg = compose(command, overrides)
    if command == "bench":
        assert set(cfg.sections or ()) <= set(SECTIONS)


def check_call(span: str, call: ast.Call, target: Any) -> None:
    """That it takes these arguments; made, where they are all written out."""
    inspect.signature(target).bind(*call.args, **{each.arg: each.value for each in call.keywords if each.arg})
    literal = all(isinstance(each, ast.Constant) for each in (*call.args, *(each.value for each in call.keywords)))
    if literal and isinstance(target, type):
        extra = {"accelerator": "cpu", "logger": False} if target is L.Trainer else {}
        target(**{str(each.arg): ast.literal_eval(each.value) for each in call.keywords}, **extra)


def execute(path: Path, folder: Path) -> None:
    """Run a copy in `folder`, cell by cell, stopping at the first error."""
    for beside in path.parent.glob("*.py"):
        shutil.copy(beside, folder)
    copy = Path(shutil.copy(path, folder))
    notebook = nbformat.read(copy, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()


def test_there_are_tutorials() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_as_it_was_run(path: Path) -> None:
    assert faults(nbformat.read(path, as_version=4)) == []
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_begins_with_a_title_and_ends_with_what_to_try_next(path: Path) -> None:
    first, *_, last = nbformat.read(path, as_version=4).cells
    assert first.source.startswith("# ")
    title, *lines = last.source.splitlines()
    assert title == "## What to try next"
    assert sum(line.startswith("- ") for line in lines) >= 3
    assert "`" in last.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_has_pictures_with_something_on_them(path: Path) -> None:
    stored = list(pictures(nbformat.read(path, as_version=4)))
    assert stored
    for picture in stored:
        assert picture.std() > 0.05
        assert 500 < picture.shape[1] <= 1800


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_takes_only_public_names(path: Path) -> None:
    layers = ("memory", "errors") if path.stem.endswith("method_of_your_own") else ()  # what a method is made of
    assert private_names(nbformat.read(path, as_version=4), *layers) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_named_in_the_text_is_there(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = prose(nbformat.read(path, as_version=4))
    for command, overrides in commands(text):
        check_command(command, overrides)
    for found in calls(text):
        check_call(*found)
    for linked in re.findall(r"\]\(([^)]+)\)", text):
        assert (FOLDER / linked).exists() or linked.startswith("https://")


@pytest.mark.slow  # trains models; `.ci/run` runs it
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    execute(path, tmp_path)


def notebook(*outputs: str, counts: tuple[int | None, ...] | None = None) -> Any:
    """One code cell per output."""
    made = nbformat.v4.new_notebook()
    for at, text in enumerate(outputs, start=1):
        cell = nbformat.v4.new_code_cell(f"print({text!r})", execution_count=counts[at - 1] if counts else at)
        cell.outputs = [nbformat.v4.new_output("stream", text=text)] if text else []
        made.cells.append(cell)
    return made


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        (notebook("a", "b", counts=(1, None)), "cell 1 was not run"),
        (notebook("a", "b", counts=(2, 1)), "top to bottom"),
        (notebook("a", "b", counts=(3, 4)), "top to bottom"),
        (notebook("", ""), "no outputs"),
        (notebook("saved to /home/someone/runs/1"), "/home/someone"),
        (notebook("'/tmp/x.ckpt'"), "/tmp/x.ckpt"),
        (notebook(r"C:\Users\someone"), "machine"),
        (notebook("\rEpoch 0"), "noise"),
        (notebook("UserWarning: old"), "noise"),
        (notebook("x: 3.2 it/s"), "noise"),
    ],
)
def test_each_fault_is_caught(stored: Any, fault: str) -> None:
    (found,) = faults(stored)
    assert fault in found


def test_relative_paths_and_rates_are_no_fault() -> None:
    assert faults(notebook("runs/tmp/1 and 3 tok/s, a/home/b", "1/2")) == []


def test_a_picture_that_is_not_stored_is_a_fault() -> None:
    forgotten = notebook("text alone")
    forgotten.cells[0].source = "plt.plot([1])\nplt.show()"
    assert faults(forgotten) == ["cell 0 shows a picture, and none is stored"]


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("from lightning_offload import plan\nfrom lightning_offload.text import CausalLM", []),
        ("from lightning_offload.numerics.noise import noise\nx.__dict__", []),
        ("from lightning_offload.bench.sections import shape", ["lightning_offload.bench.sections.shape"]),
        ("from lightning_offload import doctor", ["lightning_offload.doctor"]),
        ("from lightning_offload.numerics.noise import _mixed", ["lightning_offload.numerics.noise._mixed"]),
        ("import lightning_offload.timeline", ["lightning_offload.timeline"]),
        ("trainer.strategy._window", ["_window"]),
    ],
)
def test_a_private_name_is_found(source: str, private: list[str]) -> None:
    assert private_names(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])) == private


@pytest.mark.parametrize(
    "command",
    [
        "train modle=tiny",
        "plan hardware=rtx409",
        "train data=jsonl data.pth=<file>",
        "bench 'sections=[nothing]'",
        "run",
    ],
)
def test_a_command_that_does_not_compose_is_found(command: str) -> None:
    ((name, overrides),) = commands(f"Try `lightning-offload {command}`.")
    with pytest.raises((HydraException, AssertionError)):
        check_command(name, overrides)


@pytest.mark.parametrize(
    "call",
    [
        "LSPOffloadStrategy(dimm=1)",
        "LSPOffloadStrategy(dim='large')",
        "plan(module, batch, hardwear=x)",
        'Trainer(strategy="lsp_ofload")',
    ],
)
def test_a_call_that_cannot_work_is_found(call: str) -> None:
    ((span, node, target),) = calls(f"Try `{call}`.")
    with pytest.raises((TypeError, ValueError, MisconfigurationException)):
        check_call(span, node, target)


def test_a_cell_that_fails_is_seen(tmp_path: Path) -> None:
    failing = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("open('written', 'w')\nassert 1 == 2, 'wrong'")]
    )
    path, folder = tmp_path / "failing.ipynb", tmp_path / "folder"
    folder.mkdir()
    nbformat.write(failing, path)
    with pytest.raises(CellExecutionError, match="wrong"):
        execute(path, folder)
    assert (folder / "written").exists()
