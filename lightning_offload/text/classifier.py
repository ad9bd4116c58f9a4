"""A classifier of whole texts, or of pairs of them: a transformers model with a new linear layer on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef, SumMetric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from typing_extensions import override

from lightning_offload.errors import OffloadError
from lightning_offload.text.base import Batch, TextModule
from lightning_offload.text.loading import CLASSIFIER, shape


class SequenceClassifier(TextModule):
    """Fine-tune any model of transformers that has an ``AutoModelForSequenceClassification``: BERT to Llama.

    Two labels and more are classes: the loss is the cross-entropy; logged are ``accuracy``, ``f1`` (of two classes
    that of class 1, of more the unweighted mean over classes) and ``matthews``. One label is a score: the loss is the
    squared error; logged are ``pearson`` and ``spearman``. The loss logged in evaluation is the mean over examples.

    A batch holds ``input_ids`` (n, s); ``labels`` (n,), int64 classes or fp32 scores; ``attention_mask`` and
    ``token_type_ids`` (n, s), where there is padding and where the tokenizer has them.

    A decoder reads the class off the last token that is not padding. Where neither config nor tokenizer has a token
    to pad with (GPT-2, Llama), both get the end-of-text token.

    Args:
        num_labels: classes, or 1 for a score; None for what `path` says, or `label_names`.
        label_names: of the classes, in their order; stored with the model.
        **common: see `TextModule`. Weights that `path` does not hold, those of the new layer, are drawn.

    Attributes:
        num_labels: as above, never None.

    Raises:
        ValueError: for labels that do not fit each other, or a model and tokenizer without any token to pad with.
        OffloadError: when `path` is a classifier with other labels, or no model.
    """

    auto = CLASSIFIER

    def __init__(
        self, *, num_labels: int | None = None, label_names: Sequence[str] | None = None, **common: Any
    ) -> None:
        wanted = _labels(num_labels, label_names)
        self._new_layer = not _has_trained_layer(common.get("path"), common.get("init", "pretrained"), wanted)
        super().__init__(extra=wanted, **common)
        self.num_labels = int(self.network.config.num_labels)
        self.network.config.problem_type = "regression" if self.num_labels == 1 else "single_label_classification"
        self._agree_on_padding()
        self.total_loss = SumMetric(nan_strategy="disable")  # lets a NaN through
        self.total_examples = SumMetric(nan_strategy="disable")
        self.metrics = MetricCollection(_metrics(self.num_labels), compute_groups=False)

    def _agree_on_padding(self) -> None:
        """Have tokenizer and config name the same token: the model looks for the last one that is another.

        The config's, where it has one: some models were built by it (RoBERTa counts positions from there).
        """
        config, tokenizer = self.network.config.get_text_config(), self.tokenizer
        pad, ends = config.pad_token_id, config.eos_token_id
        if tokenizer is not None:
            own = tokenizer.convert_ids_to_tokens(pad) if pad is not None and pad >= 0 else None
            tokenizer.pad_token = own or tokenizer.pad_token or tokenizer.eos_token
            config.pad_token_id = tokenizer.pad_token_id
        elif pad is None:
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        if config.pad_token_id is None:
            raise ValueError(
                "Neither tokenizer nor config of this model has a token to pad with, or an end-of-text token: set"
                " tokenizer.pad_token and save it, then pass tokenizer_path=<that folder>."
            )

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = getattr(self._trainer, "datamodule", None)
        count, pad = getattr(data, "num_labels", self.num_labels), getattr(data, "pad", None)
        if count != self.num_labels:
            raise OffloadError(
                f"this model has num_labels={self.num_labels}, the data {count}: leave num_labels out on the command"
                " line, or pass num_labels=data.num_labels."
            )
        if pad not in (None, self.network.config.get_text_config().pad_token_id):
            raise OffloadError(
                f"the data pad with token {pad}, and this model looks for token"
                f" {self.network.config.get_text_config().pad_token_id}: give the model a tokenizer_path, and set"
                " data.tokenizer = model.tokenizer."
            )

    @override
    def on_fit_start(self) -> None:
        """Refuse to train beside a layer that is new and stays as it was drawn.

        Raises:
            OffloadError: The layer on top is new, and frozen.
        """
        top = [p for name, p in self.network.named_parameters() if not name.startswith(self.network.base_model_prefix)]
        if self._new_layer and top and not any(p.requires_grad for p in top):
            raise OffloadError(
                "the layer on top of this SequenceClassifier is new, and frozen here (as under method meft), so it"
                " would stay random: use method=full, lsp or zo2; or give model.path=<folder of a classifier>; or"
                " classify by prompt, as data=sst2 does."
            )

    def logits(self, batch: Batch) -> Tensor:
        """(n, labels), fp32."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = self.network(**inputs).logits
        return logits.float()

    def label_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over the examples of `batch`.

        Raises:
            ValueError: for a batch of another kind of data.
        """
        labels = batch["labels"]
        if labels.ndim != 1:
            raise ValueError(
                f"SequenceClassifier takes one label for each text; this batch has labels of shape"
                f" {tuple(labels.shape)}. Use data=glue, or the model CausalLM."
            )
        if self.num_labels == 1:
            return F.mse_loss(logits.squeeze(1), labels.float())
        return F.cross_entropy(logits, labels)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.label_loss(self.logits(batch), batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return self.weighed(loss, batch_idx)

    @override
    def on_validation_epoch_start(self) -> None:
        for metric in (self.total_loss, self.total_examples, self.metrics):
            metric.reset()

    on_test_epoch_start = on_validation_epoch_start

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, labels = self.logits(batch), batch["labels"]
        self.total_loss.update(self.label_loss(logits, batch) * len(labels))
        self.total_examples.update(len(labels))
        self.metrics.update(self._answers(logits), labels)

    test_step = validation_step

    @override
    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """The class of each text, or its score, (n,)."""
        return self._answers(self.logits(batch))

    def _answers(self, logits: Tensor) -> Tensor:
        return logits.squeeze(1) if self.num_labels == 1 else logits.argmax(1)

    @override
    def on_validation_epoch_end(self) -> None:
        self._report("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, stage: str) -> None:
        self.log(f"{stage}/loss", float(self.total_loss.compute() / self.total_examples.compute()), prog_bar=True)
        found = self.metrics.compute()
        shown = getattr(self.trainer.datamodule, "metric", None)  # type: ignore[attr-defined]
        for name, value in found.items():
            self.log(f"{stage}/{name}", float(value), prog_bar=name == (shown or next(iter(found))))


def _metrics(num_labels: int) -> dict[str, Metric | MetricCollection]:
    if num_labels == 1:
        return {"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()}
    return {
        "accuracy": MulticlassAccuracy(num_labels, average="micro"),
        "f1": BinaryF1Score() if num_labels == 2 else MulticlassF1Score(num_labels, average="macro"),
        "matthews": MulticlassMatthewsCorrCoef(num_labels),
    }


def _labels(num_labels: int | None, label_names: Sequence[str] | None) -> dict[str, Any]:
    """What the model's config is to say of the labels."""
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"num_labels={num_labels}: give the number of classes, or 1 for a score.")
    if label_names:
        if num_labels not in (None, len(label_names)):
            raise ValueError(f"num_labels={num_labels}, but label_names has {len(label_names)}: leave one of them out.")
        names = dict(enumerate(map(str, label_names)))
        return {"id2label": names, "label2id": {name: at for at, name in names.items()}}
    return {} if num_labels is None else {"num_labels": num_labels}


def _has_trained_layer(path: str | None, init: str, wanted: dict[str, Any]) -> bool:
    """Whether `path` is a classifier itself; refuses one with other labels than `wanted`."""
    if path is None or init == "random":
        return False
    config = shape(path, None)
    trained = any("ForSequenceClassification" in name for name in config.architectures or ())
    count = len(wanted["id2label"]) if "id2label" in wanted else wanted.get("num_labels", config.num_labels)
    if trained and config.num_labels != count:
        raise OffloadError(
            f"path={path!r} is a classifier with {config.num_labels} labels"
            f" ({', '.join(map(str, config.id2label.values()))}); here {count} are wanted. Use the model that it was"
            " made from, or data with its labels."
        )
    return trained
