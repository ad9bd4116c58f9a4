import csv
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_offload.errors import DataError
from lightning_offload.text import Glue
from lightning_offload.text.glue import TASKS

ONE = [{"sentence": f"film {'very ' * (n % 4)}{n}", "label": n % 2} for n in range(8)]
TWO = [{"sentence1": f"one {n}", "sentence2": f"two {'or ' * n}{n}", "label": n % 2} for n in range(8)]
SCORES = [{**row, "label": n * 0.5} for n, row in enumerate(TWO)]


@pytest.fixture
def folder(tmp_path):
    """A function from splits to a folder with them, in one format."""

    def write(kind="jsonl", **splits):
        for name, rows in splits.items():
            file = tmp_path / f"{name}.{kind}"
            if kind == "jsonl":
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            elif kind == "parquet":
                pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow")
                from pyarrow import parquet

                parquet.write_table(pyarrow.Table.from_pylist(rows), file)
            else:
                with file.open("w", newline="") as opened:
                    writer = csv.DictWriter(opened, rows[0], delimiter={"csv": ",", "tsv": "\t"}[kind])
                    writer.writeheader()
                    writer.writerows(rows)
        return str(tmp_path)

    return write


@pytest.fixture
def bert_like():
    """A tokenizer that puts tokens around and between texts, and says which of two a token is of."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "or", *map(str, range(8))]
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def ready(data):
    data.setup()
    return data


def texts(data, loader):
    return [(data.tokenizer.decode(row["input_ids"]), row["labels"].item()) for row in loader.dataset]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_examples(kind, folder, tokenizer):
    path = folder(kind, train=ONE, dev=ONE[:3], test=ONE[3:])
    data = ready(Glue(path=path, task="sst2", batch_size=4, tokenizer=tokenizer))
    assert texts(data, data.train_dataloader()) == [(row["sentence"], row["label"]) for row in ONE]
    assert texts(data, data.val_dataloader()) == [(row["sentence"], row["label"]) for row in ONE[:3]]
    assert len(data.test_dataloader().dataset) == 5
    assert (data.num_labels, data.label_names, data.metric) == (2, ("negative", "positive"), "accuracy")


def test_a_batch_is_padded_on_the_right(folder, tokenizer):
    data = ready(Glue(path=folder(train=ONE, dev=ONE), task="sst2", val_batch_size=8, tokenizer=tokenizer))
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == batch["labels"].dtype == torch.int64
    lengths = [len(tokenizer(row["sentence"])["input_ids"]) for row in ONE]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert all((row[length:] == tokenizer.pad_token_id).all() for row, length in zip(batch["input_ids"], lengths))  # noqa: B905
    assert batch["labels"].tolist() == [0, 1] * 4
    same = data._collate([data.val_dataloader().dataset[0]] * 2)
    assert set(same) == {"input_ids", "labels"}
    assert data.preview(batch) == f"film 0 ⟦negative⟧\n({lengths[0]} tokens; labels: negative, positive)"


def test_two_texts_have_the_models_own_tokens_between_them(folder, bert_like, tokenizer):
    path = folder(train=TWO, dev=TWO)
    data = ready(Glue(path=path, task="mrpc", val_batch_size=8, tokenizer=bert_like))
    (batch,) = data.val_dataloader()
    assert bert_like.decode(batch["input_ids"][2]).startswith("[CLS] one 2 [SEP] two or or 2 [SEP] [PAD]")
    assert batch["token_type_ids"][0].tolist() == [0] * 4 + [1] * 3 + [0] * 7
    plain = ready(Glue(path=path, task="rte", tokenizer=tokenizer))  # this one puts none: a line break
    assert texts(plain, plain.val_dataloader())[1] == ("one 1\ntwo or 1", 1)


def test_what_is_too_long_is_cut_and_said(folder, bert_like):
    data = Glue(path=folder(train=TWO, dev=TWO), task="mrpc", sequence_length=8, tokenizer=bert_like)
    with pytest.warns(UserWarning, match=r"6 of 8 examples are cut. Raise data.sequence_length \(now 8\)"):
        data.setup()
    lengths = {len(row["input_ids"]) for row in data.val_dataloader().dataset}
    assert lengths == {7, 8}
    assert bert_like.decode(data.val_dataloader().dataset[7]["input_ids"]) == "[CLS] one 7 [SEP] two or or [SEP]"


def test_labels_by_name_and_by_place(folder, tokenizer):
    named = [{**row, "label": ["entailment", "not_entailment"][row["label"]]} for row in TWO]
    for rows in (named, TWO, [{**row, "label": str(row["label"])} for row in TWO]):
        data = ready(Glue(path=folder(train=rows, dev=rows), task="rte", tokenizer=tokenizer))
        assert [row["labels"].item() for row in data.val_dataloader().dataset] == [0, 1] * 4


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["bad", "good", "awful"], ("awful", "bad", "good")),
        ([1, 2, 3], ("1", "2", "3")),
        (["-1", "1", "10"], ("-1", "1", "10")),
        ([True, False, True], ("False", "True")),
        ([0.5, 1, -2], ()),
    ],
)
def test_without_a_task_labels_are_those_in_the_training_file(labels, names, folder, tokenizer):
    rows = [{"body": f"text {n}", "kind": label} for n, label in enumerate(labels)]
    options = {"text_fields": ["body"], "label_field": "kind", "tokenizer": tokenizer}
    data = Glue(path=folder(train=rows, validation=rows), **options)
    assert (data.label_names, data.num_labels) == (names, len(names) or 1)
    data.setup()
    expected = [names.index(str(label)) for label in labels] if names else labels
    assert [row["labels"].item() for row in data.val_dataloader().dataset] == expected


def test_scores(folder, tokenizer):
    data = ready(Glue(path=folder(train=SCORES, dev=SCORES), task="stsb", val_batch_size=8, tokenizer=tokenizer))
    (batch,) = data.val_dataloader()
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [n * 0.5 for n in range(8)]
    assert (data.num_labels, data.label_names, data.metric) == (1, (), "pearson")
    assert "⟦0⟧" in data.preview(batch)


def test_fields_may_be_called_otherwise_than_the_task_has_them(folder, tokenizer):
    rows = [{"a": "one", "b": "two", "is_duplicate": n % 2} for n in range(4)]
    data = Glue(
        path=folder(train=rows, dev=rows),
        task="qqp",
        text_fields=["a", "b"],
        label_field="is_duplicate",
        label_names=["no", "yes"],
        tokenizer=tokenizer,
    )
    assert texts(data, ready(data).val_dataloader())[1] == ("one\ntwo", 1)
    assert data.label_names == ("no", "yes")


@pytest.mark.parametrize("label", [-1, "-1", -1.0])
def test_a_test_without_labels_is_not_tested_with(label, folder, tokenizer):
    path = folder(train=ONE, dev=ONE[:3], test=[{"sentence": "hidden", "label": label}])
    data = ready(Glue(path=path, task="sst2", tokenizer=tokenizer))
    assert texts(data, data.test_dataloader()) == texts(data, data.val_dataloader())


def test_mnli_validates_with_what_matches_and_tests_with_the_rest(folder, tokenizer):
    rows = [{"premise": f"p {n}", "hypothesis": f"h {n}", "label": n % 3} for n in range(9)]
    hidden = [{**rows[0], "label": -1}]
    splits = {"train": rows, "validation_matched": rows[:3], "validation_mismatched": rows[3:5]}
    data = ready(Glue(path=folder(**splits, test_matched=hidden), task="mnli", tokenizer=tokenizer))
    assert [text for text, _ in texts(data, data.val_dataloader())] == ["p 0\nh 0", "p 1\nh 1", "p 2\nh 2"]
    assert [text for text, _ in texts(data, data.test_dataloader())] == ["p 3\nh 3", "p 4\nh 4"]


def test_so_many_examples_drawn_by_the_seed(folder, tokenizer):
    path = folder(train=ONE, dev=ONE)
    drawn = [
        texts(data, ready(data).train_dataloader())
        for data in (Glue(path=path, task="sst2", train_examples=4, seed=s, tokenizer=tokenizer) for s in (0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4


def test_every_task_says_two_labels_or_a_score():
    assert len(TASKS) == 9
    for name in TASKS:
        data = Glue(path="nowhere", task=name)  # which reads nothing
        assert data.num_labels == {"mnli": 3, "stsb": 1}.get(name, 2)


def test_the_real_data(tokenizer, shared_data):
    data = ready(Glue(path=str(shared_data / "sst2"), task="sst2", train_examples=1000, tokenizer=tokenizer))
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(loader.dataset) for loader in loaders] == [1000, 500, 872]
    assert sum(row["labels"].item() for row in loaders[2].dataset) == 444


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 2}, r"train\.jsonl, line 2: 'label' is 2; the labels are 'negative' \(0\), 'positive' \(1\)\."),
        ({"label": -1}, "line 2: 'label' is -1; the labels are"),
        ({"label": "good"}, "line 2: 'label' is 'good'"),
        ({"label": None}, "line 2: 'label' is None"),
        ({"label": 0.5}, r"line 2: 'label' is 0\.5"),
        ({"sentence": 7}, "line 2: 'sentence' is int, not text"),
        ({"sentence": " "}, "line 2: 'sentence': no text"),
    ],
)
def test_bad_lines(row, message, folder, tokenizer):
    rows = [ONE[0], {**ONE[1], **row}, *ONE]
    with pytest.raises(DataError, match=message):
        Glue(path=folder(train=rows, dev=ONE), task="sst2", tokenizer=tokenizer).setup()


def test_a_label_that_training_does_not_have(folder, tokenizer):
    rows = [{"text": "a", "label": label} for label in ("yes", "no")]
    path = folder(train=rows, dev=[*rows, {"text": "a", "label": "maybe"}])
    with pytest.raises(DataError, match=r"dev\.jsonl, line 3: 'label' is 'maybe'; the labels are 'no' \(0\), 'yes'"):
        Glue(path=path, text_fields=["text"], tokenizer=tokenizer).setup()


def test_a_score_that_is_none(folder, tokenizer):
    with pytest.raises(DataError, match="line 1: 'label' is 'nan'; needs a number"):
        Glue(path=folder(train=[{**TWO[0], "label": "nan"}], dev=SCORES), task="stsb", tokenizer=tokenizer).setup()


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        ({"train": ONE}, {}, "has no validation file with anything in it"),
        ({"dev": ONE}, {}, "has no train file"),
        ({"train": ONE, "dev": ONE}, {"label_field": "kind"}, r"has the fields \['label', 'sentence'\]; needs 'kind'"),
        ({"train": ONE, "dev": ONE}, {"task": "rte"}, "needs 'sentence1'"),
    ],
)
def test_missing_files_and_fields(splits, options, message, folder, tokenizer):
    with pytest.raises(DataError, match=message):
        Glue(path=folder(**splits), **{"task": "sst2", "tokenizer": tokenizer, **options}).setup()


def test_a_field_that_is_no_label(folder):
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(40)]
    data = Glue(path=folder(train=rows, dev=rows), text_fields=["text"], label_field="text")
    with pytest.raises(DataError, match=r"'text' has 40 different values in 40 lines, so it is no label"):
        _ = data.num_labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sst"}, "task='sst': the choice is cola, sst2, mrpc"),
        ({}, r"Say what is to be read: data\.task=sst2 \(or another\), or data\.text_fields"),
        ({"text_fields": ["a", "b", "c"]}, "give one field, or two"),
        ({"task": "sst2", "label_names": ["a"]}, r"label_names=\['a'\]: give two different names or more"),
        ({"task": "sst2", "label_names": ["a", "a"]}, "give two different names"),
        ({"task": "sst2", "val_examples": 0}, "at least one each, or None"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Glue(path="x", **options)


@pytest.mark.parametrize(("kind", "missing"), [("jsonl", None), ("csv", ""), ("csv", " "), ("jsonl", float("nan"))])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_missing_label_is_no_class(split, kind, missing, folder, tokenizer):
    rows = [{"text": f"film {n}", "label": "ab"[n % 2]} for n in range(6)]
    splits = {"train": rows, "dev": rows} | {split: [*rows, {"text": "film", "label": missing}]}
    line = len(rows) + 1 + (kind == "csv")
    with pytest.raises(DataError, match=rf"{split}\.{kind}, line {line}: 'label' is .*, which is no label: leave"):
        Glue(path=folder(kind, **splits), text_fields=["text"], tokenizer=tokenizer).setup()


def test_minus_one_beside_places_is_no_class_unless_it_is_named(folder, tokenizer):
    rows = [{"text": f"film {n}", "label": n % 3 - 1} for n in range(6)]
    options = {"path": folder(train=rows, dev=rows), "text_fields": ["text"], "tokenizer": tokenizer}
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: 'label' is -1, .* pass data\.label_names=\[-1,0,1\]"):
        Glue(**options).setup()
    data = ready(Glue(**options, label_names=[-1, 0, 1]))
    assert [row["labels"].item() for row in data.val_dataloader().dataset] == [0, 1, 2] * 2


@pytest.mark.parametrize("label", [None, "", "-1"])
def test_a_test_whose_labels_are_left_empty_is_not_tested_with(label, folder, tokenizer):
    path = folder(train=ONE, dev=ONE[:3], test=[{"sentence": "hidden", "label": label}])
    data = ready(Glue(path=path, text_fields=["sentence"], tokenizer=tokenizer))
    assert texts(data, data.test_dataloader()) == texts(data, data.val_dataloader())


def test_labels_of_tables_may_have_spaces_around_them(folder, tokenizer):
    rows = [{"text": f"film {n}", "label": [" a", "b ", "a"][n % 3]} for n in range(6)]
    data = ready(Glue(path=folder("csv", train=rows, dev=rows), text_fields=["text"], tokenizer=tokenizer))
    assert data.label_names == ("a", "b")
    assert [row["labels"].item() for row in data.val_dataloader().dataset] == [0, 1, 0] * 2


@pytest.mark.parametrize("label", ["pos", 1])
def test_one_class_is_nothing_to_tell_apart(label, folder, tokenizer):
    rows = [{"text": f"film {n}", "label": label} for n in range(6)]
    data = Glue(path=folder(train=rows, dev=rows), text_fields=["text"], tokenizer=tokenizer)
    with pytest.raises(
        DataError, match=rf"train\.jsonl: 'label' is '{label}' in all 6 lines: there is nothing to tell"
    ):
        _ = data.num_labels
