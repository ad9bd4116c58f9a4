"""`dim="auto"`: the largest fraction whose traffic hides, by the formula and by what a step really moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_offload.memory.rates import Rates
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.dims import MOST, STEP, host_step_bytes, largest_hidden_dim
from tests.helpers import Net, lanes_of, train
from tests.planning.machines import cpu, gpu
from tests.projected import lsp

WEIGHTS = {str(at): nn.Parameter(torch.empty(1024, 4096, device="meta")) for at in range(3)}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("native", ["off", "on"])
def test_the_host_moves_what_is_reckoned_with(
    native: str,
    compute: torch.dtype,
    accumulate: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if native == "on":
        request.getfixturevalue("kernels")
    lanes, told = lanes_of("inline"), dict[int, int]()
    plain = lanes.host

    def host(function: Any, **how: Any) -> Any:
        if how.get("tag") == "step":
            told[how["traffic_bytes"]] = told.get(how["traffic_bytes"], 0) + 1
        return plain(function, **how)

    monkeypatch.setattr(lanes, "host", host)
    train(
        Net(),
        lanes,
        steps=1,
        dtypes=DTypes(compute=compute, rounding="stochastic"),
        method=lsp(accumulate=accumulate, others="frozen", refit_every=float("inf"), native=native),
    )
    wire = compute.itemsize
    gradient = 4 if accumulate == "host" else wire
    element = gradient + wire + 16 + (12 if wire == 2 and native == "off" else 0)
    assert told == {2 * 9 * 9 * element: 3}
    assert element == host_step_bytes(gradient, wire, fused=native == "on")


@pytest.mark.parametrize(
    ("compute", "element", "fused"),
    [(torch.float32, 24, False), (torch.bfloat16, 32, False), (torch.bfloat16, 20, True)],
)
@pytest.mark.parametrize("slower", ["the link", "the host"])
def test_the_largest_that_hides(compute: torch.dtype, element: int, fused: bool, slower: str) -> None:
    machine = gpu(host_gb_per_s=1 if slower == "the host" else 1e6, h2d_gb_per_s=0.1 if slower == "the link" else 1e6)
    assert machine.rates is not None
    fraction, reason = largest_hidden_dim(WEIGHTS, machine, DTypes(compute=compute), 8192, fused=fused)
    assert slower in reason
    assert STEP < fraction < MOST
    tflops = machine.rates.bf16_tflops if compute == torch.bfloat16 else machine.rates.fp32_tflops
    backward_s = 4 * 3 * 1024 * 4096 * 8192 / (1e12 * tflops)

    def hidden(of: float) -> bool:
        numel = 3 * (of * 1024) ** 2
        if slower == "the host":
            return numel * element <= 1e9 * backward_s
        return numel * compute.itemsize <= 0.1e9 * backward_s

    assert hidden(fraction)
    assert not hidden(fraction + STEP)


def test_where_device_and_host_are_one_memory_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rates, "cached", lambda *_: pytest.fail("measured"))
    assert largest_hidden_dim(WEIGHTS, replace(cpu(), rates=None), DTypes(), 256, fused=False)[0] == MOST
