"""What refits cost on real text, with the shipped model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lightning_offload.bench.quality_runs import Run, train
from lightning_offload.methods.projections import Projections

REFITS = {"dim": 0.5, "others": "frozen", "refit_every": 20, "bias_threshold": 0.0}


@pytest.mark.parametrize("projector", ["pca", pytest.param("learned", marks=pytest.mark.slow), "block"])
def test_a_refit_does_not_raise_the_loss_by_a_hundredth(projector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix has one between steps 21 and 37; held-out loss, ten steps apart."""
    refits = []
    plain = Projections.replaced

    def replaced(self: Projections, gradient: Any) -> Any:
        refits.append(self.key)
        return plain(self, gradient)

    monkeypatch.setattr(Projections, "replaced", replaced)
    result = train(
        Run(
            arm="lsp_pca",
            settings={**REFITS, "projector": projector},
            rate=3e-3,
            seed=0,
            steps=40,
            batch=4,
            length=64,
            held_out_tokens=1024,
            split="val",
        )
    )
    assert len(refits) == len(set(refits)) == 35
    losses = [loss for step, loss in result.curve if step >= 20]
    assert len(losses) == 3
    for before, after in pairwise(losses):
        assert after <= 1.01 * before, losses
    assert losses[-1] < 0.95 * result.curve[0][1]
