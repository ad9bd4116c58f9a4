import json
from functools import partial

import lightning as L
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_offload import export_to_hf
from lightning_offload.errors import OffloadError
from lightning_offload.text import TINY_PATH, Glue, PythonDocs, SequenceClassifier
from tests.lit import lsp, offload
from tests.meft_lit import meft
from tests.zo2 import zo2

ROWS = [{"sentence": f"film {'good ' * (n % 5) if n % 2 else 'bad ' * (n % 3)}", "label": n % 2} for n in range(24)]
SCORES = [{"sentence1": f"one {n}", "sentence2": "two " * (n % 4 + 1), "label": n % 4 + 0.5} for n in range(12)]
GOLD = [row["label"] for row in SCORES]
SIZES = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 2}
NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture
def folder(tmp_path):
    def write(rows=ROWS):
        for name in ("train", "validation"):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path)

    return write


@pytest.fixture
def classifier():
    """A function from keyword arguments to a small random classifier with the shipped tokenizer."""

    def build(model_type="llama", config=SIZES, num_labels=2, **options):
        torch.manual_seed(0)
        config = {**config, "model_type": model_type}
        return SequenceClassifier(
            config=config, init="random", tokenizer_path=TINY_PATH, num_labels=num_labels, **options
        )

    return build


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", SIZES),
        ("gpt2", {"vocab_size": 2048, "n_embd": 32, "n_layer": 2, "n_head": 2}),
        ("opt", SIZES | OPT),
        ("qwen3", SIZES),
        ("mistral", SIZES),
        ("bert", SIZES),
        ("roberta", SIZES),
    ],
)
@torch.no_grad()
def test_padding_changes_nothing(model_type, config, classifier, folder):
    module = classifier(model_type, config).eval()
    data = Glue(path=folder(), task="sst2", batch_size=5, tokenizer=module.tokenizer)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert "attention_mask" in batch
    together = module.logits(batch)
    assert together.shape == (5, 2)
    for at, example in enumerate(data.val_dataloader().dataset[:5]):
        torch.testing.assert_close(module.logits(data._collate([example]))[0], together[at], rtol=0, atol=1e-5)


def metrics_of(module, data):
    return trainer().validate(module, data, verbose=False)[0]


@torch.no_grad()
def test_metrics_are_those_of_their_definitions(classifier, folder):
    module = classifier().eval()
    data = Glue(path=folder(), task="sst2", val_batch_size=7, tokenizer=module.tokenizer)
    found = metrics_of(module, data)
    batches = list(data.val_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [7, 7, 7, 3]
    logits, labels = torch.cat([module.logits(b) for b in batches]), torch.cat([b["labels"] for b in batches])
    guess = logits.argmax(1)
    a, b, c, d = (int(((guess == g) & (labels == t)).sum()) for g, t in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert min(a, b, c, d) > 0
    assert found == pytest.approx(
        {
            "val/loss": torch.nn.functional.cross_entropy(logits, labels).item(),
            "val/accuracy": (a + d) / 24,
            "val/f1": 2 * a / (2 * a + b + c),
            "val/matthews": (a * d - b * c) / ((a + b) * (a + c) * (d + b) * (d + c)) ** 0.5,
        },
        rel=1e-5,
    )
    assert torch.cat(trainer().predict(module, data.val_dataloader())).tolist() == guess.tolist()


@torch.no_grad()
def test_f1_of_three_classes_is_the_mean_over_them(classifier, folder):
    rows = [{"premise": f"p {'x ' * (n % 7)}{n}", "hypothesis": "h", "label": n % 3} for n in range(24)]
    module = classifier(num_labels=3).eval()
    data = Glue(path=folder(rows), task="mnli", val_batch_size=9, tokenizer=module.tokenizer)
    found = metrics_of(module, data)
    logits, labels = zip(*((module.logits(batch), batch["labels"]) for batch in data.val_dataloader()), strict=True)
    guess, labels = torch.cat(logits).argmax(1), torch.cat(labels)
    each = [
        2 * int(((guess == k) & (labels == k)).sum()) / int((guess == k).sum() + (labels == k).sum()) for k in range(3)
    ]
    assert found["val/f1"] == pytest.approx(sum(each) / 3, rel=1e-5)


def test_scores_are_learned_and_correlated(classifier, folder):
    module = classifier(num_labels=1, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    data = Glue(path=folder(SCORES), task="stsb", batch_size=4, val_batch_size=5, tokenizer=module.tokenizer)
    run = trainer(max_steps=40, limit_val_batches=0)
    run.fit(module, data)
    found = trainer().validate(module, data, verbose=False)[0]
    assert set(found) == {"val/loss", "val/pearson", "val/spearman"}
    pair = torch.stack([torch.cat(trainer().predict(module, data.val_dataloader())), torch.tensor(GOLD)])
    ranks = (pair[:, :, None] > pair[:, None]).sum(2) + (pair[:, :, None] >= pair[:, None]).sum(2)
    assert found["val/pearson"] == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-4)
    assert found["val/spearman"] == pytest.approx(torch.corrcoef(ranks.float())[0, 1].item(), abs=1e-4)
    assert found["val/pearson"] > 0.9


@pytest.mark.parametrize("strategy", ["auto", offload, lsp, zo2], ids=["none", "full", "lsp", "zo2"])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llama", SIZES), ("opt", SIZES | OPT), ("roberta", SIZES)],
    ids=["llama", "opt", "roberta"],
)
def test_every_method_trains_and_the_folder_loads(model_type, config, strategy, classifier, folder, tmp_path):
    optimizer = torch.optim.SGD if strategy is zo2 else torch.optim.AdamW
    module = classifier(model_type, config, label_names=["negative", "positive"], optimizer=partial(optimizer, lr=2e-3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = Glue(path=folder(), task="sst2", batch_size=4, sequence_length=32, tokenizer=module.tokenizer)
    run = trainer(strategy=strategy if strategy == "auto" else strategy(), max_steps=3)
    run.fit(module, data)
    head = [name for name in before if name.startswith(("network.score", "network.classifier"))]
    assert all(not torch.equal(module.state_dict()[name], before[name]) for name in head if name.endswith("weight"))
    expected = run.validate(module, data, verbose=False)[0]

    plain = AutoModelForSequenceClassification.from_pretrained(export_to_hf(module, tmp_path / "hf"))
    assert plain.config.id2label == {0: "negative", 1: "positive"}
    assert plain.config.problem_type == "single_label_classification"
    again = SequenceClassifier(path=str(tmp_path / "hf")).eval()
    assert again.num_labels == 2
    assert metrics_of(again, data) == pytest.approx(expected, rel=1e-4)
    batch = next(iter(data.val_dataloader()))
    labels = batch.pop("labels")
    loss = plain(**batch, labels=labels).loss
    assert loss.item() == pytest.approx(again.label_loss(again.logits(batch), {"labels": labels}).item(), rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.pad_token_id == plain.config.pad_token_id


def test_it_learns_on_top_of_a_pretrained_model(folder):
    torch.manual_seed(0)
    module = SequenceClassifier(path=TINY_PATH, num_labels=2, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    data = Glue(path=folder(), task="sst2", batch_size=8, tokenizer=module.tokenizer)
    run = trainer(strategy=offload(), max_steps=20, limit_val_batches=0)
    run.fit(module, data)
    assert metrics_of(module, data)["val/accuracy"] > 0.9


def test_under_meft_a_new_layer_would_stay_random(classifier, folder, tmp_path):
    module = classifier()
    data = Glue(path=folder(), task="sst2", batch_size=4, tokenizer=module.tokenizer)
    with pytest.raises(OffloadError, match=r"is new, and frozen here .*use method=full, lsp or zo2; or give"):
        trainer(strategy=meft(), max_steps=1).fit(module, data)
    trained = SequenceClassifier(path=str(export_to_hf(classifier(), tmp_path / "hf")))
    trainer(strategy=meft(), max_steps=1, limit_val_batches=0).fit(trained, data)


def test_goes_on_in_the_middle_of_an_epoch_with_workers(classifier, folder, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(workers, **options):
        module = classifier(optimizer=partial(torch.optim.SGD, lr=0.1))
        data = Glue(path=folder(), task="sst2", batch_size=5, num_workers=workers, tokenizer=module.tokenizer)
        trainer(max_steps=7, limit_val_batches=0, callbacks=[Stop()]).fit(module, data, **options)
        return module.state_dict()

    whole = run(0)
    again = run(2, ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


class Bare:
    """What a tokenizer says of the tokens to pad and to end with."""

    def __init__(self, pad=None, end=None):
        self.pad_token, self.eos_token = pad, end

    @property
    def pad_token_id(self):
        return {None: None, "<pad>": 7, "<end>": 9}[self.pad_token]

    def convert_ids_to_tokens(self, index):
        return {7: "<pad>", 9: "<end>"}[index]


@pytest.mark.parametrize(
    ("tokenizer", "own", "agreed"),
    [
        (Bare(end="<end>"), None, ("<end>", 9)),
        (Bare(end="<end>"), 7, ("<pad>", 7)),
        (Bare(end="<end>"), -1, ("<end>", 9)),
        (Bare(pad="<pad>", end="<end>"), None, ("<pad>", 7)),
        (Bare(pad="<pad>", end="<end>"), 9, ("<end>", 9)),
    ],
)
def test_tokenizer_and_config_name_the_same_token_to_pad_with(tokenizer, own, agreed, classifier):
    module = classifier()
    module.network.config.pad_token_id, module.tokenizer = own, tokenizer
    module._agree_on_padding()
    assert (tokenizer.pad_token, module.network.config.pad_token_id) == agreed


def test_without_a_tokenizer_the_end_is_what_pads():
    assert SequenceClassifier(config={**SIZES, "model_type": "llama"}, init="random").network.config.pad_token_id == 2
    with pytest.raises(ValueError, match="Neither tokenizer nor config of this model has a token to pad with"):
        SequenceClassifier(config={**SIZES, **NONE, "model_type": "llama"}, init="random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 0}, "num_labels=0: give the number of classes, or 1 for a score"),
        ({"num_labels": 3, "label_names": ["a", "b"]}, "num_labels=3, but label_names has 2"),
    ],
)
def test_bad_settings(options, message, classifier):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_a_classifier_with_other_labels(classifier, tmp_path):
    path = str(export_to_hf(classifier(num_labels=3), tmp_path / "hf"))
    with pytest.raises(OffloadError, match=r"is a classifier with 3 labels \(LABEL_0, .*\); here 2 are wanted"):
        SequenceClassifier(path=path, num_labels=2)


def test_data_of_another_kind(classifier, tokenizer):
    docs = PythonDocs(sequence_length=32, limit_train_tokens=64, limit_val_tokens=64, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"one label for each text; .*Use data=glue, or the model CausalLM"):
        trainer().validate(classifier(), docs, verbose=False)


def test_data_that_pad_with_another_token(folder, tokenizer):
    module = SequenceClassifier(config={**SIZES, "model_type": "llama"}, init="random")
    with pytest.raises(OffloadError, match="the data pad with token 0, and this model looks for token 2: give the"):
        trainer().fit(module, Glue(path=folder(), task="sst2", tokenizer=tokenizer))
