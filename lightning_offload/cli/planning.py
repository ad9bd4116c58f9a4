"""`lightning-offload plan`, and the plan that a run prints first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_offload.cli.building import build, build_data, fit_to_data, settings_of, shown
from lightning_offload.cli.users import user_errors
from lightning_offload.errors import OffloadError
from lightning_offload.memory.budget import Machine, machine_from
from lightning_offload.planning import Plan
from lightning_offload.planning import plan as make_plan
from lightning_offload.planning.report import report
from lightning_offload.text.pretrained import check_positions
from lightning_offload.writing import written_file


def plan(cfg: DictConfig) -> int:
    """Print the plan; 0 whenever there is an answer, fit or not."""
    with user_errors():
        machine = machine_from(_plain(cfg.hardware))
        fit_to_data(cfg)
        optimizer = build(cfg, "optimizer")
        model = _model_without_weights(cfg, optimizer)
        batch = _batch(cfg, model)
        made = make_plan(model, batch, hardware=machine, compare=cfg.compare, union=cfg.union, **_how(cfg))
    print(f"\n{made}")
    if cfg.output:
        folder = Path(cfg.output)
        with written_file(folder / "plan.json") as file:
            file.write_text(made.to_json() + "\n")
        print(f"\nwritten to {shown(folder / 'plan.json')} and {shown(made.plot(folder / 'plan.png'))}")
    return 0


def plan_of_run(cfg: DictConfig, trainer: L.Trainer, model: Any, batch: Any, optimizer: Any) -> Plan | None:
    """What this run will take on this machine, printed; None where its model cannot be planned."""
    try:
        machine = _this_machine(cfg, trainer.strategy.root_device)
        made = make_plan(
            model,
            batch,
            hardware=machine,
            optimizer=optimizer(list(model.parameters())) if optimizer else None,
            **_how(cfg),
        )
    except Exception as error:  # the run can do without
        print(f"no plan: {error if isinstance(error, OffloadError) else f'{type(error).__name__}: {error}'}")
        return None
    print(f"\n{report(made, brief=True)}\n(what takes it: lightning-offload plan, with the same arguments)\n")
    return made


def _how(cfg: DictConfig) -> dict[str, Any]:
    """What the configuration says of the steps."""
    trainer = cfg.trainer
    return {
        "method": cfg.method.name,
        "settings": settings_of(cfg),
        "precision": instantiate(cfg.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm or "norm",
    }


def _this_machine(cfg: DictConfig, device: torch.device) -> Machine:
    """The machine at hand, no larger than the one that is to be imitated."""
    limits = {key: cfg.hardware.get(key) for key in ("device_gib", "host_gib")}
    return machine_from({"name": "auto", **limits}, device)


def _model_without_weights(cfg: DictConfig, optimizer: Any) -> Any:
    """Made on the meta device: nothing is read but a config, nothing allocated."""
    shape = {"init": "random"} if "init" in cfg.model else {}  # else weights would be read
    with torch.device("meta"):
        return build(cfg, "model", optimizer=optimizer, scheduler=None, **shape)


def _batch(cfg: DictConfig, model: Any) -> Any:
    """A micro-batch by shape; of data of one's own, the first."""
    size, length = cfg.data.get("batch_size"), cfg.data.get("sequence_length")
    check_positions(getattr(model, "network", None), length)
    if size and length:
        from lightning_offload.text import batch_by_shape

        words = cfg.data.get("label_words")
        labels, packing = getattr(model, "num_labels", None), cfg.data.get("packing", False)
        return batch_by_shape(
            size, length, 1, choices=len(words) if words else None, num_labels=labels, packing=packing
        )
    data = build_data(cfg, model)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def _plain(node: Any) -> dict[str, Any]:
    made: Any = OmegaConf.to_container(node, resolve=True)
    return dict(made)
