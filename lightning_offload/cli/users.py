"""One line and exit code 2 for what a user can mend; a bug keeps its traceback."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import fields, is_dataclass

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from lightning_offload.cli.keys import did_you_mean
from lightning_offload.errors import OffloadError
from lightning_offload.writing import is_of_disk, said

FULL_ERROR = "HYDRA_FULL_ERROR"
BAD_VALUES = (ValueError, TypeError, OSError, ImportError)


class Interrupted(KeyboardInterrupt):
    """A command that a signal has stopped; the message says what is left of it."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def one_line_for_users(command: str) -> Iterator[None]:
    """Exit with 2 and one line for what the user can mend; anything else is a bug and keeps its traceback.

    What a signal has stopped exits as the shell expects, with 128 and the signal's number.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"lightning-offload {command}: {error if error.args else 'interrupted'}", file=sys.stderr)
        raise SystemExit(128 + getattr(error, "number", signal.SIGINT)) from error
    except Exception as error:
        if os.environ.get(FULL_ERROR) == "1" or not _is_of_user(error):
            raise
        print(f"lightning-offload {command}: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error


@contextmanager
def said_by_rank_zero() -> Iterator[None]:
    """Of several processes that run the same command, one prints."""
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere) if getattr(rank_zero_only, "rank", 0) else nullcontext(),
    ):
        yield


@contextmanager
def user_errors() -> Iterator[None]:
    """While the objects are built, bad values are the user's; later they would be bugs and keep their traceback."""
    try:
        yield
    except OffloadError:
        raise
    except BAD_VALUES as error:
        raise OffloadError(_message(error)) from error


def _message(error: BaseException) -> str:
    return said(error) if isinstance(error, OSError) and is_of_disk(error) else str(error)


def _is_of_user(error: BaseException) -> bool:
    """Whether one line is enough: a constructor that Hydra called may also have failed for a bug of ours."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return isinstance(error.__cause__, BAD_VALUES) or _is_of_user(error.__cause__)
    known = isinstance(error, OffloadError | MisconfigurationException | HydraException | OmegaConfBaseException)
    return known or is_of_disk(error)


def _cause(error: BaseException) -> BaseException:
    """What Hydra wraps; an error of a configuration file is only in its context."""
    if not isinstance(error, HydraException):
        return error
    context = error.__context__ if isinstance(error.__context__, OmegaConfBaseException) else None
    return error.__cause__ or context or error


def _siblings(cause: OmegaConfBaseException) -> list[str]:
    """The keys among which one was looked for."""
    if isinstance(cause.parent_node, DictConfig):
        return sorted(map(str, cause.parent_node))
    return sorted(field.name for field in fields(cause.object_type)) if is_dataclass(cause.object_type) else []


def _place(error: BaseException, cause: BaseException) -> str:
    """``In 'experiment/mine': ``, where a file is to blame."""
    found = re.match(r"In '[^']+/[^']+': ", str(error)) if error is not cause else None
    return found[0] if found else ""


def _one_line(error: BaseException) -> str:
    """Say what Hydra says over many lines; our own messages are one line already."""
    cause = _cause(error)
    if isinstance(error, InterpolationResolutionError) and isinstance(error.__cause__, OSError):
        cause = error = error.__cause__
    if isinstance(error, InstantiationException) and cause is not error:
        key = re.search(r"full_key: (\S+)", str(error))
        text = f"{key[1] + ': ' if key else ''}{_one_line(cause)}"
    elif isinstance(cause, MissingMandatoryValue):
        text = f"{cause.full_key} has no value; give {cause.full_key}=<value>"
    elif isinstance(cause, ConfigKeyError | ConfigAttributeError) and _siblings(cause):
        known = _siblings(cause)
        hint = did_you_mean(str(cause.key), known)
        text = f"{_place(error, cause)}no key or group {cause.full_key!r}{hint}; there are {', '.join(known)}"
    elif isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        text = f"Could not find {error.missing_cfg_file!r}{did_you_mean(option, error.options)}; "
        text += f"{group} has {', '.join(error.options)}"
    elif isinstance(error, OverrideParseException):
        text = (
            f"cannot read {error.override!r}; settings are key=value, with special characters as in 'key=\"(value)\"'"
        )
    else:
        listing = _message(error).split("Config search path")[0]
        text = listing if cause is error else f"{listing}\n{str(cause).splitlines()[0]}"
    return " ".join(text.split())
