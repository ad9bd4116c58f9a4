"""One rank of a training over gloo: `python -m tests.rank_worker FOLDER CASE ...`, started as torchrun starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_offload import (
    FullOffloadDDPStrategy,
    LSPOffloadDDPStrategy,
    MEFTOffloadDDPStrategy,
    ZO2OffloadDDPStrategy,
)
from tests.helpers import VOCAB
from tests.lit import LSP, Lit, Manual, trainer
from tests.meft_lit import MEFT, MLit, MManual
from tests.zo2 import ZO2, ZLit, ZManual

SAMPLES, EPOCHS = 24, 2
STEPS = 12  # of two ranks
FIXED = {**LSP, "projector": "block", "refit_every": None, "moments": "transfer"}
STRATEGIES: dict[str, Callable[..., Any]] = {
    "full": lambda **more: FullOffloadDDPStrategy(**{"min_numel": 0, **more}),
    "lsp": lambda **more: LSPOffloadDDPStrategy(**{**LSP, "seed": None, **more}),
    "lsp fixed": lambda **more: LSPOffloadDDPStrategy(**{**FIXED, **more}),
    "zo2": lambda **more: ZO2OffloadDDPStrategy(**{**ZO2, **more}),
    "meft": lambda **more: MEFTOffloadDDPStrategy(**{**MEFT, **more}),
}
MODULES: dict[str, tuple[type[Lit], type[Lit]]] = {
    "full": (Lit, Manual),
    "lsp": (Lit, Manual),
    "lsp fixed": (Lit, Manual),
    "zo2": (ZLit, ZManual),
    "meft": (MLit, MManual),
}


class Hooked:
    """Looks at gradients as they will be stepped with."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen_norm = sum(float(p.grad.norm()) for p in self.parameters() if p.grad is not None)  # type: ignore[attr-defined]


class Synced:
    """Logs what all ranks have found."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.net.loss(batch), sync_dist=True, batch_size=2)  # type: ignore[attr-defined]


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (SAMPLES, 6), generator=torch.Generator().manual_seed(5))


def in_turn(world: int) -> list[list[int]]:
    """Batches of two samples as the ranks have them, one rank after the other."""
    own = [list(range(rank, SAMPLES, world)) for rank in range(world)]
    return [mine[at : at + 2] for at in range(0, SAMPLES // world, 2) for mine in own]


def loader(first: int = 0, world: int = 1, *, of: int = 1) -> DataLoader[Tensor]:
    """Batches of ``of`` ranks, from the ``first`` in steps of ``world``; Lightning itself would shuffle."""
    return DataLoader([tokens()[batch] for batch in in_turn(of)][first::world], batch_size=None)  # type: ignore[arg-type]


def module_of(method: str, *, manual: bool = False, hooked: bool = False, window: int = 1, **net: Any) -> Lit:
    kind = MODULES[method][manual]
    if hooked:
        kind = type("Hooked" + kind.__name__, (Hooked, kind), {})
    module = kind(schedule="step", **net)
    if manual:
        module.offload = {"accumulate_grad_batches": window, "gradient_clip_val": 0.5}
    return module


def train(method: str, how: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fit, and what came of it on this rank."""
    how = dict(how)
    settings, net, window = how.pop("settings", {}), how.pop("net", {}), how.pop("window", 1)
    manual, hooked = how.pop("manual", False), how.pop("hooked", False)
    resume, save = how.pop("resume", None), how.pop("save", None)
    torch.manual_seed(3 + int(os.environ["RANK"]))  # ranks draw other weights; those of rank 0 count
    module = module_of(method, manual=manual, hooked=hooked, window=window, **net)
    strategy = STRATEGIES[method](**settings)
    options = {"max_epochs": EPOCHS, "use_distributed_sampler": False, **how}
    if not manual:
        options |= {"accumulate_grad_batches": window, "gradient_clip_val": how.get("gradient_clip_val", 0.5)}
    run = trainer(strategy, devices=int(os.environ["WORLD_SIZE"]), **options)
    share = settings.get("direction_ranks", 1)
    world, rank = run.world_size // share, run.global_rank // share
    data = loader(rank, world, of=world)
    run.fit(module, data, ckpt_path=None if resume is None else folder / resume)
    if save is not None:
        run.save_checkpoint(folder / save)
    weights = {name: value.clone() for name, value in run.strategy.lightning_module_state_dict().items()}
    state = run.strategy.optimizer_state(run.strategy.optimizers[0])["state"]
    return {
        "weights": weights,
        "losses": module.losses,
        "steps": run.global_step,
        "state": state,
        "sent": dict(strategy.engine.peers.sent_bytes),
        "norm": getattr(module, "seen_norm", None),
        "log": getattr(strategy, "log", None),
    }


class Fails:
    """In the middle of a fit."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.global_step == 2:  # type: ignore[attr-defined]
            raise RuntimeError("by intent")
        return super().training_step(batch, batch_idx)  # type: ignore[misc]


def raised(method: str, how: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An exception on every rank, then another fit from the start in the same processes."""
    options = {"max_epochs": EPOCHS, "use_distributed_sampler": False, "gradient_clip_val": 0.5}

    def fit(module: Any) -> Any:
        run = trainer(STRATEGIES[method](), devices=int(os.environ["WORLD_SIZE"]), **options)
        run.fit(module, loader(run.global_rank, run.world_size, of=run.world_size))
        return run

    failing = type("Failing", (Fails, type(module_of(method))), {})
    with pytest.raises(RuntimeError, match="by intent"):
        fit(failing(schedule="step"))
    run = fit(module_of(method))
    return {"weights": dict(run.strategy.lightning_module_state_dict()), "steps": run.global_step}


def evaluate(method: str, how: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Validation before, between and after."""
    kind = type(module_of(method))
    module = type("Synced", (Synced, kind), {})(schedule="step")
    options = {"max_steps": 2, "max_epochs": -1, "use_distributed_sampler": False}
    run = trainer(STRATEGIES[method](), devices=int(os.environ["WORLD_SIZE"]), **options)
    data = loader(run.global_rank, run.world_size, of=run.world_size)
    run.limit_val_batches = 2
    first = run.validate(module, data, verbose=False)[0]["val/loss"]
    run.fit(module, data, data)
    last = run.validate(module, data, verbose=False)[0]["val/loss"]
    return {"first": first, "last": last, "weights": run.strategy.lightning_module_state_dict()}


CASES: dict[str, tuple[Callable[..., dict[str, Any]], str, dict[str, Any]]] = {
    **{method: (train, method, {}) for method in STRATEGIES},
    **{f"{method}, bf16": (train, method, {"precision": "bf16-true"}) for method in STRATEGIES},
    **{f"{method}, window": (train, method, {"window": 2}) for method in ("full", "zo2", "meft")},
    **{f"{method}, manual": (train, method, {"manual": True}) for method in ("full", "zo2", "meft")},
    **{f"{method}, evaluated": (evaluate, method, {}) for method in ("full", "zo2", "meft")},
    **{f"{method}, raised": (raised, method, {}) for method in ("full", "lsp fixed", "zo2", "meft")},
    "full, hooked": (train, "full", {"hooked": True}),
    "full, hooked, manual": (train, "full", {"hooked": True, "manual": True}),
    "meft, hooked": (train, "meft", {"hooked": True}),
    "full, by value": (train, "full", {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    "full, some small": (train, "full", {"settings": {"min_numel": 200}}),
    "zo2, directions": (train, "zo2", {"settings": {"directions": 2, "direction_ranks": 2}}),
    **{
        f"{method}, saved": (train, method, {"max_epochs": 1, "save": f"{method}.ckpt", "precision": "bf16-true"})
        for method in ("full", "lsp", "zo2", "meft")
    },
    **{
        f"{method}, resumed": (train, method, {"resume": f"{method}.ckpt", "precision": "bf16-true"})
        for method in ("full", "lsp", "zo2", "meft")
    },
}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    found = {name: CASES[name][0](*CASES[name][1:], Path(folder)) for name in names}
    torch.save(found, Path(folder, f"rank{os.environ['RANK']}.pt"))


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """As torchrun sets it."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(world: int, command: Sequence[str]) -> list[subprocess.Popen[str]]:
    """A process for each rank."""
    port = free_port()
    return [
        subprocess.Popen(
            list(command),
            env=environment(rank, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def launch(world: int, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every case on every rank; what each found, by rank."""
    processes = start(world, [sys.executable, "-m", "tests.rank_worker", str(folder), *names])
    said = [process.communicate(timeout=500)[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


if __name__ == "__main__":
    main()
