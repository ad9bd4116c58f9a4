"""Where kernels come from: compilers that are missing, broken or wrong, caches that cannot be written or are shared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_offload.numerics import native
from lightning_offload.numerics.native import build

HAS_COMPILER = any(shutil.which(name) for name in build.COMPILERS)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
SETTLE = "from lightning_offload.numerics import native; print(*native.settle({!r}), sep=': ')"


def process(settings: dict[str, str], code: str = SETTLE.format("auto")) -> subprocess.Popen[str]:
    """Another Python: operators belong to a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    for name in ("LD_PRELOAD", "CXX") if "CXX" not in settings else ("LD_PRELOAD",):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(settings: dict[str, str], code: str = SETTLE.format("auto")) -> str:
    out, error = process(settings, code).communicate(timeout=300)
    return (out or error).strip()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_compiled_once_and_found_again(tmp_path: Path) -> None:
    where = {"LIGHTNING_OFFLOAD_CACHE": str(tmp_path / "cache")}
    assert re.fullmatch(r"on: kernels compiled in [\d.]+ s", said(where))
    assert said({**where, "CXX": "/nowhere/c++"}) == "on: compiled kernels, from the cache"
    assert len(list((tmp_path / "cache").iterdir())) == 1


@needs_compiler
def test_other_flags_and_another_torch_are_compiled_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {build._key([]), build._key(["-g"])}
    monkeypatch.setattr("torch.__version__", "9.9")
    keys.add(build._key([]))
    monkeypatch.setattr(build, "_processor", lambda: "another")
    keys.add(build._key([]))
    assert len(keys) == 4


@needs_compiler
def test_two_processes_at_once(tmp_path: Path) -> None:
    where = {"LIGHTNING_OFFLOAD_CACHE": str(tmp_path / "cache")}
    both = [process(where) for _ in range(2)]
    assert all(one.communicate(timeout=300)[0].startswith("on: ") for one in both)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = said({"LIGHTNING_OFFLOAD_CACHE": str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path)})
    assert re.fullmatch(r"on: kernels compiled for this process alone, as '.*' cannot be written, in [\d.]+ s", found)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_compiler
def test_nowhere_to_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LIGHTNING_OFFLOAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "compiled for this process alone, as there is no home folder, in" in build.library()[1]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(native.NotBuiltError, match="nowhere to compile: "):
        build.library()


@needs_compiler
def test_what_others_keep_there_is_passed_by(tmp_path: Path) -> None:
    where = {"LIGHTNING_OFFLOAD_CACHE": str(tmp_path)}
    said(where)
    (kept,) = tmp_path.iterdir()
    kept.unlink()
    (tmp_path / f"{kept.name[:-4]}.so").mkdir()  # cannot be read
    assert "compiled in" in said(where)


@needs_compiler
def test_without_openmp_they_run_on_one_thread_and_say_so(tmp_path: Path) -> None:
    compiler = script(
        tmp_path / "c++",
        f'case "$*" in *-fopenmp*) echo "error: no OpenMP" >&2; exit 1;; esac; exec {build._compiler()[0]} "$@"',
    )
    where = {"LIGHTNING_OFFLOAD_CACHE": str(tmp_path / "cache"), "CXX": compiler}
    assert re.fullmatch(r"on: kernels compiled in [\d.]+ s, on one thread: the compiler has no OpenMP", said(where))
    assert said(where) == "on: compiled kernels, from the cache, on one thread: the compiler has no OpenMP"


@needs_compiler
@pytest.mark.parametrize(
    "default",
    ["set_default_dtype(torch.float64)", "set_default_dtype(torch.bfloat16)", "set_default_device('meta')"],
)
def test_the_defaults_of_the_process_are_its_own(default: str) -> None:
    assert said({}, f"import torch; torch.{default}\n{SETTLE.format('on')}").startswith("on: ")


@needs_compiler
def test_a_damaged_cache_is_compiled_anew(tmp_path: Path) -> None:
    where = {"LIGHTNING_OFFLOAD_CACHE": str(tmp_path)}
    said(where)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert "compiled in" in said(where)
    assert said(where) == "on: compiled kernels, from the cache"


def test_no_compiler(tmp_path: Path) -> None:
    found = said({"LIGHTNING_OFFLOAD_CACHE": str(tmp_path), "PATH": str(tmp_path)})
    assert found == (
        "off: there is no C++ compiler (c++, g++, clang++, or $CXX); torch's own operations do the same, slower"
    )


def test_a_broken_compiler(tmp_path: Path) -> None:
    compiler = script(tmp_path / "c++", "echo 'kernels.cpp:1:1: error: no such thing' >&2; exit 1")
    where = {"LIGHTNING_OFFLOAD_CACHE": str(tmp_path / "cache"), "CXX": compiler}
    assert "cannot compile the kernels: kernels.cpp:1:1: error: no such thing; torch's own" in said(where)
    assert list((tmp_path / "cache").iterdir()) == []
    asked = said(where, SETTLE.format("on"))
    assert "native='on', but the compiler" in asked
    assert asked.endswith("pass native='auto' to go on without them")


def test_a_compiler_that_writes_nonsense(tmp_path: Path) -> None:
    compiler = script(tmp_path / "c++", 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"')
    found = said({"LIGHTNING_OFFLOAD_CACHE": str(tmp_path / "cache"), "CXX": compiler})
    assert found.startswith("off: what was compiled cannot be loaded: ")


@needs_compiler
def test_a_library_of_something_else(tmp_path: Path) -> None:
    real = build._compiler()[0]
    compiler = script(
        tmp_path / "c++",
        f'while [ "$1" != -o ]; do shift; done; echo "int x;" | exec {real} -shared -x c++ - -o "$2"',
    )
    found = said({"LIGHTNING_OFFLOAD_CACHE": str(tmp_path / "cache"), "CXX": compiler})
    assert re.match(r"off: AttributeError: .*undefined symbol: offload_square_sum; torch's own operations", found)


@pytest.mark.parametrize("variable", ["CXX", "LIGHTNING_OFFLOAD_CXXFLAGS"])
def test_words_that_have_no_end(tmp_path: Path, variable: str) -> None:
    found = said({"LIGHTNING_OFFLOAD_CACHE": str(tmp_path), variable: "c++ 'x"})
    assert found.startswith(f"off: ${variable} cannot be read: No closing quotation")


FIT = """
import logging, warnings
import torch
from lightning.pytorch import Trainer
from tests.plain import Lit, loader
from lightning_offload import FullOffloadStrategy
torch.manual_seed(0)
warnings.simplefilter("ignore")
logging.basicConfig()
for epochs in (1, 2):
    module = Lit()
    Trainer(strategy=FullOffloadStrategy(min_numel=0), accelerator="cpu", max_epochs=epochs, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False).fit(module, loader())
    print("trained", module.trainer.global_step)
"""


def test_training_goes_on_without_and_says_so_once_a_fit(tmp_path: Path) -> None:
    compiler = script(tmp_path / "c++", f"echo x >> {tmp_path}/calls; echo 'kernels.cpp:1:1: error: no' >&2; exit 1")
    where = {"LIGHTNING_OFFLOAD_CACHE": str(tmp_path / "cache"), "CXX": compiler}
    out, error = process(where, FIT).communicate(timeout=300)
    assert len(re.findall(r"trained [1-9]", out)) == 2, error
    assert len(re.findall("cannot compile the kernels: kernels.cpp:1:1: error: no; torch's own", error)) == 2
    assert len((tmp_path / "calls").read_text().split()) == len(build.VARIANTS)  # asked once in a process


def test_a_compiler_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "exec sleep 60"))
    monkeypatch.setenv("LIGHTNING_OFFLOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "TIMEOUT_S", 0.2)
    with pytest.raises(native.NotBuiltError, match=r"does not work: .*timed out"):
        build.library()


@needs_compiler
def test_what_computes_something_else_is_not_used(tmp_path: Path) -> None:
    found = said({"LIGHTNING_OFFLOAD_CACHE": str(tmp_path), "LIGHTNING_OFFLOAD_CXXFLAGS": "-ffast-math"})
    assert "off: what was compiled does not compute what torch does (AdamW with bfloat16 gradients)" in found


@needs_compiler
def test_every_loop_over_elements_is_vectorised(tmp_path: Path) -> None:
    """By GCC's report; without vectors the kernels would be slower than torch's operations."""
    compiler = build._compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    if "Free Software Foundation" not in version:
        pytest.skip("the report is GCC's")
    report = subprocess.run(
        [
            *(*compiler, *build.FLAGS, *build.VARIANTS[0], "-fopt-info-vec-optimized"),
            *(str(build.SOURCE), "-o", str(tmp_path / "kernels.so")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if report.returncode:
        pytest.skip("not on x86")
    vectorised = {int(line.split(":")[1]) for line in report.stderr.splitlines() if "loop vectorized" in line}
    lines = build.SOURCE.read_text().splitlines()
    loops = [at for at, line in enumerate(lines, 1) if re.search(r"for \(int64_t i = 0; i < (n|calls); i\+\+\)", line)]
    inner = {at + 1 for at in loops if "for (uint32_t bit" in lines[at]}  # of signs
    outer = {at - 1 for at in inner}
    assert len(loops) > 15
    assert set(loops) - outer | inner <= vectorised


@needs_compiler
@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Addresses and undefined behaviour, through all tests of the kernels; about a minute and a half."""
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run([*build._compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        for name in names
    ]
    libraries = [one.stdout.strip() for one in found]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("no sanitizers")
    environment = {
        **os.environ,
        "LIGHTNING_OFFLOAD_CACHE": str(tmp_path),
        "LIGHTNING_OFFLOAD_CXXFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -g1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "LD_PRELOAD": ":".join(libraries),
    }
    tests = Path(__file__).with_name("test_native.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
