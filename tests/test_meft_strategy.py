"""`meft_offload` as its users meet it: settings, dtypes, what is said, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_offload import MEFTOffloadStrategy, OffloadPrecision, OffloadStats, OffloadSummary, OffloadTimeline
from lightning_offload.errors import OffloadError
from lightning_offload.methods.meft import MEFTSettings
from lightning_offload.timeline import Prediction, StepUse
from tests.helpers import adamw
from tests.lit import LSPManual, assert_equal_modules, fit, lsp, trainer
from tests.meft import PLACEMENTS
from tests.meft_lit import MEFT, MLit, MManual, MOwn, attach, meft, shuffled_meft


def test_it_is_registered_and_its_settings_reach_the_method() -> None:
    assert isinstance(trainer("meft_offload").strategy, MEFTOffloadStrategy)
    assert MEFTOffloadStrategy().settings == MEFTSettings()
    assert MEFTOffloadStrategy(variant="paper", width=512).settings == MEFTSettings(variant="paper", width=512)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"width": 1000, "experts": 128},
            r"`experts=128` does not divide `width=1000`; the nearest.* 100 and 125",
        ),
        (
            {"width": 1031},
            r"`width=1031` has no divisor near 132, so experts='auto' is 1, fewer than active_experts=8; take "
            r"width=1024 or 1056, or give experts=",
        ),
        ({"width": 7, "top_k": 7}, r"`width=7` .* near 12, so experts='auto' is 7.*; take width=16, or give"),
        ({"active_experts": 200}, r"`active_experts` must be at most experts=128, got 200"),
        ({"width": 64, "experts": 16, "active_experts": 17}, r"`active_experts` must be at most experts=16.*got 17"),
        ({"width": 32, "top_k": 64}, r"`top_k` must be at most width=32, got 64"),
        ({"width": 0}, r"`width` must be an integer >= 1, got 0"),
        ({"top_k": 2.5}, r"`top_k` must be an integer >= 1, got 2.5"),
        ({"placement": "gpu"}, r"`placement` must be one of 'auto', 'host', 'keys', 'device', got 'gpu'"),
        ({"variant": "v2"}, r"`variant` must be one of 'repro', 'paper', got 'v2'"),
        ({"layers": []}, r"`layers` must be 'all' or a list of block indices, got \[\]"),
        ({"layers": "last"}, r"`layers` must be 'all' or a list"),
        ({"layers": 3}, r"`layers` must be 'all' or a list of block indices, got 3"),
        ({"layers": True}, r"`layers` must be 'all' or a list of block indices, got True"),
        ({"targets": 5}, r"`targets` must be a name, a list of names, or None, got 5"),
        ({"targets": ["mlp", 5]}, r"`targets` must be a name, a list of names, or None, got \['mlp', 5\]"),
        ({"targets": ""}, r"`targets` must be a name, a list of names, or None, got ''"),
        ({"key_std": 0}, r"`key_std` must be a number > 0 or 'auto', got 0"),
        ({"router_init": "zeros"}, r"`router_init` must be one of 'keys', 'normal'"),
        ({"placement": "device", "row_optimizer": "deferred"}, r"`placement='device'` fetches none.*'keys' or 'host'"),
        ({"min_numel": -1}, r"`min_numel` must be"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MEFTOffloadStrategy(**settings)


@pytest.mark.parametrize(
    ("rows", "optimizer", "message"),
    [
        ("lazy", adamw, r"`row_optimizer='lazy'` leaves untouched rows.*weight_decay=0\.1.*row_optimizer='deferred'"),
        ("deferred", lambda m: adamw(m, betas=(0.99, 0.9)), r"needs betas\[0\]\*\*2 < betas\[1\].*'dense'"),
        ("lazy", lambda m: torch.optim.SGD(m.parameters(), lr=1e-2), r"steps rows by Adam's.*not by `SGD`"),
    ],
)
def test_row_steps_that_an_optimizer_cannot_have_are_named(rows: str, optimizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(MLit(make_optimizer=optimizer), meft(row_optimizer=rows, top_k=12, placement="host"))


def test_adapters_of_other_settings_are_named() -> None:
    module = MLit()
    fit(module, meft(), max_steps=1)
    with pytest.raises(ValueError, match=r"top_k=4, but adapters with top_k=6 are attached"):
        fit(module, meft(top_k=4))


@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_unsupported_precision_lists_what_is(precision: Any) -> None:
    with pytest.raises(ValueError, match=rf"strategy='meft_offload', precision='{precision}'.*'32-true', 'bf16-mixed'"):
        trainer("meft_offload", precision=precision)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"master": "bfloat16"}, r"OffloadPrecision\(master=torch\.bfloat16\).*method `meft`.*must be torch\.float32"),
        ({"wire": "float16"}, r"OffloadPrecision\(wire=torch\.float16\).*must be torch\.bfloat16"),
        ({"moments": "bfloat16"}, r"OffloadPrecision\(moments=torch\.bfloat16\).*must be torch\.float32"),
        ({"rounding": "stochastic"}, r"OffloadPrecision\(rounding='stochastic'\).*keeps fp32 masters"),
    ],
)
def test_dtypes_that_meft_cannot_have_are_named(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(meft(precision_plugin=OffloadPrecision("bf16-true", **asked)))
    named = OffloadPrecision("bf16-true", master="float32", wire="bfloat16", moments="float32", rounding="nearest")
    modules = MLit(), MLit()
    fit(modules[0], meft(precision_plugin=named))
    fit(modules[1], meft(), precision="bf16-true")
    assert_equal_modules(*modules)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backbone_in_16_bits_under_full_precision(
    caplog: pytest.LogCaptureFixture, placement: str, dtype: torch.dtype
) -> None:
    """Rows go up in fp32, as the adapters are; the plain module rounds them before it scores."""
    plain, ours = MLit(), MLit()
    for module in (plain, ours):
        module.net.to(dtype)
    attach(plain)
    fit(plain)
    with caplog.at_level(logging.INFO):
        fit(ours, shuffled_meft(placement=placement))
    assert ours.losses == pytest.approx(plain.losses, rel=2e-2)
    assert ours.net.head.weight.dtype == dtype
    assert f"rows go up in float32, though weights are in {str(dtype)[6:]}: precision='bf16-true' halves" in caplog.text


def test_small_steps_are_not_lost_under_bf16() -> None:
    module = MLit(make_optimizer=lambda m: adamw(m, lr=1e-6, weight_decay=0.0))
    attach(module)
    before = module.net.blocks[0].mlp.meft.keys.detach().clone()
    torch.nn.init.normal_(module.net.blocks[0].mlp.meft.values, std=0.1)
    fit(module, meft(), precision="bf16-true")
    moved = (module.net.blocks[0].mlp.meft.keys - before).abs()
    assert 0 < moved.max() < 1e-4


# What is said


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_what_is_frozen_chosen_and_trained_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(MLit(), MEFTOffloadStrategy(width=1024, min_numel=0), max_steps=1)
    said = [text for text in messages(caplog) if text.startswith("meft_offload: ")]
    assert said[0] == "meft_offload: freezes the backbone (7,315 parameters) and trains adapters beside it"
    assert any("experts=128: 4 ceil(sqrt(width)), moved to a divisor of width" in text for text in said)
    assert any("top_k=64 leaves nothing out: 8 experts of 8 rows are 64" in text for text in said)
    assert any("placement='keys': device and host are one memory" in text for text in said)
    rows, routers = 3 * 2 * 1024 * 19, 3 * 128 * 19
    assert said[-1] == (
        "meft_offload: trains 3 adapters of 1,024 rows, 64 of them per token from 8 of 128 experts, in host memory, "
        f"keys on the device too: {rows:,} of {rows + routers + 7315:,} parameters (89%); the others: {routers:,} on "
        "the device, 7,315 frozen"
    )
    assert len(said) == len({*said})


@pytest.mark.parametrize(("placement", "there"), [("host", 0), ("keys", 480), ("device", 960)])
def test_the_summary_says_where_rows_are(caplog: pytest.LogCaptureFixture, placement: str, there: int) -> None:
    strategy = meft(placement=placement, width=480)
    with caplog.at_level(logging.INFO):
        fit(MLit(width=500), strategy, callbacks=[OffloadSummary()], max_steps=1)
    text = next(text for text in messages(caplog) if "trained on" in text)
    assert f"rows ({placement}) 480,000 + device 6,000 + frozen " in text
    assert re.search(r"net\.embed .*frozen 20,500", text)
    assert f"method meft with AdamW, placement {placement}" in text
    engine: Any = strategy.engine
    unit = next(unit for unit in engine.units if unit.is_block)
    own = {id(t.parameter) for t in engine.own.trained}
    others = sum(4 * p.numel() for p in unit.parameters.values() if id(p) not in own)
    row = next(line for line in text.splitlines() if "rows (" in line)
    assert row.split()[-1] == f"{(others + there * 500 * 4) / 1024**2:.1f}"


def test_statistics_have_the_share_of_rows_in_use() -> None:
    run = fit(MLit(), meft(top_k=1, active_experts=1), callbacks=[OffloadStats(every_n_steps=1)])
    assert 0 < run.callback_metrics["union"] <= 12 / 48  # 12 tokens use a row each


@pytest.mark.parametrize("union", [None, 0.26])
def test_a_timeline_shows_rows_on_every_lane(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, union: float | None
) -> None:
    predicted = Prediction([], StepUse({}, 0.5), union=union)
    timeline = OffloadTimeline(tmp_path, first_step=2, steps=2, predicted=predicted)
    strategy = meft(placement="host")
    with caplog.at_level(logging.INFO):
        fit(MLit(), strategy, callbacks=[timeline])
    assert strategy.engine is not None
    share = strategy.engine.own.union_share  # type: ignore[union-attr]
    said = f"; bytes were predicted for 26% (plan with union={share:.2g})" if union else ""
    assert f"forwards of this run used {share:.0%} of a layer's rows{said}\n" in caplog.text
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    trace = json.loads(next(tmp_path.glob("*.json")).read_text())
    names = " ".join(event["name"] for event in trace["traceEvents"])
    for tag in ("tokens", "select", "rows", "row gradients", "accumulate", "step"):
        assert tag in names, tag
    for block in range(3):  # backward is told apart by the gradients of rows
        assert f"backward net.blocks.{block}" in names


# Modules that bring a method


def test_a_module_of_another_method_is_refused_by_both_names() -> None:
    with pytest.raises(MisconfigurationException, match=r"`MOwn` trains by method `meft`.*`lsp_offload`"):
        fit(MOwn(), lsp())
    with pytest.raises(MisconfigurationException, match=r"`LSPManual` trains by method `lsp`.*`meft_offload`"):
        fit(LSPManual(), meft())


def test_settings_of_module_and_strategy_are_one() -> None:
    strategy = MEFTOffloadStrategy(width=96, seed=5)
    module = MOwn()
    module.offload = {"width": 96, "experts": 12, "active_experts": 3, "top_k": 4}
    fit(module, strategy, max_steps=1)
    assert strategy.engine is not None
    settings: Any = strategy.engine.method.settings
    assert (settings.width, settings.experts, settings.seed) == (96, 12, 5)
    module.offload = {"width": 48}
    with pytest.raises(ValueError, match=r"`MOwn\.offload` says width=48, `MEFTOffloadStrategy` was given width=96"):
        fit(module, MEFTOffloadStrategy(width=96))
    with pytest.raises(ValueError, match=r"`MOwn\.offload` has an unknown setting.*known: .*placement"):
        fit(MOwn({"widht": 9}), "meft_offload")


def test_the_plain_mixin_takes_the_strategys_method() -> None:
    automatic, manual = MLit(), MManual()
    fit(automatic, meft())
    fit(manual, meft())
    assert_equal_modules(automatic, manual)
    manual.offload = {"width": 9}
    with pytest.raises(ValueError, match=r"unknown setting.*known: accumulate_grad_batches"):
        fit(manual, meft())


def test_the_mixin_alone_says_and_shows_what_the_strategy_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(MOwn(), callbacks=[OffloadSummary(), OffloadStats(every_n_steps=2)], max_epochs=1)
    assert "MOwn: trains 3 adapters of 48 rows" in caplog.text
    assert "rows (keys) 1,824" in caplog.text
    assert MEFT["width"] == 48


def test_groups_made_while_training_are_refused() -> None:
    class Adds(MLit):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trainer.optimizers[0].add_param_group({"params": [self.net.head.weight]})

    with pytest.raises(OffloadError, match=r"add_param_group.*cannot grow"):
        fit(Adds(make_optimizer=lambda m: adamw(m.net.blocks)), meft())
