"""Export to a Hugging Face folder and reading checkpoints back, on models of a few thousand parameters."""

from __future__ import annotations

import ctypes
import json
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedModel

from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.export import check_weights, export_to_hf, load_weights, map_weights
from lightning_offload.folders import written_whole
from lightning_offload.memory.promises import parameters_on_meta
from lightning_offload.text import TINY_PATH
from tests.families import FAMILIES

LLAMA = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "llama-tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32),  # tied, with dropout
}


def build(name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            assert not tensors.keys() & file.keys()
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_has_every_parameter_once(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(name, dtype)
    folder = export_to_hf(model, tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    assert (folder / "generation_config.json").is_file()
    tensors = stored(folder)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters())
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for (key, mine), theirs in zip(model.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key
        assert mine.dtype == theirs.dtype


def test_shards_stay_under_the_limit_and_are_indexed(tmp_path: Path) -> None:
    limit_bytes = 8192
    folder = export_to_hf(build(), tmp_path / "hf", max_shard_gib=limit_bytes / 1024**3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["weight_map"].keys() == stored(folder).keys()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= limit_bytes  # noqa: SIM118


def test_dtype_is_cast_in_every_shard_and_in_the_config(tmp_path: Path) -> None:
    model = build("llama-tied")
    folder = export_to_hf(model, tmp_path / "hf", dtype=torch.bfloat16, max_shard_gib=8192 / 1024**3)
    assert {t.dtype for t in stored(folder).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(folder).values())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_module_is_left_as_it_was_and_its_tokenizer_is_saved(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.tokenizer = build("gpt2"), Tokenizer()

    module = Module().train()
    module.network.transformer.ln_f.eval()
    folder = export_to_hf(module, tmp_path / "hf")
    assert (folder / "tokenizer.json").is_file()
    assert module.network.training
    assert not module.network.transformer.ln_f.training


def test_an_export_is_replaced_but_no_other_folder(tmp_path: Path) -> None:
    folder = export_to_hf(build(), tmp_path / "hf")
    (folder / "left_over").touch()
    export_to_hf(build(), folder)
    assert not (folder / "left_over").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    with pytest.raises(FileExistsError, match=r"thesis.*choose another folder"):
        export_to_hf(build(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").exists()


@pytest.mark.parametrize("foreign", [".git/HEAD", "README.md", "pytorch_model.bin"])
def test_a_folder_with_a_file_that_no_export_writes_is_left(foreign: str, tmp_path: Path) -> None:
    folder = export_to_hf(build(), tmp_path / "hf", tokenizer=AutoTokenizer.from_pretrained(TINY_PATH))
    (folder / foreign).parent.mkdir(exist_ok=True)
    (folder / foreign).write_text("mine")
    before = {path: path.stat() for path in folder.rglob("*")}
    with pytest.raises(
        FileExistsError, match=rf"hf' would be replaced, and '{foreign.split('/')[0]}' in it is of no ex"
    ):
        export_to_hf(build(), folder)
    assert {path: path.stat() for path in folder.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_goes_to_where_a_link_points(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "hf"
    link.symlink_to("far/away")
    for _ in range(2):
        assert export_to_hf(build(), link) == link
        assert link.is_symlink()
        assert (tmp_path / "far/away/config.json").is_file()


def test_the_working_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match=r"'\.' is the working folder, or above it; choose another folder"):
        export_to_hf(build(), ".")


def test_what_a_killed_export_left_is_tidied(tmp_path: Path) -> None:
    folder = export_to_hf(build(), tmp_path / "hf")
    folder.rename(tmp_path / ".hf.0a1b.old")  # killed between the two renames
    (tmp_path / ".hf.0a1b.tmp").mkdir()
    (tmp_path / ".hf2.0a1b.tmp").mkdir()  # of another target
    with written_whole(folder, mark="config.json", what="model", files=[]):
        assert (folder / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hf2.0a1b.tmp", "hf"]


def test_an_error_between_the_renames_puts_the_old_export_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_to_hf(build(), tmp_path / "hf")
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError("no more")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OffloadError, match=r"could not be written to '.*hf': no more; what was there before still is"):
        export_to_hf(build(), folder)
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_different_logits_are_an_error_with_both_numbers_and_leave_the_old_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = export_to_hf(build(), tmp_path / "hf"), build()
    config = (folder / "config.json").read_bytes()
    save = model.save_pretrained

    def damage(path: Path, **options: int) -> None:
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
            save(path, **options)
            model.lm_head.weight.sub_(1.0)

    monkeypatch.setattr(model, "save_pretrained", damage)
    with pytest.raises(OffloadError, match=r"logit -?[\d.]+ became -?[\d.]+, allowed"):
        export_to_hf(model, folder)
    assert (folder / "config.json").read_bytes() == config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_value_that_no_logit_shows_is_compared(
    dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an embedding that is not tied the check's tokens read a few rows."""
    folder, model = export_to_hf(build(), tmp_path / "hf"), build()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    save, asked = model.save_pretrained, set[int]()
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: asked.update(args[0].flatten().tolist()))

    def damage(path: Path, **options: int) -> None:
        save(path, **options)
        model(input_ids=torch.arange(1)[None])
        file = path / "model.safetensors"
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        tensors["model.embed_tokens.weight"][unread, 3] += 0.1
        safetensors_save(tensors, file)

    from safetensors.torch import save_file as safetensors_save

    export_to_hf(model, tmp_path / "other")
    unread = next(token for token in range(64) if token not in asked)
    monkeypatch.setattr(model, "save_pretrained", damage)
    with pytest.raises(OffloadError, match=r"values of `model.embed_tokens.weight` have changed on the way"):
        export_to_hf(model, folder, dtype=dtype)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "other"]


def test_a_full_disk_leaves_the_old_export(tmp_path: Path) -> None:
    folder = export_to_hf(build(), tmp_path / "hf")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    bound = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, bound[1]))
    try:
        with pytest.raises(OffloadError, match=r"the exported model could not be written to '.*hf': .*still is"):
            export_to_hf(build(), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bound)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    (tmp_path / "file").touch()
    with pytest.raises(OffloadError, match="could not be written"):
        export_to_hf(build(), tmp_path / "file" / "hf")


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = transformers.BertConfig(vocab_size=64, **SMALL)
IMAGES = transformers.ViTConfig(image_size=16, patch_size=8, **SMALL)
HEADS: dict[str, Callable[[], Any]] = {
    "llama, classes": lambda: transformers.LlamaForSequenceClassification(LlamaConfig(**LLAMA, pad_token_id=0)),
    "bert, classes": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=64, **SMALL)
    ),
    "bert, words": lambda: transformers.BertForTokenClassification(transformers.BertConfig(vocab_size=64, **SMALL)),
    "bert, no head": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=64, **SMALL)),
    "images": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=8, **SMALL)
    ),
    **{name: (lambda name=name: FAMILIES[name]()[0]) for name in ("roberta", "bart", "granitemoe", "mamba")},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_any_model_of_transformers(kind: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HEADS[kind]()
    folder = export_to_hf(nn.ModuleDict({"anywhere": nn.ModuleList([model])}), tmp_path / "hf", dtype=dtype)
    reloaded = type(model).from_pretrained(folder, dtype="auto")
    for (name, mine), theirs in zip(model.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(mine.to(theirs.dtype), theirs), name
    with pytest.raises(TypeError, match="several transformers models"):
        export_to_hf(nn.ModuleList([model, build()]), tmp_path / "two")


def test_compiled_parts_keep_their_names(tmp_path: Path) -> None:
    model, plain = build("llama-tied"), build("llama-tied")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    other = export_to_hf(torch.compile(plain, backend="eager"), tmp_path / "whole")
    assert stored(export_to_hf(model, tmp_path / "hf")).keys() == stored(other).keys()
    assert export_to_hf(AutoModelForCausalLM.from_pretrained(other), tmp_path / "again")


def anonymous_bytes() -> int:
    """Of this process; what is mapped from files is none."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def growth_bytes(work: Callable[[], Any]) -> int:
    """The most that was seen beside what there was, looking all the time."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free, but still the process's, would be taken unseen
    seen, done = [before := anonymous_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            seen.append(anonymous_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        work()
    finally:
        done.set()
        looking.join()
    return max(seen) - before


WIDE = {**LLAMA, "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
OF_200M = {**LLAMA, "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 13}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of a process")
@pytest.mark.parametrize(
    ("shape", "shard_bytes"), [(WIDE, 4 << 20), pytest.param(OF_200M, 96 << 20, marks=pytest.mark.slow)]
)
def test_a_checkpoint_becomes_a_folder_shard_by_shard(shape: Any, shard_bytes: int, tmp_path: Path) -> None:
    """Nine of which and more the weights are; to load them into a model first takes all of it."""
    config, file = LlamaConfig(**shape), tmp_path / "a.ckpt"
    torch.save({"state_dict": AutoModelForCausalLM.from_config(config).state_dict()}, file)
    options = {"max_shard_gib": shard_bytes / 1024**3, "dtype": torch.bfloat16}
    made: list[Any] = []

    def mapped() -> None:
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config)
        assert map_weights(model, file)
        export_to_hf(model, tmp_path / "hf", **options)

    def loaded() -> None:
        made.append(AutoModelForCausalLM.from_config(config))
        load_weights(made[0], file)

    mapped()  # whatever is imported or kept by the first forward
    allowed = 2.5 * shard_bytes  # one, and what a forward and the making of a parameter take
    assert growth_bytes(mapped) < allowed
    assert growth_bytes(loaded) > 8 * shard_bytes  # as it would be seen
    assert growth_bytes(lambda: export_to_hf(made[0], tmp_path / "live", **options)) < allowed


def test_a_diverged_model_is_not_exported(tmp_path: Path) -> None:
    model = build()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(OffloadError, match="diverged"):
        export_to_hf(model, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_buffers_that_a_precision_rounded_are_no_difference_of_the_weights(tmp_path: Path) -> None:
    model = build()
    for buffer in model.buffers():
        buffer.data = buffer.data.bfloat16()
    with pytest.warns(UserWarning, match=r"inv_freq' is torch.bfloat16.*torch.float32 in the exported"):
        folder = export_to_hf(model.bfloat16(), tmp_path / "hf")
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {buffer.dtype for buffer in reloaded.buffers()} == {torch.float32}


def test_a_module_without_a_transformers_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"transformers model.*Linear"):
        export_to_hf(nn.Linear(2, 2), tmp_path / "hf")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({"state_dict": build().state_dict(), "global_step": 3}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_weights_load_into_a_fresh_module(checkpoint: Path) -> None:
    torch.manual_seed(1)
    fresh = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    load_weights(fresh, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), build().parameters(), strict=True))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named(checkpoint: Path, share: float) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*cut off"):
        check_weights(build(), checkpoint)


def test_another_models_checkpoint_names_the_first_differing_tensor(checkpoint: Path) -> None:
    wider = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, "intermediate_size": 48}))
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt.*`model.layers.0.mlp.gate_proj.weight` is \(32, 16\).*\(48, 16\)"
    ):
        check_weights(wider, checkpoint)
    deeper = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"`model.layers.2.*is absent in the checkpoint"):
        check_weights(deeper, checkpoint)
    shallower = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"`model.layers.1.*absent in the model"):
        check_weights(shallower, checkpoint)


def test_a_missing_checkpoint_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        check_weights(build(), tmp_path / "none.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="no Lightning checkpoint"):
        check_weights(build(), tmp_path / "list.ckpt")
