import json
import sys

import pytest

from lightning_offload.errors import DataError, OffloadError
from lightning_offload.text import Gsm8k
from lightning_offload.text.lines import read_split

ROWS = [{"question": f"What is {n} and 1?", "answer": f"It is <<{n}+1={n + 1}>>.\n#### {n + 1}"} for n in range(6)]


@pytest.fixture
def folder(tmp_path):
    """A function from file names to their lines (objects, or text as it stands) to a folder with them."""

    def write(**files):
        for name, rows in files.items():
            file = tmp_path / name.replace("__", "/").replace("_jsonl", ".jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(tmp_path)

    return write


def texts(tokenizer, examples):
    """Prompt and learned text of each example."""
    split = [int((example["labels"] == -100).sum()) for example in examples]
    ids = [example["input_ids"] for example in examples]
    return [(tokenizer.decode(row[:at]), tokenizer.decode(row[at:])) for row, at in zip(ids, split, strict=True)]


def test_answers_are_learned_and_splits_kept_apart(tokenizer, folder):
    path = folder(train_jsonl=ROWS[:5], test_jsonl=ROWS[5:])
    data = Gsm8k(path=path, val_examples=2, tokenizer=tokenizer)
    data.setup()
    train, val, test = (texts(tokenizer, loader.dataset) for loader in loaders(data))
    assert (len(train), len(val)) == (3, 2)
    whole = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}<|endoftext|>") for row in ROWS]
    assert sorted(train + val) == whole[:5]
    assert test == whole[5:]
    other = Gsm8k(path=path, val_examples=2, tokenizer=tokenizer, seed=1)
    other.setup()
    assert texts(tokenizer, other.val_dataloader().dataset) != val


def loaders(data):
    return data.train_dataloader(), data.val_dataloader(), data.test_dataloader()


def test_the_real_data(tokenizer, shared_data):
    data = Gsm8k(path=str(shared_data / "gsm8k"), sequence_length=1024, tokenizer=tokenizer)
    data.setup()
    assert [len(loader.dataset) for loader in loaders(data)] == [7473 - 500, 500, 1319]
    (prompt, answer), *_ = texts(tokenizer, data.test_dataloader().dataset)
    assert prompt.startswith("Question: Janet")
    assert answer.endswith("#### 18<|endoftext|>")
    assert 1 < data.test_bytes_per_token < 4


def test_what_is_cut_is_said(tokenizer, folder):
    long = {"question": "Why?", "answer": "Because " * 50}
    data = Gsm8k(path=folder(train_jsonl=[long, *ROWS], test_jsonl=ROWS), val_examples=1, tokenizer=tokenizer)
    data.sequence_length = 60
    with pytest.warns(
        UserWarning, match=r"1 of \d examples are cut on the right. Raise data.sequence_length \(now 60\)"
    ):
        data.setup()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train_jsonl": ROWS}, r"has no test file with anything in it: needs test ending in \.jsonl, \.parquet"),
        ({"test_jsonl": ROWS}, "has no train file"),
        ({"train_jsonl": [ROWS[0], {"question": "a"}], "test_jsonl": ROWS}, r"train\.jsonl, line 2: .*needs 'answer'"),
        ({"train_jsonl": [{"question": 1, "answer": "a"}] * 3, "test_jsonl": ROWS}, r"line \d: 'question' is int, not"),
        ({"train_jsonl": [*ROWS, "{"], "test_jsonl": ROWS}, r"train\.jsonl, line 7: not valid JSON"),
        (
            {"main__train_jsonl": ROWS, "socratic__train_jsonl": ROWS},
            "'train' more than once, in main/.* and socratic/",
        ),
        ({"train-00000-of-00002_jsonl": ROWS}, "has 1 of the files of the split 'train', needs 2"),
        ({"train_jsonl": [], "test_jsonl": ROWS}, r"train\.jsonl is empty"),
    ],
)
def test_bad_files(files, message, tokenizer, folder):
    with pytest.raises(DataError, match=message):
        Gsm8k(path=folder(**files), val_examples=1, tokenizer=tokenizer).setup()


def test_bad_settings(tokenizer, folder, tmp_path):
    with pytest.raises(DataError, match=r"no folder path='.*none': pass data\.path=<folder with train"):
        Gsm8k(path=str(tmp_path / "none"), tokenizer=tokenizer).setup()
    with pytest.raises(ValueError, match="val_examples=0"):
        Gsm8k(path="x", val_examples=0)
    path = folder(train_jsonl=ROWS, test_jsonl=ROWS)
    with pytest.raises(ValueError, match="val_examples=6 of 6 leave nothing to train on"):
        Gsm8k(path=path, val_examples=6, tokenizer=tokenizer).setup()


def test_shards_are_joined_in_order(folder):
    shards = {f"data__train-0000{n}-of-00003_jsonl": ROWS[2 * n : 2 * n + 2] for n in range(3)}
    assert [line.row for line in read_split(folder(**shards), "train")] == ROWS
    assert read_split(folder(), "test") == []


def test_csv_and_tsv(folder, tmp_path):
    folder()
    (tmp_path / "train.csv").write_text('question,answer\n"Why, then?","So:\nit is."\nWho?,He.\n')
    first, second = read_split(str(tmp_path), "train")
    assert first.row == {"question": "Why, then?", "answer": "So:\nit is."}
    assert (second.number, second.text("answer")) == (4, "He.")
    (tmp_path / "dev.tsv").write_text('sentence\tlabel\n"quoted , half\t1\n')
    assert [line.row for line in read_split(str(tmp_path), "dev", "validation")] == [
        {"sentence": '"quoted , half', "label": "1"}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n3\n", r"test\.csv, line 3: does not have the 2 fields that the first line names"),
        (b"a,b\n1,2,3\n", "line 2: does not have the 2 fields"),
        (b'a,b\n1,"2\n', r"test\.csv, line 2: unexpected end of data"),
        (b"a,b\n\xff,2\n", r"test\.csv: not UTF-8 text \(byte 4\)"),
    ],
)
def test_bad_csv(content, message, tmp_path):
    (tmp_path / "test.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_split(str(tmp_path), "test")


def test_parquet_as_the_hub_keeps_it(tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow")
    from pyarrow import parquet

    (tmp_path / "main").mkdir()
    for split in ("train", "test"):
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    data = Gsm8k(path=str(tmp_path), val_examples=1, tokenizer=tokenizer)
    data.setup()
    assert len(texts(tokenizer, data.test_dataloader().dataset)) == 6
    (tmp_path / "main" / "test-00000-of-00001.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="no Parquet file that can be read"):
        read_split(str(tmp_path), "test")


def test_parquet_without_its_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(OffloadError, match=r"needs pyarrow; pip install 'lightning-offload\[data\]', or convert"):
        read_split(str(tmp_path), "train")
