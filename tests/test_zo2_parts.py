"""Batches of every kind in parts, and how much each part counts."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from lightning_offload import zeroth_attaching
from lightning_offload.parts import IGNORED, parts_of, samples, weight_of
from tests.helpers import VOCAB
from tests.zo2 import ZLit, zfit, zo2


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def filled(made: Any) -> Any:
    made["x"], made["y"] = ROWS, ROWS[:, 0]
    return made


ROWS = torch.arange(15).reshape(5, 3)
BATCHES: dict[str, Any] = {
    "tensor": ROWS,
    "tuple": (ROWS, ROWS[:, 0]),
    "list": [ROWS, "text", ROWS[:, 0]],
    "named tuple": Pair(ROWS, ROWS[:, 0]),
    "dict": {"x": ROWS, "y": ROWS[:, 0], "scale": torch.tensor(2.0), "name": "text", "mask": torch.ones(4)},
    "defaultdict": filled(defaultdict(int)),
    "OrderedDict": filled(OrderedDict()),
    "UserDict": filled(UserDict()),
    "BatchEncoding": BatchEncoding({"x": ROWS, "y": ROWS[:, 0]}),
    "ModelOutput": BaseModelOutput(last_hidden_state=ROWS),
    "nested": UserDict({"in": {"x": (ROWS,)}, "out": UserDict({"y": ROWS[:, 0]})}),
}


def tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch] if batch.dim() and len(batch) != 4 else []
    inner = list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else []
    return [tensor for value in inner for tensor in tensors(value)]


@pytest.mark.parametrize("kind", BATCHES)
def test_every_kind_of_batch_is_cut(kind: str) -> None:
    batch = BATCHES[kind]
    before = [tensor.clone() for tensor in tensors(batch)]
    first, second = parts_of(batch, 2)
    assert type(first) is type(second) is type(batch)
    assert samples(batch) == 5
    for whole, kept, one, two in zip(tensors(batch), before, tensors(first), tensors(second), strict=True):
        assert torch.equal(whole, kept)
        assert (len(one), len(two)) == (2, 3)
        assert torch.equal(torch.cat([one, two]), whole)


def test_what_is_no_tensor_of_samples_is_in_every_part() -> None:
    for part in parts_of(BATCHES["dict"], 5):
        assert (part["scale"], part["name"], len(part["mask"])) == (2.0, "text", 4)


class Encoded(ZLit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes = {*getattr(self, "sizes", ()), len(batch["input_ids"])}
        return super().training_step(batch["input_ids"], batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader(list(super().train_dataloader()), batch_size=None, collate_fn=self.collate)

    def collate(self, tokens: Tensor) -> Any:
        return BatchEncoding({"input_ids": tokens})


class Wrapped:
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __getitem__(self, name: str) -> Tensor:
        return self.tokens


class Opaque(Encoded):
    def collate(self, tokens: Tensor) -> Any:
        return Wrapped(tokens)


def test_a_batch_that_cannot_be_cut_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(zeroth_attaching, "rank_zero_warn", said.append)
    zeroth_attaching._warn_whole.cache_clear()
    encoded, opaque = Encoded(), Opaque()
    for module in (encoded, opaque):
        zfit(module, zo2(micro_batches=2), max_epochs=1)
    assert (encoded.sizes, opaque.sizes) == ({1}, {2})
    (line,) = said
    assert "`micro_batches=2` has no effect: no tensor was found in a batch of type `Wrapped`" in line


# Weights


def test_a_part_counts_as_hugging_face_counts_it() -> None:
    """The weighted mean of the losses of parts is the loss of the batch."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    ids = torch.randint(0, VOCAB, (4, 6))
    labels = ids.clone()
    labels[0, 2:], labels[1, 0] = IGNORED, IGNORED
    batch = BatchEncoding({"input_ids": ids, "labels": labels})
    parts = parts_of(batch, 4)
    counts = [weight_of(part) for part in parts]
    assert counts == [1, 5, 5, 5]
    with torch.no_grad():
        losses = [model(**part).loss.item() for part in parts]
        whole = model(**batch).loss.item()
    assert sum(c * loss for c, loss in zip(counts, losses, strict=True)) / sum(counts) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        (torch.zeros(5, dtype=torch.int64), 5),  # of classes
        (torch.zeros(5, 1), 5),  # of a regression
        (torch.zeros(5, 2, 7, dtype=torch.int64), 5),  # of candidates, each scored as one
        (torch.full((5, 7), IGNORED), 1),
        ("text", 5),
    ],
    ids=["classes", "regression", "candidates", "none", "no tensor"],
)
def test_where_tokens_have_no_labels_samples_count(labels: Any, count: int) -> None:
    assert weight_of({"input_ids": ROWS, "labels": labels}) == count


def test_a_batch_without_tensors_counts_once() -> None:
    assert (samples("text"), weight_of("text"), parts_of("text", 3)) == (0, 1, ["text"])
