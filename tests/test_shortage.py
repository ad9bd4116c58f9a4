"""Out of memory: reported once, with what is where and what would help, by the bytes that it really saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.utilities.memory import is_oom_error
from torch import nn
from torch.utils.data import DataLoader

from lightning_offload.callbacks import summary
from lightning_offload.errors import HostMemoryError
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.savings import Place, Run, arena_bytes, savings
from lightning_offload.shortage import DeviceShortageError, HostShortageError, report
from lightning_offload.tables import device_holds, host_holds
from tests.lit import Lit, LSPManual, assert_equal_modules, fit, lsp, offload, trainer
from tests.meft_lit import MLit, meft, shuffled_meft
from tests.zo2 import ZLit, ZOwn, sgd, zo2

ON_DEVICE = "CUDA out of memory. Tried to allocate 2.00 GiB."
ON_HOST = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes."

MODULES: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "full": (Lit, offload),
    "lsp": (Lit, lsp),
    "zo2": (ZLit, zo2),
    "meft": (MLit, meft),
    "LSPMixin": (LSPManual, lambda **_: "auto"),
    "ZO2Mixin": (ZOwn, lambda **_: "auto"),
}


@contextmanager
def running_out(module: Any, error: BaseException, *, backward: bool = False, after: int = 3) -> Iterator[None]:
    """The first block raises at its fourth call; later calls work again."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise error

    block = module.net.blocks[0]
    handle = block.register_full_backward_hook(hook) if backward else block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", MODULES)
def test_every_strategy_reports_and_goes_on(name: str) -> None:
    make_module, make_strategy = MODULES[name]
    module, strategy, cause = make_module(), make_strategy(), torch.OutOfMemoryError(ON_DEVICE)
    with running_out(module, cause), pytest.raises(DeviceShortageError) as caught:
        fit(module, strategy)
    text = str(caught.value)
    assert caught.value.__cause__ is cause
    assert is_oom_error(caught.value)
    assert text.startswith(ON_DEVICE)
    assert text.count("ran out of memory in `training_step`, on the CPU") == 1
    who = strategy.strategy_name if name in ("full", "lsp", "zo2", "meft") else type(module).__name__
    assert f"`{who}` ran out of memory" in text
    for line in ("On the device:", "In host memory:", "can still be had", "net.embed", "  1. `", "  2. `"):
        assert line in text
    modules = [make_module(), make_module()]
    fit(modules[0], strategy, accelerator="auto")
    fit(modules[1], make_strategy())
    assert_equal_modules(*modules)


@pytest.mark.parametrize("name", ["full", "lsp", "meft"])
def test_backward_and_the_host_report_too(name: str) -> None:
    make_module, make_strategy = MODULES[name]
    for cause in (RuntimeError(ON_HOST), MemoryError("nothing left")):
        module = make_module()
        with running_out(module, cause, backward=True, after=1), pytest.raises(HostShortageError) as caught:
            fit(module, make_strategy())
        assert caught.value.__cause__ is cause
        assert isinstance(caught.value, HostMemoryError)
        assert is_oom_error(caught.value) == is_oom_error(cause)
        assert "in `backward`" in str(caught.value)


@pytest.mark.parametrize("name", ["full", "lsp", "zo2", "meft"])
def test_evaluating_reports(name: str) -> None:
    make_module, make_strategy = MODULES[name]
    module, run = make_module(), trainer(make_strategy(), limit_val_batches=1)
    with running_out(module, torch.OutOfMemoryError(ON_DEVICE), after=0), pytest.raises(DeviceShortageError) as caught:
        run.validate(module, verbose=False)
    assert "in `validation_step`" in str(caught.value)
    assert "half the `batch_size` of the data loader" in str(caught.value)


@pytest.mark.parametrize("name", MODULES)
def test_other_errors_pass(name: str) -> None:
    make_module, make_strategy = MODULES[name]
    module = make_module()
    with running_out(module, RuntimeError("another")), pytest.raises(RuntimeError) as caught:
        fit(module, make_strategy())
    assert str(caught.value) == "another"


@pytest.mark.parametrize("name", ["full", "lsp", "zo2", "meft"])
def test_arenas_that_are_refused_report(name: str) -> None:
    make_module, make_strategy = MODULES[name]
    with pytest.raises(HostShortageError, match=r"needs 0\.00 GiB of host memory") as caught:
        fit(make_module(), make_strategy(max_host_gib=1e-7))
    text = str(caught.value)
    assert text.count(" ran out of memory in ") == 1
    assert "The run is kept within `max_host_gib=1e-07`, which may be raised." in text
    assert "  1. `" in text


def test_the_optimizer_step_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = offload()

    def step(*_: Any) -> None:
        raise torch.OutOfMemoryError(ON_DEVICE)

    class Breaks(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            monkeypatch.setattr(strategy.engine, "step", step)

    with pytest.raises(DeviceShortageError, match="in `optimizer_step`"):
        fit(Lit(), strategy, callbacks=[Breaks()])


def test_the_batch_size_finder_still_finds(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tuned(Lit):
        batch_size = 2

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if len(batch) > 4:
                raise torch.OutOfMemoryError(ON_DEVICE)
            return super().training_step(batch, batch_idx)

        def train_dataloader(self) -> Any:
            return DataLoader(super().train_dataloader().dataset, batch_size=self.batch_size)

    monkeypatch.chdir(tmp_path)
    module = Tuned(samples=24)
    finder = BatchSizeFinder(init_val=2, steps_per_trial=1, max_trials=3)
    fit(module, offload(), callbacks=[finder], max_epochs=1)
    assert module.batch_size == 4


def at_work(look: Callable[[Run], Any], module: Any, strategy: Any, **options: Any) -> Any:
    """What ``look`` makes of a run that has made two steps."""
    seen: list[Any] = []

    class Looks(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(look(strategy._run_at_hand()))

    fit(module, strategy, callbacks=[Looks()], max_steps=2, **options)
    return seen[-1]


def run_of(module: Any, strategy: Any, **options: Any) -> Run:
    """As a fit of two steps leaves it."""
    return at_work(lambda run: run, module, strategy, **options)


def arenas(run: Run) -> int:
    """What is really there."""
    assert run.engine is not None
    return sum(host_holds(run.engine, run.module, run.device).values()) - _alignment(run)


def _alignment(run: Run) -> int:
    return host_holds(run.engine, run.module, run.device).get("alignment, small buffers", 0)


LARGE: dict[str, Any] = {"width": 48, "depth": 2}
NARROW: dict[str, Any] = {"precision": "bf16-true"}


@pytest.mark.parametrize(
    ("strategy", "words", "other", "options"),
    [
        (offload(accumulate="host"), "`accumulate='device'`", offload(accumulate="device"), {}),
        (
            offload(accumulate="device"),
            "`precision='bf16-true'`",
            offload(accumulate="device"),
            NARROW,
        ),
        (lsp(accumulate="device", dim=18), "`dim=9`", lsp(accumulate="device", dim=9), {}),
        (lsp(accumulate="device", dim=0.5), "`dim=0.25`", lsp(accumulate="device", dim=0.25), {}),
        (lsp(accumulate="device"), "`precision='bf16-true'`", lsp(accumulate="device"), NARROW),
        (offload(accumulate="device"), "`strategy='lsp_offload'", lsp(accumulate="device", dim=0.5, nnz=8), {}),
    ],
    ids=["accumulate", "full in bf16", "dim", "share of dim", "lsp in bf16", "lsp"],
)
def test_host_bytes_saved_are_those_of_a_run_with_the_setting(
    strategy: Any, words: str, other: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_of(Lit(**LARGE), strategy, accumulate_grad_batches=2)
    after = run_of(Lit(**LARGE), other, accumulate_grad_batches=2, **options)
    found = savings(on_a_gpu(before, monkeypatch), "host", 99)
    (saving,) = [saving for saving in found if saving.words.startswith(words)]
    assert saving.host_bytes == arenas(before) - arenas(after) > 0


def test_bytes_that_zo2_saves_are_those_of_its_run() -> None:
    before = run_of(Lit(**LARGE), offload(accumulate="device"))
    after = run_of(Lit(**LARGE, make_optimizer=sgd), zo2())
    (saving,) = [saving for saving in savings(before, "host", 99) if "zo2_offload" in saving.words]
    assert saving.host_bytes == arenas(before) - arenas(after) > 0
    (saving,) = [s for s in savings(after, "host", 99) if s.words == "`precision='16-true'`"]
    narrow = run_of(Lit(**LARGE, make_optimizer=sgd), zo2(), precision="16-true")
    assert saving.host_bytes == arenas(after) - arenas(narrow) > 0


def test_bytes_that_meft_saves_are_those_of_its_run() -> None:
    def look(run: Run) -> tuple[dict[str, Any], int, int]:
        assert isinstance(run.engine, Engine)
        assert isinstance(run.engine.own, RowOptimizer)
        rows = ("masters", "optimizer state", "sums over micro-batches")
        held = host_holds(run.engine, run.module, run.device)
        found = {saving.words: saving for saving in savings(run, "device", 99)}
        return found, sum(held[kind] for kind in rows), run.engine.own.resident_bytes

    settings: list[dict[str, Any]] = [{}, {"width": 24}, {"placement": "host"}]
    (found, held, resident), (_, held_narrow, _), (_, _, resident_at_home) = [
        at_work(look, MLit(), shuffled_meft(**{"width": 48, "placement": "keys", **other})) for other in settings
    ]
    assert found["`width=24`"].host_bytes == held - held_narrow > 0
    assert found["`placement='host'`"].device_bytes == resident - resident_at_home > 0


@pytest.mark.parametrize("strategy", [offload, lsp, meft])
def test_the_formula_is_the_engines_own(strategy: Any) -> None:
    run = run_of(MLit() if strategy is meft else Lit(), strategy())
    engine: Any = run.engine
    assert arena_bytes(run, engine.method, engine.dtypes) == engine.host_bytes(engine.trained) > 0


def test_what_is_where_is_said_in_full() -> None:
    run = run_of(Lit(**LARGE), offload())
    text = report(run, "host", "`training_step`")
    assert summary(run.engine) in text  # type: ignore[arg-type]
    held = device_holds(run.engine, run.module, run.device)
    assert held["weights"] == sum(p.nbytes for p in run.module.parameters())
    for kind in (*held, *host_holds(run.engine, run.module, run.device)):
        assert f"  {kind}  " in text


def on_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """As if it computed there: the counters of torch's allocator, without a GPU."""
    counters = {"memory_allocated": 6 << 30, "max_memory_allocated": 8 << 30, "memory_reserved": 9 << 30}
    for name, count in counters.items():
        monkeypatch.setattr(torch.cuda, name, lambda _=None, count=count: count)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    return replace(run, device=torch.device("cuda:0"))


class Recomputes(nn.Module):
    """As Hugging Face's models say it."""

    supports_gradient_checkpointing, gradient_checkpointing = True, False


@pytest.mark.parametrize("place", ["device", "host"])
def test_on_a_gpu_activations_are_what_nobody_else_holds(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Lit()
    module.remembers = Recomputes()
    run = on_a_gpu(run_of(module, offload(max_device_gib=7.5), accumulate_grad_batches=2), monkeypatch)
    module.trainer.state.stage = L.pytorch.trainer.states.RunningStage.TRAINING
    text = report(run, place, "`training_step`")
    assert f"ran out of {place} memory in `training_step`, on cuda:0" in text
    assert "activations, and all else of torch" in text
    assert "The run is kept within `max_device_gib=7.5`, which may be raised." in text
    if place == "device":
        for line in (
            "1. gradient checkpointing (`gradient_checkpointing_enable()` of the model): saves 5.33 GiB (at most",
            "2. `batch_size=1` with `accumulate_grad_batches=4`: saves 4.00 GiB (half of what activations hold)",
            "3. `PYTORCH_ALLOC_CONF=expandable_segments:True` in the environment: saves 3.00 GiB (at most",
        ):
            assert line in text
    else:
        assert "batch_size" not in text


def test_one_report_of_several_around_one_another() -> None:
    """The mixin under its strategy: the step calls the strategy's backward, inside the strategy's `training_step`."""
    module = LSPManual()
    with (
        running_out(module, torch.OutOfMemoryError(ON_DEVICE), backward=True, after=1),
        pytest.raises(DeviceShortageError) as caught,
    ):
        fit(module, lsp(**module.method_settings))
    assert str(caught.value).count("What would help most") == 1
    assert "in `backward`" in str(caught.value)
    assert "zo2_offload" not in str(caught.value)  # the module's method is its own
    assert not isinstance(caught.value.__cause__, DeviceShortageError)


def test_on_several_devices_what_is_refused_there_is_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And arenas are shared out."""
    run = run_of(Lit(**LARGE), offload(accumulate="host"), accumulate_grad_batches=2)
    run = on_a_gpu(run, monkeypatch)
    alone = {saving.words: saving for saving in savings(run, "host", 99)}
    monkeypatch.setattr(Run, "ranks", 2)
    several = {saving.words: saving for saving in savings(run, "host", 99)}
    assert any("accumulate=" in words for words in alone)
    assert not any("accumulate=" in words for words in several)
    assert not any("zo2_offload'" in words or "lsp_offload'" in words for words in several)
    (mine,), (whole,) = ([s for words, s in found.items() if "lsp_offload" in words] for found in (several, alone))
    assert "`strategy='lsp_offload_ddp'`" in mine.words
    assert mine.host_bytes == pytest.approx(whole.host_bytes / 2, abs=2)
