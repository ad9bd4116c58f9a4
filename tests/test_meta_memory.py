"""Host memory while weights come from files: that of the run, and one file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta_footprint import MAKE, write

ROOT = Path(__file__).parents[1]
ALLOWED = 8 << 20
"""Beside the formula and the largest file: adapters, the verdicts, and what Python makes on the way."""

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads what Linux says of a process")


@linux
@pytest.mark.parametrize("shape", ["20M", pytest.param("200M", marks=pytest.mark.slow)])
def test_no_more_than_the_run_and_one_file(shape: str, tmp_path: Path) -> None:
    """A second copy of the weights is 4 files and more; with one that is kept the bound is passed."""
    shard = write(tmp_path, shape)
    command = [sys.executable, "-m", "tests.meta_footprint", str(tmp_path), "0", "bfloat16", *MAKE, "zo2/whole"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=500)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, of in seen.items() if of["start"] > of["formula"] + shard + ALLOWED} == {"zo2/whole"}
    assert all(of["start"] > 0.8 * of["formula"] for of in seen.values())  # and the formula is no excuse
