from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_offload.memory.promises import bring, is_promised, parameters_on_meta, promise, was_promised


def late(dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(3, 2, dtype=dtype)


def test_values_come_into_the_object_that_everybody_holds() -> None:
    layer = late(torch.bfloat16)
    weight, tied = layer.weight, nn.Linear(3, 2)
    weight.tag, tied.weight = "kept", weight
    optimizer = torch.optim.SGD([weight.requires_grad_(False)], lr=0.1)
    promise(weight, lambda: torch.arange(6.0).view(2, 3))
    assert is_promised(weight)
    with torch.inference_mode():
        bring(weight)
    assert layer.weight is tied.weight is optimizer.param_groups[0]["params"][0] is weight
    assert torch.equal(weight, torch.arange(6.0).view(2, 3).bfloat16())
    assert (weight.dtype, weight.requires_grad, weight.tag) == (torch.bfloat16, False, "kept")
    assert not weight.is_inference()
    assert not is_promised(weight)
    assert was_promised(weight)


def test_values_are_owned_and_read_once() -> None:
    weight, source, reads = late().weight, torch.ones(2, 3), []
    promise(weight, lambda: reads.append(1) or source)
    bring(weight)
    bring(weight)
    source.zero_()
    assert reads == [1]
    assert torch.equal(weight, torch.ones(2, 3))


def test_without_a_promise_nothing_is_done() -> None:
    layer, real = late(), nn.Linear(3, 2)
    before = real.weight.data_ptr()
    for parameter in (layer.weight, real.weight):
        bring(parameter)
    assert layer.weight.is_meta
    assert real.weight.data_ptr() == before
    assert not was_promised(layer.weight)


def test_a_reading_that_failed_is_tried_again() -> None:
    weight, values = late().weight, []
    promise(weight, lambda: values[0])
    with pytest.raises(IndexError):
        bring(weight)
    values.append(torch.ones(2, 3))
    bring(weight)
    assert not weight.is_meta


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.embed = nn.Embedding(5, 4, padding_idx=1)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.none = nn.Linear(4, 4, bias=False)
        self.rnn = nn.LSTM(4, 4)
        self.register_buffer("angles", torch.arange(3.0), persistent=False)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.frozen.tag = 3


def test_parameters_alone_are_made_on_meta() -> None:
    with parameters_on_meta(), torch.device("cpu"):
        part = Part()
    assert all(parameter.is_meta for parameter in part.parameters())
    assert part.head.weight is part.embed.weight
    assert (part.frozen.requires_grad, part.frozen.tag, part.none.bias) == (False, 3, None)
    assert torch.equal(part.angles, torch.arange(3.0))
    assert torch.equal(part.norm.running_var, torch.ones(4))
    assert not any(parameter.is_meta for parameter in Part().parameters())


def test_an_exception_ends_it_too() -> None:
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta
