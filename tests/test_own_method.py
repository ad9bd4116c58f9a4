"""A method that is not of this package: `tutorials/signsgd.py`, its YAML and its strategy line, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

import lightning_offload
from lightning_offload import OffloadDDPStrategy, OffloadStrategy, plan
from lightning_offload.errors import RaceError
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.methods.catalogue import CATALOGUE
from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.method import Method
from lightning_offload.methods.settings import CommonSettings
from tests.helpers import lanes_of
from tests.lit import Lit, Manual, assert_equal_modules, fit

TUTORIALS = Path(__file__).parents[1] / "tutorials"
SMALL = {"min_numel": 0}


@pytest.fixture(scope="module")
def signsgd() -> Iterator[Any]:
    sys.path.insert(0, str(TUTORIALS))
    yield importlib.import_module("signsgd")
    sys.path.remove(str(TUTORIALS))
    del sys.modules["signsgd"], CATALOGUE["signsgd"]
    for name in [name for name in StrategyRegistry if name.startswith("signsgd")]:
        StrategyRegistry.remove(name)


class Plain(torch.optim.Optimizer):
    """What it has to equal: signSGD with momentum on matrices, AdamW on everything else."""

    def __init__(self, module: nn.Module, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(module.parameters(), {"lr": lr, "weight_decay": weight_decay})
        others = [p for p in module.parameters() if p.ndim <= 1]
        self.momentum = momentum
        self.others = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        group = self.param_groups[0]
        self.others.param_groups[0]["lr"] = group["lr"]
        self.others.step()
        for weight in (p for p in group["params"] if p.ndim > 1):
            momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            momentum.mul_(self.momentum).add_(weight.grad, alpha=1 - self.momentum)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * momentum.sign())
        return loss


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1, fused=True)


def plain(momentum: float = 0.9) -> Any:
    return lambda module: Plain(module, 3e-3, 0.1, momentum)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}], ids=["", "window"])
def test_it_has_the_bits_of_plain_torch(signsgd: Any, options: dict[str, Any], momentum: float) -> None:
    module = Lit(make_optimizer=adamw, schedule="step")
    fit(module, signsgd.SignSGDStrategy(momentum=momentum, **SMALL), **options)
    reference = Lit(make_optimizer=plain(momentum), schedule="step")
    fit(reference, **options)
    assert_equal_modules(module, reference)


@pytest.mark.parametrize("lanes", ["checked", "shuffled"])
def test_no_dependency_is_missing(signsgd: Any, lanes: str) -> None:
    class Strategy(signsgd.SignSGDStrategy):  # type: ignore[misc, name-defined]
        def _make_lanes(self, machine: Any, settings: Any) -> Any:
            return lanes_of(lanes, seed=3)

    module, reference = (Lit(make_optimizer=adamw) for _ in range(2))
    fit(module, Strategy(**SMALL), gradient_clip_val=0.5)
    fit(reference, signsgd.SignSGDStrategy(**SMALL), gradient_clip_val=0.5)
    assert_equal_modules(module, reference)


@pytest.mark.parametrize(("lane", "what"), [("host", "step"), ("copy", "deltas")])
def test_a_dependency_that_is_left_out_is_seen(
    signsgd: Any, lane: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(CheckedLanes, lane)

    def careless(self: Any, *args: Any, after: Any = (), tag: str = "", **more: Any) -> Any:
        return original(self, *args, after=() if tag == what else after, tag=tag, **more)

    monkeypatch.setattr(CheckedLanes, lane, careless)
    monkeypatch.setattr(signsgd.SignSGDStrategy, "_make_lanes", lambda *_: lanes_of("checked"))
    with pytest.raises(Exception) as caught:  # noqa: PT011  # what tidies up after it may fail too
        fit(Lit(make_optimizer=adamw), signsgd.SignSGDStrategy(**SMALL), gradient_clip_val=0.5)
    error: Any = caught.value
    while error is not None and not isinstance(error, RaceError):
        error = error.__context__
    assert "no declared dependency orders them" in str(error)


def test_a_sign_is_a_byte_on_the_link_and_a_step_that_is_not_finite_changes_nothing(signsgd: Any) -> None:
    class Spoilt(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 4 else 1.0)

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen_weights = [*getattr(self, "seen_weights", []), self.net.head.weight.detach().clone()]

    strategy = signsgd.SignSGDStrategy(**SMALL)
    module = Spoilt(make_optimizer=adamw)
    fit(module, strategy, max_epochs=1, precision="bf16-true")
    engine = strategy.engine
    claimed = sum(t.parameter.numel() for t in engine.own.trained)
    held = {"momenta": 4 * claimed, "wire (gradients down)": 2 * claimed, "signs (up)": claimed}
    assert engine.own.holdings == held
    assert torch.equal(module.seen_weights[3], module.seen_weights[4])
    assert not torch.equal(module.seen_weights[4], module.seen_weights[5])


def test_it_resumes_exactly_and_others_take_its_weights(signsgd: Any, tmp_path: Path) -> None:
    whole, half, rest, other = (Lit(make_optimizer=adamw) for _ in range(4))
    fit(whole, signsgd.SignSGDStrategy(**SMALL))
    done = fit(half, signsgd.SignSGDStrategy(**SMALL), max_epochs=1)
    done.save_checkpoint(tmp_path / "a.ckpt")
    fit(rest, signsgd.SignSGDStrategy(**SMALL), ckpt_path=tmp_path / "a.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    fit(other, "full_offload", ckpt_path=tmp_path / "a.ckpt")
    assert other.losses[0] == rest.losses[0]


def test_a_trainer_knows_it_by_name_and_a_mixin_works_under_it(signsgd: Any) -> None:
    assert "signsgd_offload" in StrategyRegistry.available_strategies()
    by_name, by_hand = Lit(make_optimizer=adamw, width=80), Manual(make_optimizer=adamw, width=80)
    trainer = fit(by_name, "signsgd_offload")
    assert type(trainer.strategy) is signsgd.SignSGDStrategy
    assert trainer.strategy.engine.own.trained
    fit(by_hand, "signsgd_offload")
    assert_equal_modules(by_name, by_hand)


def test_its_settings_are_shown_and_checked(signsgd: Any) -> None:
    shown = inspect.signature(signsgd.SignSGDStrategy).parameters
    assert {"momentum", "min_numel", "accumulate", "precision_plugin"} <= shown.keys()
    with pytest.raises(TypeError, match=r"`SignSGDStrategy` has no setting 'momentun'; there are .*momentum"):
        signsgd.SignSGDStrategy(momentun=0.5)
    with pytest.raises(ValueError, match="`momentum` must be a number in"):
        signsgd.SignSGDStrategy(momentum=1.0)


def test_a_default_that_is_made_anew_is_shown_as_it_is(signsgd: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Settings(signsgd.SignSGDSettings):  # type: ignore[misc, name-defined]
        skipped: list[str] = field(default_factory=list)
        needed: int

    class Listed(signsgd.SignSGD):  # type: ignore[misc, name-defined]
        name: ClassVar[str] = "signsgd_listed"
        summary: ClassVar[str] = "with a list"
        settings_type: ClassVar[Any] = Settings

    class ListedStrategy(OffloadStrategy, method=Listed):
        """One of its settings is a list, and one has no default."""

    del CATALOGUE["signsgd_listed"]
    shown = inspect.signature(ListedStrategy).parameters
    assert (shown["skipped"].default, shown["needed"].default) == ([], inspect.Parameter.empty)
    assert ListedStrategy(needed=1).settings.skipped == []


def test_it_is_planned_and_the_plan_is_exact(signsgd: Any) -> None:
    module = Lit(make_optimizer=adamw, width=48)
    strategy = signsgd.SignSGDStrategy(**SMALL)
    fit(module, strategy, max_steps=2, max_epochs=-1, precision="bf16-true")
    tokens = next(iter(module.train_dataloader()))
    made = plan(
        Lit(make_optimizer=adamw, width=48),
        tokens,
        method="signsgd",
        settings=signsgd.SignSGDSettings(**SMALL),
        precision="bf16-true",
        hardware="rtx4090",
    )
    assert {name: made.host.holds[name] for name in strategy.engine.own.holdings} == strategy.engine.own.holdings
    assert "signsgd" in str(made)
    others = plan(Lit(make_optimizer=adamw, width=48), tokens, hardware="rtx4090", compare=True).others
    assert "signsgd" in {other.method for other in others}


def test_the_command_line_trains_by_it(signsgd: Any, run: Any, given: list[str], capsys: Any) -> None:
    own = ["--config-dir", str(TUTORIALS / "conf")]
    settings = [
        "method=signsgd",
        "trainer.strategy.momentum=0.8",
        "trainer.strategy.min_numel=0",
        "name=a",
        "export=false",
        "trace=false",
    ]
    assert run("train", *own, *given, *settings) == 0
    said = capsys.readouterr().out
    assert "method signsgd" in said
    assert "held-out, before -> after" in said


def test_several_devices_take_a_second_line(signsgd: Any) -> None:
    class SignSGDDDPStrategy(OffloadDDPStrategy, method=signsgd.SignSGD):
        """On several."""

    assert SignSGDDDPStrategy.strategy_name == "signsgd_offload_ddp"
    assert {"signsgd_offload_ddp", "signsgd_offload_ddp_spawn"} <= set(StrategyRegistry.available_strategies())
    assert SignSGDDDPStrategy(momentum=0.5, timeout_s=5.0).settings.momentum == 0.5


def test_a_method_that_says_too_little_is_refused(signsgd: Any) -> None:
    class Nameless(Method):
        summary: ClassVar[str] = "nothing"

    class Loose(Method):
        name: ClassVar[str] = "loose"
        summary: ClassVar[str] = "nothing"
        settings_type: ClassVar[Any] = CommonSettings

    class Taken(Method):
        name: ClassVar[str] = "lsp"
        summary: ClassVar[str] = "another"
        settings_type: ClassVar[Any] = FullSettings

    for kind, message in (
        (Nameless, "does not say its `name`"),
        (Loose, "does not derive from `GradientSettings`"),
        (Taken, "'lsp', which is a method of this package"),
    ):
        with pytest.raises(ValueError, match=message):
            type("Strategy", (OffloadStrategy,), {}, method=kind)
    assert CATALOGUE["lsp"].__module__.startswith("lightning_offload")


def test_the_package_does_not_know_it() -> None:
    package = Path(lightning_offload.__file__).parent
    own = [path.name for path in package.rglob("*.py") if "signsgd" in path.read_text().lower()]
    assert own == ["own_method.py"]  # whose docstring has the line
