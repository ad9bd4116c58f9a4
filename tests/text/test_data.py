import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_offload.errors import DataError
from lightning_offload.text import Jsonl, PythonDocs, PythonSource, TextData, TextFiles
from lightning_offload.text.batches import batch_by_shape, collate, pack, spread

QUESTION = {"prompt": "What is one and one? ", "completion": "two"}


def learned(data, batch, row=0):
    labels = batch["labels"][row]
    return data.tokenizer.decode(labels[labels != -100])


def test_pack_joins_documents_and_cuts():
    assert pack([[1, 2, 3], [4], [5, 6]], end=9, length=4).tolist() == [[1, 2, 3, 9], [4, 9, 5, 6]]
    assert pack([], end=9, length=4).shape == (0, 4)


def test_spread_takes_sequences_from_everywhere():
    sequences = torch.arange(40).view(10, 4)
    assert spread(sequences, None) is sequences
    assert spread(sequences, 12)[:, 0].tolist() == [0, 16, 36]


def test_collate_pads_on_the_right_only_when_it_must():
    short, long = torch.tensor([1, 2]), torch.tensor([3, 4, 5])
    same = collate([{"input_ids": short, "labels": short}] * 2, pad=7)
    assert set(same) == {"input_ids", "labels"}
    mixed = collate([{"input_ids": short, "labels": short}, {"input_ids": long, "labels": long}], pad=7)
    assert mixed["input_ids"].tolist() == [[1, 2, 7], [3, 4, 5]]
    assert mixed["labels"].tolist() == [[1, 2, -100], [3, 4, 5]]
    assert mixed["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("module", [PythonSource, PythonDocs])
def test_shipped_corpus(module, tokenizer):
    data = module(sequence_length=64, batch_size=4, val_batch_size=16, limit_val_tokens=2048, tokenizer=tokenizer)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (4, 64)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert [len(part["labels"]) for part in data.val_dataloader()] == [16, 16]
    assert 2.5 < data.bytes_per_token < 4
    assert data.preview(batch).startswith("⟦")
    assert "(64 tokens; 100% of the batch is learned" in data.preview(batch)


def test_limits_are_tokens(tokenizer):
    data = PythonDocs(sequence_length=64, limit_train_tokens=1000, limit_val_tokens=640, tokenizer=tokenizer)
    data.setup()
    assert (len(data.train_dataloader().dataset), len(data.val_dataloader().dataset)) == (15, 10)


def test_bytes_per_token_counts_what_is_scored(tokenizer, tmp_path):
    text = "größer 🤖 than before " * 40
    (tmp_path / "a.txt").write_text(text)
    data = TextFiles(path=str(tmp_path), val_path=str(tmp_path / "a.txt"), sequence_length=8, tokenizer=tokenizer)
    data.setup()
    rows = torch.cat([batch["labels"] for batch in data.val_dataloader()])
    assert data.bytes_per_token == pytest.approx(len(text.encode()) / len(tokenizer(text)["input_ids"]), rel=0.2)
    assert rows.shape[1] == 8


def test_text_files(tokenizer, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("alpha " * 100)
    (tmp_path / "deep" / "b.py").write_text("beta = 1\n" * 100)
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    sizes = {}
    for path in (tmp_path, tmp_path / "a.txt", tmp_path / "**" / "*.py"):
        data = TextFiles(path=str(path), sequence_length=16, val_fraction=0.25, tokenizer=tokenizer)
        data.setup()
        train, val = (len(data.train_dataloader().dataset), len(data.val_dataloader().dataset))
        assert val == round((train + val) * 0.25)
        sizes[path] = train + val
    assert sizes[tmp_path] >= sizes[tmp_path / "a.txt"] + sizes[tmp_path / "**" / "*.py"]


def test_jsonl_learns_answers_only(tokenizer, jsonl):
    data = Jsonl(path=jsonl(QUESTION, {**QUESTION, "completion": "two, of course"}), batch_size=2, tokenizer=tokenizer)
    data.setup()
    batch = collate([data.train_dataloader().dataset[0], data.val_dataloader().dataset[0]], pad=0)
    assert sorted(learned(data, batch, row) for row in (0, 1)) == ["two, of course<|endoftext|>", "two<|endoftext|>"]
    assert "attention_mask" in batch
    row = int(batch["attention_mask"].sum(1).argmin())
    assert data.preview({name: value[row:] for name, value in batch.items()}).startswith(
        "What is one and one? ⟦two<|endoftext|>⟧"
    )


def test_jsonl_text_and_other_field_names(tokenizer, jsonl):
    data = Jsonl(
        path=jsonl({"q": "Why? ", "a": "Because."}, {"q": "How? ", "a": "So."}),
        val_path=jsonl({"body": "All of this."}, name="val.jsonl"),
        prompt_field="q",
        completion_field="a",
        text_field="body",
        tokenizer=tokenizer,
    )
    data.setup()
    assert len(data.train_dataloader().dataset) == 2
    assert learned(data, next(iter(data.val_dataloader()))) == "All of this.<|endoftext|>"


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Nothing."},
]


@pytest.fixture
def chat_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    return tokenizer


def test_jsonl_messages_learn_every_turn_of_the_assistant(chat_tokenizer, jsonl):
    file = jsonl({"messages": TALK})
    data = Jsonl(path=file, val_path=file, tokenizer=chat_tokenizer)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert learned(data, batch) == "Good day.\nNothing.\n"
    assert "<user>Hello.\n<assistant>⟦Good day.\n⟧<user>And?\n<assistant>⟦Nothing.\n⟧" in data.preview(batch)


def test_jsonl_template_that_changes_earlier_turns(chat_tokenizer, jsonl, monkeypatch):
    last_only = TEMPLATE.replace("{{ message.content }}", "{{ loop.last }}{{ message.content }}")
    monkeypatch.setattr(chat_tokenizer, "chat_template", last_only)
    with pytest.raises(DataError, match=r"line 1: this chat template renders a turn differently.*Split"):
        Jsonl(path=jsonl({"messages": TALK}), tokenizer=chat_tokenizer).setup()


def test_jsonl_messages_may_begin_with_the_assistant(chat_tokenizer, jsonl, monkeypatch):
    strict = "{% if messages[0].role == 'robot' %}never{% endif %}" + TEMPLATE  # fails where there is no message
    monkeypatch.setattr(chat_tokenizer, "chat_template", strict)
    file = jsonl({"messages": TALK[1:]})
    data = Jsonl(path=file, val_path=file, tokenizer=chat_tokenizer)
    data.setup()
    assert "⟦<assistant>Good day.\n⟧<user>And?\n<assistant>⟦Nothing.\n⟧" in data.preview(
        next(iter(data.train_dataloader()))
    )


def test_jsonl_template_that_fails_for_a_part_of_a_conversation(chat_tokenizer, jsonl, monkeypatch):
    strict = "{% if messages|length == 1 %}{{ raise_exception('Nobody answers') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(chat_tokenizer, "chat_template", strict)
    with pytest.raises(DataError, match=r"line 1: the tokenizer's chat template cannot render it \(Nobody answers\)"):
        Jsonl(path=jsonl({"messages": TALK}), tokenizer=chat_tokenizer).setup()


def test_jsonl_template_whose_prompt_ends_in_a_space(chat_tokenizer, jsonl, monkeypatch):
    spaced = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:"
    )
    file = jsonl({"messages": [TALK[0], {"role": "assistant", "content": "add one"}]})
    data = Jsonl(path=file, val_path=file, tokenizer=chat_tokenizer)
    monkeypatch.setattr(chat_tokenizer, "chat_template", spaced + " {% endif %}")
    with pytest.raises(
        DataError, match=r"line 1: the tokenizer joins 'ssistant: ' and 'add one.*end of the chat templ"
    ):
        data.setup()
    monkeypatch.setattr(chat_tokenizer, "chat_template", spaced + "{% endif %}")  # what the message says
    data.setup()
    assert "assistant:⟦ add one\n⟧" in data.preview(next(iter(data.train_dataloader())))


def test_jsonl_messages_with_half_a_character(chat_tokenizer, jsonl):
    file = jsonl({"messages": [TALK[0], {"role": "assistant", "content": "a\ud83d"}]})
    with pytest.raises(DataError, match=r"line 1: 'content' has half a character \(\\ud83d\): mend the text"):
        Jsonl(path=file, tokenizer=chat_tokenizer).setup()


@pytest.fixture
def framing():
    """A tokenizer that puts a token before each text, and one after it."""
    words = ["<s>", "</s>", "one", "two", "three"]
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="one"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def test_a_text_begins_with_what_its_tokenizer_puts_there(framing, jsonl, tmp_path):
    file = jsonl({"prompt": "one", "completion": "two"})
    data = Jsonl(path=file, val_path=file, tokenizer=framing)
    data.setup()
    assert data.train_dataloader().dataset[0]["input_ids"].tolist() == [0, 2, 3, 1]
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("one two three")
    files = TextFiles(path=str(tmp_path), val_path=str(tmp_path), sequence_length=5, tokenizer=framing)
    files.setup()
    assert files.train_dataloader().dataset.sequences.tolist() == [[0, 2, 3, 4, 1]] * 2


def test_what_fills_no_sequence_is_said(framing, tmp_path):
    (tmp_path / "a.txt").write_text("one two three " * 7)  # 23 tokens
    data = TextFiles(path=str(tmp_path), val_path=str(tmp_path), sequence_length=8, tokenizer=framing)
    with pytest.warns(UserWarning, match=r"the last 7 of 23 tokens do not fill a sequence .* \(now 8\) leaves fewer"):
        data.setup()
    (tmp_path / "a.txt").write_text("one two three " * 67 + "one")  # 204, of which 1.0 % is 2
    data = TextFiles(path=str(tmp_path), val_path=str(tmp_path), sequence_length=101, tokenizer=framing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup()


def test_packing_is_true_or_false():
    with pytest.raises(ValueError, match="packing='off': give true or false"):
        Jsonl(path="x", packing="off")
    with pytest.raises(ValueError, match="packing='off': give true or false"):
        batch_by_shape(1, 2, 3, packing="off")


def test_jsonl_says_what_it_cuts(tokenizer, jsonl):
    long_answer = {"prompt": "Say. ", "completion": "word " * 50}
    long_prompt = {"prompt": "word " * 50, "completion": "Yes."}
    file = jsonl(long_answer, long_prompt, QUESTION, QUESTION)
    data = Jsonl(path=file, val_path=jsonl(QUESTION, name="v"), sequence_length=32, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="examples") as said:
        data.setup()
    messages = [str(warning.message) for warning in said]
    assert any("1 examples dropped, all of their answer is cut (lines 2)" in message for message in messages)
    assert any("1 of 3 examples are cut on the right" in message for message in messages)
    assert len(data.train_dataloader().dataset) == 3
    with pytest.raises(DataError, match="no example has any of its answer within"):
        Jsonl(path=jsonl(long_prompt), sequence_length=32, tokenizer=tokenizer).setup()


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([QUESTION, '{"prompt": "a", '], r"line 2: not valid JSON \(.*column"),
        ([QUESTION, "", QUESTION], "line 2: empty"),
        (["[1, 2]"], "line 1: a list, not a JSON object"),
        ([{"question": "a"}], r"line 1: has the fields \['question'\]; needs 'prompt' and 'completion'"),
        ([{"prompt": "a", "completion": 3}], "line 1: 'completion' is int, not text"),
        ([{"text": ""}], "line 1: holds nothing to learn"),
        ([{"messages": TALK}], "line 1: has messages, but the tokenizer has no chat template"),
    ],
)
def test_jsonl_bad_lines(lines, reason, tokenizer, jsonl):
    with pytest.raises(DataError, match=rf"data\.jsonl, {reason}"):
        Jsonl(path=jsonl(*lines), tokenizer=tokenizer).setup()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [("hi", "is not a list"), ([{"role": "user"}], "is not a list"), (TALK[:1], "no message of the assistant")],
)
def test_jsonl_bad_messages(messages, reason, chat_tokenizer, jsonl):
    with pytest.raises(DataError, match=f"line 1: .*{reason}"):
        Jsonl(path=jsonl({"messages": messages}), tokenizer=chat_tokenizer).setup()


def test_missing_and_empty_files(tokenizer, tmp_path, jsonl):
    with pytest.raises(DataError, match=r"no file .*none\.jsonl: pass data\.path"):
        Jsonl(path=str(tmp_path / "none.jsonl"), tokenizer=tokenizer).setup()
    with pytest.raises(DataError, match="is empty"):
        Jsonl(path=jsonl(), tokenizer=tokenizer).setup()
    with pytest.raises(DataError, match="Jsonl: nothing to validate with"):
        Jsonl(path=jsonl(QUESTION), tokenizer=tokenizer).setup()
    with pytest.raises(DataError, match="no file, folder or match for path="):
        TextFiles(path=str(tmp_path / "no*"), tokenizer=tokenizer).setup()
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no \.txt"):
        TextFiles(path=str(tmp_path / "none"), tokenizer=tokenizer).setup()
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match=r"TextFiles: nothing to train on.*sequence_length \(now 256\)"):
        TextFiles(path=str(tmp_path / "short.txt"), tokenizer=tokenizer).setup()
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text \(byte 2\)"):
        TextFiles(path=str(tmp_path / "latin.txt"), tokenizer=tokenizer).setup()


def test_bad_settings(tokenizer):
    with pytest.raises(ValueError, match="sequence_length=1"):
        PythonSource(sequence_length=1)
    with pytest.raises(ValueError, match="batch_size=0"):
        PythonSource(batch_size=0)
    with pytest.raises(ValueError, match="limit_val_tokens=10 is less than one sequence of 256"):
        PythonSource(limit_val_tokens=10)
    with pytest.raises(ValueError, match="val_fraction=0"):
        Jsonl(path="x", val_fraction=0)
    with pytest.raises(ValueError, match=r"PythonSource has no tokenizer: set data\.tokenizer = model\.tokenizer"):
        PythonSource().setup()
    with pytest.raises(ValueError, match=r"sequence_length=4096 is more than the 1024 tokens"):
        PythonSource(sequence_length=4096, tokenizer=tokenizer).setup()
    with pytest.raises(RuntimeError, match="setup"):
        TextData().val_dataloader()
