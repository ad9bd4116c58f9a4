"""The fused kernel without a GPU. Triton keeps its interpreter or driver for good: hence processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_offload.numerics.zeroth import has_triton

pytestmark = pytest.mark.slow


def printed(script: str, **environment: str) -> str:
    """What a module prints that is run as a script."""
    if not has_triton():
        pytest.skip("needs Triton, which torch brings on CUDA machines; `pip install triton` is enough for this test")
    done = subprocess.run(
        [sys.executable, "-m", script],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_kernel_has_the_bits_of_the_torch_form() -> None:
    assert printed("tests.numerics.kernels", TRITON_INTERPRET="1") == "the same bits"


def test_it_compiles_and_is_compiled_once_whatever_is_drawn(tmp_path: Path) -> None:
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    assert printed("tests.numerics.variants", **environment) == "one binary each"
