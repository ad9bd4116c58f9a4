"""Automatic optimization, the mixin and the update rule in memory: the same bits, for every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.lit import Lit, LSPManual, Manual, assert_equal_modules, fit, lsp, offload
from tests.meft_lit import MLit, MManual, MOwn, meft
from tests.zo2 import ZLit, ZManual, ZOwn, zo2

STEPS = 20
WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Lit], Callable[..., Lit], Callable[..., Lit]]] = {
    "full": (offload, Lit, Manual, Manual),  # whose rule is torch's own
    "lsp": (lsp, Lit, Manual, LSPManual),
    "zo2": (zo2, ZLit, ZManual, ZOwn),
    "meft": (meft, MLit, MManual, MOwn),
}


@pytest.mark.parametrize("method", WAYS)
def test_with_accumulation_clipping_and_a_warm_up(method: str) -> None:
    strategy, *kinds = WAYS[method]
    step = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    modules = [kind(schedule="step") for kind in kinds]
    for module, how in zip(modules, (step, {}, {}), strict=True):
        module.samples = 4 * STEPS
        if module is not modules[0]:
            module.offload = {**getattr(module, "offload", {}), **step}
        np.random.seed(6)
        run = fit(module, "auto" if module is modules[2] else strategy(), max_epochs=1, **how)
        assert run.global_step == STEPS
    assert_equal_modules(modules[0], modules[1])
    assert_equal_modules(modules[0], modules[2])
