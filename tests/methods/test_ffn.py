"""Finding feed-forward networks: one per block in every family, and what is said where that fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.methods.ffn import find_ffns, input_of
from lightning_offload.text import TINY_PATH, CausalLM
from tests.families import FAMILIES
from tests.zoo import HIDDEN, LAYERS, ZOO

HOLDERS = {  # what the first one is, by family
    "opt": "model.decoder.layers.0",
    "opt_350m_like": "model.decoder.layers.0",
    "gpt2": "transformer.h.0.mlp",
    "gpt_neox": "gpt_neox.layers.0.mlp",
    "llama": "model.layers.0.mlp",
    "qwen3": "model.layers.0.mlp",
    "gemma2": "model.layers.0.mlp",
    "mixtral": "model.layers.0.mlp",
    "phi": "model.layers.0.mlp",
    "falcon": "transformer.h.0.mlp",
    "bloom": "transformer.h.0.mlp",
    "mpt": "transformer.blocks.0.ffn",
    "gptj": "transformer.h.0.mlp",
    "granitemoe": "model.layers.0.block_sparse_moe",
    "rwkv": "rwkv.blocks.0.feed_forward",
    "xglm": "model.layers.0",
    "distilbert": "distilbert.transformer.layer.0.ffn",
}


def family(name: str) -> nn.Module:
    return (ZOO | FAMILIES)[name]()[0]


@pytest.mark.parametrize("name", HOLDERS)
def test_one_in_each_block(name: str) -> None:
    model = family(name)
    ffns = find_ffns(model)
    assert [ffn.block for ffn in ffns] == list(range(LAYERS))
    assert ffns[0].path == HOLDERS[name]
    assert {ffn.hidden_size for ffn in ffns} == {HIDDEN}
    assert all(model.get_submodule(ffn.path) is ffn.holder for ffn in ffns)


@pytest.mark.parametrize("name", ["opt", "xglm"])
def test_a_pair_of_linears_is_entered_and_left_by_them(name: str) -> None:
    ffn = find_ffns(family(name))[0]
    assert (ffn.entry, ffn.exit) == (ffn.holder.fc1, ffn.holder.fc2)


def test_a_pair_inside_a_network_is_left_alone() -> None:
    ffn = find_ffns(family("phi"))[0]
    assert ffn.entry is ffn.exit is ffn.holder


@pytest.mark.parametrize("name", ["t5", "bart", "pegasus"])
def test_encoders_and_decoders(name: str) -> None:
    ffns = find_ffns(family(name))
    assert ["encoder" in ffn.path for ffn in ffns] == [True] * LAYERS + [False] * LAYERS
    assert [ffn.block for ffn in ffns] == list(range(2 * LAYERS))


def test_stages_around_blocks_are_no_blocks() -> None:
    class Stage(nn.Module):
        _no_split_modules = ("Block",)

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = nn.ModuleDict({"stages": nn.ModuleList([Stage(), Stage()])})
    assert [ffn.block_path for ffn in find_ffns(model, targets="net")] == [
        f"stages.{stage}.blocks.{block}" for stage in range(2) for block in range(2)
    ]


def test_a_block_that_runs_often_has_one() -> None:
    (ffn,) = find_ffns(family("albert"))
    assert (ffn.entry, ffn.exit) == (ffn.holder.ffn, ffn.holder.ffn_output)


def test_inside_a_lightning_module() -> None:
    ffns = find_ffns(CausalLM(path=str(TINY_PATH)))
    assert len(ffns) == len({ffn.block for ffn in ffns}) > 1


def test_inside_peft() -> None:
    pytest.importorskip("peft", reason="adapters inside PEFT's need peft")
    from peft import LoraConfig, get_peft_model

    for name, wrapped in (("opt", ["fc1", "q_proj"]), ("llama", ["gate_proj", "up_proj"])):
        model = get_peft_model(family(name), LoraConfig(target_modules=wrapped))
        ffns = find_ffns(model)
        assert [ffn.path for ffn in ffns] == [f"base_model.model.{ffn.path}" for ffn in find_ffns(family(name))]
        assert {ffn.hidden_size for ffn in ffns} == {HIDDEN}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x + self.attention.mlp(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))


def test_an_attention_may_own_one_too() -> None:
    model = Decoder()
    for block in model.layers:
        block.feed_forward = block.net
        del block.net
    assert [ffn.path for ffn in find_ffns(model)] == [f"layers.{index}.feed_forward" for index in range(3)]


@pytest.mark.parametrize("targets", ["net", ["net"], r"layers\.\d\.net", "layers.*net"])
def test_targets_override(targets: str | list[str]) -> None:
    assert [ffn.path for ffn in find_ffns(Decoder(), targets=targets)] == [f"layers.{index}.net" for index in range(3)]


@pytest.mark.parametrize(("layers", "blocks"), [("all", [0, 1, 2]), ([-1], [2]), ([2, 0, -3], [0, 2]), ((), [])])
def test_layers(layers: object, blocks: list[int]) -> None:
    if blocks:
        assert [ffn.block for ffn in find_ffns(family("llama"), layers=layers)] == blocks
    else:
        with pytest.raises(ValueError, match="layers="):
            find_ffns(family("llama"), layers=layers)


def test_what_is_wrong_is_said() -> None:
    model = Decoder()
    with pytest.raises(ValueError, match=r"blocks of class BertLayer.*targets="):
        find_ffns(family("bert"))
    with pytest.raises(ValueError, match=r"2 feed-forward networks .* 'layers.0': .*attention.mlp.*net.*targets="):
        find_ffns(model, targets=["net", "mlp"])
    with pytest.raises(ValueError, match=r"1 of 3 blocks, the first 'layers.1.net'; none in 'layers.0'.*layers=\[1\]"):
        find_ffns(model, targets="layers.1.net")
    with pytest.raises(ValueError, match=r"targets='\('.*regular expression"):
        find_ffns(model, targets="(")
    with pytest.raises(ValueError, match=r"layers=\[0, 3\].*\[3\].*-3 to 2"):
        find_ffns(model, layers=[0, 3])
    with pytest.raises(ValueError, match="layers='some'"):
        find_ffns(model, layers="some")
    with pytest.raises(ValueError, match=r"layers=3: pass 'all' or a list of indices"):
        find_ffns(model, layers=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"targets=5: pass the end of a path"):
        find_ffns(model, targets=5)  # type: ignore[arg-type]


def test_where_nothing_repeats_targets_are_the_blocks() -> None:
    model = nn.ModuleDict({"a": Block(), "b": Block()})
    ffns = find_ffns(model, targets="net")
    assert [(ffn.path, ffn.block, ffn.hidden_size) for ffn in ffns] == [("a.net", 0, 8), ("b.net", 1, 8)]


def test_x_is_the_first_argument_or_has_a_usual_name() -> None:
    x, other = torch.ones(1), torch.zeros(1)
    assert input_of((x, other), {}) is x
    assert input_of((), {"residual": other, "hidden_states": x}) is x
    with pytest.raises(TypeError, match="targets="):
        input_of((), {"residual": other})
