"""What the `meft` strategy does beside with Lightning's hooks: adapters come before optimizers, rows stay at home."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.call import _call_configure_model
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_offload.attaching import local_ranks, machine_for
from lightning_offload.checkpoint import ADAPTERS, compare_adapters
from lightning_offload.gradient_behaviour import GradientBehaviour
from lightning_offload.memory.blocks import partition
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.meft import MEFT, MEFTSettings, adapters_of, attach, join
from lightning_offload.methods.method import Method
from lightning_offload.methods.row_forwards import RowForwards
from lightning_offload.methods.sparse_adapter import ADAPTER, backbone_names
from lightning_offload.resting import WeightsAtRest
from lightning_offload.resuming import restore_rows
from lightning_offload.windows import copies_module, writes_while_evaluating


class MEFTBehaviour(WeightsAtRest[Engine], GradientBehaviour):
    """See the module docstring.

    Attributes:
        adapter_only: Whether checkpoints leave out what is frozen, and are loaded into a model that has its weights.
    """

    method_type: ClassVar[type[Method]] = MEFT
    settings: MEFTSettings
    adapter_only = False

    @override
    def _claims_anything(self, method: Method) -> bool:
        """No adapters are an error of the method."""
        return True

    # Setting up.

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        module = self.lightning_module
        assert module is not None
        if module.trainer.state.fn == TrainerFn.FITTING and copies_module(module.trainer):
            _call_configure_model(module.trainer)  # called again later, as Lightning may do at any time
            self._settle_settings(module)
            put_adapters_on(self.strategy_name, module, self.settings)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        put_adapters_on(self.strategy_name, module, self.settings)
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            add_missing(self.strategy_name, optimizer, module)

    @override
    def _prepare_forwards(self, trainer: Trainer) -> None:
        module, settings = self.lightning_module, self.settings
        assert module is not None
        if not adapters_of(module):
            return
        method, dtypes = MEFT(settings), self.precision_plugin.dtypes(self._method())
        units, machine = (
            partition(module, settings.blocks),
            machine_for(module, settings, self.root_device, local_ranks(trainer)),
        )
        method.resolve(module, units, machine, dtypes, accumulates=False)
        self._forwards = RowForwards(module, method, self._make_lanes(machine, method.settings), dtypes, units)
        self._written_outside = writes_while_evaluating(trainer, module)

    # State.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state, module = super().lightning_module_state_dict(), self.lightning_module
        left_out = backbone_names(module) if self.adapter_only and module is not None else set()
        return {name: value for name, value in state.items() if name not in left_out}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        assert self.lightning_module is not None
        keep_settings(checkpoint, self.lightning_module)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        if has_adapters(checkpoint) or module.trainer.state.fn == TrainerFn.FITTING:
            self._settle_settings(module)
            put_adapters_on(self.strategy_name, module, self.settings)
            check_settings(checkpoint, module)
            checkpoint = {**checkpoint, "state_dict": complete(checkpoint["state_dict"], module)}
        super().load_model_state_dict(checkpoint, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.engine is not None and not has_adapters(checkpoint):
            warn_of_new_adapters(self.strategy_name)
            return
        if self.engine is not None:
            assert self.lightning_module is not None
            restore_rows(self.engine, self.lightning_module.trainer, checkpoint)
        super().load_optimizer_state_dict(checkpoint)


def has_adapters(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds adapters, of whatever model."""
    return any(ADAPTER in name for name in checkpoint["state_dict"])


def keep_settings(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Have a checkpoint say what adapters are in it."""
    if adapters := adapters_of(module):
        checkpoint[ADAPTERS] = asdict(adapters[0].settings)


def check_settings(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Look whether the module's adapters compute what those of a checkpoint do.

    Raises:
        CheckpointError: They do not.
    """
    compare_adapters(asdict(adapters_of(module)[0].settings), checkpoint, source="the checkpoint")


def complete(state: Mapping[str, Any], module: LightningModule) -> dict[str, Any]:
    """``state``, with the module's own backbone if it holds adapters alone, or the module's adapters if it has none."""
    own, backbone = module.state_dict(), backbone_names(module)
    if backbone.isdisjoint(state):
        return {name: own[name] for name in own if name in backbone} | dict(state)
    if not any(ADAPTER in name for name in state):
        return {name: own[name] for name in own if ADAPTER in name} | dict(state)
    return dict(state)


def warn_of_new_adapters(who: str) -> None:
    """A checkpoint of the backbone alone is continued."""
    rank_zero_warn(
        f"{who}: the checkpoint has no adapters. The backbone, the step count and schedulers are those of the "
        "checkpoint, adapters and their optimizer start anew. To start at step 0, load the weights alone "
        "(`load_from_checkpoint`) and fit without `ckpt_path`."
    )


def put_adapters_on(who: str, module: LightningModule, settings: MEFTSettings) -> None:
    """Make the module's adapters where there are none, and say what is frozen.

    Args:
        who: Named before what is said.
        module: To be trained.
        settings: Of the method.
    """
    before = adapters_of(module)
    attach(module, settings)
    if not before:
        frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
        rank_zero_info(f"{who}: freezes the backbone ({frozen:,} parameters) and trains adapters beside it")


def add_missing(who: str, optimizer: Optimizer, module: LightningModule) -> None:
    """Put parameters of adapters that ``configure_optimizers`` left out into the first group, and say so."""
    if optimizer.param_groups and (missing := join(optimizer, module)):
        rank_zero_info(
            f"{who}: `configure_optimizers` left {len(missing)} parameters of adapters out ({missing[0]}, ...): "
            "they join its first group"
        )
