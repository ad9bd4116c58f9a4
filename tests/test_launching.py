"""Other processes: without the import, and terminated from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.features.arm import Arm, ByIndex
from tests.features.interrupting import AT

WITHOUT_IMPORT = """
import logging, os, sys, warnings
import torch
warnings.simplefilter("ignore")
from hydra.utils import instantiate
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

class Trained(BoringModel):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

quiet = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False,
         "enable_progress_bar": False, "enable_model_summary": False}

def by_command_line():
    strategy = "--trainer.strategy=lightning_offload.FullOffloadStrategy"
    args = ["fit", strategy, "--trainer.strategy.init_args.min_numel=0"]
    return LightningCLI(Trained, trainer_defaults=quiet, args=args).trainer

def by_target():
    strategy = {"_target_": "lightning_offload.FullOffloadStrategy", "min_numel": 0}
    trainer = instantiate({"_target_": "lightning.pytorch.Trainer", **quiet, "strategy": strategy})
    trainer.fit(Trained())
    return trainer

for way in (by_command_line, by_target):
    child = os.fork()
    if not child:
        assert "lightning_offload" not in sys.modules
        trainer = way()
        assert trainer.global_step == 2 and trainer.strategy.engine is not None
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, way
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: each way must begin without the import")
def test_class_path_and_target_need_no_import(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_IMPORT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


TERMINATED = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from tests.features.arm import Arm, ByIndex

class Waits:
    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == AT - 1:
            print("here", flush=True)
            while not self.trainer._signal_connector.received_sigterm:
                time.sleep(0.01)

AT, arm = int(sys.argv[3]), Arm(sys.argv[1], Path(sys.argv[2]))
saving = OnExceptionCheckpoint(arm.folder, "terminated")
arm.fit(arm.lit(Waits, ByIndex), callbacks=[saving], enable_checkpointing=True)
"""


def test_a_terminated_process_finishes_its_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    """In flight at any time: as a scheduler of jobs would end it."""
    command = [sys.executable, "-c", TERMINATED, "lsp_offload", str(tmp_path), str(AT)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("here" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert "Received SIGTERM" in said
    assert torch.load(tmp_path / "terminated.ckpt", weights_only=True)["global_step"] == AT
    arm = Arm("lsp_offload", tmp_path)
    module = arm.lit(ByIndex)
    arm.fit(module, ckpt_path=tmp_path / "terminated.ckpt")
    assert arm.same(module, arm.trained(ByIndex))
