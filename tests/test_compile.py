"""`torch.compile`, block by block: the bits of blocks that are not compiled, no graph break, nothing compiled twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import config
from torch._dynamo.utils import counters

from tests.lit import Lit, assert_equal_modules, fit, offload, shuffled, shuffled_lsp, trainer
from tests.meft_lit import MLit, attach, shuffled_meft
from tests.zo2 import ZLit, zo2


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(module: Any, backend: str = "eager", *, wraps: bool = False) -> Any:
    blocks = module.net.blocks
    for index in range(len(blocks)):
        if wraps:
            blocks[index] = torch.compile(blocks[index], backend=backend)
        else:
            blocks[index].compile(backend=backend)
    return module


def names(module: Any) -> list[str]:
    return [name.replace("_orig_mod.", "") for name in module.state_dict()]


@pytest.mark.parametrize("wraps", [False, True], ids=["in place", "wrapped"])
@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("strategy", [shuffled, shuffled_lsp])
def test_blocks_train_to_the_same_bits_and_are_compiled_once(
    strategy: Any, backend: str, accumulate: str, wraps: bool
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 1}
    plain, ours = Lit(depth=2), compiled(Lit(depth=2), backend, wraps=wraps)
    fit(plain, strategy(accumulate=accumulate), **options)
    with config.patch(error_on_recompile=True):
        fit(ours, strategy(accumulate=accumulate), **options)
    assert ours.losses == plain.losses
    assert names(ours) == list(plain.state_dict())
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert counters["stats"]["unique_graphs"] == 1  # two equal blocks, nine micro-batches
    assert not counters["graph_break"]


@pytest.mark.parametrize("wraps", [False, True], ids=["in place", "wrapped"])
def test_checkpoints_have_the_names_that_lightning_gives_them(wraps: bool, tmp_path: Path) -> None:
    states = []
    for name, strategy in (("plain", "auto"), ("ours", offload())):
        module = compiled(Lit(depth=2), wraps=wraps)
        fit(module, strategy, max_steps=2).save_checkpoint(tmp_path / name)
        states.append(torch.load(tmp_path / name, weights_only=True)["state_dict"])
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
    again, whole = compiled(Lit(depth=2), wraps=wraps), compiled(Lit(depth=2), wraps=wraps)
    fit(again, offload(), max_steps=5, ckpt_path=tmp_path / "ours")
    fit(whole, "auto", max_steps=5, ckpt_path=tmp_path / "plain")
    assert_equal_modules(whole, again)


def test_blocks_that_are_computed_again_in_backward_are_compiled() -> None:
    plain, ours = Lit(depth=2, recompute="yes"), compiled(Lit(depth=2, recompute="yes"), "aot_eager")
    fit(plain, shuffled(), max_epochs=1)
    fit(ours, shuffled(), max_epochs=1)
    assert_equal_modules(plain, ours)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_blocks_under_meft_have_the_same_bits_with_breaks_where_rows_come(backend: str) -> None:
    plain, ours = MLit(depth=2), compiled(MLit(depth=2), backend)
    attach(plain)
    fit(plain, max_steps=5)
    with config.patch(error_on_recompile=True):
        fit(ours, shuffled_meft(placement="host"), max_steps=5)
    assert_equal_modules(plain, ours)


@pytest.mark.parametrize("wraps", [False, True], ids=["in place", "wrapped"])
def test_zo2_refuses_compiled_blocks(wraps: bool) -> None:
    way_out = (
        r"method `zo2` passes each unit .* `net\.blocks\.0` would not see\. Leave `torch\.compile` out, or use `full"
    )
    module = compiled(ZLit(depth=2), wraps=wraps)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=way_out):
        fit(module, zo2())
    with pytest.raises(ValueError, match=way_out):
        trainer(zo2(), limit_val_batches=1).validate(module, verbose=False)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


class Silent:
    """Lightning 2.6 itself cannot trace `self.log`."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net.loss(batch)  # type: ignore[attr-defined,no-any-return]

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.net.loss(batch)  # type: ignore[attr-defined]


class SilentLit(Silent, Lit):
    pass


class SilentMLit(Silent, MLit):
    pass


class SilentZLit(Silent, ZLit):
    pass


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("make", "strategy"), [(SilentLit, shuffled), (SilentLit, shuffled_lsp), (SilentMLit, shuffled_meft)]
)
def test_a_module_compiled_as_a_whole_trains_to_the_same_bits(make: Any, strategy: Any, backend: str) -> None:
    plain, ours = make(depth=2), make(depth=2)
    fit(plain, strategy(), max_steps=5)
    fit(torch.compile(ours, backend=backend), strategy(), max_steps=5)  # type: ignore[arg-type]
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_zo2_refuses_a_module_compiled_as_a_whole() -> None:
    whole: Any = torch.compile(SilentZLit(), backend="eager")
    with pytest.raises(ValueError, match="the compiled `SilentZLit` would not see"):
        fit(whole, zo2())
    with pytest.raises(ValueError, match="the compiled `SilentZLit` would not see"):
        trainer(zo2(), limit_val_batches=1).validate(torch.compile(SilentZLit(), backend="eager"), verbose=False)
