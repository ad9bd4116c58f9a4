"""BoolQ by prompt and label words: what the model reads, and which files are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_offload.errors import DataError
from lightning_offload.text import TINY_PATH, BoolQ
from lightning_offload.text.loading import load_tokenizer

ROW = {"passage": " Cats sleep a lot. ", "question": "do cats sleep", "answer": True}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_PATH, None)


def made(folder: Path, *rows: dict[str, object], tokenizer, **options) -> BoolQ:
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = BoolQ(path=str(folder), tokenizer=tokenizer, **{"val_examples": 1, "batch_size": 1, **options})
    data.setup()
    return data


@pytest.mark.parametrize("question", ["do cats sleep", "Do cats sleep?"])
def test_a_question_is_one_and_yes_is_the_second_word(question: str, tmp_path: Path, tokenizer) -> None:
    data = made(tmp_path, {**ROW, "question": question}, {**ROW, "question": question}, tokenizer=tokenizer)
    batch = next(iter(data.train_dataloader()))
    texts = [tokenizer.decode(ids) for ids in batch["input_ids"][0]]
    assert all(
        text.endswith(f"Cats sleep a lot. Do cats sleep?\n{word}")
        for text, word in zip(texts, ("No", "Yes"), strict=True)
    )
    assert batch["target"].tolist() == [1]
    assert "⟦Yes⟧" in data.preview(batch)


@pytest.mark.parametrize(
    ("label", "right"),
    [({"answer": False}, 0), ({"answer": "True"}, 1), ({"label": 1}, 1), ({"label": "0"}, 0), ({"label": False}, 0)],
)
def test_labels_of_all_its_files(label, right: int, tmp_path: Path, tokenizer) -> None:
    row = {"passage": "a", "question": "b", **label}
    assert made(tmp_path, row, row, tokenizer=tokenizer).test_dataloader().dataset[0].target == right


def test_braces_in_a_passage_are_text(tmp_path: Path, tokenizer) -> None:
    row = {**ROW, "passage": "a {question} in a passage"}
    batch = next(iter(made(tmp_path, row, row, tokenizer=tokenizer).train_dataloader()))
    assert "a {question} in a passage Do cats sleep?" in tokenizer.decode(batch["input_ids"][0, 0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "answer": "maybe"}, r"line 1: 'answer' is 'maybe'; needs 0 \(false\) or 1 \(true\)"),
        ({"passage": "a", "question": "b"}, r"has the fields \['passage', 'question'\]; needs 'label'"),
        ({"question": "b", "answer": True}, "needs 'passage'"),
    ],
)
def test_bad_lines(row, message: str, tmp_path: Path, tokenizer) -> None:
    with pytest.raises(DataError, match=message):
        made(tmp_path, row, row, tokenizer=tokenizer)


def test_a_prompt_needs_both_fields(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt='\{passage\}': say where the text goes with one \{question\}"):
        BoolQ(path=str(tmp_path), prompt="{passage}")
    with pytest.raises(ValueError, match="give two different ones, for false and true"):
        BoolQ(path=str(tmp_path), label_words=["Yes", "Yes"])
