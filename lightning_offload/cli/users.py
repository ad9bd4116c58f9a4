"""One line and exit code 2 for what a user can mend; a bug keeps its traceback."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

from hydra.errors import HydraException, InstantiationException, OverrideParseException
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


def _one_line(error: BaseException) -> str:
    """Say what Hydra says over many lines; our own messages are one line already."""
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    if isinstance(error, InterpolationResolutionError) and isinstance(error.__cause__, OSError):
        cause = error = error.__cause__
    if isinstance(error, InstantiationException) and cause is not error:
        key = re.search(r"full_key: (\S+)", str(error))
        text = f"{key[1] + ': ' if key else ''}{_one_line(cause)}"
    elif isinstance(cause, MissingMandatoryValue):
        text = f"{cause.full_key} has no value; give {cause.full_key}=<value>"
    elif isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        text = f"no key or group {cause.full_key!r}; there are {', '.join(sorted(map(str, cause.parent_node)))}"
    elif isinstance(error, OverrideParseException):
        text = (
            f"cannot read {error.override!r}; settings are key=value, with special characters as in 'key=\"(value)\"'"
        )
    else:
        listing = _message(error).split("Config search path")[0]
        text = listing if cause is error else f"{listing}\n{str(cause).splitlines()[0]}"
    return " ".join(text.split())
