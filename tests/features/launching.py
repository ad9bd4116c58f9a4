"""How a strategy is named and made, and what of it can be sent to another process."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from contextlib import redirect_stdout
from typing import Any

import lightning as L
import pytest
import yaml
from hydra.utils import instantiate
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

import lightning_offload
from lightning_offload import OffloadPrecision
from tests.features.arm import Arm, WholeLit, WholeMLit, WholeZLit
from tests.features.registry import feature
from tests.meft_lit import trained_alone


@feature('by name: `Trainer(strategy="...")`, presets of your own, registered again by `importlib.reload`')
def by_name(strategy: Arm) -> None:
    lightning_offload.register()
    importlib.reload(lightning_offload)
    assert strategy.name in StrategyRegistry.available_strategies()
    assert type(strategy.trainer(strategy.name).strategy) is strategy.kind
    preset = f"{strategy.name}_small"
    StrategyRegistry.register(preset, strategy.kind, override=True, **strategy.settings)
    try:
        module = strategy.lit()
        strategy.fit(module, preset)
    finally:
        StrategyRegistry.remove(preset)
    assert strategy.same(module, strategy.trained())


class OfFull(WholeLit):
    """As LightningCLI makes it: without arguments."""

    def __init__(self) -> None:
        super().__init__()


class OfZO2(WholeZLit):
    def __init__(self) -> None:
        super().__init__()


class OfMEFT(WholeMLit):
    def __init__(self) -> None:
        super().__init__(make_optimizer=trained_alone)


MODULES: dict[str, type[L.LightningModule]] = {"zo2_offload": OfZO2, "meft_offload": OfMEFT}


def cli(strategy: Arm, *arguments: str) -> LightningCLI:
    quiet = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "limit_val_batches": 0}
    quiet |= {"default_root_dir": str(strategy.folder), "enable_checkpointing": False}
    kind = MODULES.get(strategy.name, OfFull)
    return LightningCLI(kind, trainer_defaults=quiet, seed_everything_default=3, args=list(arguments))


@feature("LightningCLI: by name, by `class_path`, `--print_config`, a saved config run again")
def lightning_cli(strategy: Arm) -> None:
    path = f"lightning_offload.{strategy.kind.__name__}"
    settings = [f"--trainer.strategy.init_args.{name}={value}" for name, value in strategy.settings.items()]
    made = cli(strategy, "fit", f"--trainer.strategy={path}", *settings)
    assert type(made.trainer.strategy) is strategy.kind
    assert made.trainer.strategy.settings == strategy().settings
    saved = next(strategy.folder.rglob("config.yaml"))
    assert yaml.safe_load(saved.read_text())["trainer"]["strategy"]["class_path"] == path
    again = cli(strategy, "fit", "--config", str(saved), "--trainer.logger=false")
    assert again.trainer.strategy.settings == made.trainer.strategy.settings
    assert strategy.same(again.model, made.model)
    assert made.trainer.global_step == again.trainer.global_step == 9
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
        cli(strategy, "fit", f"--trainer.strategy={strategy.name}", "--print_config")
    named = yaml.safe_load(printed.getvalue())["trainer"]["strategy"]
    assert named == strategy.name
    assert type(strategy.trainer(named).strategy) is strategy.kind


@feature("Hydra: `_target_`")
def hydra(strategy: Arm) -> None:
    run = instantiate(
        {
            "_target_": "lightning.Trainer",
            "strategy": {"_target_": f"lightning_offload.{strategy.kind.__name__}", **strategy.settings},
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
        }
    )
    assert run.strategy.settings == strategy().settings
    run.fit(strategy.lit())
    assert run.global_step == 5


class Pickles(L.Callback):
    """In the middle of a fit."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.found = pickle.loads(pickle.dumps(trainer.strategy))


@feature("pickled and copied, for launchers that spawn: before, during and after a fit")
def pickled(strategy: Arm) -> None:
    made, seen, module = strategy(precision_plugin=OffloadPrecision()), Pickles(), MODULES.get(strategy.name, OfFull)()
    before, copied = pickle.loads(pickle.dumps(made)), copy.deepcopy(made)
    run = strategy.fit(module, made, callbacks=[seen])
    after = pickle.loads(pickle.dumps(run.strategy))
    assert run.global_step == 18
    assert type(run.strategy.engine).__name__.endswith("Engine")
    for other in (before, copied, seen.found, after):
        assert other.settings == made.settings
        assert other.engine is None
        again = MODULES.get(strategy.name, OfFull)()
        flags = {} if other in (before, copied) else {"accelerator": "auto"}
        strategy.fit(again, other, **flags)
        assert strategy.same(again, module)
    assert pickle.loads(pickle.dumps(run)).strategy.settings == made.settings
