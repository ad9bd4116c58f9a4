"""Adapters as folders: written, loaded onto stock models, and refused where they do not belong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_offload import export_to_hf, load_meft_adapter, save_meft_adapter
from lightning_offload.adapters import CONFIG, WEIGHTS, fingerprint
from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.methods.sparse_adapter import SparseAdapter, attach_parameters
from tests.families import FAMILIES
from tests.meft import FFNNet, tokens_of
from tests.meft import adapted as adapted_net
from tests.zoo import HIDDEN, LAYERS, ZOO

BUILD = ZOO | FAMILIES
SETTINGS: dict[str, Any] = {"width": 24, "experts": 6, "active_experts": 2, "top_k": 5}


def wake(model: nn.Module) -> None:
    """Values that are not zero, so that the adapters do something."""
    for index, adapter in enumerate(part for part in model.modules() if isinstance(part, SparseAdapter)):
        nn.init.normal_(adapter.values, std=0.5, generator=torch.Generator().manual_seed(index))


def adapted(name: str = "llama", **settings: Any) -> Any:
    model = BUILD[name]()[0]
    attach_parameters(model, **{**SETTINGS, **settings})
    wake(model)
    return model


def stock(name: str = "llama") -> Any:
    return BUILD[name]()[0]


def has_adapters(model: nn.Module) -> bool:
    return any(isinstance(part, SparseAdapter) for part in model.modules())


@torch.no_grad()
def logits(model: Any, name: str = "llama") -> torch.Tensor:
    return model(**BUILD[name]()[1]).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_meft_adapter(adapted(), tmp_path / "adapter")


def edit(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


@pytest.mark.parametrize("scope", ["token", "union"])
@pytest.mark.parametrize("gate", ["logit", "none"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mixtral", "t5"])
def test_a_stock_model_gives_the_same_bits(name: str, gate: str, scope: str, tmp_path: Path) -> None:
    model = adapted(name, gate=gate, scope=scope)
    written = save_meft_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert sorted(p.name for p in written.iterdir()) == [CONFIG, WEIGHTS]
    loaded = stock(name)
    assert not torch.equal(logits(loaded, name), logits(model, name))
    assert load_meft_adapter(loaded, written) is loaded
    assert torch.equal(logits(loaded, name), logits(model, name))
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_generation_is_that_of_the_trained_model(folder: Path) -> None:
    prompt = {"input_ids": torch.tensor([[5, 9, 2, 7]]), "max_new_tokens": 12, "do_sample": False}
    trained, base = (model.generate(**prompt) for model in (adapted(), stock()))
    assert not torch.equal(trained, base)
    loaded = load_meft_adapter(stock(), folder)
    assert not loaded.training
    assert torch.equal(loaded.generate(**prompt), trained)


def test_files_and_names_are_those_of_peft(tmp_path: Path) -> None:
    written = save_meft_adapter(adapted("opt", seed=3), tmp_path / "adapter")
    tensors = load_file(written / WEIGHTS)
    paths = [f"model.decoder.layers.{n}" for n in range(LAYERS)]
    shapes = {"keys": (24, HIDDEN), "values": (24, HIDDEN), "router": (6, HIDDEN)}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"base_model.model.{path}.meft.{name}": shape for path in paths for name, shape in shapes.items()
    }
    config = json.loads((written / CONFIG).read_text())
    assert config["peft_type"] == "MEFT"
    assert config["target_modules"] == paths
    assert {name: config[name] for name in SETTINGS} == SETTINGS
    assert (config["gate"], config["scope"], config["seed"]) == ("logit", "token", 3)
    assert (config["dtype"], config["base_dtype"], config["base_class"]) == ("float32", "float32", "OPTForCausalLM")


def test_peft_itself_refuses_the_type(folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="what PEFT says of the folder")
    model = stock()
    with pytest.raises(KeyError, match="MEFT"):
        peft.PeftModel.from_pretrained(model, folder)
    assert not has_adapters(model)


class Around(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.language = nn.ModuleDict({"model": network})


@pytest.mark.parametrize(
    "where", [{"layers": [0, -1]}, {"layers": [1]}, {"targets": r".*layers\.[01]\.mlp", "layers": [0, 1]}]
)
def test_some_layers_of_a_model_inside_a_module(where: dict[str, Any], tmp_path: Path) -> None:
    module = Around(stock())
    attach_parameters(module, **SETTINGS, **where)
    wake(module)
    written = save_meft_adapter(module, tmp_path / "adapter")
    assert all(name.startswith("base_model.model.model.layers.") for name in load_file(written / WEIGHTS))
    expected = logits(module.language["model"])
    assert torch.equal(logits(load_meft_adapter(stock(), written)), expected)
    assert torch.equal(logits(load_meft_adapter(Around(stock()), written).language["model"]), expected)


def test_a_plain_model_has_adapters_too(tmp_path: Path) -> None:
    net, tokens = adapted_net(), tokens_of(0)
    loaded = load_meft_adapter(FFNNet(), save_meft_adapter(net, tmp_path / "adapter"))
    assert torch.equal(loaded(tokens), net(tokens))


def test_a_compiled_block_has_the_names_of_a_plain_one(tmp_path: Path) -> None:
    def compiled() -> Any:
        model = stock()
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
        return model

    model = compiled()
    attach_parameters(model, **SETTINGS)
    wake(model)
    written = save_meft_adapter(model, tmp_path / "adapter")
    assert fingerprint(compiled(), torch.float32) == fingerprint(stock(), torch.float32)
    torch.testing.assert_close(logits(load_meft_adapter(stock(), written)), logits(model))
    again = load_meft_adapter(compiled(), written)
    assert torch.equal(again.model.layers[1]._orig_mod.mlp.meft.keys, model.model.layers[1]._orig_mod.mlp.meft.keys)


def test_rows_are_stored_as_they_are_or_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = stock().bfloat16()
    attach_parameters(model, dtype=torch.float32, **SETTINGS)
    wake(model)
    for part in model.modules():
        if isinstance(part, SparseAdapter):
            part.router.data = part.router.data.bfloat16()  # as bf16-true keeps routers
    masters = load_meft_adapter(stock().bfloat16(), save_meft_adapter(model, tmp_path / "masters"))
    kinds = {n.rpartition(".")[2]: p.dtype for n, p in masters.named_parameters() if ".meft." in n}
    assert kinds == {"keys": torch.float32, "values": torch.float32, "router": torch.bfloat16}
    assert torch.equal(logits(masters), logits(model))
    small = save_meft_adapter(model, tmp_path / "small", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(small / WEIGHTS).values()} == {torch.bfloat16}
    assert torch.equal(logits(load_meft_adapter(stock().bfloat16(), small)), logits(model))  # computed is in bfloat16
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("keys")} == {torch.float32}


def test_loading_again_writes_into_the_parameters_that_are_there(folder: Path) -> None:
    model = adapted(width=24)
    held = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in held:
            parameter.zero_()
    load_meft_adapter(model, folder)
    assert all(p is q for p, q in zip(held, (p for p in model.parameters() if p.requires_grad), strict=True))
    assert torch.equal(logits(model), logits(adapted()))
    with pytest.raises(ValueError, match=r"top_k=5, but adapters with top_k=6 are attached"):
        load_meft_adapter(adapted(top_k=6), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_may_be_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = stock().to(dtype)
    attach_parameters(model, **SETTINGS)
    written = save_meft_adapter(model, tmp_path / "adapter")
    for other in (torch.float32, torch.bfloat16):
        assert has_adapters(load_meft_adapter(stock().to(other), written))


def changed(change: Callable[[Any], object]) -> Any:
    model = stock()
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(
    "base",
    [
        lambda: changed(lambda m: m.model.layers[1].self_attn.v_proj.weight.mul_(1.01)),
        lambda: changed(lambda m: m.model.norm.weight.add_(0.1)),
        lambda: changed(lambda m: m.resize_token_embeddings(104)),
        lambda: stock("qwen3"),
    ],
    ids=["attention", "norm", "vocabulary", "family"],
)
def test_another_base_is_refused_and_left_alone(base: Callable[[], Any], folder: Path) -> None:
    model = base()
    names = list(model.state_dict())
    with pytest.raises(
        CheckpointError,
        match=r"'.*adapter' was trained beside another model: LlamaForCausalLM None in float32, of hash \w{32}; this "
        r"\w+ '?\w*'? has \w{32}.*check_base=False",
    ):
        load_meft_adapter(model, folder)
    assert list(model.state_dict()) == names
    assert any(p.requires_grad for p in model.parameters())
    assert has_adapters(load_meft_adapter(model, folder, check_base=False))


def test_a_model_that_has_no_place_for_it(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"belongs beside `model.layers.0.mlp`, which this GPT2LMHeadModel does not"
    ):
        load_meft_adapter(stock("gpt2"), folder, check_base=False)
    wide = type(stock())(type(stock().config)(**{**stock().config.to_dict(), "hidden_size": 64}))
    with pytest.raises(CheckpointError, match=r"`base_.*0.mlp.meft.keys` is \(24, 32\) in the ch.* and \(24, 64\) in"):
        load_meft_adapter(wide, folder, check_base=False)
    assert not has_adapters(wide)


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"base_model.model.model.layers.1.mlp.meft.{name}"]
    save_file(tensors, folder / WEIGHTS)


def more(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}, folder / WEIGHTS)


def overwritten(folder: Path) -> None:
    """Of right length, with values that are none."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-10_000:] = b"\xff" * 10_000
    (folder / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), r"no adapter at .*: it has no adapter_model.safetensors"),
        (lambda f: (f / CONFIG).unlink(), r"no adapter at .*: it has no adapter_config.json"),
        (lambda f: (f / CONFIG).write_text("{"), r"adapter_config.json' cannot be read: Expecting"),
        (lambda f: (f / CONFIG).write_text("[]"), r"has peft_type=None, not 'MEFT'"),
        (lambda f: edit(f, peft_type="LORA"), r"has peft_type='LORA', not 'MEFT': `peft.PeftModel.from_pretrained`"),
        (lambda f: edit(f, top_k=...), r"has no 'top_k': it is damaged, or of another version"),
        (lambda f: edit(f, gate="sigmoid"), r"has gate='sigmoid': it is damaged, or of another version"),
        (lambda f: edit(f, top_k=0), r"has top_k=0: it is damaged"),
        (lambda f: edit(f, width="24"), r"has width='24': it is damaged"),
        (lambda f: edit(f, key_std="wide"), r"has key_std='wide': it is damaged"),
        (lambda f: edit(f, router_init="zero"), r"has router_init='zero': it is damaged"),
        (lambda f: edit(f, seed=0.5), r"has seed=0.5: it is damaged"),
        (lambda f: edit(f, target_modules="model"), r"has target_modules='model': it is damaged"),
        (lambda f: edit(f, target_modules=[]), r"has target_modules=\[\]: it is damaged"),
        (lambda f: edit(f, target_modules=[""]), r"has target_modules=\[''\]: it is damaged"),
        (lambda f: edit(f, base_dtype="float31"), r"has base_dtype='float31': it is damaged"),
        (lambda f: edit(f, experts=5), r"is damaged: `width` must be a multiple of experts=5, got 24"),
        (lambda f: edit(f, width=48), r"keys` is \(24, 32\) in the checkpoint and \(48, 32\) in the model"),
        (lambda f: edit(f, experts=4), r"router` is \(6, 32\) in the checkpoint and \(4, 32\) in the model"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), r"safetensors' is damaged, copy it"),
        (overwritten, r"The adapter in '.*adapter' is damaged, copy it again: the values in adapter_model.safetensors"),
        (lambda f: without(f, "values"), r"layers.1.mlp.meft.values` is absent in the checkpoint"),
        (more, r"`base_model.model.lm_head.weight` is \(2,\) in the checkpoint and absent in the model"),
    ],
)
def test_a_folder_that_is_none_or_damaged(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    damage(folder)
    model = stock()
    with pytest.raises(CheckpointError, match=message):
        load_meft_adapter(model, folder)
    assert not has_adapters(model)


def test_a_folder_without_a_hash_loads_whatever_its_values(folder: Path) -> None:
    edit(folder, weights_hash=...)
    tensors = {name: value + 1 for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    state = load_meft_adapter(stock(), folder).state_dict()
    assert all(torch.equal(state[name.removeprefix("base_model.model.")], value) for name, value in tensors.items())


def test_no_folder_and_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter at '.*nowhere': there is no such folder"):
        load_meft_adapter(stock(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"this LlamaForCausalLM has no adapters to save"):
        save_meft_adapter(stock(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_only_an_adapter_is_replaced(folder: Path) -> None:
    before = (folder / WEIGHTS).read_bytes()
    save_meft_adapter(adapted(top_k=6), folder)
    assert json.loads((folder / CONFIG).read_text())["top_k"] == 6
    assert (folder / WEIGHTS).read_bytes() == before
    (folder.parent / "thesis").mkdir()
    (folder.parent / "thesis" / "chapter.txt").touch()
    with pytest.raises(FileExistsError, match=r"thesis' exists and is no adapter; choose another folder"):
        save_meft_adapter(adapted(), folder.parent / "thesis")


def test_logits_that_differ_or_are_not_finite_leave_the_old_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged = adapted()
    nn.init.constant_(diverged.model.layers[0].mlp.meft.values, float("nan"))
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(OffloadError, match="logits are not finite"):
        save_meft_adapter(diverged, folder)

    def damage(tensors: dict[str, torch.Tensor], file: Path, **options: Any) -> None:
        save_file({name: t + 1 for name, t in tensors.items()}, file, **options)

    monkeypatch.setattr("safetensors.torch.save_file", damage)
    with pytest.raises(CheckpointError, match="is damaged, copy it again"):
        save_meft_adapter(adapted(), folder)
    monkeypatch.setattr("lightning_offload.adapters._hash", lambda tensors: "")
    with pytest.raises(OffloadError, match=r"exported adapter differs after reloading: logit -?[\d.]+ became"):
        save_meft_adapter(adapted(), folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"]


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = adapted().train()
    model.model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    save_meft_adapter(model, tmp_path / "adapter")
    assert model.training
    assert not model.model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n in before if ".meft." in n]


def test_no_hugging_face_folder_is_written_of_a_model_with_adapters(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match=r"LlamaForCausalLM has sparse adapters.*`save_meft_adapter.*`merge_meft_"):
        export_to_hf(adapted(), tmp_path / "hf")
    assert not list(tmp_path.iterdir())
