"""The strategy as Lightning and its users meet it: names, devices, settings, messages, life cycle."""

from __future__ import annotations

import gc
import inspect
import pickle
import subprocess
import sys
import weakref
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_offload
from lightning_offload import FullOffloadStrategy, OffloadPrecision, attaching
from lightning_offload.errors import HostMemoryError, NonFiniteError, OffloadError, PartitionError
from lightning_offload.memory.blocks import partition
from lightning_offload.memory.budget import Machine
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.strategies import STRATEGIES, OneDevice
from tests.helpers import adamw
from tests.lit import Lit, Manual, assert_equal_modules, fit, lsp, offload, shuffled, shuffled_lsp, trainer


def test_the_name_is_registered_by_the_import_and_registering_twice_is_harmless() -> None:
    lightning_offload.register()
    assert isinstance(trainer("full_offload").strategy, FullOffloadStrategy)
    assert "full_offload" in StrategyRegistry.available_strategies()


def test_without_the_import_lightning_says_what_the_readme_quotes() -> None:
    code = "import lightning as L; L.Trainer(strategy='full_offload', accelerator='cpu', logger=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "You selected an invalid strategy name: `strategy='full_offload'`" in done.stderr


@pytest.mark.parametrize("kind", STRATEGIES)
def test_settings_are_the_signature(kind: type[OneDevice]) -> None:
    """One dataclass is the single source: names and defaults."""
    parameters = inspect.signature(kind).parameters
    base = ("calibration_dataloader", "log_file", "adapter_only", "accelerator", "checkpoint_io", "precision_plugin")
    settings = {name: p.default for name, p in parameters.items() if name not in base}
    assert settings == {field.name: field.default for field in fields(kind.settings_type)}
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values())
    documented = (kind.__doc__ or "").split("Args:")[1]
    for name in parameters:
        assert f"{name}:" in documented, name


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("accumulate", "gpu"),
        ("min_numel", -1),
        ("pin_memory", "yes"),
        ("host_threads", 0),
        ("skip_nonfinite", 1.5),
        ("max_skips", -2),
        ("on_misfit", "ignore"),
    ],
)
def test_bad_settings_are_named(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{setting}` must be .*got {value!r}"):
        FullOffloadStrategy(**{setting: value})


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("by", ["name", "instance"])
def test_precision_becomes_ours(precision: Any, by: str) -> None:
    made = trainer("full_offload" if by == "name" else FullOffloadStrategy(), precision=precision)
    assert isinstance(made.precision_plugin, OffloadPrecision)
    assert made.precision == precision


def test_precision_plugins_are_taken_or_refused() -> None:
    assert trainer("full_offload", plugins=[HalfPrecision("bf16-true")]).precision == "bf16-true"
    mine = OffloadPrecision("bf16-true")
    assert trainer("full_offload", plugins=[mine]).precision_plugin is mine
    assert trainer(FullOffloadStrategy(precision_plugin=mine)).precision_plugin is mine

    class Special(MixedPrecision):
        pass

    with pytest.raises(TypeError, match=r"can only work with the `OffloadPrecision` plugin, found `.*Special`"):
        trainer("full_offload", plugins=[Special("bf16-mixed", "cpu")])


@pytest.mark.parametrize("precision", ["64-true", "16-true"])
def test_unsupported_precision_lists_what_is(precision: Any) -> None:
    with pytest.raises(ValueError, match=rf"strategy='full_offload', precision='{precision}'.*'32-true', 'bf16-mixed'"):
        trainer("full_offload", precision=precision)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("master", "bfloat16"), ("wire", "float16"), ("moments", torch.bfloat16), ("rounding", "stochastic")],
)
def test_dtypes_that_full_cannot_have_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"OffloadPrecision\({argument}=.*not supported by method `full`"):
        trainer(FullOffloadStrategy(precision_plugin=OffloadPrecision("bf16-true", **{argument: value})))
    with pytest.raises(ValueError, match="`OffloadPrecision\\(wire='int8'\\)` is not a dtype"):
        OffloadPrecision(wire="int8")
    with pytest.raises(ValueError, match="precision='16-mixed'"):
        OffloadPrecision("16-mixed")  # type: ignore[arg-type]


def test_several_devices_asked_for_are_refused() -> None:
    made = L.Trainer(strategy="full_offload", accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match=r"runs on exactly one device, found 2.*devices=1"):
        made.fit(Lit())
    with pytest.raises(MisconfigurationException, match="`num_nodes=2`"):
        trainer("full_offload", num_nodes=2)


class TwoGpus(CPUAccelerator):
    """A machine with two devices, as far as the Trainer knows."""

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cpu")] * 2

    @staticmethod
    def auto_device_count() -> int:
        return 2


def test_several_devices_found_are_fine() -> None:
    ours, plain = Lit(), Lit()
    made = L.Trainer(
        strategy=offload(),
        accelerator=TwoGpus(),
        devices="auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="of the 2 found it uses cpu"):
        made.fit(ours)
    fit(plain, max_epochs=1)
    assert_equal_modules(plain, ours)


def test_a_gpu_is_found_by_name() -> None:
    """The device comes through `parallel_devices`; a plain SingleDeviceStrategy by name would land on the CPU."""
    with (
        mock.patch("lightning.fabric.accelerators.cuda.num_cuda_devices", return_value=2),
        mock.patch("lightning.pytorch.accelerators.cuda.num_cuda_devices", return_value=2),
    ):
        made = L.Trainer(strategy="full_offload", accelerator="cuda", devices=[1], logger=False)
    assert made.strategy.root_device == torch.device("cuda", 1)


def test_other_accelerators_and_launchers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = offload()
    made = trainer(strategy)
    strategy._root_device = torch.device("meta")
    with pytest.raises(MisconfigurationException, match="runs on CUDA GPUs and, for tests, on the CPU; found `meta`"):
        made.fit(Lit())
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(MisconfigurationException, match="one of 4 processes"):
        fit(Lit(), offload())


class TwoOptimizers(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [adamw(self.net.blocks), adamw(self.net.head)]


def test_two_optimizers_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"supports a single optimizer.*returned 2"):
        fit(TwoOptimizers(), offload())


class MyAdam(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: torch.optim.Adagrad(m.parameters()), "`torch.optim.adagrad.Adagrad` cannot be offloaded.*AdamW"),
        (lambda m: MyAdam(m.parameters()), "MyAdam` cannot be offloaded.*exact classes"),
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), r"AdamW\(amsgrad=True\)"),
        (lambda m: torch.optim.AdamW(m.parameters(), maximize=True), r"AdamW\(maximize=True\)"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.1), "dampening"),
        (lambda m: torch.optim.AdamW([nn.Parameter(torch.ones(9000))]), "is not a parameter of the module"),
    ],
)
def test_optimizers_that_cannot_be_offloaded_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Lit(make_optimizer=make), offload())


def test_hooks_on_the_optimizer_step_are_refused() -> None:
    def hooked(module: nn.Module) -> torch.optim.Optimizer:
        optimizer = adamw(module)
        optimizer.register_step_post_hook(lambda *_: None)
        return optimizer

    with pytest.raises(ValueError, match=r"register_step_post_hook.*would never run"):
        fit(Lit(make_optimizer=hooked), offload())


@pytest.mark.filterwarnings("ignore:.*no repeated blocks")
def test_auto_accumulation_looks_at_what_there_is() -> None:
    units = partition(nn.Linear(1000, 1, bias=False))
    gpu = replace(Machine.detect(), device_type="cuda", device_free_bytes=4000 + 4 * 4000)
    for machine, accumulates, where in (
        (gpu, True, "device"),
        (replace(gpu, device_free_bytes=4000 + 4 * 4000 - 4), True, "host"),
        (replace(gpu, device_free_bytes=0), False, "device"),
        (Machine.detect(), True, "device"),
    ):
        method = Full(FullSettings())
        reasons = method.resolve(units[0].module, units, machine, DTypes(), accumulates=accumulates)
        assert method.settings.accumulate == where
        assert any("accumulate" in reason for reason in reasons)


@pytest.mark.filterwarnings("ignore:.*no repeated blocks")
def test_gradients_are_counted_in_the_dtype_they_will_have() -> None:
    units = partition(nn.Linear(1000, 1, bias=False))
    gpu = replace(Machine.detect(), device_type="cuda", device_free_bytes=2000 + 4 * 2000)
    chosen = []
    for precision in ("32-true", "bf16-true"):
        method = Full(FullSettings())
        method.resolve(units[0].module, units, gpu, DTypes.of(precision), accumulates=True)
        chosen.append(method.settings.accumulate)
    assert chosen == ["host", "device"]


def test_every_auto_is_resolved_with_a_reason() -> None:
    method = Full(FullSettings())
    reasons = method.resolve(nn.Linear(1, 1), [], Machine.detect(), DTypes(), accumulates=True)
    asked = {name for name, value in vars(FullSettings()).items() if value == "auto"}
    assert asked == {reason.partition("=")[0] for reason in reasons}
    assert "auto" not in vars(method.settings).values()


def test_a_continued_run_chooses_as_it_did_before(tmp_path: Path) -> None:
    """Sums on the host and on the device round differently: the choice is part of the run."""
    first = fit(Lit(), offload(accumulate="host"), accumulate_grad_batches=2, max_epochs=1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    strategy = offload()
    fit(Lit(), strategy, accumulate_grad_batches=2, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert strategy.engine is not None
    assert strategy.engine.method.settings.accumulate == "host"
    assert strategy.settings.accumulate == "auto"


@pytest.mark.parametrize("kind", ["mixin", "scheduler", "trainer", "none"])
def test_every_way_to_accumulate_is_seen(kind: str) -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    module = Manual() if kind == "mixin" else Lit()
    if isinstance(module, Manual):
        module.offload = {"accumulate_grad_batches": 2}
    callbacks = [GradientAccumulationScheduler({0: 2})] if kind == "scheduler" else []
    made = trainer(offload(), callbacks=callbacks, accumulate_grad_batches=2 if kind == "trainer" else 1)
    assert attaching.accumulates(made, module) is (kind != "none")


def test_the_cpu_as_device_locks_no_memory() -> None:
    with mock.patch("lightning_offload.memory.arena._Pins", side_effect=AssertionError("page-locked")):
        fit(Lit(), offload(pin_memory=True), max_epochs=1)


def test_the_last_fits_state_survives_an_evaluation() -> None:
    strategies: tuple[Any, Any] = ("auto", offload())
    states = []
    for strategy in strategies:
        module = Lit()
        made = fit(module, strategy)
        made.validate(module, verbose=False)
        states.append(made.strategy.optimizer_state(made.optimizers[0])["state"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[0])


def test_where_nothing_is_offloaded_any_optimizer_passes() -> None:
    def adagrad(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(module.parameters())

    plain, ours = Lit(make_optimizer=adagrad), Lit(make_optimizer=adagrad)
    fit(plain, gradient_clip_val=0.1)
    with pytest.warns(UserWarning, match="nothing is offloaded and the optimizer runs as it is.*min_numel=0"):
        fit(ours, "full_offload", gradient_clip_val=0.1)
    assert_equal_modules(plain, ours)


class GrowsGroups(Lit):
    def on_train_epoch_start(self) -> None:
        self.trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def test_groups_cannot_grow() -> None:
    with pytest.raises(OffloadError, match=r"add_param_group` was called after setup.*configure_optimizers"):
        fit(GrowsGroups(), offload())


class Unfreezes(Lit):
    def on_train_epoch_start(self) -> None:
        self.net.blocks[1].requires_grad_(True)


def test_late_unfreezing_is_named() -> None:
    with pytest.raises(OffloadError, match=r"`net\.blocks\.1\.\S+` has a gradient but was frozen when"):
        fit(Unfreezes(frozen=True), offload())


class SparseLit(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net.embed.sparse = True


def test_sparse_gradients_are_named() -> None:
    with pytest.raises(OffloadError, match=r"gradient of `net\.embed\.weight` is sparse.*sparse=False"):
        fit(SparseLit(), offload())


def test_wrong_blocks_and_no_blocks() -> None:
    with pytest.raises(PartitionError, match=r"net\.blocs.*net\.blocks"):
        fit(Lit(), offload(blocks=["net.blocs"]))
    with pytest.warns(UserWarning, match="no repeated blocks"):
        fit(Lit(depth=0), offload())


def test_double_precision_weights_are_named() -> None:
    module = Lit()
    module.net.double()
    with pytest.raises(ValueError, match=r"`net\.embed\.weight` is trained in torch\.float64"):
        fit(module, offload())


def test_too_little_host_memory_is_said_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:

    small = replace(Machine.detect(), host_available_bytes=1000)
    monkeypatch.setattr(Machine, "detect", classmethod(lambda cls, device="cpu": small))
    strategy = offload()
    with (
        mock.patch("lightning_offload.memory.arena.HostMemory.region", side_effect=AssertionError("allocated")),
        pytest.raises(HostMemoryError, match="GiB"),
    ):
        fit(Lit(), strategy)
    with pytest.warns(UserWarning, match="GiB"):
        fit(Lit(), offload(on_misfit="warn"))


def test_what_an_earlier_trainer_held_is_available_to_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody refers to it any more, but its Trainer is a reference cycle."""
    earlier = offload()
    fit(Lit(), earlier)
    held, real, seen = weakref.ref(earlier.engine), Machine.detect.__func__, []

    def detect(cls: type[Machine], device: Any = "cpu") -> Machine:
        seen.append(held() is not None)
        return real(cls, device)

    monkeypatch.setattr(Machine, "detect", classmethod(detect))
    monkeypatch.setattr(attaching, "LARGE_BYTES", 0)
    del earlier
    fit(Lit(), offload())
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("make", [offload, shuffled, lsp, shuffled_lsp])
def test_another_fit_on_a_trainer_gives_back_what_the_last_one_held_before_it_maps_its_own(make: Any) -> None:
    """By reference count alone: an engine that is closed is in no cycle."""
    strategy = make()
    run = fit(Lit(), strategy)
    held = [weakref.ref(part) for part in (strategy.engine, *strategy.engine.parts)]
    make_lanes, alive = strategy._make_lanes, []

    def lanes(*arguments: Any) -> Any:
        alive.append(sum(part() is not None for part in held))
        return make_lanes(*arguments)

    strategy._make_lanes = lanes
    gc.disable()
    try:
        run.fit(Lit())
    finally:
        gc.enable()
    assert alive == [0]


class NanLit(Lit):
    bad: tuple[int, ...] = ()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step in self.bad else loss


def test_nan_losses_are_skipped_and_counted() -> None:
    module, strategy = NanLit(schedule="step"), offload()
    module.bad = (2, 3, 7)
    done = fit(module, strategy)
    assert done.global_step == 18  # steps and schedule advance
    assert strategy.engine is not None
    assert strategy.engine.report.skipped_total == 3
    assert all(p.isfinite().all() for p in module.parameters())


def test_too_many_nan_losses_are_an_error_and_nothing_is_lost() -> None:
    module = NanLit()
    module.bad = tuple(range(4, 100))
    clean = Lit()
    fit(clean, offload(), max_steps=4)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row.*`net\.embed\.weight`"):
        fit(module, offload(max_skips=2))
    for name, p in clean.named_parameters():
        assert torch.equal(p, dict(module.named_parameters())[name]), name


class Breaks(Lit):
    at = 3

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.trainer.global_step == self.at and batch_idx:
            raise KeyError("mine")
        return super().training_step(batch, batch_idx)


def test_after_an_exception_the_module_is_whole_and_fits_again() -> None:
    modules = Breaks(), Breaks()
    for module, strategy in zip(modules, ("auto", offload()), strict=True):
        made = trainer(strategy)
        torch.manual_seed(3)
        with pytest.raises(KeyError, match="mine"):
            made.fit(module)
        assert all(not m._forward_pre_hooks for m in module.modules())
        module.at = 10**9
        torch.manual_seed(4)
        made.fit(module)
    assert len(modules[0].losses) > 10
    assert_equal_modules(*modules)


def test_every_entry_point_in_any_order_on_one_strategy() -> None:
    plain, ours, strategy = Lit(dropout=0.1), Lit(dropout=0.1), offload()
    results: dict[str, list[Any]] = {"plain": [], "ours": []}
    for name, module, kind in (("plain", plain, "auto"), ("ours", ours, strategy)):
        made = trainer(kind, limit_val_batches=2, max_epochs=1)
        torch.manual_seed(3)
        results[name] += made.validate(module, verbose=False)
        made.fit(module)
        results[name] += made.validate(module, verbose=False)
        made.fit_loop.max_epochs = 2
        made.fit(module)
        results[name] += made.validate(module, verbose=False)
    assert results["plain"] == results["ours"]
    assert_equal_modules(plain, ours)


def test_a_strategy_can_be_pickled_before_during_and_after() -> None:
    class Pickles(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            # the module and the callbacks of this test cannot be pickled; the strategy's own state can
            state = trainer.strategy.__getstate__()
            assert state["engine"] is None
            pickle.dumps(state["settings"])

    strategy = offload()
    assert pickle.loads(pickle.dumps(strategy)).settings == strategy.settings
    fit(Lit(), strategy, callbacks=[Pickles()])


def test_fast_dev_run_overfit_and_limits() -> None:
    for kwargs in ({"fast_dev_run": True}, {"overfit_batches": 2}, {"limit_train_batches": 3}, {"barebones": True}):
        plain, ours = Lit(), Lit()
        run = {"logger": None, "enable_checkpointing": None} if "barebones" in kwargs else {}
        extra = {"enable_progress_bar": None, "enable_model_summary": None} if "barebones" in kwargs else {}
        fit(plain, **kwargs, **run, **extra)
        fit(ours, offload(), **kwargs, **run, **extra)
        assert_equal_modules(plain, ours)


class BadMixin(Manual):
    pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 0}, r"offload\['accumulate_grad_batches'\].*>= 1"),
        ({"gradient_clip_val": -1.0}, r"offload\['gradient_clip_val'\].*positive"),
        ({"gradient_clip_algorithm": "max"}, "'norm' or 'value'"),
        ({"accumulate": 2}, "unknown setting.*known: accumulate_grad_batches"),
    ],
)
def test_mixin_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    module = BadMixin()
    module.offload = settings
    with pytest.raises(ValueError, match=message):
        fit(module, offload())


class PlateauManual(Manual):
    def configure_optimizers(self) -> Any:
        optimizer = adamw(self)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}


def test_mixin_refuses_plateau_schedulers_by_name() -> None:
    with pytest.raises(MisconfigurationException, match="cannot step `ReduceLROnPlateau`"):
        fit(PlateauManual(), offload())


def test_mixin_without_a_loss_says_what_to_write() -> None:
    class NoLoss(lightning_offload.OffloadMixin, Lit):
        training_step = lightning_offload.OffloadMixin.training_step

    with pytest.raises(NotImplementedError, match=r"`NoLoss` must define `loss\(self, batch, batch_idx\)`"):
        fit(NoLoss(), offload())


def test_version_canaries() -> None:
    """Private names we rely on; each is one test away from being noticed when Lightning changes."""
    from lightning.fabric.utilities.init import _EmptyInit
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
    from lightning.pytorch.plugins.precision import Precision

    assert callable(Precision._after_closure)
    assert inspect.signature(_EmptyInit).parameters["enabled"]
    assert issubclass(_WrappingCheckpointIO, object)
    made = trainer("full_offload")
    assert made._accelerator_connector._devices_flag == 1
    assert callable(torch.optim.lr_scheduler.StepLR)
    optimizer = adamw(nn.Linear(2, 2))
    optimizer._opt_called = True
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer._opt_called = True
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
