"""Out of memory: the error is raised once more, with what is where and the settings that would help most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from lightning_offload.errors import HostMemoryError
from lightning_offload.memory.host_limits import host_memory
from lightning_offload.savings import Place, Run, Saving, savings
from lightning_offload.tables import device_holds, host_holds, summary, table
from lightning_offload.words import size


class DeviceShortageError(torch.OutOfMemoryError):
    """The device's memory is used up; ``__cause__`` is the error as it came."""


class HostShortageError(HostMemoryError, MemoryError):
    """The host's memory is used up; ``__cause__`` is the error as it came."""


Hook = TypeVar("Hook", bound=Callable[..., Any])


def reports_shortage(hook: Hook) -> Hook:
    """A hook of a strategy that knows its run, whose out-of-memory errors then tell what is where."""

    @wraps(hook)
    def reporting(strategy: Any, *args: Any, **kwargs: Any) -> Any:
        with reported(strategy._run_at_hand, f"`{hook.__name__}`"):
            return hook(strategy, *args, **kwargs)

    return cast("Hook", reporting)


@contextmanager
def reported(run: Callable[[], Run | None], doing: str) -> Iterator[None]:
    """Around what may run out of memory; of several around one another the innermost reports.

    Args:
        run: What is running; ``None`` where there is nothing to tell.
        doing: In words, for the message.

    Raises:
        DeviceShortageError: A ``torch.OutOfMemoryError``.
        HostShortageError: A ``MemoryError``, a ``HostMemoryError``, or one of torch's CPU allocator.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        place = _place(error)
        at_hand = run() if place is not None else None
        if place is None or at_hand is None:
            raise
        kind = DeviceShortageError if place == "device" else HostShortageError
        raise kind(f"{error}\n\n{report(at_hand, place, doing)}") from error


def report(run: Run, place: Place, doing: str) -> str:
    """What is where, and what would help.

    Args:
        run: What ran out.
        place: Of what.
        doing: What it did when it did.
    """
    on_cpu = run.device.type == "cpu"
    kind = "memory" if on_cpu else f"{place} memory"
    where = "the CPU, which is the device too" if on_cpu else str(run.device)
    host = host_memory()
    lines = [f"`{run.who}` ran out of {kind} in {doing}, on {where}.", "", "On the device:"]
    lines += table(_device(run))
    lines += ["In host memory:", *table(host_holds(run.engine, run.module, run.device))]
    lines.append(f"  {size(host.available_bytes)} of {size(host.total_bytes)} can still be had ({host.limit})")
    lines += ["", summary(run.engine)] if run.engine is not None else []
    lines += ["", *_limits(run), "What would help most:"]
    found = savings(run, place)
    lines += [f"  {index}. {_words(saving, run, place)}" for index, saving in enumerate(found, 1)]
    if not found:
        lines.append("  a smaller model, or a machine with more: nothing that can be set here saves any of it")
    return "\n".join(lines)


def _device(run: Run) -> dict[str, int]:
    held = device_holds(run.engine, run.module, run.device)
    if run.device.type != "cuda":
        return held
    allocated, reserved = torch.cuda.memory_allocated(run.device), torch.cuda.memory_reserved(run.device)
    held["activations, and all else of torch"] = max(allocated - sum(held.values()), 0)
    held["held by torch's allocator, not in use"] = reserved - allocated
    return held


def _limits(run: Run) -> list[str]:
    """Those that the user has set."""
    settings = run.method.settings
    caps = {"max_device_gib": settings.max_device_gib, "max_host_gib": settings.max_host_gib}
    if run.device.type == "cpu":
        caps["max_device_gib"] = None
    return [f"The run is kept within `{name}={gib:g}`, which may be raised." for name, gib in caps.items() if gib]


def _words(saving: Saving, run: Run, place: Place) -> str:
    count = saving.bytes_at(place, run.device)
    if count is None:
        return f"{saving.words}: saves {saving.kind}, which nobody counts on the CPU"
    return f"{saving.words}: saves {size(count)}" + (f" ({saving.kind})" if saving.kind else "")


def _place(error: BaseException) -> Place | None:
    """Where memory has run out; ``None`` where it is another error, or one that has been reported."""
    if isinstance(error, DeviceShortageError | HostShortageError):
        return None
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or ("CUDA" in text and "out of memory" in text):
        return "device"
    if isinstance(error, MemoryError | HostMemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return "host"
    return None
