"""Method ``full`` on a CUDA device: the bits of a reference loop under random delays on every stream.

``pytest -m gpu tests/gpu`` on any machine with a CUDA device and 1 GiB free on it. The reference takes gradients and
the clip coefficient from the device and steps fp32 masters with ``torch.optim.AdamW(fused=True)`` on the CPU. That
the reference itself is right is tested on the CPU, without the marker.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.asynchronous import AsyncLanes, Marker
from lightning_offload.memory.cuda import CudaStreams, _CudaMarker, cuda_lanes
from lightning_offload.memory.lanes import CopyLane, InlineLanes, Lanes
from lightning_offload.methods import part
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.numerics.norms import clip_coefficient, gradient_norm, total_norm

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; makes its results repeatable

gpu = pytest.mark.gpu
VOCAB, WIDTH, STEPS = 211, 136, 5
MOMENT = 2_000_000  # clock cycles: about a millisecond, longer than any transfer here
AGES = 2_000_000_000  # about a second, longer than the host needs to issue a step


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


class Wide(nn.Module):
    """Long transfers, short compute: shaped to race."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).float().view(-1, VOCAB), tokens.roll(1, -1).view(-1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """One way to train; ``str`` is a test's name."""

    narrow: bool = False
    tied: bool = False
    micro_batches: int = 1
    accumulate: str = "device"
    clip: str = "none"
    nan_step: int | None = None
    pin: bool = True

    def __str__(self) -> str:
        on = [name for name in ("narrow", "tied") if getattr(self, name)] + (["nan"] if self.nan_step else [])
        pinned = "pinned" if self.pin else "pageable"
        return "-".join([f"{self.micro_batches}x{self.accumulate}", f"clip_{self.clip}", *on, pinned])

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.narrow else torch.float32

    @property
    def limit(self) -> Clip | None:
        return None if self.clip == "none" else Clip(0.05 if self.clip == "norm" else 1e-3, self.clip)

    def module(self) -> Wide:
        torch.manual_seed(3)
        return Wide(tied=self.tied)

    def batches(self, device: torch.device) -> list[list[Tensor]]:
        draw = torch.Generator().manual_seed(11)
        return [
            [torch.randint(0, VOCAB, (4, 16), generator=draw).to(device) for _ in range(self.micro_batches)]
            for _ in range(STEPS)
        ]

    def loss(self, module: Wide, tokens: Tensor, step: int) -> Tensor:
        loss = module.loss(tokens) / self.micro_batches
        return loss * float("nan") if step == self.nan_step else loss


CASES = [
    Case(),
    Case(narrow=True),
    Case(clip="norm", tied=True),
    Case(clip="norm", narrow=True, nan_step=2),
    Case(clip="value", narrow=True, tied=True),
    Case(micro_batches=3, clip="norm", nan_step=1),
    Case(micro_batches=3, clip="value", narrow=True),
    Case(micro_batches=3, accumulate="host", clip="norm", tied=True),
    Case(micro_batches=3, accumulate="host", clip="norm", narrow=True, nan_step=2),
    Case(micro_batches=3, accumulate="host", clip="value", narrow=True, tied=True),
    Case(accumulate="host"),
    Case(pin=False, clip="norm"),
    Case(pin=False, narrow=True, tied=True),
    Case(pin=False, micro_batches=3, accumulate="host", narrow=True, clip="norm"),
]


@dataclass
class Result:
    losses: list[float]
    weights: dict[str, Tensor]
    masters: dict[str, Tensor]
    moments: dict[str, Tensor]


def assert_same(one: Result, other: Result) -> None:
    torch.testing.assert_close(one.losses, other.losses, rtol=0, atol=0, equal_nan=True)
    for held in ("weights", "masters", "moments"):
        left, right = getattr(one, held), getattr(other, held)
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor.cpu(), right[name].cpu()), f"{held} of {name}"
    assert all(weight.isfinite().all() for weight in one.weights.values())


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1, fused=True)


def reference(case: Case, device: torch.device) -> Result:
    """Gradients and the coefficient from the device, fused AdamW on fp32 masters on the CPU."""
    module = case.module()
    masters = {name: nn.Parameter(p.detach().clone()) for name, p in module.named_parameters()}
    module.to(device, case.dtype)
    weights = dict(module.named_parameters())
    optimizer = adamw(masters.values())
    losses: list[float] = []
    torch.manual_seed(7)
    for step, batches in enumerate(case.batches(device)):
        totals = {name: torch.zeros_like(master) for name, master in masters.items()}
        for tokens in batches:
            loss = case.loss(module, tokens, step)
            loss.backward()
            losses.append(loss.item())
            if case.accumulate == "host":
                for name, weight in weights.items():
                    totals[name] += weight.grad.cpu()
                    weight.grad = None
        grads = totals if case.accumulate == "host" else {name: weight.grad for name, weight in weights.items()}
        total = total_norm([gradient_norm(grad) for grad in grads.values()])
        if total.isfinite():
            for name, master in masters.items():
                master.grad = _clipped(grads[name].cpu(), case.limit, total.cpu()).float()
            optimizer.step()
        for name, weight in weights.items():
            weight.data.copy_(masters[name])
            weight.grad = None
    moments = {
        f"{name}.{key}": value
        for name, master in masters.items()
        for key, value in optimizer.state.get(master, {}).items()
    }
    plain = {name: master.detach() for name, master in masters.items()}
    return Result(losses, {name: weight.detach() for name, weight in weights.items()}, plain, moments)


def _clipped(grad: Tensor, clip: Clip | None, total: Tensor) -> Tensor:
    if clip is None:
        return grad
    if clip.algorithm == "value":
        return grad.clamp(-clip.value, clip.value)
    return grad.mul_(clip_coefficient(total, clip.value))


def offloaded(case: Case, lanes: Lanes, device: torch.device) -> Result:
    module = case.module()
    engine = attach(module, case, lanes)
    losses: list[Tensor] = []
    batches = case.batches(device)
    torch.manual_seed(7)
    for step in range(STEPS):
        losses += one_step(engine, case, batches[step], step)
    engine.flush()
    numbers = [loss.item() for loss in losses]
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    masters = weights if not case.narrow else copy.deepcopy(engine.extras()["masters"])
    packed = engine.optimizer_state()["state"]
    moments = {
        f"{trained.name}.{key}": value.clone()
        for trained in engine.trained
        for key, value in packed.get(trained.position, {}).items()
    }
    assert engine.report.skipped_total == int(case.nan_step is not None)
    offloaded_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    assert lanes.ledger.moved("h2d", "weights") == STEPS * offloaded_bytes
    sends = case.micro_batches if case.accumulate == "host" else 1
    assert lanes.ledger.moved("d2h", "gradients") == STEPS * sends * offloaded_bytes
    engine.detach()
    return Result(numbers, weights, masters, moments)


def attach(module: Wide, case: Case, lanes: Lanes) -> Engine:
    method = Full(FullSettings(min_numel=0, accumulate=case.accumulate))
    dtypes = DTypes(compute=case.dtype)
    return Engine(module, adamw(module.parameters()), method, lanes, dtypes, expects_clip=case.limit is not None)


def one_step(engine: Engine, case: Case, batches: Sequence[Tensor], step: int = -1) -> list[Tensor]:
    losses = []
    for at, tokens in enumerate(batches):
        with engine.micro_batch():
            loss = case.loss(engine.module, tokens, step)
        engine.stepping = at == len(batches) - 1
        loss.backward()
        losses.append(loss.detach())
    engine.step(case.limit)
    return losses


class DelayedStreams(CudaStreams):
    """Random delays on every stream, and targets that are NaN while their copy is under way."""

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device)
        self._random = random.Random(seed)

    def delay(self) -> None:
        if self._random.random() < 0.4:
            torch.cuda._sleep(self._random.randrange(MOMENT))

    def copy(
        self, lane: CopyLane, dst: Sequence[Tensor], src: Sequence[Tensor], after: Sequence[Marker]
    ) -> tuple[Marker, Callable[[], tuple[float, float] | None]]:
        stream = self._lanes[lane]
        for marker in after:
            if isinstance(marker, _CudaMarker):
                stream.wait_event(marker.event)
        with torch.cuda.stream(stream):
            self.delay()
            for target in dst:
                if target.is_floating_point():
                    target.copy_(torch.full_like(target, float("nan"), device=self._device), non_blocking=True)
            self.delay()
        return super().copy(lane, dst, src, ())

    def compute_marker(self) -> Marker:
        self.delay()
        return super().compute_marker()

    def compute_wait(self, marker: Marker) -> None:
        super().compute_wait(marker)
        self.delay()


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The first device, with repeatable kernels."""
    torch.use_deterministic_algorithms(True)
    try:
        yield torch.device("cuda", 0)
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def cuda(device: torch.device, *, pin: bool = True, seed: int | None = None) -> Iterator[AsyncLanes]:
    """Lanes of ``device``, with random delays if there is a seed."""
    memory = HostMemory(pin=pin)
    lanes = cuda_lanes(memory, device, 2)
    if seed is not None:
        lanes = AsyncLanes(memory, device, DelayedStreams(device, seed), 2)
    try:
        yield lanes
    finally:
        lanes.close()


# On the CPU: the reference is what the engine does there.


@pytest.mark.parametrize("case", [case for case in CASES if case.pin], ids=str)
def test_the_reference_loop_is_right_on_the_cpu(case: Case) -> None:
    cpu = torch.device("cpu")
    assert_same(offloaded(case, InlineLanes(HostMemory(pin=False)), cpu), reference(case, cpu))


# On the device: the same bits.


@gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("slot_numel", [part.SLOT_NUMEL, 10_000], ids=["whole", "pieces"])
def test_the_bits_of_the_reference_under_random_delays(
    case: Case, slot_numel: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "SLOT_NUMEL", slot_numel)
    expected = reference(case, device)
    for seed in (None, 1, 2, 3):
        with cuda(device, pin=case.pin, seed=seed) as lanes:
            assert_same(offloaded(case, lanes, device), expected)


@gpu
def test_inline_lanes_on_the_device_give_the_same_bits(device: torch.device) -> None:
    case = Case(clip="norm", narrow=True)
    assert_same(offloaded(case, InlineLanes(HostMemory(pin=False), device), device), reference(case, device))


@gpu
@pytest.mark.parametrize("seed", range(3))
def test_compute_on_a_stream_of_the_users(seed: int, device: torch.device) -> None:
    """Markers are of the current stream, in backward's thread too."""
    case = Case(clip="norm", narrow=True)
    expected = reference(case, device)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(device)), cuda(device, seed=seed) as lanes:
        assert_same(offloaded(case, lanes, device), expected)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one(device: torch.device) -> None:
    """Worker and backward threads must not fall back to device 0."""
    other, case = torch.device("cuda", 1), Case(clip="norm")
    expected, held = reference(case, other), torch.cuda.memory_allocated(device)
    with cuda(other, seed=1) as lanes:
        assert_same(offloaded(case, lanes, other), expected)
    assert torch.cuda.memory_allocated(device) == held


# The host waits for nothing.


@contextmanager
def synchronization_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("case", [Case(), Case(clip="norm", narrow=True), Case(clip="value", tied=True)], ids=str)
def test_no_synchronization_on_the_hot_path(case: Case, device: torch.device) -> None:
    batches = case.batches(device)
    with cuda(device) as lanes:
        engine = attach(case.module(), case, lanes)
        for step in range(2):  # workspaces, the caching allocator, the order of execution
            one_step(engine, case, batches[step])
        lanes.synchronize()
        before = lanes.ledger.moved("h2d", "weights")
        with synchronization_is_an_error():
            for step in range(2, STEPS):
                one_step(engine, case, batches[step])
        lanes.synchronize()
        moved = lanes.ledger.moved("h2d", "weights") - before
        assert moved == (STEPS - 2) * sum(p.numel() * p.element_size() for p in engine.module.parameters())


@gpu
@pytest.mark.parametrize("case", [Case(), Case(clip="norm", narrow=True)], ids=str)
def test_a_step_is_issued_while_the_device_is_still_busy(case: Case, device: torch.device) -> None:
    batches = case.batches(device)
    with cuda(device) as lanes:
        engine = attach(case.module(), case, lanes)
        for step in range(2):
            one_step(engine, case, batches[step])
        lanes.synchronize()
        torch.cuda._sleep(AGES)
        slept = torch.cuda.Event()
        slept.record()
        one_step(engine, case, batches[2])
        assert not slept.query()
        lanes.synchronize()
        assert slept.query()


# Memory.


@gpu
def test_device_memory_is_what_the_engine_counts(device: torch.device) -> None:
    """At rest: the weights, the rings and the verdict; at the peak: activations and the gradient on its way beside."""
    case = Case(clip="norm")
    batches = case.batches(device)
    activations = _peak_of_forward_and_backward(case, batches[0][0], device)
    torch.cuda.synchronize()
    empty = torch.cuda.memory_allocated(device)
    with cuda(device) as lanes:
        module = case.module()
        engine = attach(module, case, lanes)
        one_step(engine, case, batches[0])
        lanes.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device) - empty
        weights = sum(_rounded(p.numel() * p.element_size()) for p in module.parameters())
        verdict = _rounded(4 * (3 + len(engine.trained)))
        rings = engine.host.ring_bytes
        slack = 512 * (len(engine.trained) + 16)  # one block of the allocator for each small tensor that is still held
        assert weights + rings + verdict <= rest <= weights + rings + verdict + slack
        for step in range(1, STEPS):
            one_step(engine, case, batches[step])
        lanes.synchronize()
        largest = max(p.numel() * p.element_size() for p in module.parameters())
        peak = torch.cuda.max_memory_allocated(device) - empty
        assert peak <= rest + activations + 2 * largest + slack


def _peak_of_forward_and_backward(case: Case, tokens: Tensor, device: torch.device) -> int:
    """Beside the weights, where each gradient is freed as it arrives."""
    module = case.module().to(device)
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        module.loss(tokens).backward()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def _rounded(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


@gpu
def test_pinned_memory_is_page_locked_where_it_lies_and_free_after_close(device: torch.device) -> None:
    with cuda(device) as lanes:
        pinned = lanes.buffers("wire", [1000, 0, 70_000], torch.float32, "pinned")
        plain = lanes.buffers("moments", [1000], torch.float32, "host")
        assert lanes.memory.report().by_name["wire"].locked_bytes >= 4 * 71_000
        assert all(lanes.streams.is_asynchronous(tensor) for tensor in pinned)
        assert pinned[2].is_pinned()
        assert pinned[2][33_333:33_337].is_pinned()
        assert not lanes.streams.is_asynchronous(plain[0])
    assert not pinned[2].is_pinned()
    assert pinned[2].sum() == 0


@gpu
def test_a_pageable_copy_runs_on_its_lane_while_compute_is_busy(device: torch.device) -> None:
    with cuda(device, pin=False) as lanes:
        (home,) = lanes.buffers("wire", [1 << 16], torch.float32, "pinned")
        source = torch.ones(1 << 16, device=device)
        ready = lanes.compute()
        torch.cuda._sleep(AGES)
        slept = torch.cuda.Event()
        slept.record()
        landed = lanes.copy([home], [source], "d2h", after=[ready])
        lanes.wait_compute(landed)  # for host work: until it is done
        assert not slept.query()
        assert home.unique().tolist() == [1.0]


# What outlives what.


@gpu
def test_a_copy_keeps_its_source_alive(device: torch.device) -> None:
    """Freed memory would be handed to compute at once, while the copy has not read it."""
    with cuda(device) as lanes:
        (home,) = lanes.buffers("wire", [1 << 20], torch.float32, "pinned")
        source = torch.ones(1 << 20, device=device)
        ready = lanes.compute()
        with torch.cuda.stream(lanes.streams._lanes["d2h"]):
            torch.cuda._sleep(AGES)
        lanes.copy([home], [source], "d2h", after=[ready])
        del source
        other = torch.full((1 << 20,), 2.0, device=device)
        lanes.synchronize()
        assert home.unique().tolist() == [1.0]
        assert other.unique().tolist() == [2.0]


@gpu
def test_a_device_buffer_is_not_still_in_use_by_compute(device: torch.device) -> None:
    """Its memory may have been freed by the host a moment ago, with a kernel still to write it."""
    with cuda(device) as lanes:
        (home,) = lanes.buffers("wire", [1 << 20], torch.float32, "pinned")
        home.fill_(1)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        recycled = torch.empty(1 << 20, device=device)
        address = recycled.data_ptr()
        torch.cuda._sleep(AGES)
        recycled.fill_(2)
        del recycled
        (made,) = lanes.buffers("slot", [1 << 20], torch.float32, "device")
        assert made.data_ptr() == address
        lanes.copy([made], [home], "h2d")
        lanes.synchronize()
        assert made.unique().tolist() == [1.0]


@gpu
def test_close_lets_copies_land_before_host_memory_is_unlocked(device: torch.device) -> None:
    with cuda(device) as lanes:
        (home,) = lanes.buffers("wire", [1 << 20], torch.float32, "pinned")
        source = torch.ones(1 << 20, device=device)
        torch.cuda._sleep(AGES)
        lanes.copy([home], [source], "d2h", after=[lanes.compute()])
        lanes.close()
        assert home.unique().tolist() == [1.0]


@gpu
def test_transfers_are_timed_by_the_device(device: torch.device) -> None:
    with cuda(device) as lanes:
        (home,) = lanes.buffers("wire", [1 << 22], torch.float32, "pinned")
        source = torch.ones(1 << 22, device=device)
        for _ in range(3):
            lanes.copy([home], [source], "d2h", after=[lanes.compute()], tag="down")
        lanes.synchronize()
        total = lanes.ledger.lanes["d2h"]
        assert (total.operations, total.bytes) == (3, 3 << 24)
        assert total.seconds > 0


@gpu
def test_strided_weights_go_up_and_down(device: torch.device) -> None:
    """No synchronization, and a staging copy of torch's that nobody overwrites."""
    with cuda(device, seed=4) as lanes:
        (home, back) = lanes.buffers("wire", [300 * 200] * 2, torch.float32, "pinned")
        home.copy_(torch.arange(300 * 200))
        weight = torch.empty(200, 300, device=device).t()
        with synchronization_is_an_error():
            up = lanes.copy([weight], [home.view(300, 200)], "h2d", after=[lanes.compute()])
            lanes.wait_compute(up)
            weight.mul_(2)
            lanes.copy([back.view(300, 200)], [weight], "d2h", after=[lanes.compute()])
        lanes.synchronize()
        assert torch.equal(back, 2 * home)
