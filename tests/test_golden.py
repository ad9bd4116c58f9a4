"""Loss curves at full precision, kept in the tree: a change of numbers is seen, whoever made it.

``python -m tests.test_golden`` records them anew. Compared bit for bit on the recorded processor capability and torch
version; elsewhere matrix products round differently, which twenty steps carry to at most ``FAR``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_offload.methods.base import Clip, DTypes
from tests.helpers import Net, lanes_of, train, two_groups
from tests.projected import lsp

FOLDER = Path(__file__).parent / "golden"
FAR = 2e-2
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32_clip_accumulate": {"clip": Clip(0.05), "micro_batches": 3, "make_optimizer": two_groups, "schedule": True},
    "bf16": {"dtypes": DTypes(compute=torch.bfloat16), "clip": Clip(0.05)},
    "bf16_host_accumulation": {
        "dtypes": DTypes(compute=torch.bfloat16),
        "settings": {"accumulate": "host"},
        "micro_batches": 2,
    },
    "lsp_learned": {"method": {"projector": "learned", "fit_steps": 20, "refit_every": 5}, "clip": Clip(0.05)},
    "lsp_block_bf16": {
        "dtypes": DTypes(compute=torch.bfloat16, rounding="stochastic"),
        "method": {"projector": "block", "accumulate": "host", "refit_every": 5},
        "micro_batches": 2,
    },
}


def where() -> dict[str, str]:
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}


def losses(name: str) -> list[float]:
    torch.set_num_threads(1)
    changes = dict(RUNS[name])
    if "method" in changes:
        changes["method"] = lsp(**changes["method"])
    return train(Net(tied=True, dropout=0.1), lanes_of("inline"), steps=20, **changes).losses


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_recorded_ones(name: str) -> None:
    recorded = json.loads((FOLDER / f"{name}.json").read_text())
    found = losses(name)
    if recorded["where"] == where():
        assert found == recorded["losses"]
    else:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(recorded["losses"]), rtol=FAR, atol=FAR)
    assert min(found) < 0.9 * found[0]


if __name__ == "__main__":
    for name in RUNS:
        text = json.dumps({"where": where(), "losses": losses(name)}, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n")
