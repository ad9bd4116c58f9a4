"""Measures what a machine achieves, in about two seconds and without touching anybody's random numbers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MIB = 1024**2

_BUDGET_S = 0.12
"""Time for repetitions of one measurement, beside its warm-up."""
_SPAN_S = 0.01
"""Shortest span that is timed: calls and waiting for the device are small against it."""
_LARGEST = 8192


def measure(device: torch.device | str, host_threads: int) -> dict[str, float]:
    """The fields of ``Rates``, medians of repetitions.

    On the CPU there is no link: its rates are those of copies within host memory, which take turns.

    Args:
        device: Where compute happens.
        host_threads: Threads that sweep host memory.
    """
    device = torch.device(device)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        rates = {
            "fp32_tflops": _tflops(device, torch.float32),
            "bf16_tflops": _tflops(device, torch.bfloat16),
            "device_gb_per_s": _sweep_gb_per_s(device),
            **(_cuda_link(device) if device.type == "cuda" else _host_link()),
            "host_gb_per_s": _host_gb_per_s(host_threads),
            "op_us": _op_us(device),
        }
    if device.type == "cuda":
        torch.cuda.empty_cache()
        getattr(torch.accelerator, "empty_host_cache", lambda: None)()  # from torch 2.12: page-locked memory goes back
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of ``run``, issued many times in a row where it is short."""
    _span(run, 1, device)
    repeats = min(1000, math.ceil(_SPAN_S / _span(run, 1, device)))
    end = time.perf_counter() + _BUDGET_S
    spans = [_span(run, repeats, device)]
    while len(spans) < 3 or (time.perf_counter() < end and len(spans) < 50):
        spans.append(_span(run, repeats, device))
    return statistics.median(spans) / repeats


def _span(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return max(time.perf_counter() - start, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Of square matrices as large as still take no time: a CPU may need a second for what a GPU does in a moment."""
    width = 256
    run = _product(device, dtype, width)
    while width < _LARGEST and min(_span(run, 1, device) for _ in range(2)) < _SPAN_S:
        width *= 2
        run = _product(device, dtype, width)
    return 2 * width**3 / _seconds(run, device) / 1e12


def _product(device: torch.device, dtype: torch.dtype, width: int) -> Callable[[], Tensor]:
    """A matrix product of random numbers: GPUs clock higher on zeros and ones."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(width, width, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _sweep_gb_per_s(device: torch.device) -> float:
    data = _bytes_on(device, _scratch_bytes(device)).view(torch.float32).fill_(1.0)
    return 2 * data.nbytes / _seconds(lambda: data.mul_(1.0), device) / 1e9


def _host_gb_per_s(threads: int) -> float:
    with _torch_threads(threads):  # they touch the pages first, too
        return _sweep_gb_per_s(torch.device("cpu"))


def _op_us(device: torch.device) -> float:
    tiny = torch.zeros(1, dtype=torch.float32, device=device)
    return 1e6 * _seconds(lambda: tiny.add_(1.0), device)


def _host_link() -> dict[str, float]:
    cpu = torch.device("cpu")
    source, target = (_bytes_on(cpu, 128 * MIB) for _ in range(2))
    rate = source.nbytes / _seconds(lambda: target.copy_(source), cpu) / 1e9
    return {"h2d_gb_per_s": rate, "d2h_gb_per_s": rate, "duplex": 0.5, "pageable_gb_per_s": rate}


def _cuda_link(device: torch.device) -> dict[str, float]:
    pageable, pinned, back = _bytes_on(torch.device("cpu"), 64 * MIB), *_pinned(64 * MIB)
    there, here = (_bytes_on(device, 64 * MIB) for _ in range(2))
    up_s = _seconds(lambda: there.copy_(pinned, non_blocking=True), device)
    down_s = _seconds(lambda: back.copy_(here, non_blocking=True), device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def both() -> None:
        for stream, target, source in zip(streams, (there, back), (pinned, here), strict=True):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    share = max(up_s, down_s) / _seconds(both, device)
    pageable_s = _seconds(lambda: there.copy_(pageable), device)
    return {
        "h2d_gb_per_s": there.nbytes / up_s / 1e9,
        "d2h_gb_per_s": back.nbytes / down_s / 1e9,
        "duplex": min(1.0, max(0.5, share)),
        "pageable_gb_per_s": there.nbytes / pageable_s / 1e9,
    }


def _pinned(nbytes: int) -> list[Tensor]:
    """Two page-locked buffers; ordinary ones where the system refuses, as the run will have to use too."""
    try:
        return [torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
    except RuntimeError:
        return [_bytes_on(torch.device("cpu"), nbytes) for _ in range(2)]


def _bytes_on(device: torch.device, nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def _scratch_bytes(device: torch.device) -> int:
    """Well beyond any cache, but little of what is free."""
    if device.type == "cpu":
        return 256 * MIB
    free, _ = torch.cuda.mem_get_info(device)
    return max(16, min(512, free // MIB // 8)) * MIB


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
