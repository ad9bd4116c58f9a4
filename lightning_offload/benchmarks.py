"""Measures what the README claims about this machine: ``python -m lightning_offload.benchmarks``.

Everything is interleaved in one run and given as medians and ratios: absolute times of a shared machine mean little.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.lanes import InlineLanes
from lightning_offload.methods.base import DTypes, Flight, Trained, Verdict
from lightning_offload.methods.host import HostOptimizer
from lightning_offload.methods.rules import frozen_groups, rule_for
from lightning_offload.strategies import FullOffloadStrategy

BYTES_FUSED = 28
"""Memory traffic of one AdamW step per parameter: gradient read, master and two moments read and written."""


def machine() -> str:
    """Processor, threads and versions, for a table's caption."""
    return (
        f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}"
    )


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each arm; every round runs every arm once, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            start = perf_counter()
            arm()
            if turn:
                times[name].append(perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def host_phase(numel: int = 100_000_000, rounds: int = 25) -> str:
    """The host's share of a step on ``numel`` parameters, beside torch's kernel and the memory it must move."""
    shapes = _shapes(numel)
    sweep = torch.ones(numel)
    arms = {
        "in-place sweep (8 B)": lambda: sweep.mul_(1.0),
        "torch AdamW fused, fp32": _torch_fused(shapes),
        "full, 32-true": _ours(shapes, torch.float32),
        "torch: up-cast, AdamW fused, down-cast": _torch_cast(shapes),
        "full, bf16-true": _ours(shapes, torch.bfloat16),
    }
    times = interleaved(arms, rounds)
    total = sum(shape.numel() for shape in shapes)
    bound = BYTES_FUSED / 8 * times["in-place sweep (8 B)"] * total / numel
    fused = times["torch AdamW fused, fp32"]
    rows = [
        f"| host phase, {total / 1e6:.0f} M parameters | ms | / torch fused | % of 28 B at that rate |",
        "|---|--:|--:|--:|",
    ]
    rows += [
        f"| {name} | {1e3 * seconds:.1f} | {seconds / fused:.2f} | {100 * bound / seconds:.0f} |"
        for name, seconds in times.items()
        if not name.startswith("in-place")
    ]
    rate = 8 * numel / times["in-place sweep (8 B)"] / 1e9
    return "\n".join([*rows, "", f"In-place sweep {rate:.1f} GB/s; medians of {rounds} interleaved rounds."])


def overhead(rounds: int = 4, steps: int = 6) -> str:
    """A whole training step under ``full_offload`` and under the plain Trainer: 20 M parameters, 8 x 256 tokens."""
    times: dict[str, list[float]] = {"plain Trainer": [], "full_offload": []}
    for _ in range(rounds):
        for name in times:
            strategy: Any = FullOffloadStrategy() if name == "full_offload" else "auto"
            module = _Decoder()
            L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=steps, **QUIET).fit(module)
            starts = module.starts[2:]  # without the steps that allocate
            times[name] += [after - before for before, after in pairwise(starts)]
    plain, ours = (median(values) for values in times.values())
    count = sum(p.numel() for p in _Decoder().parameters())
    return "\n".join(
        [
            f"| step, {count / 1e6:.1f} M parameters, 8 x 256 tokens, fp32 | ms | ratio |",
            "|---|--:|--:|",
            f"| plain Trainer, AdamW(fused=True) | {1e3 * plain:.0f} | 1.000 |",
            f"| full_offload | {1e3 * ours:.0f} | {ours / plain:.3f} |",
        ]
    )


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class _Decoder(L.LightningModule):
    """A decoder of torch's own layers, the size of the overhead row."""

    def __init__(self, vocab: int = 8192, width: int = 384, depth: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.starts: list[float] = []
        self.embed = nn.Embedding(vocab, width)
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.starts.append(perf_counter())
        hidden = self.layers(self.embed(batch), is_causal=True, mask=_causal(batch.shape[1]))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randint(0, 8192, (800, 256)), batch_size=8)  # type: ignore[arg-type]


def _causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def _shapes(numel: int) -> list[torch.Size]:
    """Weights of a decoder: square and 4-to-1 matrices."""
    width = 1024
    blocks = max(round(numel / (12 * width * width)), 1)
    block = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return [torch.Size(shape) for _ in range(blocks) for shape in block]


def _torch_fused(shapes: list[torch.Size]) -> Callable[[], Any]:
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return torch.optim.AdamW(weights, fused=True).step


def _torch_cast(shapes: list[torch.Size]) -> Callable[[], Any]:
    """What a loop that keeps fp32 masters does without a kernel of its own: cast, step, cast."""
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(weights, fused=True)
    wires = [torch.randn(shape).to(torch.bfloat16) for shape in shapes]
    for weight in weights:
        weight.grad = torch.empty_like(weight)

    def step() -> None:
        for weight, wire in zip(weights, wires, strict=True):
            assert weight.grad is not None
            weight.grad.copy_(wire)
        optimizer.step()
        with torch.no_grad():
            for weight, wire in zip(weights, wires, strict=True):
                wire.copy_(weight)

    return step


def _ours(shapes: list[torch.Size], dtype: torch.dtype) -> Callable[[], Any]:
    """The host functions of method full alone, unit by unit, without the copies."""
    module = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    named = dict(module.named_parameters())
    trained = []
    for index, (name, parameter) in enumerate(named.items()):
        unit = Unit(index // 6, f"block{index // 6}", module, True, named, ())
        trained.append(Trained(name, parameter, unit, Flight(index // 6), 0, index))
    host = HostOptimizer(
        trained,
        rule_for(optimizer),
        InlineLanes(HostMemory(pin=False)),
        DTypes(compute=dtype),
        accumulate_on_host=False,
        wants_norms=False,
    )
    return lambda: host.step_all(frozen_groups(optimizer), Verdict(None, False, 1))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=100_000_000, help="parameters of the host phase")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    print(machine(), host_phase(arguments.numel, arguments.rounds), overhead(), sep="\n\n")


if __name__ == "__main__":
    main()
