"""Noise on a CUDA device: torch's form and the fused kernel have the CPU's bits; MeZO's sequence has random access."""

from __future__ import annotations

import pytest
import torch

from lightning_offload.numerics.mezo import MezoSequence
from lightning_offload.numerics.noise import LANES, TILE, Distribution, Draw, noise, random_bits
from lightning_offload.numerics.zeroth import Copy, Update, advance_, has_triton
from tests.gpu.test_full_gpu import device
from tests.numerics.kernels import everything

__all__ = ["device"]  # a fixture
DRAW = Draw(42, 3, 7, 1)


@pytest.mark.gpu
def test_the_kernel_has_the_bits_of_the_torch_form(device: torch.device) -> None:
    if not has_triton():
        pytest.skip("needs Triton")
    everything(device)


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", ["popcount", "rademacher"])
def test_the_torch_form_has_the_bits_of_the_cpu(distribution: Distribution, device: torch.device) -> None:
    for start in (0, 5, TILE - 300, 2**33 - 300):
        on_cpu = noise(DRAW, start, 5000, distribution, device="cpu")
        assert torch.equal(noise(DRAW, start, 5000, distribution, device=device).cpu(), on_cpu)
    assert torch.equal(random_bits(DRAW, 3, 5000, device=device).cpu(), random_bits(DRAW, 3, 5000, device="cpu"))


@pytest.mark.gpu
def test_slices_of_gaussian_noise_and_its_distance_from_the_cpu(device: torch.device) -> None:
    whole = noise(DRAW, 0, TILE + 5000, "gaussian", device=device)
    for start in (1, LANES["gaussian"] * 16 + 3, TILE - 7):
        assert torch.equal(noise(DRAW, start, 4000, "gaussian", device=device), whole[start : start + 4000])
    assert (whole.cpu() - noise(DRAW, 0, TILE + 5000, "gaussian", device="cpu")).abs().max() < 4e-6


@pytest.mark.gpu
def test_a_visit_takes_no_memory_on_the_device(device: torch.device) -> None:
    if not has_triton():
        pytest.skip("needs Triton")
    weight = torch.zeros(2**24, dtype=torch.bfloat16, device=device)
    copies = [Copy(scale, torch.empty_like(weight)) for scale in (1e-3, -1e-3)]
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        advance_(weight, [Update(DRAW, 1.0, 1e-3, 0.1)], DRAW, copies, "popcount", "stochastic")
        assert torch.cuda.max_memory_allocated() == held


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mezo_in_any_order(dtype: torch.dtype, device: torch.device) -> None:
    shapes = [((33, 7), dtype), ((3,), dtype), ((2048, 1024), dtype), ((), dtype), ((129,), dtype)]
    generator = torch.Generator(device).manual_seed(11)
    expected = [torch.normal(0.0, 1.0, s, generator=generator, dtype=t, device=device) for s, t in shapes]
    sequence = MezoSequence(shapes, device)
    for place in (4, 2, 0, 3, 1, 2):
        assert torch.equal(sequence.z(11, place), expected[place])
        sequence.z(12, place)
    assert torch.equal(sequence.states(11)[-1], generator.get_state())
