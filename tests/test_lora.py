"""LoRA through the offload methods: what is saved is what PEFT loads; merged it is a stock model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from lightning_offload import (
    FullOffloadStrategy,
    LSPOffloadStrategy,
    ZO2OffloadStrategy,
    export_to_hf,
    lora,
    save_peft_adapter,
)
from lightning_offload.errors import OffloadError
from lightning_offload.text import CausalLM, SequenceClassifier
from tests.meft_lit import meft
from tests.plain import trainer

SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SHAPE, tie_word_embeddings=True, pad_token_id=0)
GPT2 = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.arange(24).view(2, 12)
METHODS = {
    "full": lambda: FullOffloadStrategy(min_numel=0),
    "lsp": lambda: LSPOffloadStrategy(min_numel=0, nnz=2, seed=1),
    "zo2": lambda: ZO2OffloadStrategy(min_numel=0, seed=1),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2)


def module(base: Path, method: str = "full", **settings: Any) -> CausalLM:
    torch.manual_seed(1)
    optimizer = {"optimizer": sgd} if method == "zo2" else {}
    return CausalLM(path=str(base), lora={"rank": 4, **settings}, **optimizer)


def batches() -> DataLoader[Any]:
    """The same each time: Lightning does not restore the loader's place."""
    return DataLoader([{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 4)


def fit(model: L.LightningModule, method: str, steps: int = 4, ckpt: Path | None = None, **options: Any) -> L.Trainer:
    run = trainer(METHODS[method](), steps=steps, **options)
    run.fit(model, batches(), ckpt_path=ckpt)
    return run


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def made_anything_of(network: nn.Module) -> None:
    """As if it had been trained."""
    for name, parameter in network.named_parameters():
        if "lora_B" in name or "lora_embedding" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_what_peft_loads(method: str, precision: str, base: Path, tmp_path: Path) -> None:
    model = module(base, method)
    fit(model, method, precision=precision)
    folder = save_peft_adapter(model, tmp_path / "adapter")
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", WEIGHTS}
    stored = load_file(folder / WEIGHTS)
    assert any(value.any() for name, value in stored.items() if "lora_B" in name)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {value.dtype for value in stored.values()} == {dtype}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 4, 8)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    without = logits(fresh)
    loaded = PeftModel.from_pretrained(fresh, folder, autocast_adapter_dtype=False)
    if precision == "32-true":
        assert torch.equal(logits(loaded), logits(model.network))
    assert not torch.equal(logits(loaded), without)
    merged = AutoModelForCausalLM.from_pretrained(export_to_hf(model, tmp_path / "hf", merge_lora=True), dtype="auto")
    assert merged.dtype == dtype
    torch.testing.assert_close(logits(merged), logits(loaded), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_continued_exactly(method: str, base: Path, tmp_path: Path) -> None:
    whole, half = module(base, method), module(base, method)
    fit(whole, method)
    fit(half, method, steps=2).save_checkpoint(tmp_path / "half.ckpt")
    again = module(base, method)
    fit(again, method, ckpt=tmp_path / "half.ckpt")
    left, right = (load_file(save_peft_adapter(m, tmp_path / "a") / WEIGHTS) for m in (whole, again))
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    frozen = {n: p for n, p in whole.network.named_parameters() if "lora" not in n}
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(p, start[n.replace(".base_layer", "")]) for n, p in frozen.items())


class Save(L.Callback):
    """Both kinds of folder after the third step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            save_peft_adapter(module, self.folder / "adapter")
            export_to_hf(module, self.folder / "hf", merge_lora=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_written_during_fit_has_every_update(method: str, base: Path, tmp_path: Path) -> None:
    model, plain, shorter = (module(base, method) for _ in range(3))
    fit(model, method, callbacks=[Save(tmp_path)])
    fit(plain, method)
    fit(shorter, method, steps=3)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    own = {name.replace(".default", ""): value for name, value in shorter.network.named_parameters()}
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    assert all(torch.equal(value, own[name.removeprefix("base_model.model.")]) for name, value in stored.items())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(merged), logits(shorter.network))


class Own(L.LightningModule):
    """A user's, who calls PEFT."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.something = network

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.something(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_a_users_own_module(base: Path, tmp_path: Path) -> None:
    peft = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = Own(get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft, adapter_name="mine"))
    fit(model, "full")
    with pytest.raises(OffloadError, match=r"Own has adapters of PEFT: write them with `save_peft_adapter"):
        export_to_hf(model, tmp_path / "hf")
    trained = logits(model.something)
    folder = save_peft_adapter(model, tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, folder)), trained)
    assert model.something.training is False
    assert model.something.peft_config["mine"].inference_mode is False
    merged = AutoModelForCausalLM.from_pretrained(export_to_hf(model, tmp_path / "hf", merge_lora=True))
    torch.testing.assert_close(logits(merged), trained)
    unloaded = model.something.merge_and_unload()  # and without any of it, it is a model as others are
    assert export_to_hf(unloaded, tmp_path / "hf")


def peft_model(config: Any, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    made = get_peft_model(auto.from_config(config), LoraConfig(r=4, **options))
    made_anything_of(made)
    return made


KINDS = {
    "gpt2": lambda: peft_model(GPT2, target_modules="all-linear", fan_in_fan_out=True),
    "head trained whole": lambda: peft_model(LLAMA, target_modules=["q_proj"], modules_to_save=["norm"]),
    "classifier": lambda: peft_model(
        LLAMA, AutoModelForSequenceClassification, target_modules=["q_proj"], task_type="SEQ_CLS"
    ),
    "embeddings": lambda: peft_model(LlamaConfig(**SHAPE), target_modules=["embed_tokens", "v_proj"]),
    "fp32 beside bf16": lambda: peft_model(LLAMA, target_modules=["q_proj"]).to(torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_lora(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]()
    if kind == "fp32 beside bf16":
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_peft_adapter(model, tmp_path / "adapter")
    folder = export_to_hf(model, tmp_path / "hf", merge_lora=True)
    stock = model.get_base_model()
    merged = type(stock).from_pretrained(folder, dtype="auto")
    atol = 1e-5 if kind != "fp32 beside bf16" else 0.05
    torch.testing.assert_close(logits(merged).float(), logits(model).float(), rtol=0, atol=atol)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_classifier_without_code(tmp_path: Path) -> None:
    config = {"model_type": "llama", **SHAPE, "pad_token_id": 0}
    model = SequenceClassifier(config=config, init="random", lora={"rank": 4, "targets": "q_proj"}, num_labels=3)
    trained = {name.split(".")[-4] for name, p in model.network.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "score"}
    made_anything_of(model.network)
    save_peft_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    assert any("score.weight" in name for name in stored)
    assert export_to_hf(model, tmp_path / "hf", merge_lora=True)


def damaged(how: str) -> Any:
    write = lora._write

    def call(top: Any, network: Any, adapter: str, folder: Path) -> None:
        write(top, network, adapter, folder)
        file = folder / WEIGHTS
        tensors = load_file(file)
        if how == "prefix":
            tensors = {name.removeprefix("base_model."): value for name, value in tensors.items()}
        if how == "values":
            next(iter(tensors.values())).view(-1)[3] += 1e-6
        if how == "scale":
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
        save_file(tensors, file)

    return call


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(("how", "trained"), [("prefix", True), ("prefix", False), ("values", False), ("scale", True)])
def test_an_adapter_that_peft_would_load_otherwise_is_refused(
    how: str, trained: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untrained ones, with B = 0, do not show in logits."""
    model = module(base)
    earlier = (save_peft_adapter(model, tmp_path / "adapter") / WEIGHTS).read_bytes()
    if trained:
        made_anything_of(model.network)
    monkeypatch.setattr(lora, "_write", damaged(how))
    with pytest.raises(OffloadError, match="the exported adapter differs after reloading"):
        save_peft_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == earlier
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_is_no_plain_lora_is_not_merged(tmp_path: Path) -> None:
    dora = peft_model(LLAMA, target_modules=["q_proj"], use_dora=True)
    assert save_peft_adapter(dora, tmp_path / "dora")
    with pytest.raises(
        OffloadError, match=r"q_proj` \(Linear\) is no LoRA of .* call PEFT's own `merge_and_unload\(\)`"
    ):
        export_to_hf(dora, tmp_path / "hf", merge_lora=True)
    tied = peft_model(LLAMA, target_modules=["embed_tokens"])
    with pytest.raises(OffloadError, match="differs after reloading"):  # the head would change with it
        export_to_hf(tied, tmp_path / "hf", merge_lora=True)
    prompts = get_peft_model(
        AutoModelForCausalLM.from_config(LLAMA), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(OffloadError, match="has adapters of PEFT"):
        export_to_hf(prompts, tmp_path / "hf")
    assert save_peft_adapter(prompts, tmp_path / "prompts")
    assert not (tmp_path / "hf").exists()


def test_adapters_that_have_changed_the_base_are_merged_alone(tmp_path: Path) -> None:
    """PEFT loads those of OLoRA without a word, with other logits."""
    model = peft_model(LLAMA, target_modules=["q_proj"], init_lora_weights="olora")
    with pytest.raises(OffloadError, match=r"init_lora_weights='olora' has changed the weights"):
        save_peft_adapter(model, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(export_to_hf(model, tmp_path / "hf", merge_lora=True))
    torch.testing.assert_close(logits(merged), logits(model))


def test_states_that_cannot_be_saved(tmp_path: Path) -> None:
    model = peft_model(LLAMA, target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has the adapters default, other of PEFT beside each other"):
        save_peft_adapter(model, tmp_path / "a")
    model.delete_adapter("other")
    model.merge_adapter()
    with pytest.raises(OffloadError, match=r"merged into its weights at the moment: call `unmerge_adapter\(\)`"):
        save_peft_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="has no adapters of PEFT"):
        save_peft_adapter(AutoModelForCausalLM.from_config(LLAMA), tmp_path / "a")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    model.unmerge_adapter()
    with pytest.raises(FileExistsError, match="thesis"):
        save_peft_adapter(model, tmp_path / "thesis")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 0}, "lora.rank=0"),
        ({"rank": True}, "lora.rank=True"),
        ({"rank": 4, "alpha": 0}, "lora.alpha=0"),
        ({"rank": 4, "dropout": 1.0}, "lora.dropout=1.0"),
        ({"rank": 4, "targets": []}, r"lora.targets=\[\]"),
        ({"rank": 4, "targets": ["qq"]}, "qq"),
        ({"rank": 4, "dropuot": 0.1}, "lora has no setting 'dropuot'; there are rank, alpha, targets, dropout"),
        ({"alpha": 4}, "lora.alpha=4 without lora.rank"),
    ],
)
def test_settings_that_cannot_work(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CausalLM(config={"model_type": "llama", **SHAPE}, init="random", lora=given)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(OffloadError, match=r"lora.rank needs PEFT: pip install 'lightning-offload\[peft\]'"):
        CausalLM(config={"model_type": "llama", **SHAPE}, init="random", lora={"rank": 4})


def test_meft_would_freeze_it(base: Path) -> None:
    with pytest.raises(ValueError, match=r"CausalLM has adapters of PEFT \(LoRA\), and `meft` would freeze them"):
        trainer(meft(), steps=1).fit(module(base), batches())
