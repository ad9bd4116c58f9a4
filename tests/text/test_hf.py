import json
import sys

import datasets
import pytest
import torch

from lightning_offload.errors import DataError, OffloadError
from lightning_offload.text import HfDataset, Jsonl

ROWS = [{"prompt": f"Say {n}: ", "completion": "word " * (n % 5 + 1)} for n in range(8)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def on_disk(folder):
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table, "validation": table.select(range(2))}).save_to_disk(folder)


def one_on_disk(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)


def files(folder):
    folder.mkdir()
    for name, rows in (("train", ROWS), ("validation", ROWS[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(folder):
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def learned(data):
    data.setup()
    sets = data.train_dataloader().dataset, data.val_dataloader().dataset
    return [[data.tokenizer.decode(row["labels"][row["labels"] != -100]) for row in rows] for rows in sets]


@pytest.mark.parametrize("write", [on_disk, files])
def test_two_splits(write, tmp_path, tokenizer):
    write(tmp_path / "set")
    train, val = learned(HfDataset(path=str(tmp_path / "set"), val_split="validation", tokenizer=tokenizer))
    assert train == [f"{row['completion']}<|endoftext|>" for row in ROWS]
    assert val == train[:2]


@pytest.mark.parametrize("write", [on_disk, one_on_disk, files, parquet])
def test_a_part_is_held_out_as_of_a_file(write, tmp_path, tokenizer, jsonl):
    write(tmp_path / "set")
    options = {"val_fraction": 0.25, "tokenizer": tokenizer, "packing": True, "seed": 3}
    train, val = learned(HfDataset(path=str(tmp_path / "set"), **options))
    assert len(val) == 2
    assert (train, val) == tuple(learned(Jsonl(path=jsonl(*ROWS), **options)))


def test_rows_of_other_shapes_and_names(tmp_path, tokenizer):
    rows = [{"q": "Why? ", "a": "So.", "body": None}, {"q": None, "a": None, "body": "All of it."}] * 2
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    data = HfDataset(
        path=str(tmp_path / "set"), prompt_field="q", completion_field="a", text_field="body", tokenizer=tokenizer
    )
    train, val = learned(data)
    assert sorted(train + val) == ["All of it.<|endoftext|>"] * 2 + ["So.<|endoftext|>"] * 2


def test_a_part_of_a_split(tmp_path, tokenizer):
    files(tmp_path / "set")
    data = HfDataset(path=str(tmp_path / "set"), split="train[:3]", val_split="train[3:]", tokenizer=tokenizer)
    assert list(map(len, learned(data))) == [3, 5]
    assert next(iter(data.train_dataloader()))["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (on_disk, {"split": "dev"}, r"data.path='.*set' has no split 'dev'; there are train, validation\."),
        (one_on_disk, {"val_split": "dev"}, r"has no split 'dev'; there are train\."),
        (
            files,
            {"split": "dev"},
            r"Cannot load .*, data.split='dev': Unknown split \"dev\".*Pass a hub",
        ),
        (files, {"name": "small"}, "Cannot load .* BuilderConfig 'small' not found"),
        (lambda folder: folder.mkdir(), {}, "Cannot load data.path='.*set'.* or a folder with data files"),
        (files, {"prompt_field": "q"}, r"set \(train\), line 1: has the fields \['completion', 'prompt'\]; needs 'q'"),
    ],
)
def test_what_cannot_be_found(write, options, message, tmp_path, tokenizer):
    write(tmp_path / "set")
    with pytest.raises(DataError, match=message) as raised:
        HfDataset(path=str(tmp_path / "set"), tokenizer=tokenizer, **options).setup()
    assert "\n" not in str(raised.value)


def test_a_script_is_one_line(tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("x = 1")
    with pytest.raises(DataError, match=r"Cannot load .*scripts are no longer supported.*Pass a hub id") as raised:
        HfDataset(path=str(tmp_path / "set"), tokenizer=tokenizer).setup()
    assert "\n" not in str(raised.value)


def test_the_hub_is_out_of_reach(tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"Cannot load data.path='nobody/nothing', data.split='train': .*") as raised:
        HfDataset(path="nobody/nothing", tokenizer=tokenizer).setup()
    assert "\n" not in str(raised.value)


def test_without_the_package(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OffloadError, match=r"needs the package datasets; pip install 'lightning-offload\[data\]', or"):
        HfDataset(path="x", tokenizer=tokenizer).setup()
