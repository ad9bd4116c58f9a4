"""`lightning-offload evaluate` and `export`: what a run has made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.utils.data import DataLoader

from lightning_offload import runs
from lightning_offload.cli.adapting import how_to_load, is_adapted, save_adapter
from lightning_offload.cli.building import (
    build,
    build_data,
    build_without_weights,
    dtype,
    fit_to_data,
    put_adapters,
    shown,
    stored_config,
)
from lightning_offload.cli.checks import check_trainer, seed_everything
from lightning_offload.cli.training import held_out
from lightning_offload.cli.users import user_errors
from lightning_offload.errors import OffloadError
from lightning_offload.export import export_to_hf, load_weights, map_weights
from lightning_offload.lora import has_peft
from lightning_offload.merging import merge_meft_adapter
from lightning_offload.methods.sparse_adapter import ADAPTER
from lightning_offload.methods.steplog import Header, load_log
from lightning_offload.progress import progress_bar
from lightning_offload.replaying import replay
from lightning_offload.stock import stock_model
from lightning_offload.text import CausalLM
from lightning_offload.writing import written_file


def evaluate(cfg: DictConfig) -> int:
    """Print loss, perplexity, bits per byte and a sample, and write them to a JSON file."""
    with user_errors():
        checkpoint = runs.find_checkpoint(cfg.ckpt_path) if cfg.ckpt_path else None
        run = runs.folder_of(checkpoint) if checkpoint else None
        if cfg.split not in ("val", "test"):
            raise OffloadError(f"`split` is val or test; got {cfg.split!r}")
        if cfg.max_new_tokens < 1:
            raise OffloadError(f"max_new_tokens={cfg.max_new_tokens}: give a number from 1")
        check_trainer(cfg.trainer)
        _fill_in(cfg, run)
        fit_to_data(cfg)
        seed_everything(cfg.seed)
        model = build(cfg, "model")
        if checkpoint and run:
            put_adapters(stored_config(run), model)
            load_weights(model, checkpoint)
        data = build_data(cfg, model)
        bar = [progress_bar()] if cfg.trainer.enable_progress_bar else []
        trainer = build(cfg, "trainer", logger=False, enable_checkpointing=False, callbacks=bar)
    metrics = held_out(trainer, model, data, split=cfg.split)
    print("\n" + "   ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items()) + "\n")
    sample = _sample(cfg, trainer, model) if hasattr(model, "generate") else {}
    output = Path(cfg.output or (run or Path()) / "evaluation.json")
    result = {
        **metrics,
        "split": cfg.split,
        "checkpoint": checkpoint and str(checkpoint),
        **sample,
    }
    with written_file(output) as file:
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {shown(output)}")
    return 0


def _sample(cfg: DictConfig, trainer: L.Trainer, model: Any) -> dict[str, str]:
    """What a language model makes of the prompt, printed; a classifier says nothing."""
    prompts: Any = [{"prompt": cfg.prompt, "max_new_tokens": cfg.max_new_tokens}]
    (sample,) = trainer.predict(model, DataLoader(prompts, batch_size=None))  # type: ignore[misc]
    print(f"{cfg.prompt}{sample}\n")
    return {"prompt": cfg.prompt, "sample": str(sample)}


def export(cfg: DictConfig) -> int:
    """Write a Hugging Face folder from a run's checkpoint, or from the weights that it began with and its log.

    Of a run by `meft`, or with LoRA, it is the folder of its adapters, unless they are to be merged.
    """
    with user_errors():
        model, source, folder = _replayed(cfg) if cfg.log else _loaded(cfg)
        adapted = is_adapted(model) and not cfg.merge
        output = Path(cfg.output or folder / (runs.ADAPTER if adapted else runs.MODEL))
        _refuse_base(model, output)
        if adapted:
            save_adapter(model, output, dtype=dtype(cfg.dtype))
        else:
            _export_whole(cfg, model, output)
    print(f"written to {shown(output)}; reloaded, it gives the logits of {shown(source)}")
    if adapted:
        print(how_to_load(model, output))
    return 0


def _export_whole(cfg: DictConfig, model: Any, output: Path) -> None:
    lora = cfg.merge and has_peft(model)
    if cfg.merge and not lora:
        merge_meft_adapter(model)
    export_to_hf(model, output, max_shard_gib=cfg.max_shard_gib, dtype=dtype(cfg.dtype), merge_lora=lora)


def _refuse_base(model: Any, output: Path) -> None:
    """An earlier export is replaced, but what a run began with is nobody's to lose."""
    base = getattr(stock_model(model).config, "_name_or_path", None)
    if base and output.is_dir() and Path(base).is_dir() and output.samefile(base):
        raise FileExistsError(f"output={output} is the model that the run began with; choose another folder")


def _loaded(cfg: DictConfig) -> tuple[Any, Path, Path]:
    """The model of a checkpoint, the checkpoint, and the run's folder; weights stay in the checkpoint's file."""
    if cfg.base:
        raise OffloadError(f"`base` is what a log is replayed on; got base={cfg.base} without log=<file>")
    checkpoint = runs.find_checkpoint(cfg.ckpt_path)
    folder = runs.folder_of(checkpoint)
    stored = stored_config(folder)
    L.seed_everything(stored.seed, verbose=False)  # of the adapters, and of weights that a checkpoint may leave out
    model = build_without_weights(stored)
    if not map_weights(model, checkpoint):
        model = _beside_base(stored, checkpoint)
    return model, checkpoint, folder


def _beside_base(stored: Any, checkpoint: Path) -> Any:
    """Of a checkpoint of adapters alone: the other weights are those that the run began with."""
    _load_narrow(stored, "bfloat16" if stored.precision.precision == "bf16-true" else None)
    model = build(stored, "model")
    put_adapters(stored, model)
    load_weights(model, checkpoint)
    if stored.precision.precision == "bf16-true":
        _round(model)
    return model


def _round(model: Any) -> None:
    """All but rows, as it was while they were trained."""
    for name, parameter in model.named_parameters():
        if not name.endswith((f"{ADAPTER}keys", f"{ADAPTER}values")):
            parameter.data = parameter.data.bfloat16()


def _replayed(cfg: DictConfig) -> tuple[Any, Path, Path]:
    """The model of a log, the log, and the folder that it is in; ``base``, or what the run's configuration builds."""
    log = Path(cfg.log)
    entries = load_log(log)  # before the model, which may take minutes
    narrow = _narrow(entries[0])
    if cfg.base:
        _refuse_drawn(entries[0], log)
        return replay(CausalLM(path=cfg.base, dtype=narrow or "float32"), entries), log, log.parent
    folder = runs.folder_of(log)
    stored = stored_config(folder)
    _load_narrow(stored, narrow)
    L.seed_everything(stored.seed, verbose=False)  # where the run began with random weights
    return replay(build(stored, "model"), entries), log, folder


def _narrow(header: Header) -> str | None:
    """The 16-bit dtype in which a run kept its weights, where it is one for all."""
    kinds = {name.removeprefix("torch.") for name in header.stored.values()}
    return next(iter(kinds)) if len(kinds) == 1 and kinds <= {"bfloat16", "float16"} else None


def _load_narrow(stored: Any, narrow: str | None) -> None:
    """Have weights load as training rounded them: files in that dtype are mapped. What is drawn is rounded later."""
    model = stored.model
    drawn = model.get("init") != "pretrained" or (model.get("lora") or {}).get("rank") is not None
    if narrow and not drawn and model.get("dtype") == "float32":
        model.dtype = narrow


def _refuse_drawn(header: Header, log: Path) -> None:
    if any(".lora_" in name for name in header.shapes):
        raise OffloadError(
            f"{log} is of a run with LoRA, whose adapters began with values drawn by the run's seed: leave base= out, "
            "and give the log in its run's folder, whose configuration has both"
        )


def _fill_in(cfg: DictConfig, run: Path | None) -> None:
    """Take the model and the data of the run, where none was chosen; data may say how the model is used."""
    stored = stored_config(run) if run else OmegaConf.create()
    given = HydraConfig.get().runtime.choices
    with open_dict(cfg):
        for key in ("model", "data"):
            of_run = OmegaConf.select(stored, key)
            if given.get(key) is None and of_run is not None:
                cfg[key] = OmegaConf.merge(of_run, cfg[key] or {})
    missing = [key for key in ("model", "data") if cfg[key] is None]
    if missing:
        raise OffloadError(
            f"nothing says which {' and '.join(missing)} to evaluate: give ckpt_path=<run>, or model=<option> "
            "data=<option> (--help lists them)"
        )
