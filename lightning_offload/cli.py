"""`lightning-offload train | evaluate | export`: thin Hydra mains over `lightning_offload.conf`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from lightning_offload import runs
from lightning_offload.conf import schema
from lightning_offload.errors import OffloadError
from lightning_offload.export import check_weights, export_to_hf, load_weights
from lightning_offload.plots import metrics_files, plot_losses

_USAGE = """\
lightning-offload: fine-tune language models that do not fit on the GPU

  train      fine-tune, compare the held-out loss before and after, save a Hugging Face folder
               lightning-offload train
               lightning-offload train model=pretrained model.path=<folder> data=jsonl data.path=my.jsonl
  evaluate   loss, perplexity, bits per byte and a sample
               lightning-offload evaluate ckpt_path=runs/<name>
  export     a Hugging Face folder from a run's checkpoint, checked by its logits
               lightning-offload export ckpt_path=runs/<name> output=my_model dtype=bfloat16

`lightning-offload <command> --help` lists what a command takes. HYDRA_FULL_ERROR=1 shows where an error came from.\
"""
_FULL_ERROR = "HYDRA_FULL_ERROR"
_LINE_LENGTH = 118
_BAD_VALUES = (ValueError, TypeError, OSError, ImportError)
_NOT_FOR_USERS = (r".*LeafSpec.*", r".*does not have many workers.*", r".*number of training batches.*")


def main() -> int:
    """Run the sub-command named by the first argument of the process; the console script's entry point.

    Raises:
        SystemExit: With 2 when something the user gave was wrong; one line on stderr says what, and the way out.
    """
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    with _one_line_for_users(command):
        if command not in _COMMANDS:
            raise OffloadError(f"no command {command!r}; there are {', '.join(_COMMANDS)}")
        _check_flags(arguments)
        _run_hydra(command, arguments)
    return 0


def train(cfg: DictConfig) -> None:
    """Fit, with the held-out loss before and after; then save a Hugging Face folder and the loss curve."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with _user_errors():
        resume = runs.checkpoint_to_resume(folder, cfg.ckpt_path)
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        optimizer, scheduler = _build(cfg, "optimizer"), _build(cfg, "scheduler")
        model = _build(cfg, "model", optimizer=optimizer, scheduler=scheduler)
        data = _build_data(cfg, model)
        trainer = _build(cfg, "trainer", callbacks=_build_all(cfg, "callbacks"), logger=_build_all(cfg, "logger"))
        if resume:
            check_weights(model, resume)
            print(f"continues from {_shown(resume)}")
        _check_trainable(cfg, model, optimizer)
        _print_example(data)
        if not trainer.fast_dev_run:  # which leaves nothing behind
            OmegaConf.save(cfg, folder / runs.CONFIG, resolve=True)
    before = _validate(trainer, model, data, resume)
    _fit(trainer, model, data, resume)
    after = _validate(trainer, model, data)
    if trainer.is_global_zero:
        _print_change(before, after)
        _save_results(cfg, model, folder)


def evaluate(cfg: DictConfig) -> None:
    """Print loss, perplexity, bits per byte and a sample, and write them to a JSON file."""
    with _user_errors():
        checkpoint = runs.find_checkpoint(cfg.ckpt_path) if cfg.ckpt_path else None
        run = runs.folder_of(checkpoint) if checkpoint else None
        _fill_in(cfg, run)
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        model = _build(cfg, "model")
        if checkpoint:
            load_weights(model, checkpoint)
        data = _build_data(cfg, model)
        trainer = _build(cfg, "trainer", logger=False, enable_checkpointing=False)
    metrics = _validate(trainer, model, data)
    sample = model.to(trainer.strategy.root_device).generate(cfg.prompt, cfg.max_new_tokens)
    print("\n" + "   ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items()))
    print(f"\n{cfg.prompt}{sample}\n")
    output = Path(cfg.output or (run or Path()) / "evaluation.json")
    result = {**metrics, "checkpoint": checkpoint and str(checkpoint), "prompt": cfg.prompt, "sample": sample}
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {_shown(output)}")


def export(cfg: DictConfig) -> None:
    """Write a Hugging Face folder from a run's checkpoint."""
    with _user_errors():
        checkpoint = runs.find_checkpoint(cfg.ckpt_path)
        folder = runs.folder_of(checkpoint)
        model = _build(OmegaConf.load(folder / runs.CONFIG), "model")
        load_weights(model, checkpoint)
        output = export_to_hf(
            model, cfg.output or folder / runs.MODEL, max_shard_gib=cfg.max_shard_gib, dtype=_dtype(cfg.dtype)
        )
    print(f"written to {_shown(output)}; reloaded, it gives the logits of {_shown(checkpoint)}")


_COMMANDS: dict[str, Callable[[DictConfig], None]] = {"train": train, "evaluate": evaluate, "export": export}


def _run_hydra(command: str, arguments: list[str]) -> None:
    """Hand the process to Hydra; inside the command `sys.argv` is whole again, as Lightning replays it."""
    _quiet()
    schema.register()
    OmegaConf.register_new_resolver("run_folder", functools.cache(runs.choose_folder), replace=True)
    seen_by_all = sys.argv, os.environ.get(_FULL_ERROR)
    begun = False

    @hydra.main(version_base="1.3", config_path="pkg://lightning_offload.conf", config_name=command)
    def task(cfg: DictConfig) -> None:
        nonlocal begun
        begun = True
        # an exception that leaves this function makes Hydra print a line of its own
        with _process_state(*seen_by_all), _one_line_for_users(command):
            try:
                _check_top_level(cfg)
                _COMMANDS[command](cfg)
            finally:
                runs.remove_if_empty(Path(HydraConfig.get().runtime.output_dir))

    # The variable makes Hydra raise its errors instead of printing several lines and exiting with 1.
    with _process_state([sys.argv[0], *arguments], "1"):
        try:
            task()
        except ValueError as error:  # how Hydra refuses `group=null`
            if begun:
                raise
            raise OffloadError(f"{error} (a group is switched off by =none)") from error


def _quiet() -> None:
    """Leave out what Lightning says to developers, and its advertisement."""
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


@contextmanager
def _process_state(argv: list[str], full_error: str | None) -> Iterator[None]:
    before = sys.argv, os.environ.get(_FULL_ERROR)

    def put(argv: list[str], full_error: str | None) -> None:
        sys.argv = argv
        os.environ.pop(_FULL_ERROR, None)
        if full_error is not None:
            os.environ[_FULL_ERROR] = full_error

    put(argv, full_error)
    try:
        yield
    finally:
        put(*before)


def _check_flags(arguments: list[str]) -> None:
    """Let Hydra's own parser look first: it would print its usage over several lines."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise OffloadError(f"{message}; settings are written key=value, as in trainer.max_steps=100")

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)


def _check_top_level(cfg: DictConfig) -> None:
    """Refuse what ``+key=value`` added beside the schema: nothing would read it."""
    known = {field.name for field in dataclasses.fields(OmegaConf.get_type(cfg))}  # type: ignore[arg-type]
    unknown = sorted(map(str, cfg.keys() - known))
    if unknown:
        raise OffloadError(f"no key {unknown[0]!r}; there are {', '.join(sorted(known))}")


@contextmanager
def _one_line_for_users(command: str) -> Iterator[None]:
    """Exit with 2 and one line for what the user can mend; anything else is a bug and keeps its traceback."""
    try:
        yield
    except Exception as error:
        if os.environ.get(_FULL_ERROR) == "1" or not _is_of_user(error):
            raise
        print(f"lightning-offload {command}: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error


@contextmanager
def _user_errors() -> Iterator[None]:
    """While the objects are built, bad values are the user's; later they would be bugs and keep their traceback."""
    try:
        yield
    except OffloadError:
        raise
    except _BAD_VALUES as error:
        raise OffloadError(str(error)) from error


def _is_of_user(error: BaseException) -> bool:
    """Whether one line is enough: a constructor that Hydra called may also have failed for a bug of ours."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return isinstance(error.__cause__, _BAD_VALUES) or _is_of_user(error.__cause__)
    return isinstance(error, OffloadError | MisconfigurationException | HydraException | OmegaConfBaseException)


def _one_line(error: BaseException) -> str:
    """Say what Hydra says over many lines; our own messages are one line already."""
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    if isinstance(error, InstantiationException) and cause is not error:
        key = re.search(r"full_key: (\S+)", str(error))
        text = f"{key[1] + ': ' if key else ''}{_one_line(cause)}"
    elif isinstance(cause, MissingMandatoryValue):
        text = f"{cause.full_key} has no value; give {cause.full_key}=<value>"
    elif isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        text = f"no key or group {cause.full_key!r}; there are {', '.join(sorted(map(str, cause.parent_node)))}"
    elif isinstance(error, OverrideParseException):
        text = (
            f"cannot read {error.override!r}; settings are key=value, with special characters as in 'key=\"(value)\"'"
        )
    else:
        listing = str(error).split("Config search path")[0]
        text = listing if cause is error else f"{listing}\n{str(cause).splitlines()[0]}"
    return " ".join(text.split())


def _build(cfg: DictConfig | ListConfig, key: str, **extra: Any) -> Any:
    """Make the object that a group describes, and say so in one line."""
    node = OmegaConf.select(cfg, key)
    if node is None:
        return None
    shown = ", ".join(f"{name}={value}" for name, value in _telling(node))
    choice = HydraConfig.get().runtime.choices.get(key)
    line = f"{f'{key}={choice}' if choice else key:<26} {node._target_.rpartition('.')[2]}({shown})"
    print(line if len(line) <= _LINE_LENGTH else f"{line[: _LINE_LENGTH - 4]} ...")
    made = instantiate(node, _convert_="all", **extra)
    if isinstance(made, functools.partial):  # called long after: a misspelt key has to be found now
        try:
            inspect.signature(made.func).bind_partial(**made.keywords)
        except TypeError as error:
            raise TypeError(f"{key}: {error}") from error
    return made


def _telling(node: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield the settings that say something in a line."""
    for name in map(str, node):
        if not name.startswith("_") and node[name] is not None and not OmegaConf.is_config(node[name]):
            yield name, node[name]


def _build_all(cfg: DictConfig, group: str) -> list[Any]:
    return [_build(cfg, f"{group}.{name}") for name in cfg[group] or {}]


def _build_data(cfg: DictConfig, model: Any) -> Any:
    data = _build(cfg, "data")
    data.tokenizer = model.tokenizer
    return data


def _fill_in(cfg: DictConfig, run: Path | None) -> None:
    """Take the model and the data of the run, where none was given."""
    stored = OmegaConf.load(run / runs.CONFIG) if run else OmegaConf.create()
    with open_dict(cfg):
        for key in ("model", "data"):
            cfg[key] = cfg[key] if cfg[key] is not None else OmegaConf.select(stored, key)
    missing = [key for key in ("model", "data") if cfg[key] is None]
    if missing:
        raise OffloadError(
            f"nothing says which {' and '.join(missing)} to evaluate: give ckpt_path=<run>, or model=<option> "
            "data=<option> (--help lists them)"
        )


def _check_trainable(cfg: DictConfig, model: Any, optimizer: Callable[[list[Any]], Any] | None) -> None:
    """Refuse before the first validation what would fail after it, or do something else than asked."""
    model.setup("fit")
    if optimizer:
        optimizer(list(model.parameters()))
    if cfg.trainer.max_steps < 1 and OmegaConf.select(cfg, "scheduler.num_training_steps") is not None:
        raise OffloadError("this scheduler needs trainer.max_steps=<number>; scheduler=linear also counts epochs")
    if cfg.method.name == "none":
        _check_plain(cfg)


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


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if name else None
    if name and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OffloadError(f"`dtype` is float32, bfloat16 or float16; got {name!r}")
    return dtype


def _print_example(data: Any) -> None:
    data.setup("fit")
    print(f"\n{data.preview(next(iter(data.train_dataloader())))}\n")


def _validate(trainer: L.Trainer, model: Any, data: Any, ckpt_path: Path | None = None) -> dict[str, float]:
    results = trainer.validate(model, datamodule=data, ckpt_path=ckpt_path, verbose=False)
    metrics = results[0] if results else {}
    return {name.removeprefix("val/"): float(value) for name, value in metrics.items()}


def _fit(trainer: L.Trainer, model: Any, data: Any, resume: Path | None) -> None:
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume)
    except _BAD_VALUES as error:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            raise
        # before the first batch a strategy looks at model, optimizer and settings: the last of what is built
        raise OffloadError(str(error)) from error


def _print_change(before: dict[str, float], after: dict[str, float]) -> None:
    print("\nheld-out, before -> after")
    for name in after:
        print(f"  {name.replace('_', ' '):<14} {before[name]:.3f} -> {after[name]:.3f}")


def _save_results(cfg: DictConfig, model: Any, folder: Path) -> None:
    made: dict[str, Path | None] = {"config": folder / runs.CONFIG, "checkpoint": runs.newest_checkpoint(folder)}
    if metrics_files(folder):
        made["loss curve"] = plot_losses([folder], folder / "loss.png")
    if cfg.export:
        made["model"] = export_to_hf(model, folder / runs.MODEL)
    print()
    for what, path in made.items():
        if path and path.exists():
            print(f"{what:<12} {_shown(path)}")


def _shown(path: str | Path) -> str:
    """Relative to the working folder, where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


if __name__ == "__main__":
    sys.exit(main())
