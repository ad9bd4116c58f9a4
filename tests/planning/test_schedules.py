"""Two schedules of one method move the same; the one that waits takes longer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lightning_offload.methods.base import Clip
from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.lsp import LSPSettings
from lightning_offload.methods.settings import GradientSettings
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.planning.schedules import draw_schedules, schedules
from lightning_offload.words import seconds
from tests.methods.test_dryrun import wide
from tests.planning.machines import gpu


@pytest.mark.parametrize(("method", "settings"), [("lsp", LSPSettings()), ("full", FullSettings(skip_nonfinite=False))])
def test_layer_by_layer_is_faster_with_the_same_bytes(method: str, settings: GradientSettings, tmp_path: Path) -> None:
    module, batch = wide(2)
    plans = schedules(Scenario(module, batch, gpu(), method=method, settings=settings, precision="bf16-true"))
    early, late = plans.values()
    assert early.step_s < late.step_s
    assert {lane: use.bytes for lane, use in early.lanes.items() if lane != "d2h"} == {
        lane: use.bytes for lane, use in late.lanes.items() if lane != "d2h"
    }
    assert 0 < late.lanes["d2h"].bytes - early.lanes["d2h"].bytes <= 4 * (3 + len(list(module.parameters())))
    with Image.open(draw_schedules(plans, tmp_path / "schedules.png")) as picture:
        assert picture.width > picture.height / 2


def test_a_picture_of_two_methods_is_titled_by_what_they_share(tmp_path: Path) -> None:
    module, batch = wide(2)
    full, lsp = (
        Dry(Scenario(module, batch, gpu(), method=name, precision="bf16-true")).plan() for name in ("full", "lsp")
    )
    drawn = draw_schedules({"first": full, "second": lsp}, tmp_path / "methods.svg").read_text()
    assert f"{full.model}, bf16-true, {full.hardware}: planned" in drawn
    assert f"first, {seconds(full.step_s)}" in drawn
    assert f"second, {seconds(lsp.step_s)}" in drawn


def test_lsp_is_as_fast_as_its_bound_layer_by_layer_clipped_and_not() -> None:
    module, batch = wide(8)
    scenario = Scenario(module, batch, gpu(), method="lsp", settings=LSPSettings(), precision="bf16-true")
    for asked in (scenario, replace(scenario, clip=Clip(1.0))):
        dry = Dry(asked)
        assert dry.waiting.bound_s * (1 - 1e-9) <= dry.timing.step_s <= 1.10 * dry.waiting.bound_s
