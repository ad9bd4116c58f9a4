"""Compiles `kernels.cpp` for this processor, once per source, torch and processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from lightning_offload.errors import OffloadError

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",))
"""Tried in this order: x86 and Arm, then without OpenMP, on one thread."""
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 120.0


class NotBuiltError(OffloadError):
    """The compiled kernels cannot be had on this machine; the message says why."""


def library() -> tuple[ctypes.CDLL, str]:
    """The compiled library, and where it comes from.

    It is kept in ``$LIGHTNING_OFFLOAD_CACHE``, or else in ``lightning_offload`` of the user's cache folder; where that
    cannot be written, in a folder of this process. ``$CXX`` names the compiler, ``$LIGHTNING_OFFLOAD_CXXFLAGS`` adds
    to its flags.

    Raises:
        NotBuiltError: No compiler, or none that can compile it.
    """
    extra = _words("LIGHTNING_OFFLOAD_CXXFLAGS")
    name, cache = f"kernels-{_key(extra)}", _cache_folder()
    kept = None if cache is None else _kept(cache, name)
    if kept is not None:
        return _loaded(kept), f"compiled kernels, from the cache{_THREADS[kept.stem.split('-')[2]]}"
    start = time.perf_counter()
    workplace, alone = _workplace(cache)
    try:
        made = workplace / "kernels.so"
        threads = "parallel" if "-fopenmp" in _compile(made, extra) else "serial"
        if cache is not None and not alone:
            kept = cache / f"{name}-{threads}-{_digest(made)}.so"
            os.replace(made, kept)  # at once: another process may do the same, and both are right
            made = kept
        loaded = _loaded(made)
    except OSError as error:
        raise NotBuiltError(f"what was compiled cannot be kept: {error}") from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return loaded, f"kernels compiled{alone} in {time.perf_counter() - start:.1f} s{_THREADS[threads]}"


_THREADS = {"parallel": "", "serial": ", on one thread: the compiler has no OpenMP"}


def _kept(cache: Path, name: str) -> Path | None:
    """What was compiled before, if it is whole."""
    for path in cache.glob(f"{name}-*.so"):
        try:
            if path.stem.endswith(f"-{_digest(path)}"):
                return path
        except OSError:  # not ours to read
            continue
    return None


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuiltError(f"what was compiled cannot be loaded: {error}") from error


def _workplace(cache: Path | None) -> tuple[Path, str]:
    """A folder to compile in, and what to say where that is not in the cache."""
    try:
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="build-", dir=cache)), ""
        alone = " for this process alone, as there is no home folder,"
    except OSError:
        alone = f" for this process alone, as {str(cache)!r} cannot be written,"
    try:
        return Path(tempfile.mkdtemp(prefix="lightning-offload-")), alone
    except OSError as error:
        raise NotBuiltError(f"there is nowhere to compile: {error}") from error


def _cache_folder() -> Path | None:
    own, users = os.environ.get("LIGHTNING_OFFLOAD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    try:
        return (Path(users) if users else Path.home() / ".cache") / "lightning_offload"
    except RuntimeError:
        return None


def _digest(library: Path) -> str:
    """Of the content: to load a library that has been cut short would end the process."""
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _key(extra: list[str]) -> str:
    parts = [SOURCE.read_text(), repr((FLAGS, VARIANTS, extra)), torch.__version__, platform.platform(), _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Name and instruction sets: one home folder may serve machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    known = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(known)}))


def _compile(out: Path, extra: list[str]) -> tuple[str, ...]:
    """With the first variant of flags that the compiler knows; which it was."""
    command = _compiler()
    said = ""
    for variant in VARIANTS:
        flags = [*FLAGS, *variant, *extra]
        try:
            done = subprocess.run(
                [*command, *flags, str(SOURCE), "-o", str(out)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotBuiltError(f"the compiler {shlex.join(command)!r} does not work: {error}") from error
        if done.returncode == 0 and out.is_file():
            return variant
        said = said or _first_error(done.stderr) or f"exit status {done.returncode}"
    raise NotBuiltError(f"the compiler {shlex.join(command)!r} cannot compile the kernels: {said}")


def _compiler() -> list[str]:
    chosen = _words("CXX")
    if chosen:
        return chosen
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise NotBuiltError(f"there is no C++ compiler ({', '.join(COMPILERS)}, or $CXX)")


def _words(variable: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise NotBuiltError(f"${variable} cannot be read: {error}") from error


def _first_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
