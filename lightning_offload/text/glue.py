"""Files shaped like GLUE's (Wang et al., 2018): one or two texts and a label per line, for `SequenceClassifier`."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.errors import DataError
from lightning_offload.text.batches import Example
from lightning_offload.text.data import TextData
from lightning_offload.text.lines import Line, needed, read_split

Metric = Literal["accuracy", "f1", "matthews", "pearson"]
_ENTAILMENT = ("entailment", "not_entailment")


class Task(NamedTuple):
    """Fields of the texts, names of the classes in their order (none: a score), and the metric that GLUE reports."""

    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metric: Metric = "accuracy"


#: fields and labels as on the Hugging Face hub (``nyu-mll/glue``)
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1"),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    "stsb": Task(("sentence1", "sentence2"), (), "pearson"),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": Task(("question", "sentence"), _ENTAILMENT),
    "rte": Task(("sentence1", "sentence2"), _ENTAILMENT),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
SPLITS = (("train",), ("validation", "dev", "validation_matched", "dev_matched"), ("test",))
MISMATCHED = ("validation_mismatched", "dev_mismatched")
_UNLABELLED = ("-1", "-1.0", "", "None", "nan")  # as GLUE ships its test splits, and as tables leave a field empty
_FEW = 20  # labels that may all differ without a doubt that they are labels


class Glue(TextData):
    """Texts, or pairs of texts, with a label each.

    Args:
        path: folder with train, validation (or dev) and maybe test as .jsonl, .csv, .tsv or .parquet. Where test has
            no labels, as GLUE's, the test is ``validation_mismatched`` (mnli's), else the validation.
        task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli: says fields, labels and the metric that GLUE
            reports.
        text_fields: names of one or two fields, instead of the task's.
        label_field: name of the label's.
        label_names: the classes in their order, instead of the task's. A label is a name or its place in this list.
            Without a task and without names they are those in the training file, in their order; numbers with a
            fraction are scores; -1 beside 0 is no label, as on the Hub, unless it is named here.
        train_examples, val_examples, test_examples: at most so many, drawn by `seed`; None for all.
        **common: see `TextData`. Texts are tokenized as the model's tokenizer does it, special tokens and all; where
            it puts none between two texts, a line break does. Longer ones are cut, which is counted and said once.

    Attributes:
        metric: what GLUE reports of the task, else None.

    Raises:
        ValueError: for an unknown task, or neither task nor fields.
        DataError: for missing files, a bad line or a wrong label, naming file, line number and reason.
    """

    def __init__(
        self,
        *,
        path: str,
        task: str | None = None,
        text_fields: Sequence[str] | None = None,
        label_field: str = "label",
        label_names: Sequence[str] | None = None,
        train_examples: int | None = None,
        val_examples: int | None = None,
        test_examples: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if task is not None and task not in TASKS:
            raise ValueError(f"task={task!r}: the choice is {', '.join(TASKS)}, or text_fields=[...] without a task.")
        if task is None and not text_fields:
            raise ValueError("Say what is to be read: data.task=sst2 (or another), or data.text_fields=[<field>].")
        fields = tuple([text_fields] if isinstance(text_fields, str) else text_fields or TASKS[str(task)].fields)
        if len(fields) > 2:
            raise ValueError(f"text_fields={list(fields)}: give one field, or two.")
        if label_names and len(set(label_names)) < max(2, len(label_names)):
            raise ValueError(f"label_names={list(label_names)}: give two different names or more.")
        limits = train_examples, val_examples, test_examples
        if any(limit is not None and limit < 1 for limit in limits):
            raise ValueError(f"train_examples, val_examples, test_examples={limits}: at least one each, or None.")
        self.path = path
        self.task = task
        self.fields = fields
        self.label_field = label_field
        self.limits = limits
        self.metric: Metric | None = TASKS[task].metric if task else None
        self._given_names = tuple(map(str, label_names)) if label_names else None

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """The classes in their order; none where labels are scores."""
        if self._given_names:
            return self._given_names
        return TASKS[self.task].labels if self.task else self._found_names()

    @property
    def num_labels(self) -> int:
        """Classes, or 1 of scores."""
        return len(self.label_names) or 1

    def _found_names(self) -> tuple[str, ...]:
        train, *_ = self._splits
        found = {self._label_text(line) for line in train}
        if len(found) > max(_FEW, len(train) // 2) and not all(map(_is_number, found)):
            raise DataError(
                f"{train[0].file}: {self.label_field!r} has {len(found)} different values in {len(train)} lines, so it"
                " is no label. Pass data.label_field=<field>."
            )
        if all(map(_is_number, found)) and not all(map(_is_integer, found)):
            return ()
        order: Any = int if all(map(_is_integer, found)) else None
        if {"-1", "0"} <= found:
            unlabelled = next(line for line in train if self._label_text(line) == "-1")
            raise unlabelled.error(
                f"{self.label_field!r} is -1, which beside 0 means that there is no label: leave the line out. Where"
                f" it is a class, pass data.label_names=[{','.join(sorted(found, key=order))}]."
            )
        if len(found) == 1:
            raise DataError(
                f"{train[0].file}: {self.label_field!r} is {found.pop()!r} in all {len(train)} lines: there is nothing"
                " to tell apart. Give lines of another class too, or pass data.label_field=<field>."
            )
        return tuple(sorted(found, key=order))

    @cached_property
    def _splits(self) -> tuple[list[Line], list[Line], list[Line]]:
        """Training, validation and test lines; none of the test where that is the validation."""
        train, val, test = (read_split(self.path, *names) for names in SPLITS)
        needed(train, self.path, "train")
        needed(val, self.path, "validation")
        if all(str(line.row.get(self.label_field)).strip() in _UNLABELLED for line in test):
            test = read_split(self.path, *MISMATCHED)
        return train, val, test

    @override
    def read(self) -> tuple[Dataset[Example], ...]:
        rng = random.Random(self.seed)
        parts = []
        for lines, limit in zip(self._splits, self.limits, strict=True):
            drawn = lines if limit is None or limit >= len(lines) else rng.sample(lines, limit)
            parts.append(self._examples(drawn))
        return tuple(part for part in parts if part)

    def _examples(self, lines: Sequence[Line]) -> Any:
        labels = [self._label(line) for line in lines]
        encoded = self._encoded([self._texts(line) for line in lines])
        return [{**inputs, "labels": label} for inputs, label in zip(encoded, labels, strict=True)]

    def _texts(self, line: Line) -> list[str]:
        texts = [line.text(field).strip() for field in self.fields]
        if not any(texts):
            raise line.error(f"{' and '.join(map(repr, self.fields))}: no text.")
        return texts

    def _label(self, line: Line) -> Tensor:
        text = self._label_text(line)
        names = self.label_names
        if not names:
            if not _is_number(text):
                raise line.error(f"{self.label_field!r} is {line.field(self.label_field)!r}; needs a number.")
            return torch.tensor(float(text))
        if text in names:
            return torch.tensor(names.index(text))
        if not any(map(_is_integer, names)) and _is_integer(text) and 0 <= int(text) < len(names):
            return torch.tensor(int(text))
        known = [f"{name!r} ({at})" for at, name in enumerate(names)]
        raise line.error(
            f"{self.label_field!r} is {line.field(self.label_field)!r}; the labels are {', '.join(known)}."
        )

    def _label_text(self, line: Line) -> str:
        """The label as a word; raises DataError where a table has none: its field is empty, or NaN."""
        value = line.field(self.label_field)
        text = str(value).strip()
        if value is None or value != value or not text:
            raise line.error(f"{self.label_field!r} is {value!r}, which is no label: leave the line out.")
        return text

    def _encoded(self, texts: Sequence[Sequence[str]]) -> list[Example]:
        """Model inputs of each example, cut where they are too long."""
        if not texts:
            return []
        firsts, seconds = list(zip(*texts, strict=True)) if len(self.fields) == 2 else ([text for (text,) in texts], ())
        count = self.tokenizer.num_special_tokens_to_add
        if seconds and count(pair=True) == count(pair=False):
            firsts, seconds = ["\n".join(pair) for pair in texts], ()
        given = [list(firsts), *([list(seconds)] if seconds else [])]
        whole = self.tokenizer(*given, verbose=False)
        long = [at for at, ids in enumerate(whole["input_ids"]) if len(ids) > self.sequence_length]
        made = [{name: whole[name][at] for name in self._inputs} for at in range(len(texts))]
        if long:
            rank_zero_warn(
                f"{self.path}: {len(long)} of {len(texts)} examples are cut. Raise data.sequence_length"
                f" (now {self.sequence_length})."
            )
            cut = self.tokenizer(
                *([part[at] for at in long] for part in given), truncation=True, max_length=self.sequence_length
            )
            for index, at in enumerate(long):
                made[at] = {name: cut[name][index] for name in self._inputs}
        return [{name: torch.tensor(ids) for name, ids in example.items()} for example in made]

    @override
    def weight_of(self, example: Any) -> int:
        """Every example counts alike."""
        return 1

    @property
    def _inputs(self) -> list[str]:
        return [name for name in self.tokenizer.model_input_names if name != "attention_mask"]

    @property
    @override
    def _collate(self) -> partial[Example]:
        fill = {"input_ids": self.pad, "token_type_ids": getattr(self.tokenizer, "pad_token_type_id", 0)}
        return partial(collate_labelled, fill=fill)

    @override
    def preview(self, batch: dict[str, Tensor], max_chars: int = 800) -> str:
        """The first example with its label, between ⟦ and ⟧."""
        ids, label = batch["input_ids"][0], batch["labels"][0].item()
        if "attention_mask" in batch:
            ids = ids[batch["attention_mask"][0].bool()]
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)[:max_chars]
        named = self.label_names[int(label)] if self.label_names else f"{label:g}"
        kinds = ", ".join(self.label_names) if self.label_names else "scores"
        return f"{text} ⟦{named}⟧\n({len(ids)} tokens; labels: {kinds})"


def collate_labelled(examples: Sequence[Example], *, fill: dict[str, int]) -> Example:
    """Inputs (n, s), padded on the right with `fill`, and an ``attention_mask`` where lengths differ; labels (n,)."""
    batch = {
        name: pad_sequence([example[name] for example in examples], batch_first=True, padding_value=fill.get(name, 0))
        for name in examples[0]
        if name != "labels"
    }
    lengths = [len(example["input_ids"]) for example in examples]
    if min(lengths) < max(lengths):
        ones: Iterable[Tensor] = (torch.ones(length, dtype=torch.int64) for length in lengths)
        batch["attention_mask"] = pad_sequence(list(ones), batch_first=True)
    return {**batch, "labels": torch.stack([example["labels"] for example in examples])}


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
