"""Disks that are full, and signals: what is said, what stays whole, and how a run goes on."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.fabric.loggers.csv_logs import _ExperimentWriter

from lightning_offload import runs
from lightning_offload.checkpoint import OffloadCheckpointIO
from lightning_offload.methods.steplog import LogFile
from lightning_offload.text import CausalLM
from lightning_offload.writing import written_file

QUICK = ["method=full", "plan=false", "trace=false", "name=mine"]


@contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a real error of the system, from whatever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def error_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("lightning-offload")]
    assert "Traceback" not in text
    return line


def weights() -> dict[str, torch.Tensor]:
    stored = torch.load(runs.newest_checkpoint(Path("runs/mine")), weights_only=True)
    return stored["state_dict"]


def test_a_run_whose_disk_fills_up_goes_on_from_its_last_checkpoint(run, given, monkeypatch, capsys) -> None:
    often = [*given, *QUICK, "trainer.max_steps=6", "callbacks.checkpoint.every_n_train_steps=2", "export=false"]
    assert run("train", *often) == 0
    expected = weights()
    os.rename("runs/mine", "runs/uninterrupted")

    save = OffloadCheckpointIO.save_checkpoint
    saved: list[Path] = []

    def fills_up(self: OffloadCheckpointIO, checkpoint: dict, path: Path, **options: object) -> None:
        with room_for(10**9 if not saved else 20_000):
            saved.append(Path(path))
            save(self, checkpoint, path, **options)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(OffloadCheckpointIO, "save_checkpoint", fills_up)
        assert run("train", *often) == 2
    line = error_line(capsys.readouterr().err)
    assert re.search(r"step000004\.ckpt': File too large \([\d.]+ MB to write, .* free\); raise the limit", line)
    assert "step000002.ckpt is whole: the same command with ckpt_path=last goes on from it" in line
    assert [path.name for path in Path("runs/mine/checkpoints").iterdir()] == ["step000002.ckpt"]
    assert run("train", *often, "ckpt_path=last") == 0
    found = weights()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("nbytes", "settings", "what"),
    [
        (1000, [], "config.yaml"),
        (10_000, ["callbacks=none", "export=false"], "loss.png"),
        (10_000, ["callbacks=none", "logger=none"], "runs/mine/hf"),
        (9_000, ["callbacks=none", "logger=none", "export=false", "trace=true"], "timeline.png|trace.json"),
    ],
)
def test_whatever_finds_no_room_is_named(nbytes: int, settings: list[str], what: str, run, given, capsys) -> None:
    with room_for(nbytes):
        assert run("train", *given, *QUICK, *settings) == 2
    line = error_line(capsys.readouterr().err)
    assert re.search(what, line)
    assert "File too large" in line
    assert not [path for path in Path("runs").rglob("*") if re.search("partial|tmp|png|safetensors", path.name)]


@pytest.mark.parametrize(
    ("owner", "name", "settings"),
    [
        (_ExperimentWriter, "save", ["callbacks=none"]),
        (LogFile, "append", ["method=zo2", "trainer.strategy.min_numel=0", "callbacks=none", "logger=none"]),
    ],
)
def test_logs_that_find_no_room_end_the_run(owner, name: str, settings, run, given, monkeypatch, capsys) -> None:
    rest = [word for word in QUICK if word.split("=")[0] not in "".join(settings)]
    monkeypatch.setattr(owner, name, no_space)
    assert run("train", *given, *rest, *settings) == 2
    line = error_line(capsys.readouterr().err)
    assert "runs/mine': No space left on device; free some space" in line
    assert re.search("no checkpoint to go on from|Training had not begun, and nothing is left", line)


def test_results_of_a_run_stay_whole(run, given, capsys) -> None:
    assert run("train", *given, *QUICK) == 0
    assert run("evaluate", "ckpt_path=runs/mine", "hardware=cpu", "max_new_tokens=1") == 0
    before = {path: path.read_bytes() for path in Path("runs/mine").rglob("*") if path.is_file()}
    capsys.readouterr()
    with room_for(10_000):
        assert run("export", "ckpt_path=runs/mine") == 2
    line = error_line(capsys.readouterr().err)
    assert "runs/mine/hf" in line
    assert "File too large" in line
    with room_for(50):
        assert run("evaluate", "ckpt_path=runs/mine", "hardware=cpu", "max_new_tokens=1") == 2
    assert "evaluation.json': File too large" in error_line(capsys.readouterr().err)
    assert {path: path.read_bytes() for path in Path("runs/mine").rglob("*") if path.is_file()} == before


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    with written_file(file) as place:
        place.write_text("one")

    def write(error: Exception) -> None:
        with written_file(file, 2 * 10**9) as place:
            place.write_text("two")
            raise error

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device \(2\.00 GB to write, .* free\).*a\.txt") as raised:
        write(full)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(file))
    assert file.read_text() == "one"
    with pytest.raises(ValueError, match="a bug"):
        write(ValueError("a bug"))
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"]
    assert file.read_text() == "one"


# Signals


def sent_at(step: int, number: int, times: int = 1):
    """A training step that gets a signal."""
    original, seen = CausalLM.training_step, [0]

    def training_step(self: CausalLM, batch: dict, batch_idx: int) -> torch.Tensor:
        seen[0] += 1
        if seen[0] == step:
            for _ in range(times):
                signal.raise_signal(number)
        return original(self, batch, batch_idx)

    return training_step


@pytest.mark.parametrize(
    ("method", "number"), [("full", signal.SIGINT), ("zo2", signal.SIGTERM), ("none", signal.SIGINT)]
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    method: str, number: int, run, given, monkeypatch, capsys
) -> None:
    extra = ["trainer.strategy.min_numel=0"] if method == "zo2" else ["trainer.accumulate_grad_batches=2"]
    words = [*given, *QUICK[1:], f"method={method}", "export=false", "trainer.max_steps=5", *extra]
    assert run("train", *words) == 0
    expected = weights()
    os.rename("runs/mine", "runs/uninterrupted")
    capsys.readouterr()
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "training_step", sent_at(5, number))
        assert run("train", *words) == 128 + number
    line = error_line(capsys.readouterr().err)
    assert "interrupted. runs/mine/checkpoints/end-step" in line
    assert "is whole: the same command with ckpt_path=last goes on from it" in line
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.load(runs.newest_checkpoint(Path("runs/mine")), weights_only=True)["global_step"] < 5
    assert run("train", *words, "ckpt_path=last") == 0
    found = weights()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_second_signal_stops_at_once_and_one_before_training_leaves_nothing(
    run, given, monkeypatch, capsys
) -> None:
    words = [*given, *QUICK, "export=false"]
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "training_step", sent_at(2, signal.SIGINT, times=2))
        assert run("train", *words) == 130
    assert "There is no checkpoint to go on from" in error_line(capsys.readouterr().err)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CausalLM, "validation_step", interrupted)
    try:
        assert run("train", *words[:-2], "name=other") == 130
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert "interrupted. Training had not begun, and nothing is left" in error_line(capsys.readouterr().err)
    assert not Path("runs/other").exists()
