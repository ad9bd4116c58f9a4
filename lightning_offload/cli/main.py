"""The console script: picks the command, and hands the process to Hydra."""

from __future__ import annotations

import dataclasses
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
from omegaconf import DictConfig, OmegaConf

from lightning_offload import runs
from lightning_offload.cli.machine import bench, doctor
from lightning_offload.cli.options import options
from lightning_offload.cli.planning import plan
from lightning_offload.cli.results import evaluate, export
from lightning_offload.cli.training import train
from lightning_offload.cli.users import FULL_ERROR, one_line_for_users
from lightning_offload.conf import schema
from lightning_offload.errors import OffloadError

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

`lightning-offload <command> --help` lists what a command takes. HYDRA_FULL_ERROR=1 shows where an error came from.\
"""
_NOT_FOR_USERS = (
    r".*LeafSpec.*",
    r".*does not have many workers.*",
    r".*number of training batches.*",
    r".*save all targets and predictions.*",
)


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
            raise OffloadError(f"no command {command!r}; there are {', '.join(_COMMANDS)}")
        _check_flags(arguments)
        return _run_hydra(command, _of_run(arguments) if command == "evaluate" else arguments)


_COMMANDS: dict[str, Callable[[DictConfig], int]] = {
    "train": train,
    "plan": plan,
    "evaluate": evaluate,
    "export": export,
    "bench": bench,
    "doctor": doctor,
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
    begun, code = False, 0

    @hydra.main(version_base="1.3", config_path="pkg://lightning_offload.conf", config_name=command)
    def task(cfg: DictConfig) -> None:
        nonlocal begun, code
        begun = True
        # an exception that leaves this function makes Hydra print a line of its own
        with _process_state(*seen_by_all), one_line_for_users(command):
            try:
                _check_top_level(cfg)
                code = max(code, _COMMANDS[command](cfg))
            finally:
                runs.remove_if_empty(Path(HydraConfig.get().runtime.output_dir))

    # The variable makes Hydra raise its errors instead of printing several lines and exiting with 1.
    with _process_state([sys.argv[0], *arguments], "1"):
        try:
            task()
        except ValueError as error:  # how Hydra refuses `group=null`
            if begun:
                raise
            raise OffloadError(f"{error} (a group is switched off by =none)") from error
    return code


def _quiet() -> None:
    """Leave out what Lightning says to developers, and its advertisement."""
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    ours = logging.getLogger("lightning_offload")
    if not ours.handlers:  # else Hydra's, which puts the time before every line
        ours.addHandler(logging.StreamHandler())
        ours.setLevel(logging.INFO)
        ours.propagate = False


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


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


def _check_top_level(cfg: DictConfig) -> None:
    """Refuse what ``+key=value`` added beside the schema: nothing would read it."""
    known = {field.name for field in dataclasses.fields(OmegaConf.get_type(cfg))}  # type: ignore[arg-type]
    unknown = sorted(map(str, cfg.keys() - known))
    if unknown:
        raise OffloadError(f"no key {unknown[0]!r}; there are {', '.join(sorted(known))}")
