"""Every file in conf/ composes, and what this machine can is instantiated."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning_offload.conf import schema
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.optim.lr_scheduler import LRScheduler

import lightning_offload
from lightning_offload.cli.options import options
from lightning_offload.methods.lsp import PRESETS

CONF = Path(schema.__file__).parent
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()
}
GROUPS = {group: options for group, options in GROUPS.items() if options}
FILES = [(group, option) for group, options in sorted(GROUPS.items()) for option in options]


@pytest.fixture(autouse=True)
def _hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    schema.register()
    OmegaConf.register_new_resolver("options", options, replace=True)
    OmegaConf.register_new_resolver("run_folder", lambda *names: f"runs/{names[2]}-1", replace=True)
    with initialize_config_module("lightning_offload.conf", version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


def composed(*overrides: str, command: str = "train") -> DictConfig:
    cfg = compose(command, list(overrides), return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = "runs/a-1"
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def mandatory(group: str, option: str) -> list[str]:
    """What the file leaves to the user."""
    if option == "by_shape":
        return ["model.config={model_type: gpt2, n_layer: 2}"]
    task = ["data.task=sst2"] if (group, option) == ("data", "glue") else []
    return task + [f"{key}=somewhere" for key in sorted(OmegaConf.missing_keys(composed(f"{group}={option}")))]


@pytest.mark.parametrize(("group", "option"), FILES, ids=lambda value: value)
def test_every_file_composes_and_resolves(group: str, option: str) -> None:
    cfg = composed(f"{group}={option}", *mandatory(group, option))
    assert HydraConfig.get().runtime.choices[group] == option
    content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for key, node in _leaves(content):
        get_class_or_function(node["_target_"], key)


def _leaves(content: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, node in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(node, dict | list):
            yield from _leaves(node, f"{key}.{name}")
    if isinstance(content, dict) and "_target_" in content:
        yield key, content


def get_class_or_function(target: str, key: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except ImportError as error:
        if error.name in ("tensorboard", "tensorboardX"):
            pytest.skip(f"{key} needs {error.name}")
        raise


@pytest.mark.parametrize("command", ["train", "plan", "evaluate", "export", "bench", "doctor"])
def test_every_command_composes_and_its_help_fits_a_screen(command: str) -> None:
    overrides = ["ckpt_path=a"] if command == "export" else []
    cfg = composed(*overrides, command=command)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    lines = HydraConfig.get().help.template.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("option", GROUPS["experiment"])
def test_an_experiment_starts_with_its_command(option: str) -> None:
    lines = (CONF / "experiment" / f"{option}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# lightning-offload train experiment={option}")


@pytest.mark.parametrize("option", GROUPS["model"])
def test_models_are_built(option: str) -> None:
    if option == "pretrained":
        pytest.skip("takes a folder: test_cli trains one")
    if option == "tiny":
        assert instantiate(composed().model, _convert_="all").tokenizer is not None
        return
    node = composed(f"model={option}", *mandatory("model", option), "model.init=random").model
    with torch.device("meta"):
        model = instantiate({**node, "tokenizer_path": None}, _convert_="all")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.network.config.to_dict().items() >= node.config.items()


@pytest.mark.parametrize("option", GROUPS["data"])
def test_data_modules_are_built_with_every_argument_shown(option: str) -> None:
    node = composed(f"data={option}", *mandatory("data", option), "seed=7").data
    assert instantiate(node, _convert_="all").seed == 7
    hidden = set(_arguments(get_class(node._target_))) - set(node) - {"tokenizer", "common", "self"}
    assert not hidden


def _arguments(of: type) -> Iterator[str]:
    for base in of.__mro__:
        if base.__module__.startswith("lightning_offload"):
            yield from inspect.signature(base.__init__).parameters


@pytest.mark.parametrize("scheduler", GROUPS["scheduler"])
@pytest.mark.parametrize("optimizer", GROUPS["optimizer"])
def test_optimizers_and_schedulers_step(optimizer: str, scheduler: str) -> None:
    cfg = composed(f"optimizer={optimizer}", f"scheduler={scheduler}", "lr=0.5", "trainer.max_steps=4")
    made = instantiate(cfg.optimizer, _convert_="all")([torch.nn.Parameter(torch.zeros(2))])
    factory = instantiate(cfg.scheduler, _convert_="all")
    open_steps = {"total_steps": 4} if "total_steps" in inspect.signature(factory).parameters else {}
    schedule = factory(made, **open_steps)
    assert isinstance(schedule, LRScheduler)
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        made.step()
        schedule.step()
    assert rates[0] == 0.5
    assert rates[-1] == 0.5 if scheduler == "constant" else 0 < rates[-1] < 0.25
    assert schedule.get_last_lr()[0] == pytest.approx(0.5 if scheduler == "constant" else 0.0, abs=1e-9)


def trainer_from(cfg: DictConfig) -> L.Trainer:
    groups = {key: [instantiate(node) for node in (cfg[key] or {}).values()] for key in ("callbacks", "logger")}
    return instantiate(cfg.trainer, **groups, _convert_="all")


NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml"}
"""The package that a logger needs."""


def test_several_loggers_at_once_and_the_csv_file_beside_them() -> None:
    pytest.importorskip("tensorboard", reason="logger=tensorboard needs tensorboard")
    assert list(composed("logger=tensorboard").logger) == ["csv", "tensorboard"]
    assert list(composed("logger=[wandb,tensorboard]").logger) == ["csv", "wandb", "tensorboard"]
    assert [type(logger).__name__ for logger in trainer_from(composed("logger=[csv,tensorboard]")).loggers] == [
        "CSVLogger",
        "TensorBoardLogger",
    ]


@pytest.mark.parametrize("group", ["debug", "callbacks", "logger", "trainer", "method", "precision"])
def test_trainers_are_built(group: str) -> None:
    for option in GROUPS[group]:
        if group == "logger" and find_spec(NEEDS.get(option, "torch")) is None:
            with pytest.raises(InstantiationException, match=f"pip install.*{option}"):
                trainer_from(composed(f"logger={option}"))
            continue
        of_method = ["method=zo2"] if option == "16-true" else []
        trainer = trainer_from(composed(f"{group}={option}", *of_method))
        assert trainer.precision_plugin.precision == (option if group == "precision" else "32-true")
        assert trainer.num_devices == 1


@pytest.mark.parametrize("precision", GROUPS["precision"])
def test_plain_lightning_gets_the_same_precision(precision: str) -> None:
    trainer = trainer_from(composed("method=none", f"precision={precision}", "hardware=cpu"))
    assert trainer.precision == precision
    assert not isinstance(trainer.precision_plugin, lightning_offload.OffloadPrecision)


def test_a_dtype_given_by_key_reaches_the_precision() -> None:
    trainer = trainer_from(composed("precision=bf16-true", "precision.wire=bfloat16"))
    assert isinstance(trainer.precision_plugin, lightning_offload.OffloadPrecision)
    assert trainer.precision_plugin.precision == "bf16-true"


def test_a_precision_on_the_command_line_wins_over_the_hardware() -> None:
    assert composed("hardware=cpu", "precision=bf16-true").precision.precision == "bf16-true"


DEPARTS = {
    "lsp_paper": {"preset": "paper", "share": "type", "fit_lr": 0.05},
    "zo2": {"log_file": "runs/a-1/zo2.log"},
    "streamed": {"log_file": "runs/a-1/zo2.log"},
}
"""Where a file of a method is not at the strategy's defaults."""


@pytest.mark.parametrize("option", [name for name in GROUPS["method"] if name != "none"])
def test_method_settings_are_those_of_the_strategy(option: str) -> None:
    node = composed(f"method={option}").trainer.strategy
    of_lightning = {"accelerator", "checkpoint_io", "precision_plugin"}
    given = {name: value for name, value in node.items() if name not in {"_target_", *of_lightning}}
    parameters = inspect.signature(get_class(node._target_)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in of_lightning}
    assert given == defaults | DEPARTS.get(option, {})


@pytest.mark.parametrize(("model", "lr"), [("tiny", 6e-4), ("pretrained", 1e-6), ("opt_175b", 1e-6)])
def test_zo2_brings_what_it_needs_and_what_is_given_wins(model: str, lr: float) -> None:
    given = [f"model={model}", *mandatory("model", model), "method=zo2"]
    cfg = composed(*given)
    assert (cfg.lr, cfg.optimizer.lr, cfg.optimizer.momentum) == (lr, lr, 0.0)
    assert cfg.optimizer._target_ == "torch.optim.SGD"
    assert cfg.trainer.gradient_clip_val is None
    assert [HydraConfig.get().runtime.choices[group] for group in ("data", "scheduler")] == ["facts", "linear"]
    other = composed(*given, "data=python_docs", "scheduler=constant", "lr=0.5", "trainer.max_steps=3")
    assert (other.optimizer.lr, other.trainer.max_steps) == (0.5, 3)
    assert [HydraConfig.get().runtime.choices[group] for group in ("data", "scheduler")] == ["python_docs", "constant"]


def test_zo2_sst2_is_the_protocol_of_mezo() -> None:
    cfg = composed("experiment=zo2_sst2", *mandatory("experiment", "zo2_sst2"))
    data, strategy = cfg.data, cfg.trainer.strategy
    assert (data.train_examples, data.val_examples, data.test_examples, data.batch_size) == (1000, 500, 1000, 16)
    assert (strategy.eps, strategy.directions, strategy.train_mode) == (1e-3, 1, False)
    assert (cfg.lr, cfg.optimizer.weight_decay, cfg.trainer.max_steps) == (1e-6, 0.0, 20_000)
    assert HydraConfig.get().runtime.choices.scheduler == "constant"
    assert cfg.trainer.accumulate_grad_batches == 1


def test_lsp_is_the_default_and_its_paper_rounds_to_nearest() -> None:
    assert composed().method.name == composed(command="plan").method.name == "lsp"
    for option, rounding in (("lsp", "stochastic"), ("lsp_paper", "nearest")):
        strategy = trainer_from(composed(f"method={option}", "precision=bf16-true")).strategy
        assert strategy.precision_plugin.dtypes(strategy._method()).rounding == rounding


def test_what_a_preset_decides_is_said_in_the_comments() -> None:
    lines = (CONF / "method" / "lsp.yaml").read_text().splitlines()
    for name, value in PRESETS[None].items():
        line = next(line for line in lines if line.strip().startswith(f"{name}: null"))
        assert line.partition("# ")[2].startswith(str(value)), name
