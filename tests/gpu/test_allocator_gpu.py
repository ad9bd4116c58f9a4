"""The replay beside torch's own allocator: ``pytest -m gpu tests/gpu/test_allocator_gpu.py``, 4 GiB free on the device.

Each sequence runs in a process of its own, for the settings of the allocator are read once.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from lightning_offload.memory.allocator import MIB, replay

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

FOR_REAL = """
import json, sys, torch
sequences, results = json.loads(sys.stdin.read()), []
for sequence in sequences:
    live = {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.memory_reserved() == 0
    for number, nbytes in sequence:
        if nbytes:
            live[number] = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        else:
            del live[number]
    live.clear()
    results.append([torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()])
print(json.dumps(results))
"""


def sequence(seed: int, steps: int = 300) -> list[tuple[int, int]]:
    """Sizes of every kind, some again and again as in training; at most about 2 GiB at a time."""
    pick = random.Random(seed)
    usual = [pick.randint(1, 60 * MIB) for _ in range(6)]
    found: list[tuple[int, int]] = []
    live: dict[int, int] = {}
    for number in range(steps):
        if live and (sum(live.values()) > 2048 * MIB or pick.random() < 0.45):
            gone = pick.choice(list(live))
            del live[gone]
            found.append((gone, 0))
        else:
            live[number] = pick.choice([pick.choice(usual), pick.randint(1, 1 << pick.randint(9, 26))])
            found.append((number, live[number]))
    return found


@pytest.mark.parametrize("expandable", [False, True])
def test_reserved_and_allocated_are_torchs(expandable: bool) -> None:
    """Of equal pieces torch takes that of the lowest address, which for segments the driver chooses: within 2 %."""
    sequences = [sequence(seed) for seed in range(40)]
    setting = f"expandable_segments:{expandable}"
    done = subprocess.run(
        [sys.executable, "-c", FOR_REAL],
        input=json.dumps(sequences),
        env={**os.environ, "PYTORCH_ALLOC_CONF": setting, "PYTORCH_CUDA_ALLOC_CONF": setting},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [replay(sequence, expandable=expandable) for sequence in sequences]
    for (reserved, allocated), each in zip(json.loads(done.stdout), expected, strict=True):
        assert each.peak_bytes == pytest.approx(reserved, rel=0.0 if expandable else 0.02)
        assert each.allocated_peak_bytes == pytest.approx(allocated, rel=0.0 if expandable else 0.02)
