from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from lightning_offload.errors import PartitionError
from lightning_offload.memory.blocks import Unit, partition
from tests.zoo import LAYERS, ZOO, PlainBlock, first_tensor

BLOCKS = dict.fromkeys(ZOO, LAYERS) | {"albert": 1, "t5": 2 * LAYERS}
TIED_HEADS = {
    "opt": ("lm_head",),
    "opt_350m_like": ("lm_head",),
    "gpt2": ("lm_head",),
    "qwen3": ("lm_head",),
    "gemma2": ("lm_head",),
    "falcon": ("lm_head",),
    "bert": ("cls.predictions.decoder",),
    "albert": ("predictions.decoder",),
    "t5": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
}


class Wrapper(nn.Module):
    """As a LightningModule holds a model: under a name, and beside modules of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.metric_scale = nn.Linear(1, 1)

    def forward(self, **inputs: Tensor) -> object:
        return self.network(**inputs)


def assert_covers(model: nn.Module, units: list[Unit]) -> None:
    owned = [(name, parameter) for unit in units for name, parameter in unit.parameters.items()]
    expected = dict(model.named_parameters())
    assert len(owned) == len(expected)
    assert {name: id(parameter) for name, parameter in owned} == {n: id(p) for n, p in expected.items()}
    assert [unit.index for unit in units] == list(range(len(units)))
    assert sum(unit.numel for unit in units) == sum(parameter.numel() for parameter in model.parameters())
    modules = dict(model.named_modules())
    for unit in units:
        assert unit.parameters
        assert modules[unit.name] is unit.module is unit.entry_modules[0]
        assert len({id(module) for module in unit.entry_modules}) == len(unit.entry_modules)


def names(units: list[Unit]) -> list[str]:
    return [unit.name for unit in units]


def blocks_of(units: list[Unit]) -> list[str]:
    return [unit.name for unit in units if unit.is_block]


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_parameter_is_owned_once(name: str, wrapped: bool) -> None:
    model = ZOO[name]()[0]
    model = Wrapper(model) if wrapped else model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        units = partition(model)
    assert_covers(model, units)
    assert len(blocks_of(units)) == BLOCKS[name]


@pytest.mark.parametrize("name", ZOO)
def test_stem_before_blocks_before_head(name: str) -> None:
    units = partition(ZOO[name]()[0])
    assert not units[0].is_block
    is_block = [unit.is_block for unit in units]
    if name != "t5":  # the encoder's norm stands between its two stacks
        first = is_block.index(True)
        assert all(is_block[first : first + BLOCKS[name]])
    heads = {"gpt_neox": "lm_head", "llama": "lm_head", "mixtral": "lm_head", "phi": "lm_head", "vit": "classifier"}
    if name in heads:
        assert units[-1].name == heads[name]


@pytest.mark.parametrize("name", TIED_HEADS)
def test_the_owner_of_a_tied_weight_is_its_first_place_and_every_user_is_an_entry(name: str) -> None:
    model = ZOO[name]()[0]
    owner = partition(model)[0]
    users = tuple(model.get_submodule(path) for path in TIED_HEADS[name])
    assert owner.entry_modules == (owner.module, *users)


def test_untied_units_have_one_entry() -> None:
    assert all(unit.entry_modules == (unit.module,) for unit in partition(ZOO["llama"]()[0]))


@pytest.mark.parametrize("name", ZOO)
def test_forward_with_idle_hooks_equals_forward_without(name: str) -> None:
    model, inputs = ZOO[name]()
    plain = first_tensor(model(**inputs))
    entered: set[int] = set()
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, index=unit.index: entered.add(index))
        for unit in partition(model)
        for module in unit.entry_modules
    ]
    hooked = first_tensor(model(**inputs))
    assert torch.equal(plain, hooked)
    assert entered == {unit.index for unit in partition(model)}, "a unit's weights were read without its hook"
    for handle in handles:
        handle.remove()


def test_albert_is_one_unit_that_runs_many_times() -> None:
    model, inputs = ZOO["albert"]()
    (block,) = (unit for unit in partition(model) if unit.is_block)
    assert block.name == "albert.encoder.albert_layer_groups.0", "not the list inside it, which owns as much"
    calls: list[None] = []
    block.module.register_forward_hook(lambda *_: calls.append(None))
    model(**inputs)
    assert len(calls) == LAYERS


def test_one_layer_of_a_listed_class_is_found_by_its_list() -> None:
    model = ZOO["llama"]()[0]
    model.model.layers = model.model.layers[:1]
    assert blocks_of(partition(model)) == ["model.layers.0"]


def test_a_class_listed_as_unsplittable_that_occurs_once_is_no_block() -> None:
    model = ZOO["vit"]()[0]
    model._no_split_modules = ["ViTEmbeddings", "ViTLayer"]
    assert all("ViTLayer" in type(unit.module).__name__ for unit in partition(model) if unit.is_block)


def test_the_list_that_owns_most_wins_and_its_inner_lists_do_not() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Module()
    model.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(5))
    model.body = nn.ModuleList(Layer() for _ in range(2))
    assert blocks_of(partition(model)) == ["body.0", "body.1"]


def test_stem_and_head_of_a_sequential_are_no_blocks() -> None:
    assert blocks_of(partition(ZOO["sequential"]()[0])) == ["1", "2", "3"]


@pytest.mark.parametrize("blocks", [["body.0", "body.1"], ["PlainBlock"], [PlainBlock], "PlainBlock", PlainBlock])
def test_named_blocks_win(blocks: object) -> None:
    model = nn.Module()
    model.body = nn.ModuleList(PlainBlock(4) for _ in range(2))
    model.big = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    assert blocks_of(partition(model)) == ["big.0", "big.1", "big.2"]
    units = partition(model, blocks)
    assert blocks_of(units) == ["body.0", "body.1"]
    assert_covers(model, units)


def test_of_nested_blocks_the_outermost_wins() -> None:
    model = ZOO["sequential"]()[0]
    units = partition(model, [nn.Linear, PlainBlock])
    assert blocks_of(units) == ["0", "1", "2", "3", "5"]
    assert_covers(model, units)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["model.layer.0"], r"'model\.layer\.0'.*closest: 'model\.layers\.0'"),
        (["LlamaDecodrLayer"], r"'LlamaDecodrLayer'.*closest: 'LlamaDecoderLayer'"),
        ([nn.Conv3d], "'Conv3d'"),
        (["qqqq"], r"print\(model\)"),
        ([], "names nothing"),
        (["model.layers"], r"never called itself.*\['LlamaDecoderLayer'\]"),
    ],
)
def test_wrong_blocks_say_what_is_close(blocks: list[object], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        partition(ZOO["llama"]()[0], blocks)


def test_no_blocks_warns_once_and_works() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"Sequential has no repeated blocks.*3 modules.*blocks=\[") as caught:
        units = partition(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert names(units) == ["0", "1", "2"]


def test_no_parameters_is_refused() -> None:
    with pytest.raises(PartitionError, match="ReLU has no parameters"):
        partition(nn.ReLU())


def test_lazy_parameters_are_refused_by_name() -> None:
    with pytest.raises(PartitionError, match=r"'1\.weight' has no shape yet"):
        partition(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


@pytest.mark.parametrize("view", [lambda w: w.data, lambda w: w.data.t(), lambda w: w.data[1:]])
def test_two_parameters_over_one_memory_are_refused(view: object) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(view(model[0].weight))
    with pytest.raises(PartitionError, match=r"'0\.weight' and '1\.weight' share memory|'1\.weight' and '0\.weight'"):
        partition(model)


def test_disjoint_views_of_one_storage_are_fine() -> None:
    flat = torch.zeros(2, 16)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for layer, row in zip(model, flat, strict=True):
        layer.weight = nn.Parameter(row.view(4, 4))
    assert_covers(model, partition(model))


def test_meta_and_fake_models_split_as_real_ones() -> None:
    real = ZOO["llama"]()[0]
    expected = names(partition(real))
    assert names(partition(copy.deepcopy(real).to("meta"))) == expected
    mode = FakeTensorMode()
    fakes = {id(parameter): nn.Parameter(mode.from_tensor(parameter.data)) for parameter in real.parameters()}
    twin = copy.deepcopy(real, fakes)
    with mode:
        assert names(partition(twin)) == expected


class Wrapped(Tensor):
    """As quantised weights are: a tensor without memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default
        return cls(args[0].inner)


def test_wrapper_tensors_share_no_memory() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for layer in model:
        layer.weight = nn.Parameter(Wrapped(torch.zeros(4, 4)))
    assert_covers(model, partition(model))


def test_parameters_of_the_root_are_a_unit_of_the_root() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(3))
    model.body = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    units = partition(model)
    assert units[0].name == ""
    assert units[0].module is model
    assert list(units[0].parameters) == ["scale"]
    assert_covers(model, units)


class Holder(nn.Module):
    """Modules whose hooks would never see their parameters being read."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.zeros(2), torch.zeros(3)])
        self.keyed = nn.ParameterDict({"a": torch.zeros(4)})
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(x) + self.attention(x, x, x)[0]
        return x + self.keyed["a"] + self.listed[0].sum() + self.listed[1].sum()


def test_parameters_of_modules_that_are_never_called_belong_to_their_parent() -> None:
    model = nn.ModuleDict({"holder": Holder(), "body": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))})
    units = partition(model)
    assert names(units) == ["holder", "holder.attention", "holder.normed", "body.0", "body.1"]
    assert set(units[0].parameters) == {"holder.listed.0", "holder.listed.1", "holder.keyed.a"}
    assert "holder.attention.out_proj.weight" in units[1].parameters
    assert "holder.normed.parametrizations.weight.original0" in units[2].parameters
    assert_covers(model, units)


def test_a_layer_shared_by_two_blocks_is_owned_by_the_first_and_an_entry_of_it() -> None:
    model = nn.Sequential(PlainBlock(4), PlainBlock(4), PlainBlock(4))
    model[2].up = model[0].up
    units = partition(model)
    assert units[0].entry_modules == (model[0], model[0].up)
    assert units[2].entry_modules == (model[2],)
    assert_covers(model, units)


def test_a_weight_tied_across_blocks_makes_the_user_an_entry_of_the_owner() -> None:
    model = nn.Sequential(PlainBlock(4), PlainBlock(4))
    model[1].down.weight = model[0].down.weight
    units = partition(model)
    assert units[0].entry_modules == (model[0], model[1].down)
    assert "1.down.weight" not in units[1].parameters
    assert_covers(model, units)


def test_one_block_listed_twice_is_one_unit() -> None:
    block = PlainBlock(4)
    model = nn.Sequential(nn.Linear(4, 4), block, PlainBlock(4), block)
    assert blocks_of(partition(model)) == ["1", "2"]


def test_a_module_that_refers_to_its_parent_ends() -> None:
    model = nn.Sequential(PlainBlock(4), PlainBlock(4))
    model[1].add_module("root", model)
    units = partition(model)
    assert_covers(model, units)
    assert blocks_of(units) == ["0", "1"]


def test_of_a_compiled_block_the_wrapper_is_the_unit() -> None:
    model, inputs = ZOO["llama"]()
    plain = first_tensor(model(**inputs))
    layers = model.model.layers
    for index, layer in enumerate(list(layers)):
        layers[index] = torch.compile(layer, backend="eager")
    units = partition(model)
    assert_covers(model, units)
    assert [unit.module for unit in units if unit.is_block] == list(layers)
    calls: list[None] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(None))
    assert torch.equal(first_tensor(model(**inputs)), plain)
    assert len(calls) == LAYERS
