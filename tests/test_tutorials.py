"""The tutorials run from top to bottom, and are stored with their outputs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

MACHINE_PATH = re.compile(r"(?<![\w./])(?:/(?:home|root|Users|work|tmp|var|opt|mnt|private)/|[A-Z]:\\\\?Users)")
"""Where a notebook was run is nobody's business, and different on every machine."""


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
    return found


def execute(path: Path, folder: Path) -> None:
    """Run a copy in `folder`, cell by cell, stopping at the first error."""
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
    ],
)
def test_each_fault_is_caught(stored: Any, fault: str) -> None:
    (found,) = faults(stored)
    assert fault in found


def test_relative_paths_and_rates_are_no_fault() -> None:
    assert faults(notebook("runs/tmp/1 and 3 tok/s, a/home/b", "1/2")) == []


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
