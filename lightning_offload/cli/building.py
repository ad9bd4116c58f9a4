"""From configuration to objects, each said in one line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from yaml import YAMLError

from lightning_offload import runs
from lightning_offload.cli.keys import did_you_mean
from lightning_offload.cli.users import BAD_VALUES
from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.memory.promises import parameters_on_meta
from lightning_offload.methods.meft import MEFTSettings, attach
from lightning_offload.strategies import OneDevice
from lightning_offload.text import CausalLM
from lightning_offload.text.loading import take_generation
from lightning_offload.text.pretrained import check_positions, check_vocabulary

PROGRESS = "progress"  # the key of the callback that shows a Trainer's progress

_LINE_LENGTH = 118


def build(cfg: DictConfig | ListConfig, key: str, **extra: Any) -> Any:
    """Make the object that a group describes, and say so in one line."""
    node = OmegaConf.select(cfg, key)
    if node is None:
        return None
    shown = ", ".join(f"{name}={extra.get(name, value)}" for name, value in _telling(node))
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


def spread(cfg: DictConfig) -> None:
    """Take the method's strategy for several devices where several were asked for."""
    trainer = cfg.trainer
    devices, strategy = trainer.get("devices", 1), trainer.get("strategy")
    count = len(devices) if isinstance(devices, ListConfig) else devices
    several = (isinstance(count, int) and count > 1) or trainer.get("num_nodes", 1) > 1
    if several and OmegaConf.is_config(strategy) and issubclass(get_class(strategy._target_), OneDevice):
        strategy._target_ = strategy._target_.replace("Strategy", "DDPStrategy")


def build_all(cfg: DictConfig, group: str) -> list[Any]:
    """Make the objects of a group that has several; a bar only where the Trainer is to have one."""
    barred = () if cfg.trainer.get("enable_progress_bar", True) else (PROGRESS,)
    names = [name for name in cfg[group] or {} if name not in barred]
    for name in names:
        if "_target_" not in cfg[group][name]:
            near = did_you_mean(name, {*names} - {name})
            raise OffloadError(f"{group}.{name} has no _target_, the class that it is{near}")
    with _services(group):
        return [build(cfg, f"{group}.{name}") for name in names]


@contextmanager
def _services(group: str) -> Iterator[None]:
    """What a service answers to a logger, in classes of its own, is the user's to mend."""
    try:
        yield
    except InstantiationException as error:
        if group != "logger" or error.__cause__ is None or isinstance(error.__cause__, BAD_VALUES):
            raise
        key = re.search(r"full_key: (\S+)", str(error))
        raise OffloadError(f"{key[1] if key else group}: {error.__cause__}") from error


def build_data(cfg: DictConfig, model: Any) -> Any:
    """Make the data module, with the tokenizer of the model."""
    data = build(cfg, "data")
    network = getattr(model, "network", None)
    check_vocabulary(network, model.tokenizer)
    check_positions(network, getattr(data, "sequence_length", None))
    data.tokenizer = model.tokenizer
    return data


def fit_to_data(cfg: Any) -> None:
    """Give a classifier the labels of its data, and take from its settings what language models alone have."""
    model = cfg.model
    if "num_labels" not in model:
        return
    of_language_models = inspect.signature(CausalLM.__init__).parameters
    with open_dict(model):
        for name in [name for name in model if name in of_language_models]:
            given = model.pop(name)
            if given != of_language_models[name].default:
                raise OffloadError(f"model.{name}={given} is for language models; this one classifies: leave it out")
    if model.num_labels is None and not model.get("label_names"):
        path = {"path": ""} if OmegaConf.is_missing(cfg.data, "path") else {}  # a plan needs no data
        data = instantiate(cfg.data, _convert_="all", **path)
        model.num_labels = getattr(data, "num_labels", None)
        model.label_names = list(getattr(data, "label_names", ())) or None


def settings_of(cfg: Any) -> Any:
    """The settings of the method that a configuration names; None of a plain strategy."""
    strategy = cfg.trainer.strategy
    if not OmegaConf.is_config(strategy):
        return None
    given: Any = OmegaConf.to_container(strategy, resolve=True)
    behaviour: Any = get_class(given["_target_"])
    kind = behaviour.settings_type
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in given.items() if name in names})


def stored_config(run: Path) -> Any:
    """What a run was made with.

    Raises:
        CheckpointError: The file is not what the run has written.
    """
    file, found = run / runs.CONFIG, None
    with suppress(YAMLError, UnicodeDecodeError):
        found = OmegaConf.load(file)
    missing = [key for key in ("model", "data", "trainer", "precision", "seed") if found is None or key not in found]
    if missing:
        raise CheckpointError(
            f"{shown(file)} does not say the run's {', '.join(missing)}: it is damaged, or of something else. The run "
            "writes it again when it goes on: the same train command with ckpt_path=last"
        )
    return found


def put_adapters(cfg: Any, model: Any) -> None:
    """Have the model of a run by `meft` its adapters, to load a checkpoint into."""
    settings = settings_of(cfg)
    if isinstance(settings, MEFTSettings):
        attach(model, settings)


def build_without_weights(cfg: Any) -> Any:
    """The model of a run, its weights on the meta device: for a checkpoint that has them."""
    drawn = {"init": "random"} if "init" in cfg.model else {}  # nothing is drawn there, and no weights are looked for
    with parameters_on_meta():
        model = instantiate(cfg.model, _convert_="all", **drawn)
        put_adapters(cfg, model)
    path = cfg.model.get("path")
    if drawn and cfg.model.init == "pretrained" and path:
        take_generation(model.network, instantiate(path) if OmegaConf.is_config(path) else path)
    return model


def dtype(name: str | None) -> torch.dtype | None:
    """The dtype of this name.

    Raises:
        OffloadError: There is none, or it is no floating-point dtype.
    """
    dtype = getattr(torch, name, None) if name else None
    if name and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OffloadError(f"`dtype` is float32, bfloat16 or float16; got {name!r}")
    return dtype


def shown(path: str | Path) -> str:
    """Relative to the working folder, where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
