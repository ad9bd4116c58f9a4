"""`lsp_offload` as its users meet it: settings, dtypes, what is said, and what is refused."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_offload import LSPOffloadStrategy, OffloadPrecision, OffloadSummary
from lightning_offload.methods.lsp import LSP as LSPMethod
from lightning_offload.methods.lsp import LSPSettings
from tests.helpers import adamw
from tests.lit import LSP, Lit, LSPManual, Manual, fit, lsp, offload, trainer


def test_it_is_registered_and_its_settings_reach_the_method() -> None:
    assert isinstance(trainer("lsp_offload").strategy, LSPOffloadStrategy)
    assert LSPOffloadStrategy().settings == LSPSettings()
    assert LSPOffloadStrategy(preset="paper", nnz=4).settings == LSPSettings(preset="paper", nnz=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 8, "nnz": 16}, r"`dim` must be at least nnz=16.*got 8"),
        ({"dim": 20, "nnz": 8}, r"`dim` must be a multiple of nnz=8.*try 16 or 24, got 20"),
        ({"dim": 1.5}, r"`dim` must be an integer, a fraction.*got 1.5"),
        ({"projector": "svd"}, r"`projector` must be one of 'learned', 'pca', 'block', got 'svd'"),
        ({"preset": "thesis"}, r"`preset` must be 'paper' or None, got 'thesis'"),
        ({"nnz": 0}, r"`nnz` must be an integer >= 1, got 0"),
        ({"threshold_over": "all"}, r"`threshold_over='all'`.*calibration='batch'"),
        ({"min_numel": -1}, r"`min_numel` must be"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSPOffloadStrategy(**settings)


class Flat(Lit):
    """No linear layer anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(41, 8), nn.LayerNorm(8), nn.Flatten(), nn.LayerNorm(48))

    def one(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()


@pytest.mark.filterwarnings("ignore:.*no repeated blocks")
@pytest.mark.parametrize(
    ("module", "strategy", "message"),
    [
        (Lit, {"dim": 24}, r"`dim=24` is larger than min\(m, n\)=19 of `net\.blocks\.0\.up\.weight`.*dim=0\.5"),
        (Flat, {}, r"found no linear weight to project in Flat.*lower `min_numel`, or use `full_offload`"),
        (Lit, {"min_numel": 10_000}, r"found no linear weight.*min_numel=10,000"),
        (Lit, {"calibration": "batch"}, r"`calibration='batch'` needs batches: pass `calibration_dataloader=.*'train'"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_batch(module: Any, strategy: Any, message: str) -> None:
    made = module()
    with pytest.raises(ValueError, match=message):
        fit(made, lsp(**strategy))
    assert made.losses == []
    assert all(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_optimizers_that_cannot_be_projected_are_named(kind: Any) -> None:
    module = Lit(make_optimizer=lambda m: kind(m.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match=rf"cannot project `{kind.__name__}`.*AdamW.*`full_offload`"):
        fit(module, lsp())


@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_unsupported_precision_lists_what_is(precision: Any) -> None:
    with pytest.raises(ValueError, match=rf"strategy='lsp_offload', precision='{precision}'.*'32-true', 'bf16-mixed'"):
        trainer("lsp_offload", precision=precision)


def test_mixed_fp16_is_refused() -> None:
    with pytest.raises(ValueError, match="precision='16-mixed'"):
        OffloadPrecision("16-mixed")  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", [None, "nearest", "stochastic"])
def test_rounding_is_the_methods_unless_it_is_given(rounding: Any) -> None:
    dtypes = OffloadPrecision("bf16-true", rounding=rounding).dtypes(LSPMethod(LSPSettings()))
    assert dtypes.rounding == (rounding or "stochastic")
    assert dtypes.compute == torch.bfloat16


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"master": "float32"}, r"OffloadPrecision\(master=torch\.float32\).*method `lsp`.*keeps no masters"),
        ({"rounding": "up"}, r"OffloadPrecision\(rounding='up'\)` must be one of: \('nearest', 'stochastic'\)"),
        ({"wire": "float16"}, r"OffloadPrecision\(wire=torch\.float16\).*must be torch\.bfloat16"),
    ],
)
def test_dtypes_that_lsp_cannot_have_are_named(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(lsp(precision_plugin=OffloadPrecision("bf16-true", **asked)))
    OffloadPrecision("32-true", master="float32").dtypes(LSPMethod(LSPSettings()))  # there it is the weight itself


def test_rounding_reaches_the_weights() -> None:
    """Steps far below half a unit in the last place are lost by rounding to nearest, not by stochastic rounding."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        module = Lit(make_optimizer=lambda m: adamw(m, lr=1e-5, weight_decay=0.0))
        before = module.net.blocks[0].up.weight.detach().bfloat16()
        fit(module, lsp(precision_plugin=OffloadPrecision("bf16-true", rounding=rounding)), max_epochs=1)
        after = module.net.blocks[0].up.weight
        assert after.dtype == torch.bfloat16
        moved[rounding] = float((after != before).float().mean())
    assert moved["nearest"] < 0.05 < moved["stochastic"]


# What is said


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_what_is_projected_and_what_is_not_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Lit(tied=True), lsp(min_numel=30), max_steps=1)
        fit(Lit(), lsp(others="frozen"), max_steps=1)
    first, second = (text for text in messages(caplog) if "projects" in text)
    weights = 6 * 19 * 38
    assert f"projects 6 linear weights to dim 9: {weights:,} of 5,377 parameters (81%)" in first
    assert "893 on the common path in host memory, 152 on the device (smaller than min_numel=30)" in first
    assert first.endswith("device (smaller than min_numel=30)")
    assert second.endswith(f"the others: {6156 - weights:,} frozen")


def test_the_summary_says_where_each_unit_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    strategy = lsp(min_numel=60, dim=0.5)
    with caplog.at_level(logging.INFO):
        fit(Lit(depth=4, frozen=True), strategy, callbacks=[OffloadSummary()], max_steps=1)
    text = next(text for text in messages(caplog) if "trained on" in text)
    assert "projected (dim 9) 1,444 + device 76" in text
    assert re.search(r"net\.embed .*frozen 779", text)
    assert "method lsp with AdamW" in text
    assert strategy.engine is not None
    assert strategy.engine.own is not None
    held = strategy.engine.host_bytes([*strategy.engine.own.trained, *strategy.engine.host.trained])
    assert f"host {held / 1024**3:.3f} GiB" in text


class LooksAtGradients(Lit):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        weight = self.net.blocks[0].up.weight
        assert weight.grad is not None
        self.losses.append(float(weight.grad.norm()))


def test_hooks_that_look_at_gradients_get_them_and_activations_have_no_effect() -> None:
    runs = {form: LooksAtGradients() for form in ("gradient", "activations")}
    fit(runs["gradient"], lsp(form="gradient"))
    with pytest.warns(UserWarning, match=r"`form='activations'` has no effect: `LooksAtGradients\.on_before_opt"):
        fit(runs["activations"], lsp(form="activations"))
    assert runs["gradient"].losses == pytest.approx(runs["activations"].losses, rel=1e-4)


# Modules that bring a method


def test_a_module_of_another_method_is_refused_by_both_names() -> None:
    with pytest.raises(MisconfigurationException, match=r"`LSPManual` trains by method `lsp`.*`full_offload`"):
        fit(LSPManual(), offload())


def test_settings_of_module_and_strategy_are_one() -> None:
    strategy = LSPOffloadStrategy(dim=8, min_numel=0)
    module = LSPManual()
    module.offload = {"dim": 8, "nnz": 4, "seed": 5}
    fit(module, strategy, max_steps=1)
    assert strategy.engine is not None
    settings = strategy.engine.method.settings
    assert isinstance(settings, LSPSettings)
    assert (settings.dim, settings.nnz, settings.min_numel) == (8, 4, 0)
    module.offload = {"dim": 9, "nnz": 3}
    with pytest.raises(ValueError, match=r"`LSPManual\.offload` says dim=9, `LSPOffloadStrategy` was given dim=8"):
        fit(module, LSPOffloadStrategy(dim=8, min_numel=0))


def test_the_plain_mixin_takes_the_strategys_method() -> None:
    automatic, manual = Lit(), Manual()
    fit(automatic, lsp())
    fit(manual, lsp())
    assert automatic.losses == manual.losses
    manual.offload = {"dim": 9}
    with pytest.raises(ValueError, match=r"unknown setting.*known: accumulate_grad_batches"):
        fit(manual, lsp())


def test_unknown_settings_of_the_mixin_are_named() -> None:
    with pytest.raises(ValueError, match=r"`LSPManual\.offload` has an unknown setting.*known: .*projector"):
        fit(LSPManual({"dimm": 9}), "lsp_offload")


def test_every_setting_of_the_test_net_is_one() -> None:
    assert LSPSettings(**LSP).refit_every == 3
