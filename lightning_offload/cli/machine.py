"""`lightning-offload doctor` and `bench`: what this machine is and does."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_offload.cli.building import shown
from lightning_offload.cli.users import user_errors
from lightning_offload.doctor import diagnose


def doctor(cfg: DictConfig) -> int:
    """Print what was found; 1 where training cannot work."""
    with user_errors():
        diagnosis = diagnose(cfg.device)
    print(diagnosis)
    return 0 if diagnosis.ok else 1


def bench(cfg: DictConfig) -> int:
    """Measure, print the tables, and write them as JSON and Markdown."""
    from lightning_offload.bench import BenchSettings, QualitySettings, RecallSettings, ZerothSettings, run_bench

    with user_errors():
        names = {field.name for field in fields(BenchSettings)}
        plain = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(plain, dict)
        kinds = {"quality": QualitySettings, "zeroth": ZerothSettings, "recall": RecallSettings}
        plain |= {name: kind(**plain[name]) for name, kind in kinds.items()}
        settings = BenchSettings(**{str(name): value for name, value in plain.items() if name in names})
    folder = Path(cfg.output or HydraConfig.get().runtime.output_dir)
    run_bench(settings, folder)
    print(f"\nwritten to {shown(folder)}")
    return 0
