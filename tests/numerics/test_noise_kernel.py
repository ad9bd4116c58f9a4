"""The fused kernel in Triton's interpreter, which is chosen when Triton is imported: hence a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_offload.numerics.zeroth import has_triton


@pytest.mark.slow
def test_the_kernel_has_the_bits_of_the_torch_form() -> None:
    if not has_triton():
        pytest.skip("needs Triton, which torch brings on CUDA machines; `pip install triton` brings its interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "tests.numerics.kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the same bits"
