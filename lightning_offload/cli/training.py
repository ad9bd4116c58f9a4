"""`lightning-offload train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from lightning_offload import runs
from lightning_offload.behaviour import OffloadBehaviour
from lightning_offload.callbacks import OffloadStats
from lightning_offload.cli.adapting import how_to_load, is_adapted, save_adapter
from lightning_offload.cli.building import (
    build,
    build_all,
    build_data,
    fit_to_data,
    put_adapters,
    settings_of,
    shown,
    spread,
)
from lightning_offload.cli.checks import check_rates, check_trainer, seed_everything
from lightning_offload.cli.planning import plan_of_run
from lightning_offload.cli.stopping import Stopping, left_in_order
from lightning_offload.cli.users import BAD_VALUES, said_by_rank_zero, user_errors
from lightning_offload.errors import OffloadError
from lightning_offload.export import check_weights, export_to_hf
from lightning_offload.lora import has_peft
from lightning_offload.memory.blocks import partition
from lightning_offload.memory.budget import cap_device
from lightning_offload.methods.lsp import LSP, LSPSettings
from lightning_offload.methods.meft import MEFTSettings, refuse_other_adapters
from lightning_offload.planning import Plan
from lightning_offload.plots import metrics_files, plot_losses
from lightning_offload.tracing import PICTURE_FILE, OffloadTimeline
from lightning_offload.writing import is_of_disk, written_file

TRACED_STEPS = 2


@said_by_rank_zero()
def train(cfg: DictConfig) -> int:
    """Plan, then fit, with the held-out loss before and after; then save a Hugging Face folder and pictures."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with user_errors():
        check_trainer(cfg.trainer)
        spread(cfg)
        fit_to_data(cfg)
        resume = runs.checkpoint_to_resume(folder, cfg.ckpt_path)
        seed_everything(cfg.seed)
        optimizer, scheduler = build(cfg, "optimizer"), build(cfg, "scheduler")
        # before weights are loaded: a package may be missing
        callbacks, loggers = build_all(cfg, "callbacks"), build_all(cfg, "logger")
        model = build(cfg, "model", optimizer=optimizer, scheduler=scheduler)
        data = build_data(cfg, model)
        trainer = build(cfg, "trainer", callbacks=callbacks, logger=loggers)
        if resume:
            put_adapters(cfg, model)
            check_weights(model, resume)
            print(f"continues from {shown(resume)}")
        _check_trainable(cfg, model, optimizer)
        batch = _first_batch(data)
        _calibrate(trainer, data)
        planned = plan_of_run(cfg, trainer, model, batch, optimizer) if cfg.plan else None
        _watch(cfg, trainer, planned, folder)
        stopping = Stopping(partial(_keep, cfg, trainer, folder))
        trainer.callbacks.append(stopping)
    with _cap(cfg, trainer), left_in_order(folder, stopping):
        before = held_out(trainer, model, data, resume)
        _fit(trainer, model, data, resume, stopping)
        after = held_out(trainer, model, data)
        if trainer.is_global_zero:
            _print_change(before, after)
            _save_results(cfg, model, folder)
    return 0


def _keep(cfg: DictConfig, trainer: L.Trainer, folder: Path) -> None:
    """Write down how the run was made, now that it runs; an earlier part of it keeps its own until then."""
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which leaves nothing behind
        with written_file(folder / runs.CONFIG) as file:
            OmegaConf.save(cfg, file, resolve=True)


def _watch(cfg: DictConfig, trainer: L.Trainer, planned: Plan | None, folder: Path) -> None:
    """Have the run compared with its plan, and a few of its steps drawn."""
    if planned is not None:
        _tell_bound(trainer, planned)
    if not isinstance(trainer.strategy, OffloadBehaviour) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    predicted = planned.prediction if planned is not None else None
    timeline = OffloadTimeline(folder, steps=TRACED_STEPS if cfg.trace else 0, predicted=predicted)
    trainer.callbacks.insert(0, timeline)  # type: ignore[attr-defined]
    if planned is not None:
        trainer.strategy.uses = planned.uses


def _tell_bound(trainer: L.Trainer, planned: Plan) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, OffloadStats) and callback.bound_s is None:
            callback.bound_s = planned.bound_s


@contextmanager
def _cap(cfg: DictConfig, trainer: L.Trainer) -> Iterator[None]:
    """Without an offload strategy, which keeps to the cap by itself."""
    gib, device = cfg.hardware.device_gib, trainer.strategy.root_device
    if cfg.method.name != "none" or gib is None or device.type != "cuda":
        yield
        return
    undo = cap_device(device, gib)
    try:
        yield
    finally:
        undo()


def _check_trainable(cfg: DictConfig, model: Any, optimizer: Callable[[list[Any]], Any] | None) -> None:
    """Refuse before the first validation what would fail after it, or do something else than asked."""
    model.setup("fit")
    if optimizer:
        try:
            check_rates(optimizer(list(model.parameters())))
        except ValueError as error:
            raise OffloadError(f"optimizer: {error}; its settings are lr=... and optimizer.<name>=...") from error
    if cfg.trainer.max_steps < 1 and OmegaConf.select(cfg, "scheduler.num_training_steps") is not None:
        raise OffloadError("this scheduler needs trainer.max_steps=<number>; scheduler=linear also counts epochs")
    if cfg.method.name == "none":
        _check_plain(cfg)
    settings = settings_of(cfg)
    if isinstance(settings, MEFTSettings):
        refuse_other_adapters(model)
    if isinstance(settings, LSPSettings) and settings.dim != "auto" and has_peft(model):
        _check_projected(model, settings)


def _check_projected(model: Any, settings: LSPSettings) -> None:
    """Refuse LoRA of too few ranks for projectors; `train` would find out late, and `lsp` is its default."""
    if any(p.requires_grad and p.numel() >= settings.min_numel for p in model.parameters()):
        LSP(settings).claim(model, partition(model, settings.blocks))


def _check_plain(cfg: DictConfig) -> None:
    """Refuse what Lightning itself cannot do and the offload methods can."""
    chosen = [key for key in ("master", "wire", "moments", "rounding") if cfg.precision.get(key) is not None]
    if chosen:
        raise OffloadError(f"precision.{chosen[0]} is for the offload methods; method=none takes none of these")
    fused = OmegaConf.select(cfg, "optimizer.fused")
    if fused and cfg.precision.precision == "bf16-mixed" and cfg.trainer.gradient_clip_val:
        raise OffloadError(
            "method=none cannot clip gradients of a fused optimizer under precision=bf16-mixed: "
            "set optimizer.fused=false or trainer.gradient_clip_val=null"
        )


def _first_batch(data: Any) -> Any:
    """The first micro-batch of training, its first example printed."""
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    print(f"\n{data.preview(batch)}\n")
    return batch


def _calibrate(trainer: L.Trainer, data: Any) -> None:
    """Where projectors are fitted to batches apart and none were given: training data, in an order of its own."""
    strategy: Any = trainer.strategy
    wanted = getattr(getattr(strategy, "settings", None), "calibration", None) == "batch"
    if wanted and strategy.calibration_dataloader is None:
        train = data.train_dataloader()
        strategy.calibration_dataloader = DataLoader(
            train.dataset, batch_size=train.batch_size, shuffle=True, collate_fn=train.collate_fn
        )


def held_out(
    trainer: L.Trainer, model: Any, data: Any, ckpt_path: Path | None = None, split: str = "val"
) -> dict[str, float]:
    """The metrics of validation or test by name."""
    run = trainer.test if split == "test" else trainer.validate
    results = run(model, datamodule=data, ckpt_path=ckpt_path, verbose=False)
    metrics = results[0] if results else {}
    return {name.removeprefix(f"{split}/"): float(value) for name, value in metrics.items()}


def _fit(trainer: L.Trainer, model: Any, data: Any, resume: Path | None, stopping: Stopping) -> None:
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume)
    except BAD_VALUES as error:
        if stopping.begun or is_of_disk(error):
            raise
        # before the first batch a strategy looks at model, optimizer and settings: the last of what is built
        raise OffloadError(str(error)) from error
    if stopping.received:
        raise KeyboardInterrupt


def _print_change(before: dict[str, float], after: dict[str, float]) -> None:
    if not after:
        print("\nno held-out loss: trainer.limit_val_batches=0 leaves nothing to measure it on")
        return
    print("\nheld-out, before -> after")
    for name in after:
        print(f"  {name.replace('_', ' '):<14} {before[name]:.3f} -> {after[name]:.3f}")


def _save_results(cfg: DictConfig, model: Any, folder: Path) -> None:
    made: dict[str, Path | None] = {"config": folder / runs.CONFIG, "checkpoint": runs.newest_checkpoint(folder)}
    if metrics_files(folder):
        made["loss curve"] = plot_losses([folder], folder / "loss.png")
    made["timeline"] = folder / PICTURE_FILE
    adapter = save_adapter(model, folder / runs.ADAPTER) if cfg.export and is_adapted(model) else None
    if adapter:
        made["adapter"] = adapter
    elif cfg.export:
        made["model"] = export_to_hf(model, folder / runs.MODEL)
    print()
    for what, path in made.items():
        if path and path.exists():
            print(f"{what:<12} {shown(path)}")
    if adapter:
        print(how_to_load(model, adapter))
