"""The console script: picks the command, and hands the process to Hydra."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_offload import runs
from lightning_offload.cli.comparing import after_sweep, compare
from lightning_offload.cli.keys import check_keys, did_you_mean
from lightning_offload.cli.machine import bench, doctor
from lightning_offload.cli.options import options
from lightning_offload.cli.planning import plan
from lightning_offload.cli.results import evaluate, export
from lightning_offload.cli.training import train
from lightning_offload.cli.users import FULL_ERROR, one_line_for_users
from lightning_offload.conf import schema
from lightning_offload.errors import OffloadError
from lightning_offload.progress import load_without_bars

_USAGE = """\
lightning-offload: fine-tune language models that do not fit on the GPU

  train      fine-tune, compare the held-out loss before and after, save a Hugging Face folder
               lightning-offload train
               lightning-offload train model=pretrained model.path=<folder> data=jsonl data.path=my.jsonl
  plan       what a run will take: memory by place, seconds by lane, and what to change if it does not fit
               lightning-offload plan model=llama3_8b hardware=rtx4090
  evaluate   loss, perplexity, bits per byte and a sample
               lightning-offload evaluate ckpt_path=runs/<name>
  export     a Hugging Face folder from a run's checkpoint, of meft its adapters; checked by logits
               lightning-offload export ckpt_path=runs/<name> output=my_model dtype=bfloat16
  bench      this machine's rates, and the methods beside plain Lightning, their bounds and other packages
               lightning-offload bench
  doctor     what was found on this machine, what will be used and why
               lightning-offload doctor
  compare    finished runs side by side: a table and two pictures; `train -m` ends with it
               lightning-offload compare runs=runs/sweep-<time>

`lightning-offload <command> --help` lists what a command takes. HYDRA_FULL_ERROR=1 shows where an error came from.\
"""
_NOT_FOR_USERS = (
    r".*LeafSpec.*",
    r".*is_gradient_checkpointing.*",
    r".*does not have many workers.*",
    r".*number of training batches.*",
    r".*save all targets and predictions.*",
)

_NO_NEWS = ("litlogger", "PU available: ", "Loading `train_dataloader`", "Detected KeyboardInterrupt")


def main() -> int:
    """Run the sub-command named by the first argument of the process; the console script's entry point.

    Raises:
        SystemExit: With 2 when something the user gave was wrong; one line on stderr says what, and the way out.
    """
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    with one_line_for_users(command):
        if command not in _COMMANDS:
            near = did_you_mean(command, _COMMANDS)
            raise OffloadError(f"no command {command!r}; there are {', '.join(_COMMANDS)}{near}")
        _check_flags(arguments)
        return _run_hydra(command, _of_run(arguments) if command == "evaluate" else arguments)


_COMMANDS: dict[str, Callable[[DictConfig], int]] = {
    "train": train,
    "plan": plan,
    "evaluate": evaluate,
    "export": export,
    "bench": bench,
    "doctor": doctor,
    "compare": compare,
}


def _of_run(arguments: list[str]) -> list[str]:
    """Settings of model and data may be for those of the run, which Hydra does not know."""
    return [f"++{given}" if given.startswith(("model.", "data.")) else given for given in arguments]


def _run_hydra(command: str, arguments: list[str]) -> int:
    """Hand the process to Hydra; inside the command `sys.argv` is whole again, as Lightning replays it.

    Returns:
        The largest exit code of the jobs.
    """
    _quiet()
    schema.register()
    OmegaConf.register_new_resolver("options", options, replace=True)
    OmegaConf.register_new_resolver("run_folder", functools.cache(runs.choose_folder), replace=True)
    seen_by_all = sys.argv, os.environ.get(FULL_ERROR)
    begun, code, jobs = False, 0, list[Path]()

    @hydra.main(version_base="1.3", config_path="pkg://lightning_offload.conf", config_name=command)
    def task(cfg: DictConfig) -> None:
        nonlocal begun, code
        begun = True
        of_sweep, folder = HydraConfig.get().mode == RunMode.MULTIRUN, Path(HydraConfig.get().runtime.output_dir)
        job = f"{command}, job {HydraConfig.get().job.num}" if of_sweep else command
        # an exception that leaves this function makes Hydra print a line of its own
        with _process_state(*seen_by_all), _next_job(of_sweep) as failed, one_line_for_users(job):
            try:
                check_keys(cfg)
                code = max(code, _COMMANDS[command](cfg))
            except BaseException:
                runs.remove_if_empty(folder, cfg.get("runs_dir"))
                raise
            runs.remove_if_empty(folder)
        code = max(code, *failed, 0)
        if of_sweep and not failed:
            jobs.append(folder)

    # The variable makes Hydra raise its errors instead of printing several lines and exiting with 1.
    with _process_state([sys.argv[0], *arguments], "1"):
        try:
            task()
        except ValueError as error:  # how Hydra refuses `group=null`
            if begun or isinstance(error, OmegaConfBaseException):
                raise
            raise OffloadError(f"{error} (a group is switched off by =none)") from error
        finally:
            after_sweep(jobs if command == "train" else [])
    return code


@contextmanager
def _next_job(of_sweep: bool) -> Iterator[list[int]]:
    """Let a sweep go on after a job that what the user gave made impossible; yields where its exit code is put."""
    codes: list[int] = []
    try:
        yield codes
    except SystemExit as stopped:
        if not of_sweep or not isinstance(stopped.code, int):
            raise
        codes.append(stopped.code)


def _quiet() -> None:
    """Leave out what Lightning says to developers, its advertisement, and bars where there is no terminal."""
    if not sys.stderr.isatty():
        load_without_bars()
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    ours = logging.getLogger("lightning_offload")
    if not ours.handlers:  # else Hydra's, which puts the time before every line
        ours.addHandler(logging.StreamHandler())
        ours.setLevel(logging.INFO)
        ours.propagate = False


def _is_news(record: logging.LogRecord) -> bool:
    return not any(said in record.getMessage() for said in _NO_NEWS)


@contextmanager
def _process_state(argv: list[str], full_error: str | None) -> Iterator[None]:
    before = sys.argv, os.environ.get(FULL_ERROR)

    def put(argv: list[str], full_error: str | None) -> None:
        sys.argv = argv
        os.environ.pop(FULL_ERROR, None)
        if full_error is not None:
            os.environ[FULL_ERROR] = full_error

    put(argv, full_error)
    try:
        yield
    finally:
        put(*before)


def _check_flags(arguments: list[str]) -> None:
    """Let Hydra's own parser look first: it would print its usage over several lines."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise OffloadError(f"{message}; settings are written key=value, as in trainer.max_steps=100")

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)
