"""The table of what noise costs."""

from __future__ import annotations

from lightning_offload.bench.noise import noise_cost
from lightning_offload.numerics.native import Kernels


def test_every_arm_has_its_cost_and_its_ratio_to_torchs_own() -> None:
    table = noise_cost(4096, 2)
    assert len([row for row in table.rows if "compiled" not in row.arm]) == 9
    assert all(row.values["ns_per_element"] > 0 and len(row.samples_s) == 2 for row in table.rows)
    assert table.rows[0].values["ratio"] == 1.0
    assert "| perturb, bf16, popcount |" in table.markdown()


def test_compiled_kernels_have_rows_of_their_own(kernels: Kernels) -> None:
    names = [row.arm for row in noise_cost(4096, 1).rows]
    assert "perturb, bf16, popcount, compiled" in names
    assert "update and both signs, bf16, popcount, compiled" in names
