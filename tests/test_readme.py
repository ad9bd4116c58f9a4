"""The commands of README.md and docs/, run as they stand.

A fenced block (``bash`` or ``python``) right after an HTML comment ``<!-- test: run -->``, or
``<!-- test: run timeout=300 -->``, is run; blocks run in order, in one folder that starts empty, as a reader would.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.readme import PAGES, README

MARK = re.compile(r"<!--\s*test:\s*run(?:\s+timeout=(?P<timeout>\d+))?\s*-->$")
FENCE = re.compile(r"(?P<indent>\s*)```+(?P<language>\w*)")


@dataclass(frozen=True)
class Block:
    """One block to run."""

    line: int
    language: str
    text: str
    timeout_s: int

    @property
    def command(self) -> list[str]:
        if self.language == "python":
            return [sys.executable, "-c", self.text]
        return ["bash", "-euo", "pipefail", "-c", self.text]


def marked_blocks(text: str) -> list[Block]:
    """The blocks to run, in order.

    Raises:
        ValueError: A mark without a block of a known language behind it, or a block that does not end.
    """
    lines, blocks = text.splitlines(), []
    for number, line in enumerate(lines, start=1):
        if "<!--" not in line or "test:" not in line:
            continue
        mark = MARK.match(line.strip())
        rest = [following for following in lines[number:] if following.strip()]
        fence = FENCE.match(rest[0]) if rest else None
        if mark is None or fence is None or fence["language"] not in ("bash", "python"):
            raise ValueError(f"line {number}: `{line.strip()}` must stand before a ```bash or ```python block")
        body = rest_of(lines[number:], fence["indent"], number)
        blocks.append(Block(number, fence["language"], body, int(mark["timeout"] or 600)))
    return blocks


def rest_of(lines: list[str], indent: str, number: int) -> str:
    """The text between the first fence in `lines` and the one that closes it."""
    fences = [at for at, line in enumerate(lines) if line.strip().startswith("```")]
    if len(fences) < 2:
        raise ValueError(f"line {number}: the block does not end")
    return "\n".join(line.removeprefix(indent) for line in lines[fences[0] + 1 : fences[1]]) + "\n"


def run(block: Block, folder: Path) -> None:
    """Run one block where only installed commands and the folder itself are at hand."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": path}
    done = subprocess.run(
        block.command,
        cwd=folder,
        env=environment,
        timeout=block.timeout_s,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"line {block.line} ends with {done.returncode}:\n{done.stdout[-4000:]}"


@pytest.mark.slow  # trains a model; `.ci/run` runs it
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_work(page: Path, tmp_path: Path) -> None:
    blocks = marked_blocks(page.read_text())
    if not blocks:
        pytest.skip("nothing here is marked with <!-- test: run -->")
    for block in blocks:
        run(block, tmp_path)


EXAMPLE = """
Text.

```bash
not run
```

<!-- test: run -->
```bash
echo one > file
test "$(ls)" = file
```

1. In a list:

   <!-- test: run timeout=30 -->

   ```python
   if True:
       print(open("file").read())
   ```
"""


def test_marked_blocks_are_found_and_run_in_one_folder(tmp_path: Path) -> None:
    one, two = marked_blocks(EXAMPLE)
    assert (one.language, one.timeout_s, two.language, two.timeout_s) == ("bash", 600, "python", 30)
    assert two.text == 'if True:\n    print(open("file").read())\n'
    run(one, tmp_path)
    run(two, tmp_path)


@pytest.mark.parametrize("text", ["false\ntrue", "false | true", "echo $nothing_is_called_this", "no-such-command"])
def test_a_command_that_fails_is_seen(tmp_path: Path, text: str) -> None:
    with pytest.raises(AssertionError, match="line 7 ends with"):
        run(Block(7, "bash", text, 60), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- test: run -->\ntext\n```bash\nls\n```",
        "<!-- test: run -->",
        "<!-- test: run -->\n```yaml\na: 1\n```",
        "<!-- test: run -->\n```bash\nls",
        "<!-- test: runs -->\n```bash\nls\n```",
        "<!-- test: run timeout=5m -->\n```bash\nls\n```",
    ],
)
def test_a_mark_that_marks_nothing_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="line 1: "):
        marked_blocks(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_mark_marks_a_block(page: Path) -> None:
    marked_blocks(page.read_text())


def test_the_front_page_has_some() -> None:
    assert marked_blocks(README.read_text())
