"""What users get wrong, case by case: the files, the command, and what the one line has to say."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

JSONL = "train {given} data=jsonl data.path=my.jsonl"


def rows(count: int = 12, **changes: Any) -> bytes:
    """Lines that can be trained on."""
    row = {"prompt": "def add_1(x", "completion": ", y=1):\n", **changes}
    return (json.dumps(row) + "\n").encode() * count


GOOD = rows()


@dataclass(frozen=True)
class Case:
    """Something wrong.

    Attributes:
        name: What.
        command: After `lightning-offload`; `{given}` are the settings of a run that works.
        said: Parts of the line, in order: the place, and the way out.
        files: What is there, by path below the working folder.
        model: What is done to a copy of the model, in `model`.
        spoil: What is done to the working folder.
        of_run: Whether there is a finished run in `runs/done`.
    """

    name: str
    command: str
    said: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    model: Callable[[Path], None] | None = None
    spoil: Callable[[Path], None] | None = None
    of_run: bool = False

    def make(self, folder: Path, small: Path) -> None:
        """Put its files there."""
        for path, content in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        if self.model:
            shutil.copytree(small, folder / "model")
            self.model(folder / "model")
        if self.spoil:
            self.spoil(folder)


def jsonl(name: str, content: bytes, *said: str, more: str = "") -> Case:
    return Case(name, f"{JSONL} {more}".strip(), said, {"my.jsonl": content})


def model(name: str, change: Callable[[Path], None], *said: str, more: str = "") -> Case:
    return Case(name, f"train {{given}} model.path=model {more}".strip(), said, model=change)


def setting(words: str, *said: str) -> Case:
    return Case(words, f"train {{given}} {words}", said)


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    """Other values in a JSON file; None takes them out."""

    def edit(folder: Path) -> None:
        content = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return edit


def replaced(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / file).write_bytes(content))


def void(_: object) -> None: ...


def without(pattern: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return remove


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: void((folder / file).write_bytes((folder / file).read_bytes()[:size]))


def sharded(*, without_shard: bool) -> Callable[[Path], None]:
    """In several files, of which one is gone."""

    def split(folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        network.save_pretrained(folder, max_shard_size="8KB")
        if without_shard:
            sorted(folder.glob("model-*.safetensors"))[1].unlink()

    return split


def larger_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    for number in range(50):
        vocabulary[f"word{number}"] = len(vocabulary)
    content["added_tokens"].append(
        {
            "id": len(vocabulary),
            "content": "def",
            "special": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    )
    (folder / "tokenizer.json").write_text(json.dumps(content))


def learned_positions(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def without_end(folder: Path) -> None:
    edited("tokenizer_config.json", eos_token=None)(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


MESSAGES = {"prompt": None, "completion": None}


def chat(messages: Any) -> bytes:
    return (json.dumps({"messages": messages}) + "\n").encode() * 4


TALK = [{"role": "user", "content": "def"}, {"role": "assistant", "content": "add"}]
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
STRICT = "{% if messages[0].role == 'robot' %}{{ raise_exception('Unknown role') }}{% endif %}" + TEMPLATE
WORDS = "train {given} data=sst2 data.path=sst2 data.sequence_length=32 data.label_words=[' x',' y']"


def labelled(label: Any, *, at: int = 3, sentence: str = "def") -> dict[str, bytes]:
    good = json.dumps({"sentence": "def add", "label": 1}) + "\n"
    bad = json.dumps({"sentence": sentence, "label": label}) + "\n"
    lines = [good] * 12
    lines[at - 1] = bad
    return {f"sst2/{split}.jsonl": "".join(lines).encode() for split in ("train", "dev", "test")}


CLASSES = "train {given} data=glue data.path=glue data.text_fields=[text]"


def classes(*labels: Any) -> dict[str, bytes]:
    lines = [json.dumps({"text": "def add", "label": label}) + "\n" for label in labels]
    return {f"glue/{split}.jsonl": "".join(lines).encode() for split in ("train", "dev")}


DATA = [
    Case("no data file", JSONL, ("my.jsonl", "pass data.path")),
    Case("a folder in its place", JSONL, ("my.jsonl is a folder", "data.path="), {"my.jsonl/a.jsonl": GOOD}),
    jsonl("empty file", b"", "my.jsonl is empty"),
    jsonl("only blank lines", b"\n\n  \n", "my.jsonl is empty"),
    jsonl("binary file", bytes(range(256)) * 4, "my.jsonl", "UTF-8"),
    jsonl("UTF-16", GOOD.decode().encode("utf-16"), "my.jsonl is UTF-16", "UTF-8"),
    jsonl("latin-1", GOOD + '{"text": "caf\xe9"}\n'.encode("latin-1"), "my.jsonl", "line 13", "UTF-8"),
    jsonl("gzip", gzip.compress(GOOD), "my.jsonl is compressed by gzip", "unpack"),
    jsonl("cut off in a line", GOOD[:-20], "my.jsonl, line 12: not valid JSON", "one JSON object a line"),
    jsonl(
        "one JSON array",
        b"[" + b",".join(GOOD.splitlines()) + b"]",
        "my.jsonl, line 1: a list",
        "one JSON object a line",
    ),
    jsonl(
        "pretty-printed JSON",
        json.dumps([json.loads(line) for line in GOOD.splitlines()], indent=1).encode(),
        "my.jsonl, line 1",
        "one JSON object a line",
    ),
    jsonl("an empty line in the middle", rows(2) + b"\n" + rows(2), "my.jsonl, line 3: empty", "take it out"),
    jsonl("other fields", b'{"question": "a", "answer": "b"}\n' * 3, "my.jsonl, line 1", "data.prompt_field="),
    jsonl("a number for a text", rows(3) + rows(1, prompt=5), "my.jsonl, line 4: 'prompt' is int", "quotes"),
    jsonl(
        "null", rows(3) + rows(1, completion=None), "my.jsonl, line 4: 'completion' is NoneType", "leave the line out"
    ),
    jsonl("nested", rows(3) + rows(1, completion={"text": "a"}), "my.jsonl, line 4: 'completion' is dict"),
    jsonl("a list", rows(3) + rows(1, completion=["a"]), "my.jsonl, line 4: 'completion' is list"),
    jsonl(
        "empty completion",
        rows(3) + rows(1, completion=""),
        "my.jsonl, line 4",
        "'completion' is empty",
        "leave the line out",
    ),
    jsonl(
        "completion of white space",
        rows(3) + rows(1, completion="  \n "),
        "my.jsonl, line 4",
        "'completion' is empty",
        "leave the line out",
    ),
    jsonl("empty text", b'{"text": ""}\n' * 3, "my.jsonl, line 1", "'text' is empty", "leave the line out"),
    jsonl(
        "a key twice",
        rows(3) + b'{"prompt": "a", "prompt": "b", "completion": "c"}\n',
        "my.jsonl, line 4",
        "'prompt' is there twice",
        "keep one",
    ),
    jsonl("NaN", rows(3) + b'{"prompt": "a", "completion": NaN}\n', "my.jsonl, line 4", "float, not text"),
    jsonl(
        "a lone surrogate",
        rows(3) + b'{"prompt": "\\ud83d", "completion": "b"}\n',
        "my.jsonl, line 4",
        "half a character",
        "mend",
    ),
    jsonl("no chat template", chat(TALK), "my.jsonl, line 1", "chat template"),
    jsonl("no message list", chat("hello"), "my.jsonl, line 1", "chat template"),
    jsonl("all too long", rows(4, prompt="def add " * 30), "my.jsonl", "Raise data.sequence_length"),
    jsonl("one row, nothing to hold out", rows(1), "nothing to validate with in 'my.jsonl'", "Give more"),
    jsonl("val_fraction of nothing", GOOD, "val_fraction=0", more="data.val_fraction=0"),
    jsonl("val_fraction of all", GOOD, "val_fraction=1", more="data.val_fraction=1"),
    Case(
        "empty val_path",
        f"{JSONL} data.val_path=val.jsonl",
        ("val.jsonl is empty",),
        {"my.jsonl": GOOD, "val.jsonl": b""},
    ),
    Case("no val_path", f"{JSONL} data.val_path=val.jsonl", ("val.jsonl", "data.val_path"), {"my.jsonl": GOOD}),
    Case("a text that is not UTF-8", "train {given} data.path=a.txt", ("a.txt", "Convert"), {"a.txt": b"caf\xe9" * 99}),
    Case(
        "a text too short for one sequence",
        "train {given} data.path=a.txt",
        ("nothing to", "data.sequence_length"),
        {"a.txt": b"def"},
    ),
    Case("a folder without texts", "train {given} data.path=texts", ("texts", ".txt"), {"texts/a.bin": b"def"}),
    Case("a text of null bytes", "train {given} data.path=a.txt", ("a.txt",), {"a.txt": b"\0" * 3000}),
    Case("no folder of sst2", WORDS, ("sst2", "data.path=")),
    Case("a label out of range", WORDS, ("train.jsonl, line 3: 'label' is 2", "needs 0"), labelled(2)),
    Case("a negative label", WORDS, ("train.jsonl, line 3: 'label' is -7",), labelled(-7)),
    Case("an unknown label", WORDS, ("train.jsonl, line 3: 'label' is 'good'",), labelled("good")),
    Case("no label", WORDS, ("train.jsonl, line 3: 'label' is None",), labelled(None)),
    Case("a label that is a float", WORDS, ("train.jsonl, line 3: 'label' is 0.5",), labelled(0.5)),
    Case("no sentence", WORDS, ("train.jsonl, line 3", "'sentence' is empty", "leave"), labelled(1, sentence="")),
    Case("equal label words", WORDS.replace("' y'", "' x'"), ("label_words", "different"), labelled(1)),
    Case("sst2 without train", WORDS, ("sst2",), {"sst2/dev.jsonl": labelled(1)["sst2/dev.jsonl"]}),
    Case("a class that is null", CLASSES, ("train.jsonl, line 3: 'label' is None", "leave"), classes("a", "b", None)),
    Case("an empty class", CLASSES, ("train.jsonl, line 3: 'label' is ''", "leave"), classes("a", "b", "")),
    Case("a class of -1", CLASSES, ("train.jsonl, line 3: 'label' is -1", "data.label_names="), classes(0, 1, -1)),
    Case("one class", CLASSES, ("train.jsonl: 'label' is 'a' in all 3 lines", "another class"), classes("a", "a", "a")),
    Case(
        "a data set with a script",
        "train {given} data=hf data.path=set",
        ("data.path='set'", "scripts are no longer supported", "Pass a hub id"),
        {"set/set.py": b"x = 1"},
    ),
    Case(
        "packing of another word", f"{JSONL} data.packing=off", ("packing='off'", "true or false"), {"my.jsonl": GOOD}
    ),
    Case(
        "sst2 with nothing left to train on",
        f"{WORDS} data.val_examples=20",
        ("val_examples=20 of 12", "data.val_examples="),
        {name: content for name, content in labelled(1).items() if "test" not in name},
    ),
    Case(
        "gsm8k without a test",
        "train {given} data=gsm8k data.path=math",
        ("math", "test"),
        {"math/train.jsonl": b'{"question": "a", "answer": "b"}\n' * 9},
    ),
    Case(
        "a Parquet file that is none",
        "train {given} data=gsm8k data.path=math",
        ("train.parquet",),
        {"math/train.parquet": b"PAR1"},
    ),
    Case(
        "a .csv with a short line",
        "train {given} data=gsm8k data.path=math",
        ("train.csv, line 3",),
        {"math/train.csv": b"question,answer\na,b\na\n"},
    ),
]

CHAT = f"{JSONL} model.path=model"


def conversation(name: str, messages: Any, *said: str, template: str = TEMPLATE) -> Case:
    change = edited("tokenizer_config.json", chat_template=template)
    return Case(name, CHAT, said, {"my.jsonl": chat(messages)}, change)


CHATS = [
    conversation("no assistant", TALK[:1], "my.jsonl, line 1", "assistant"),
    conversation("no message", [], "my.jsonl, line 1"),
    conversation("a message that is none", ["hello"], "my.jsonl, line 1", "role"),
    conversation("content that is none", [{"role": "user", "content": None}], "my.jsonl, line 1", "content"),
    conversation(
        "an unknown role",
        [{"role": "robot", "content": "a"}, *TALK],
        "my.jsonl, line 1",
        "Unknown role",
        "change the line",
        template=STRICT,
    ),
    conversation("a chat template that is none", TALK, "chat template", template="{% for %}"),
    conversation(
        "an assistant who says nothing",
        [TALK[0], {"role": "assistant", "content": ""}],
        "my.jsonl, line 1",
        template="{% for m in messages %}{{ m.content }}{% endfor %}",
    ),
]

MODELS = [
    setting("model.path=nowhere/at/all", "nowhere/at/all", "model.path"),
    setting("model.path=no-such-model", "no-such-model", "model.path"),
    setting("model.path={inputs}/text.py", "text.py", "model.path"),
    model("an empty folder", without("*"), "model", "config.json"),
    model("a damaged config", replaced("config.json", b'{"model_type": '), "config.json"),
    model("a config of another kind", replaced("config.json", b"[]"), "config.json"),
    model("an unknown architecture", edited("config.json", model_type="nonesuch"), "nonesuch"),
    model("no architecture", edited("config.json", model_type=None), "model_type"),
    model(
        "a config that does not fit the weights",
        edited("config.json", hidden_size=32),
        "config.json",
        "(300, 16) in the files and (300, 32)",
    ),
    model("a config that is impossible", edited("config.json", num_attention_heads=3), "3"),
    model("an encoder", edited("config.json", model_type="bert"), "bert"),
    model(
        "an encoder-decoder", edited("config.json", model_type="t5", architectures=["T5ForConditionalGeneration"]), "T5"
    ),
    model(
        "quantized",
        edited("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantiz",
    ),
    model("no weights", without("*.safetensors"), "model"),
    model("weights cut off", cut("model.safetensors", 5000), "model"),
    model(
        "weights that are none", replaced("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "model"
    ),
    model("weights of nothing", replaced("model.safetensors", b""), "model"),
    model("a shard is missing", sharded(without_shard=True), "model-00002"),
    model("no tokenizer", without("tokenizer*"), "tokenizer_path"),
    model("a damaged tokenizer", replaced("tokenizer.json", b'{"version": '), "tokenizer"),
    model("a tokenizer without an end", without_end, "end-of-text"),
    Case(
        "a tokenizer without padding or an end",
        f"{CLASSES} model.path=model",
        ("token to pad with", "end-of-text", "pad_token", "tokenizer_path="),
        classes("a", "b"),
        without_end,
    ),
    model(
        "a table of too few positions",
        learned_positions,
        "data.sequence_length=16",
        "the model's 8 positions",
        "data.sequence_length=8",
    ),
    model("a tokenizer too large for the model", larger_vocabulary, "'model'", "349", "300", "model.tokenizer_path="),
    model("too few positions", edited("tokenizer_config.json", model_max_length=8), "data.sequence_length=8"),
    setting("model.tokenizer_path=nowhere", "tokenizer_path='nowhere'"),
    setting("model.dtype=int8", "dtype='int8'", "float32"),
    setting("model.dtype=[1]", "dtype"),
    setting("model.loss_chunk_tokens=-1", "loss_chunk_tokens=-1"),
    setting("model.match_answers=fuzzy", "match_answers='fuzzy'"),
]

SETTINGS = [
    setting("method=lsp trainer.strategy.min_numel=0 trainer.strategy.dim=4096", "dim=4096"),
    setting("method=lsp trainer.strategy.min_numel=0 trainer.strategy.dim=-8", "dim"),
    setting("method=zo2 optimizer=adamw", "SGD"),
    setting("method=meft trainer.strategy.width=17", "width"),
    setting("method=meft trainer.strategy.experts=7", "experts"),
    setting("method=full precision=16-true", "16-true"),
    setting("trainer.max_steps=0", "max_steps"),
    setting("trainer.max_steps=1.5", "max_steps"),
    setting("trainer.devices=9999", "devices"),
    setting("trainer.accelerator=gpu", "trainer.accelerator=gpu", "hardware=cpu"),
    setting("trainer.limit_train_batches=0", "limit_train_batches"),
    setting("trainer.val_check_interval=0", "val_check_interval"),
    setting("trainer.val_check_interval=100000 trainer.check_val_every_n_epoch=1", "val_check_interval"),
    setting("trainer.accumulate_grad_batches=0", "accumulate_grad_batches"),
    setting("trainer.gradient_clip_val=-1", "gradient_clip_val"),
    setting("data.batch_size=0", "batch_size=0"),
    setting("data.batch_size=abc", "batch_size"),
    setting("data.sequence_length=null", "sequence_length"),
    setting("hardware.host_gib=0.0001 trainer.strategy.min_numel=0", "host memory"),
    setting("hardware.host_gib=abc", "host_gib"),
    setting("lr=abc", "lr"),
    setting("lr=inf", "lr"),
    setting("seed=-1", "seed"),
    setting("runs_dir=/dev/null/x", "/dev/null/x"),
    setting("runs_dir={inputs}/text.py", "text.py"),
    setting("runs_dir=/proc/x", "/proc/x"),
    setting("name=mine runs_dir=/proc/x", "/proc/x", "choose a place"),
]


def finished(name: str, command: str, *said: str, spoil: Callable[[Path], None] | None = None, **files: bytes) -> Case:
    """With a run in `runs/done`."""
    return Case(name, command, said, files, spoil=spoil, of_run=True)


def newest(folder: Path) -> Path:
    (found,) = folder.glob("runs/done/checkpoints/*.ckpt")
    return found


def cut_checkpoint(folder: Path) -> None:
    file = newest(folder)
    file.write_bytes(file.read_bytes()[:5000])


def stored(content: bytes) -> Callable[[Path], None]:
    return lambda folder: void(newest(folder).write_bytes(content))


def saved(content: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, newest(folder))


def diverged(folder: Path) -> None:
    content = torch.load(newest(folder), weights_only=True)
    for value in content["state_dict"].values():
        value.fill_(torch.nan)
    torch.save(content, newest(folder))


def config(content: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "runs/done/config.yaml"
        file.write_bytes(content) if content is not None else file.unlink()

    return change


GO_ON = "train {given} name=done ckpt_path=last trainer.max_steps=6"
ROWS = ("width=16", "top_k=4", "experts=2", "active_experts=1")
OTHER = "".join(f" trainer.strategy.{row}" for row in ROWS)
EXPORT = "export ckpt_path=runs/done output=new"
EVALUATE = "evaluate ckpt_path=runs/done hardware=cpu max_new_tokens=1"
FINISHED = [
    finished("a run of that name", "train {given} name=done", "runs/done", "holds a run already", "ckpt_path=last"),
    finished("a checkpoint cut off", GO_ON, "end-step000002.ckpt", "an earlier one", spoil=cut_checkpoint),
    finished("a checkpoint of nothing", GO_ON, "end-step000002.ckpt", "an earlier one", spoil=stored(b"")),
    finished(
        "a checkpoint that is a text", GO_ON, "end-step000002.ckpt", "an earlier one", spoil=stored(b"my notes\n" * 99)
    ),
    finished(
        "a checkpoint with code", GO_ON, "end-step000002.ckpt", "an earlier one", spoil=saved({"state_dict": print})
    ),
    finished(
        "tensors alone", GO_ON, "end-step000002.ckpt", "no Lightning checkpoint", spoil=saved({"a": torch.ones(3)})
    ),
    finished("no checkpoint left", GO_ON, "runs/done", "start without ckpt_path", spoil=lambda at: newest(at).unlink()),
    finished("a checkpoint of another model", GO_ON + " model.path={inputs}/wide", "end-step", "gate_proj.weight"),
    finished("a checkpoint of another method", GO_ON + " method=meft" + OTHER, "end-step", "meft.keys", "absent"),
    finished("a checkpoint of another optimizer", GO_ON + " optimizer=sgd", "`momentum`", "another optimizer"),
    finished("a checkpoint without its config", EXPORT, "end-step", "config.yaml", spoil=config(None)),
    finished("a config that is no YAML", EXPORT, "runs/done/config.yaml", "ckpt_path=last", spoil=config(b"model: [")),
    finished("an empty config", EXPORT, "runs/done/config.yaml", "ckpt_path=last", spoil=config(b"")),
    finished("a binary config", EXPORT, "runs/done/config.yaml", "ckpt_path=last", spoil=config(b"\xff\xfe\x00")),
    finished(
        "a config of something else", EVALUATE, "runs/done/config.yaml", "model, data", spoil=config(b"seed: 1\n")
    ),
    finished("nothing there to export", "export ckpt_path=nowhere", "'nowhere'"),
    finished("nothing there to evaluate", "evaluate ckpt_path=runs", "runs", "config.yaml", spoil=config(None)),
    finished("evaluation of a damaged checkpoint", EVALUATE, "end-step", "an earlier one", spoil=cut_checkpoint),
    finished("evaluation to a folder", f"{EVALUATE} output=runs", "'runs': Is a directory", "name a file"),
    finished("evaluation to a full disk", f"{EVALUATE} output=/dev/full", "'/dev/full': No space left", "free some"),
    finished("evaluation below a file", f"{EVALUATE} output={{inputs}}/text.py/a.json", "text.py", "another name"),
    finished(
        "evaluation to where nobody writes", f"{EVALUATE} output=/proc/a.json", "'/proc/a.json'", "choose a place"
    ),
    finished("evaluation of no tokens", EVALUATE.replace("=1", "=-1"), "max_new_tokens=-1", "from 1"),
    finished("evaluation on other data", f"{EVALUATE} data.path=nowhere.txt", "'nowhere.txt'", "data.path="),
    finished("evaluation with a bad seed", f"{EVALUATE} seed=-1", "seed=-1", "from 0"),
    finished("evaluation on too many devices", f"{EVALUATE} trainer.devices=9999", "trainer.devices=9999", "cores"),
    finished("evaluation of no split", f"{EVALUATE} split=train", "val or test", "'train'"),
    finished("export to a file", f"{EXPORT[:-3]}file", "'file'", "another folder", file=b"notes"),
    finished(
        "export to a folder of notes", f"{EXPORT[:-3]}mine", "'mine'", "another folder", **{"mine/notes.txt": b"notes"}
    ),
    finished(
        "export over a repository",
        f"{EXPORT[:-3]}mine",
        "'mine'",
        "'.git'",
        "another folder",
        **{"mine/config.json": b"{}", "mine/.git/HEAD": b"ref"},
    ),
    finished("export below a file", f"{EXPORT[:-3]}file/a", "'file/a'", "Not a directory", file=b"notes"),
    finished("export to where nobody writes", f"{EXPORT[:-3]}/proc/a", "'/proc/a'", "No such file"),
    finished("export in four bits", f"{EXPORT} dtype=int4", "`dtype`", "bfloat16", "'int4'"),
    finished("export in files of nothing", f"{EXPORT} max_shard_gib=0", "max_shard_gib=0", "above 0"),
    finished("export of a diverged model", EXPORT, "not finite", "diverged", spoil=diverged),
    finished("export of a damaged checkpoint", EXPORT, "end-step", "an earlier one", spoil=cut_checkpoint),
    finished("no log", "export log=nowhere.log output=new", "'nowhere.log'"),
    finished("a log that is none", "export log=a.log output=new", "a.log", "no log of a zo2 run", **{"a.log": b"LOG"}),
    finished("a bench of nonsense", "bench sections=[nonsense]", "sections: no section 'nonsense'", "there are rates"),
    finished("no such device", "doctor device=abacus", "`device` must be 'cpu'", "'abacus'"),
    finished("a plan to a file", "plan {given} output=file", "'file", "file is in the way", file=b"a"),
    finished("a plan with too many rows", "plan {given} method=meft union=7", "`union`", "at most 1", "7.0"),
    finished(
        "a plan of less than no memory", "plan {given} hardware=rtx4090 hardware.device_gib=-1", "device_gib", "-1"
    ),
    finished("a plan without a link", "plan {given} hardware=rtx4090 hardware.rates.h2d_gb_per_s=0", "h2d_gb_per_s"),
    finished("a plan of no samples", "plan {given} data.batch_size=0", "batch_size=0"),
]

CASES = [*DATA, *CHATS, *MODELS, *SETTINGS, *FINISHED]
