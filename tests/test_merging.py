"""Adapters that become a part of the feed-forward networks beside them, and those that cannot."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_offload import export_to_hf, merge_meft_adapter
from lightning_offload.errors import OffloadError
from lightning_offload.methods.sparse_adapter import attach_parameters
from tests.families import FAMILIES
from tests.meft import adapted as adapted_net
from tests.test_adapters import Around, has_adapters, logits, wake
from tests.zoo import ZOO

BUILD = ZOO | FAMILIES
DENSE: dict[str, Any] = {"width": 24, "experts": 1, "active_experts": 1, "top_k": 24, "gate": "none"}


def adapted(name: str = "opt", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = BUILD[name]()[0].to(dtype)
    attach_parameters(model, dtype=torch.float32, **{**DENSE, **settings})
    wake(model)
    return model


def worst(model: Any, expected: torch.Tensor, name: str = "opt") -> float:
    """The largest difference of a logit, by the largest logit."""
    return float((logits(model, name) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 4e-2)]
)
@pytest.mark.parametrize("name", ["opt", "opt_350m_like", "t5"])
def test_the_merged_model_gives_the_logits_of_before(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = adapted(name, dtype)
    expected = logits(model, name)
    assert worst(BUILD[name]()[0].to(dtype), expected, name) > 2 * tolerance
    assert merge_meft_adapter(model) is model
    assert not has_adapters(model)
    assert worst(model, expected, name) <= tolerance
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("settings", [{"scope": "union"}, {"experts": 6, "active_experts": 6}])
def test_all_rows_of_all_experts_are_as_good(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    expected = logits(model)
    assert worst(merge_meft_adapter(model), expected) <= 2e-6


def test_it_is_a_stock_model_of_wider_networks(tmp_path: Path) -> None:
    module = Around(BUILD["opt"]()[0])
    attach_parameters(module, **DENSE)
    wake(module)
    network: Any = module.language["model"]
    expected, before = logits(network), network.config.ffn_dim
    merge_meft_adapter(module)
    assert network.config.ffn_dim == before + 24
    layer = network.model.decoder.layers[0]
    assert (layer.fc1.out_features, layer.fc2.in_features) == (before + 24, before + 24)
    reloaded = AutoModelForCausalLM.from_pretrained(export_to_hf(network, tmp_path / "hf"))
    assert worst(reloaded, expected) <= 2e-6
    with torch.no_grad():
        prompt = torch.tensor([[5, 9, 2]])
        assert torch.equal(
            *(m.generate(input_ids=prompt, max_new_tokens=5, do_sample=False) for m in (network, reloaded))
        )


def test_every_row_for_every_token_only_if_asked_for() -> None:
    model = adapted(top_k=5, experts=6, active_experts=2)
    with pytest.raises(OffloadError, match=r"top_k=5 of width=24 rows and 2 of 6 experts.*Pass dense=True.*top_k=24"):
        merge_meft_adapter(model)
    sparse = logits(model)
    merge_meft_adapter(model, dense=True)
    assert worst(model, logits(adapted())) <= 2e-6
    assert worst(model, sparse) > 1e-3


class ReLU6(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, 0.0, 1e-3)


def hides(model: Any) -> None:
    """Something between the layers that has no name."""
    model.model.decoder.layers[1].activation_fn = ReLU6()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "opt",
            {"gate": "logit"},
            r"gate='logit' cannot be merged: the router's logit.*variant='paper' or gate='none'",
        ),
        ("llama", {}, r"`model.layers.0.mlp` is no ReLU network of two.*gate_proj \(Linear\), up_proj.*`save_meft_ad"),
        ("llama", {"top_k": 5}, r"`model.layers.0.mlp` is no ReLU network"),
        ("phi", {"gate": "logit"}, r"`model.layers.0.mlp` is no ReLU network"),
        ("phi", {}, r"`model.layers.0.mlp` is no ReLU network.*activation_fn \(NewGELUActivation\)"),
        ("gpt2", {}, r"`transformer.h.0.mlp` is no ReLU network.*c_fc \(Conv1D\)"),
        (
            "opt",
            {"layers": [0, 2]},
            r"config of OPTForCausalLM has no words.*beside 2 feed-forward networks.*one width",
        ),
    ],
)
def test_what_is_no_part_of_the_network_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    model = adapted(name, **settings)
    check_refused(model, message)


def test_networks_are_looked_through_not_believed() -> None:
    model = adapted()
    hides(model)
    check_refused(model, r"`model.decoder.layers.1` is no ReLU network.*activation_fn \(ReLU6\)")


def check_refused(model: Any, message: str) -> None:
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(OffloadError, match=message):
        merge_meft_adapter(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not model.training


def test_without_adapters_or_a_config_there_is_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="this OPTForCausalLM has no adapters to merge"):
        merge_meft_adapter(BUILD["opt"]()[0])
    net = adapted_net(gate="none")
    with pytest.raises(TypeError, match=r"merging needs a transformers model, .*; got a FFNNet"):
        merge_meft_adapter(net)
