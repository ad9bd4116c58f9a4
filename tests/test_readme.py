"""The commands of README.md and docs/, run as they stand.

A fenced block (``bash`` or ``python``) right after an HTML comment ``<!-- test: run -->``, or
``<!-- test: run timeout=300 -->``, is run; blocks run in order, in one folder that starts empty, as a reader would.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning_offload.conf import schema
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_offload.cli.main import _of_run
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


# Every other command is composed: a misspelt key or option in these pages is an error here


NAMES = "train|plan|evaluate|export|bench|doctor|compare"
COMMAND = re.compile(rf"(?<!\S)(?:\S*/)?lightning-offload (?P<text>(?:{NAMES})(?![\w-])[^\n|;&#]*)")
SHORT = re.compile(rf"(?P<text>(?:{NAMES}) \S*=.*)")
GROUPS = [folder.name for folder in Path(schema.__file__).parent.iterdir() if folder.is_dir()]
PLACEHOLDER = re.compile(r"<[^<>\n]*>")


def commands(text: str) -> list[str]:
    """What stands behind `lightning-offload` in blocks of bash and in inline code, where it may be left out."""
    fences = re.compile(r"^[ \t]*```+(\w*)\n(.*?)^[ \t]*```+[ \t]*$", flags=re.MULTILINE | re.DOTALL)
    blocks = "\n".join(found[2].replace("\\\n", " ") for found in fences.finditer(text) if found[1] == "bash")
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fences.sub("", text))]
    of_spans = [found for span in spans if (found := COMMAND.match(span) or SHORT.fullmatch(span))]
    return [found["text"].strip() for found in [*COMMAND.finditer(blocks), *of_spans]]


def overrides(command: str) -> tuple[str, list[str]]:
    """A command's name and settings; of a sweep the first value of each, what `...` and `<...>` stand for as some."""
    name, *words = shlex.split(PLACEHOLDER.sub("some", command))
    left_open = {f"{group}=some" for group in GROUPS}
    words = [word for word in words if "=" in word and not word.endswith("=...") and word not in left_open]
    parsed = OverridesParser.create().parse_overrides(words)
    firsts = [
        f"{one.get_key_element()}={next(iter(one.sweep_string_iterator()))}" if one.is_sweep_override() else word
        for one, word in zip(parsed, words, strict=True)
    ]
    return name, _of_run(firsts) if name == "evaluate" else firsts


def composed(command: str) -> DictConfig:
    name, words = overrides(command)
    schema.register()
    with initialize_config_module("lightning_offload.conf", version_base="1.3"):
        return compose(name, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_composes(page: Path) -> None:
    for command in dict.fromkeys(commands(page.read_text())):
        if "--config-dir" in command:  # with files of one's own
            continue
        try:
            composed(command)
        except (HydraException, OmegaConfBaseException) as error:
            pytest.fail(f"{page.name}: `lightning-offload {command}`: {error}")


def test_the_pages_are_full_of_commands() -> None:
    assert sum(len(commands(page.read_text())) for page in PAGES) > 30


MISSPELT = """
| `train dta=facts` | in a table |
`lightning-offload evaluate ckpt_path=runs/<name>
splitt=test` over two lines

```bash
python -m venv .venv && .venv/bin/lightning-offload train trainer.max_stepps=3 && echo
lightning-offload train -m methood=full,lsp \\
  lr=1e-3
lightning-offload export ckpt=runs/<name>  # after all
```

and `lightning-offload bench 'sections=[rates]' zeroth.forwardss=1`, not `train` or `plan()` alone
"""


def test_a_misspelt_command_is_seen() -> None:
    found = commands(MISSPELT)
    assert len(found) == 6
    for command in found:
        with pytest.raises((HydraException, OmegaConfBaseException)):
            composed(command)
