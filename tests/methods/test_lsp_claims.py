"""What lsp claims, at which d, and what it says where it cannot."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from lightning_offload.memory.blocks import partition
from lightning_offload.memory.rates import Rates
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.lsp import LSP, LSPSettings
from tests.helpers import Net
from tests.planning.machines import cpu, gpu
from tests.projected import projected_names, settings_of


def claimed(module: nn.Module, **changes: object) -> set[str]:
    ids = LSP(settings_of(**changes)).claim(module, partition(module, None))
    return {name for name, p in module.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("tied", [True, False])
def test_linear_weights_of_blocks_and_nothing_else(tied: bool) -> None:
    net = Net(tied=tied)
    assert claimed(net) == set(projected_names(net)) != set()
    assert claimed(Net(frozen=True)) == {name for name in projected_names(Net()) if not name.startswith("blocks.1")}


def test_weights_that_are_shared_inside_blocks_are_left_alone() -> None:
    net = Net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    assert claimed(net) == set(projected_names(Net())) - {"blocks.0.up.weight", "blocks.1.up.weight"}


def test_small_weights_are_left_alone() -> None:
    with pytest.raises(ValueError, match=r"no linear weight to project in Net.*min_numel=723"):
        claimed(Net(), min_numel=19 * 38 + 1)
    assert claimed(Net(), min_numel=19 * 38)
    net = Net()
    net.blocks[0].up = nn.Linear(19, 2)
    net.blocks[0].down = nn.Linear(2, 19)
    assert claimed(net, dim=0.5) == {name for name in projected_names(Net()) if not name.startswith("blocks.0")}


def test_conv1d_is_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(19, 38))

    utils = ModuleType("transformers.pytorch_utils")
    utils.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", utils)
    net = Net()
    net.blocks[2].up = Conv1D()
    assert claimed(net) == set(projected_names(Net()))


def test_dim_of_a_fraction_is_a_multiple_of_nnz() -> None:
    settings = LSPSettings(dim=0.5, nnz=8)
    assert [settings.dim_of(m, n) for m, n in ((64, 256), (256, 70), (15, 99), (17, 17))] == [32, 32, 0, 8]
    assert LSPSettings(dim=16, nnz=8).dim_of(64, 256) == 16
    assert LSPSettings(dim=1.0, nnz=1).dim_of(19, 38) == 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 4, "nnz": 8}, r"`dim` must be at least nnz=8.*got 4"),
        ({"dim": 20, "nnz": 8}, r"`dim` must be a multiple of nnz=8.*try 16 or 24, got 20"),
        ({"dim": 1.5}, r"`dim` must be an integer, a fraction.*got 1\.5"),
        ({"dim": 0}, r"`dim` must be .*got 0"),
        ({"nnz": 0}, r"`nnz` must be an integer >= 1, got 0"),
        ({"refit_every": 2.5}, r"`refit_every` must be an integer >= 1, or inf for never, got 2\.5"),
        ({"bias_threshold": -1}, r"`bias_threshold` must be a number >= 0, got -1"),
        ({"projector": "svd"}, r"`projector` must be one of 'learned', 'pca', 'block', got 'svd'"),
        ({"others": "sgd"}, r"`others` must be one of 'adamw', 'frozen', got 'sgd'"),
        ({"preset": "best"}, r"`preset` must be 'paper' or None, got 'best'"),
        ({"threshold_over": "all"}, r"`threshold_over='all'`.*calibration='batch'"),
        ({"seed": -1}, r"`seed` must be an integer >= 0, or None, got -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSPSettings(**changes)  # type: ignore[arg-type]


def test_a_dim_larger_than_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`dim=21` is larger than min\(m, n\)=19 of `blocks\.0\.up\.weight`"):
        claimed(Net(), dim=21)


def test_what_is_not_projected_anyway_does_not_bound_dim() -> None:
    """An adapter of 4 x 4: too small, or frozen."""
    net = Net()
    net.blocks[1].up = nn.Linear(4, 4, bias=False)
    others = set(projected_names(Net())) - {"blocks.1.up.weight"}
    assert claimed(net, min_numel=17) == others
    with pytest.raises(ValueError, match=r"`dim=9` is larger than min\(m, n\)=4 of `blocks\.1\.up\.weight`"):
        claimed(net)
    net.blocks[1].up.requires_grad_(False)
    assert claimed(net) == others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dim": 0.25, "nnz": 16},
            r"`dim=0\.25` of min\(m, n\)=19.*`blocks\.0\.up\.weight`.* is 4 columns, fewer than",
        ),
        ({"dim": 0.25, "nnz": 16}, r"`nnz=16`; pass nnz=4 or dim=16 \(an integer\), or use `full_offload`"),
        ({"dim": 0.25, "nnz": 64}, r"`nnz=64`; pass nnz=4, or use"),
        ({"dim": 0.03, "nnz": 16}, r"is 0 columns.*pass dim=16 \(an integer\), or use"),
        ({"dim": 0.03, "nnz": 64}, r"pass nnz=1, dim=1, or use"),
    ],
)
def test_fewer_columns_than_nonzeros_is_said(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        claimed(Net(), **changes)


def test_an_auto_dim_of_fewer_columns_than_nonzeros_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_offload.methods.lsp.largest_hidden_dim", lambda *_, **__: (1 / 32, "measured"))
    net, method = Net(), LSP(settings_of(dim="auto", nnz=8))
    units = partition(net, None)
    method.resolve(net, units, cpu(), DTypes(), accumulates=False)
    with pytest.raises(ValueError, match=r"`dim=0\.03125`.* is 0 columns, fewer than `nnz=8`; pass dim=8"):
        method.claim(net, units)


def test_nothing_is_measured_for_a_dim_that_a_checkpoint_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rates, "cached", lambda *_: pytest.fail("measured"))
    net, method = Net(), LSP(settings_of(dim="auto"))
    here, before = replace(gpu(), rates=None), {"dim": 0.25}
    reasons = method.resolve(net, partition(net, None), here, DTypes(), accumulates=False, before=before)
    assert method.settings.dim == 0.25
    assert "dim=0.25: as in the run that is continued" in reasons


def test_what_is_set_wins_over_the_preset() -> None:
    paper = LSPSettings(preset="paper", scale="match")
    assert (paper.projector, paper.moments, paper.scale, paper.calibration) == ("learned", "paper", "match", "batch")
