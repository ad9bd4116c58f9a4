"""`<method>_offload_ddp` on real processes over gloo: against one process that runs their micro-batches in turn."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_offload
from lightning_offload import FullOffloadDDPStrategy, MEFTOffloadDDPStrategy
from tests.lit import Lit, lsp, offload, trainer
from tests.meft_lit import MEFT, meft
from tests.rank_worker import CASES, EPOCHS, FIXED, STEPS, in_turn, launch, loader, module_of, start, tokens
from tests.zo2 import zo2

ONE = {"full": offload, "lsp": lsp, "lsp fixed": lambda **more: lsp(**{**FIXED, **more}), "zo2": zo2, "meft": meft}
NARROW: dict[str, Any] = {"precision": "bf16-true"}
SAVED = ("full", "lsp", "zo2", "meft")
OF_FOUR = ["full", "lsp", "zo2", "meft", "full, bf16", "zo2, directions", *(f"{method}, resumed" for method in SAVED)]
TRAINED = [name for name, (run, *_) in CASES.items() if run.__name__ == "train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """Every case on two ranks, in one launch."""
    return launch(2, folder, list(CASES))


@pytest.fixture(scope="module")
def four(folder: Path, two: Any) -> list[dict[str, Any]]:
    """Some on four, which go on from what two have saved."""
    return launch(4, folder, OF_FOUR)


@functools.cache
def alone(name: str, world: int) -> tuple[Lit, L.Trainer]:
    """The same case in one process."""
    _, method, how = CASES[name]
    how = dict(how)
    settings, net, window = dict(how.pop("settings", {})), how.pop("net", {}), how.pop("window", 1)
    share = settings.pop("direction_ranks", 1)
    for key in ("manual", "hooked", "save", "resume"):
        how.pop(key, None)
    module = module_of(method, **net)
    several = {
        "accumulate_grad_batches": window * world // share,
        "gradient_clip_val": how.pop("gradient_clip_val", 0.5),
    }
    run = trainer(ONE[method](**settings), **{"max_epochs": EPOCHS, **how, **several})
    run.fit(module, loader(of=world // share))
    return module, run


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    names = [name for name, value in expected.items() if value.is_floating_point()]
    apart = torch.stack([(found[name].float() - expected[name].float()).norm() for name in names]).norm()
    assert apart <= relative * torch.stack([expected[name].float().norm() for name in names]).norm()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_identical(two: list[dict[str, Any]], name: str) -> None:
    for weights in (of_rank[name]["weights"] for of_rank in two):
        assert all(torch.equal(value, two[0][name]["weights"][key]) for key, value in weights.items())


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_ranks_are_identical(four: list[dict[str, Any]], name: str) -> None:
    for weights in (of_rank[name]["weights"] for of_rank in four):
        assert all(torch.equal(value, four[0][name]["weights"][key]) for key, value in weights.items())


EXACT = [
    name
    for name in TRAINED
    if "lsp" not in name and ", saved" not in name and ", resumed" not in name and "window" not in name
]


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_have_the_bits_of_one_process(two: list[dict[str, Any]], name: str) -> None:
    module, run = alone(name, 2)
    found = two[0][name]
    assert found["steps"] == run.global_step
    for key, value in run.strategy.lightning_module_state_dict().items():
        if key != "seen":  # batches of its own
            assert torch.equal(found["weights"][key], value), key
    if CASES[name][1] != "zo2":
        expected = run.strategy.optimizer_state(run.strategy.optimizers[0])["state"]
        assert found["state"].keys() == expected.keys()
        for position, state in expected.items():
            assert all(torch.equal(found["state"][position][key], value) for key, value in state.items())
        shared = [loss for pair in zip(*(of_rank[name]["losses"] for of_rank in two), strict=True) for loss in pair]
        assert shared == module.losses


@pytest.mark.parametrize("name", ["full, window", "meft, window", "zo2, window", "lsp fixed"])
def test_sums_in_another_order(two: list[dict[str, Any]], name: str) -> None:
    """Windows are summed rank by rank, subspaces before they meet: round-off."""
    _, run = alone(name, 2)
    assert_near(two[0][name]["weights"], run.strategy.lightning_module_state_dict(), 1e-6)


@pytest.mark.parametrize("name", ["full", "zo2", "meft", "zo2, directions"])
def test_four_ranks_equal_one_process(four: list[dict[str, Any]], name: str) -> None:
    """Gloo sums in an order of its own, but for losses, which are summed exactly."""
    _, run = alone(name, 4)
    assert_near(four[0][name]["weights"], run.strategy.lightning_module_state_dict(), 0.0 if "zo2" in name else 1e-6)


@pytest.mark.parametrize("method", SAVED)
def test_a_run_that_was_resumed_is_one_that_never_stopped(two: list[dict[str, Any]], method: str) -> None:
    """To the bit with as many ranks."""
    for key, value in two[0][f"{method}, bf16"]["weights"].items():
        if key != "seen":
            assert torch.equal(two[0][f"{method}, resumed"]["weights"][key], value), key
    assert two[0][f"{method}, resumed"]["steps"] == two[0][f"{method}, bf16"]["steps"] == STEPS


@pytest.mark.parametrize("method", SAVED)
def test_others_go_on_from_what_two_ranks_have_saved(folder: Path, four: list[dict[str, Any]], method: str) -> None:
    """Four ranks, one process, and a plain Trainer without this package's strategy."""
    saved = torch.load(folder / f"{method}.ckpt", weights_only=True)
    start = {key: value.float() for key, value in saved["state_dict"].items() if key != "seen"}
    assert four[0][f"{method}, resumed"]["steps"] == STEPS // 2 + STEPS // 4
    moved = four[0][f"{method}, resumed"]["weights"]
    assert any(not torch.equal(moved[key].float(), value) for key, value in start.items())
    if method != "lsp":  # what it sums before it meets is rounded to 16 bits
        turns = trainer(ONE[method](), max_epochs=EPOCHS, accumulate_grad_batches=4, gradient_clip_val=0.5, **NARROW)
        turns.fit(module_of(method), loader(of=4), ckpt_path=folder / f"{method}.ckpt")
        assert_near(moved, turns.strategy.lightning_module_state_dict(), 3e-3)  # sums of 16-bit gradients
    module = module_of(method)
    run = trainer(ONE[method](), max_epochs=-1, max_steps=8, gradient_clip_val=0.5, precision="bf16-true")
    run.fit(module, DataLoader(tokens(), batch_size=2), ckpt_path=folder / f"{method}.ckpt")
    assert run.global_step == 8
    if method != "meft":
        plain = module_of(method)
        again = trainer(max_epochs=-1, max_steps=8, precision="bf16-true")
        again.fit(plain, DataLoader(tokens(), batch_size=2), ckpt_path=folder / f"{method}.ckpt")
        assert again.global_step == 8


def test_what_is_exchanged_in_a_step(two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    """zo2 a few numbers; lsp subspaces, small parameters, and gradients to fit to; meft rows that were touched."""
    assert sum(value for key, value in two[0]["zo2"]["sent"].items() if key != "module") / STEPS < 100
    directions = four[0]["zo2, directions"]
    assert sum(value for key, value in directions["sent"].items() if key != "module") / directions["steps"] < 100
    net = module_of("lsp").net
    matrices = [part.weight for block in net.blocks for part in (block.up, block.down)]
    small = 4 * (sum(p.numel() for p in net.parameters()) - sum(w.numel() for w in matrices))
    sent = two[0]["lsp fixed"]["sent"]
    assert sent["compressed gradients"] == STEPS * len(matrices) * 4 * 9**2
    assert sent["gradients"] == STEPS * small
    assert sum(of_rank["lsp fixed"]["sent"]["deltas"] for of_rank in two) == STEPS * len(matrices) * 4 * 9**2
    rows = module_of("meft")
    touched = two[0]["meft"]["sent"]
    width = rows.net.embed.weight.shape[1]
    tables = 2 * len(rows.net.blocks)
    shapes = 16 * tables * STEPS  # how many there are, and how wide
    places = touched["places of rows"] - shapes
    assert touched["gradients of rows"] - shapes == places // 8 * 4 * width
    assert places // 8 < STEPS * tables * MEFT["width"]


@pytest.mark.parametrize("method", ["full", "meft"])
def test_two_ranks_equal_one_process_with_twice_the_batch(two: list[dict[str, Any]], method: str) -> None:
    """Means of equal parts: round-off."""
    module = module_of(method)
    run = trainer(ONE[method](), max_epochs=EPOCHS, gradient_clip_val=0.5)
    pairs = [tokens()[[*one, *other]] for one, other in zip(*[iter(in_turn(2))] * 2, strict=True)]
    run.fit(module, DataLoader(pairs, batch_size=None))  # type: ignore[arg-type]
    assert run.global_step == two[0][method]["steps"]
    assert_near(two[0][method]["weights"], run.strategy.lightning_module_state_dict(), 1e-5)


@pytest.mark.parametrize("method", ["full", "lsp fixed", "zo2", "meft"])
def test_a_new_fit_after_an_exception_is_as_if_there_had_been_none(two: list[dict[str, Any]], method: str) -> None:
    for key, value in two[0][method]["weights"].items():
        assert torch.equal(two[0][f"{method}, raised"]["weights"][key], value), key


def test_hooks_see_the_mean_of_all_ranks(two: list[dict[str, Any]]) -> None:
    assert two[0]["full, hooked"]["norm"] == two[1]["full, hooked"]["norm"] > 0
    assert two[0]["meft, hooked"]["norm"] == two[1]["meft, hooked"]["norm"] > 0


def test_validation_is_that_of_all_ranks(two: list[dict[str, Any]]) -> None:
    for method in ("full", "zo2", "meft"):
        module = module_of(method)
        run = trainer(ONE[method](), limit_val_batches=4)
        whole = run.validate(module, loader(of=2), verbose=False)[0]["val/loss"]
        assert two[0][f"{method}, evaluated"]["first"] == pytest.approx(whole, rel=1e-6)
        assert two[0][f"{method}, evaluated"]["first"] == two[1][f"{method}, evaluated"]["first"]
        assert two[0][f"{method}, evaluated"]["last"] < whole


# Starting.

SCRIPT = """
import sys, torch, lightning as L
from torch.utils.data import DataLoader
import lightning_offload
from tests.lit import Lit
from tests.rank_worker import tokens

if __name__ == "__main__":
    module = Lit()
    trainer = L.Trainer(strategy={strategy!r}, accelerator="cpu", devices=2, max_steps=3, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(tokens(), batch_size=2))
    if trainer.is_global_zero:
        moved = float((module.net.head.weight - Lit().net.head.weight).abs().max())
        print("done", trainer.world_size, moved > 0)
"""


@pytest.mark.parametrize("strategy", ["full_offload_ddp", "full_offload_ddp_spawn"])
def test_a_script_starts_its_own_processes(tmp_path: Path, strategy: str) -> None:
    """By name, with Lightning's launchers; every parameter is small here and steps on the devices."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(strategy=strategy))
    alone = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=alone)
    assert "done 2 True" in done.stdout, done.stderr[-3000:]


DIES = """
import os, sys, time, torch, lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from lightning_offload import FullOffloadDDPStrategy
from tests.lit import Lit
from tests.rank_worker import tokens

class Dies(Lit):
    def training_step(self, batch, batch_idx):
        if os.environ["RANK"] == "1" and self.global_step == 3:
            if sys.argv[2] == "dies":
                os._exit(7)
            time.sleep(60)
        return super().training_step(batch, batch_idx)

saves = ModelCheckpoint(dirpath=sys.argv[1], filename="last", every_n_train_steps=1, save_top_k=1)
trainer = L.Trainer(strategy=FullOffloadDDPStrategy(min_numel=0, timeout_s=5), accelerator="cpu", devices=2,
                    max_steps=6, logger=False, callbacks=[saves], enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Dies(), DataLoader(tokens(), batch_size=2))
"""


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_when_a_rank_is_gone_the_others_say_so_and_the_last_checkpoint_resumes(tmp_path: Path, how: str) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    processes = start(2, [sys.executable, str(script), str(tmp_path), how])
    said = [process.communicate(timeout=300)[0] for process in processes[:1]]
    if how == "hangs":
        assert processes[1].poll() is None
        processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode not in (0, -signal.SIGKILL)
    assert "PeersLostError: Rank 0 of 2 lost the others while it exchanged" in said[0], said[0][-3000:]
    assert "`ckpt_path=` of the last checkpoint" in said[0]
    module = Lit()
    run = trainer(offload(), max_epochs=-1, max_steps=6)
    run.fit(module, DataLoader(tokens(), batch_size=2), ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 6


# What is refused.


def test_ranks_that_share_directions_see_one_batch() -> None:
    strategy = lightning_offload.ZO2OffloadDDPStrategy(directions=2, direction_ranks=2)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 0}


def test_names_are_registered() -> None:
    known = L.pytorch.strategies.StrategyRegistry.available_strategies()
    for method in ("full", "lsp", "zo2", "meft"):
        assert {f"{method}_offload", f"{method}_offload_ddp", f"{method}_offload_ddp_spawn"} <= set(known)
        kind = getattr(lightning_offload, f"{'Full' if method == 'full' else method.upper()}OffloadDDPStrategy")
        assert kind().strategy_name == f"{method}_offload_ddp"


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FullOffloadDDPStrategy(accumulate="host"), r"accumulate='host'.*Pass `accumulate='device'`"),
        (MEFTOffloadDDPStrategy(row_optimizer="deferred"), r"row_optimizer='deferred'.*Pass `row_optimizer='dense'`"),
    ],
    ids=["accumulate", "row_optimizer"],
)
def test_settings_for_one_device_alone(strategy: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        strategy._settle_settings(module_of("full"))


def test_manual_optimization_by_hand_is_refused() -> None:
    class ByHand(Lit):
        automatic_optimization = False

    with pytest.raises(MisconfigurationException, match=r"`ByHand` steps by itself.*Derive it from `OffloadMixin`"):
        FullOffloadDDPStrategy()._check_module(ByHand())


@pytest.mark.parametrize(
    "callback", [OnExceptionCheckpoint("."), ModelCheckpoint(save_on_exception=True)], ids=["always", "asked"]
)
def test_checkpoints_on_exceptions_are_refused(callback: L.Callback) -> None:
    run = L.Trainer(callbacks=[callback], logger=False)
    with pytest.raises(NotImplementedError, match=r"saves when an exception is raised.*every_n_train_steps"):
        FullOffloadDDPStrategy()._check_callbacks(run)


def test_single_device_names_point_to_these() -> None:
    strategy = offload()
    with pytest.raises(MisconfigurationException, match=r"strategy='full_offload_ddp'"):
        strategy.num_nodes = 2
