"""One training of the shipped model on text that it has not seen, and a file that remembers what came of each."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from lightning_offload.bench.measure import CannotRun
from lightning_offload.bench.quality_arms import QUALITY_ARMS
from lightning_offload.errors import NonFiniteError
from lightning_offload.text import TINY_PATH, load_corpus
from lightning_offload.text.batches import pack, spread
from lightning_offload.text.lines import read_lines
from lightning_offload.text.loading import build_network, load_tokenizer
from lightning_offload.text.loss import next_token_loss

_log = logging.getLogger(__name__)

EVERY = 10
"""Steps between two points of a curve."""

CURVE_TOKENS = 2048
"""Of the fixed part of the validation text that curves are measured on."""

CALIBRATION = 16
"""Sequences of the training text that nothing is trained on, for methods that look at a batch apart."""

WARM_UP = 0.05
"""Share of the steps on which the rate rises; then it falls, linearly."""

_EVALUATED_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that decides what a training comes to.

    Attributes:
        arm: Of ``QUALITY_ARMS``.
        settings: Of the arm.
        rate: Highest learning rate.
        seed: Of the batches, and of what the arm draws.
        steps: Optimizer steps; 0 measures the model as it is.
        batch: Sequences per step.
        length: Tokens of each.
        held_out_tokens: Of the text of the final loss, at most.
        split: Held-out text of the final loss: ``"val"`` chooses rates, ``"test"`` is reported.
        gsm8k: Folder of GSM8K's two files, to train on these; None is the shipped Python source.
    """

    arm: str
    settings: Mapping[str, Any]
    rate: float
    seed: int
    steps: int
    batch: int
    length: int
    held_out_tokens: int
    split: str
    gsm8k: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training came to.

    Attributes:
        loss: Mean over the tokens of the held-out split; infinite after too many steps that were not finite.
        curve: Steps done, and the loss on a fixed part of the validation text.
        step_s: Median seconds of a step.
        cpu_s: Processor seconds of everything.
        device_bytes: Beside the network's own weights and gradients.
        host_bytes: Of states on the host.
    """

    loss: float
    curve: list[tuple[int, float]]
    step_s: float
    cpu_s: float
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Text:
    """Packed sequences, (count, length) each."""

    train: Tensor
    val: Tensor
    test: Tensor


@cache
def read_text(length: int, gsm8k: str | None) -> Text:
    """Training text, and two halves of the held-out documents.

    Raises:
        DataError: A file of GSM8K that is not there.
    """
    tokenizer = load_tokenizer(None, TINY_PATH)

    def packed(documents: list[str]) -> Tensor:
        ids = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        return pack(ids, end=tokenizer.eos_token_id, length=length)

    train, held_out = map(packed, _documents(gsm8k))
    half = len(held_out) // 2
    return Text(train, held_out[:half], held_out[half:])


def _documents(gsm8k: str | None) -> tuple[list[str], list[str]]:
    if gsm8k is None:
        return load_corpus("code", "train"), load_corpus("code", "heldout")
    train, test = (
        [f"{line.row['question']}\n{line.row['answer']}" for line in read_lines(Path(gsm8k) / f"{name}.jsonl")]
        for name in ("train", "test")
    )
    return train, test


@cache
def pretrained() -> Any:
    """The shipped model; copy it before it is trained."""
    network = build_network(path=TINY_PATH, config=None, init="pretrained", dtype="float32")
    network.config._attn_implementation = "eager"  # at this size faster than the fused kernel's backward
    return network


def train(run: Run) -> Result:
    """Train on one thread, in bf16 autocast; the same for the same ``Run``."""
    with one_thread():
        begun = process_time()
        torch.manual_seed(run.seed)
        text = read_text(run.length, run.gsm8k)
        network = deepcopy(pretrained())
        fit = QUALITY_ARMS[run.arm].make(network, run.rate, **run.settings)
        part = spread(text.val, CURVE_TOKENS)
        curve, seconds = [(0, held_out_loss(network, part))], []
        try:
            for step, tokens in enumerate(_batches(text.train[CALIBRATION:], run), 1):
                start = perf_counter()
                for group in fit.optimizer.param_groups:
                    group["lr"] = run.rate * rate_factor(step, run.steps)
                fit.step(partial(_loss, network, tokens), partial(_loss, network, text.train[:CALIBRATION]))
                seconds.append(perf_counter() - start)
                if step % EVERY == 0 or step == run.steps:
                    fit.settle()
                    curve.append((step, held_out_loss(network, part)))
            final = text.val if run.split == "val" else text.test
            loss = held_out_loss(network, spread(final, run.held_out_tokens))
        except NonFiniteError:
            loss = float("inf")
        return Result(
            loss=loss,
            curve=curve,
            step_s=median(seconds or [0.0]),
            cpu_s=process_time() - begun,
            device_bytes=fit.device_bytes,
            host_bytes=fit.host_bytes,
        )


def _batches(sequences: Tensor, run: Run) -> Iterator[Tensor]:
    """Every step its own sequences, in an order drawn by the seed; what there is comes again when it is used up."""
    if not len(sequences) and run.steps:
        raise CannotRun(f"the text has no more than the {CALIBRATION} sequences that are kept for calibration")
    generator = torch.Generator().manual_seed(run.seed)
    wanted, order = run.steps * run.batch, torch.empty(0, dtype=torch.int64)
    while len(order) < wanted:
        order = torch.cat([order, torch.randperm(len(sequences), generator=generator)])
    for start in range(0, wanted, run.batch):
        yield sequences[order[start : start + run.batch]]


def rate_factor(step: int, steps: int) -> float:
    """Share of the highest rate that step 1, 2, ... takes: linearly up, then linearly down to almost nothing."""
    return min(step / (WARM_UP * steps + 1), (steps + 1 - step) / steps)


def _loss(network: Any, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return next_token_loss(network, {"input_ids": tokens, "labels": tokens}, chunk_tokens=0).mean


@torch.no_grad()
def held_out_loss(network: Any, sequences: Tensor) -> float:
    """Mean over all tokens but the first of each sequence."""
    count = max(_EVALUATED_TOKENS // sequences.shape[1], 1)
    parts = [sequences[start : start + count] for start in range(0, len(sequences), count)]
    return sum(float(_loss(network, part)) * len(part) for part in parts) / len(sequences)


@contextmanager
def one_thread() -> Iterator[None]:
    """As the processes beside this one do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Cache:
    """A line of JSON per finished run, so that a bench that was interrupted goes on; several processes may append.

    Args:
        folder: Made where it is not there.
        trainer: What takes a run to its result; ``train`` by default.
        kind: Of that result.
    """

    def __init__(
        self, folder: Path, trainer: Callable[[Any], Result] | None = None, kind: type[Result] = Result
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self._train, self._kind = folder / "quality.jsonl", trainer or train, kind

    def result(self, run: Any) -> Any:
        """Of this run, a dataclass, in ``kind``: from the file, or trained now."""
        found = self._read(run)
        if found is None:
            found = self._train(run)
            _log.info("%s: %.4f in %.0f s, lr %g, seed %d", run.arm, found.loss, found.cpu_s, run.rate, run.seed)
            with self.file.open("a") as file:
                file.write(json.dumps({"run": asdict(run), "result": asdict(found)}) + "\n")
        return found

    def _read(self, run: Any) -> Result | None:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        wanted = asdict(run)
        for line in map(json.loads, lines):
            if line["run"] == wanted:
                curve = [(step, loss) for step, loss in line["result"].pop("curve")]
                return self._kind(curve=curve, **line["result"])
        return None
