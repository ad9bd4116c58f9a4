"""More than fifty things that users get wrong: one line with the place and the way out, and everything as it was."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.bad_inputs import CASES, GOOD, Case, jsonl, rows, setting
from tests.command import settings

QUICK = ["method=full", "plan=false", "trace=false"]
NEWS = re.compile(r"(full|lsp|zo2|meft)_offload: |measuring this machine|other programs keep this machine busy")


@pytest.fixture(scope="module")
def done(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, in `runs/done`."""
    from lightning_offload import cli

    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["train", *settings(inputs), *QUICK, "name=done", "trainer.max_steps=2"]
        patch.setattr(sys, "argv", ["lightning-offload", *arguments])
        assert cli.main() == 0
    return folder / "runs"


def arguments(case: Case, given: list[str], inputs: Path) -> list[str]:
    """The words of a command; of two settings of one key the later one."""
    command, *words = case.command.replace("' ", "'\0").split(" ")
    settings: dict[str, str] = {}
    for word in words:
        for one in [*given, *QUICK] if word == "{given}" else [word]:
            key = one.partition("=")[0]
            settings.pop(key, None)
            settings[key] = one.replace("{inputs}", str(inputs)).replace("\0", " ")
    return [command, *settings.values()]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_there_are_more_than_fifty() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) > 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_line_and_leaves_everything(case: Case, run, given, inputs, done, workplace, capsys) -> None:
    if case.of_run:
        shutil.copytree(done, "runs")
    case.make(workplace, inputs / "small")
    before = contents(workplace)
    capsys.readouterr()
    words = arguments(case, given, inputs)
    assert run(*words) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if not NEWS.match(line)]
    assert line.startswith(f"lightning-offload {words[0]}: ")
    pattern = ".*".join(map(re.escape, case.said))
    assert re.search(pattern, line)
    assert len(line) < 900
    assert "Traceback" not in said.out
    assert contents(workplace) == before


GOES = [
    jsonl("a byte order mark", b"\xef\xbb\xbf" + GOOD),
    jsonl("lines as Windows ends them", GOOD.replace(b"\n", b"\r\n")),
    jsonl("no end of the last line, blank ones after it", GOOD.rstrip() + b"\n\n \n"),
    jsonl("an empty prompt, and fields of no concern", rows(12, prompt="", source=None, score=[1])),
    jsonl("fewer rows than a batch", rows(3), more="data.batch_size=64"),
    setting("trainer.limit_val_batches=0"),
]


@pytest.mark.parametrize("case", GOES, ids=lambda case: case.name)
def test_what_only_looks_bad_is_trained_on(case: Case, run, given, inputs, workplace, capsys) -> None:
    case.make(workplace, inputs / "small")
    rest = ["trainer.max_steps=1", "callbacks=none", "logger=none", "export=false"]
    assert run(*arguments(case, given, inputs), *rest) == 0
    out = capsys.readouterr().out
    assert "held-out, before -> after" in out or "no held-out loss: trainer.limit_val_batches=0" in out


def test_samples_without_room_for_an_answer_are_named(run, given, inputs, workplace, capsys) -> None:
    long = rows(2, prompt="def add " * 30)
    jsonl("long", rows(6) + long + rows(4)).make(workplace, inputs / "small")
    rest = ["trainer.max_steps=1", "callbacks=none", "logger=none", "export=false"]
    with pytest.warns(
        UserWarning, match=r"my\.jsonl: 2 examples dropped.*\(lines 7, 8\)\. Raise data\.sequence_length"
    ):
        assert run(*arguments(jsonl("long", b""), given, inputs), *rest) == 0
