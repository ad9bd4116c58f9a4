import json
import math
from functools import partial

import lightning as L
import pytest
import torch

from lightning_offload.errors import DataError
from lightning_offload.text import TINY_PATH, PromptClassifier, Sst2, batch_by_shape
from lightning_offload.text.verbalizers import choices, collate_choices

WORDS = [" terrible", " really great indeed"]  # of several tokens, and of another number of them
ROWS = [{"sentence": f"a film number {'very ' * (n % 4)}{n}", "label": n % 2} for n in range(12)]


@pytest.fixture
def sst2(tmp_path):
    """A function from splits to a folder."""

    def write(**splits):
        for name, rows in splits.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path)

    return write


@pytest.fixture
def classifier():
    """A function from keyword arguments to a random classifier with the shipped tokenizer."""

    def build(model_type="llama", **options):
        torch.manual_seed(0)
        shape = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        shape |= {"model_type": model_type, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
        module = PromptClassifier(config=shape, init="random", tokenizer_path=TINY_PATH, **options)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return module.eval()

    return build


@pytest.fixture
def data(tokenizer, sst2):
    def build(**options):
        path = sst2(train=ROWS, dev=ROWS[:5], test=ROWS[5:])
        return Sst2(path=path, **{"batch_size": 3, "tokenizer": tokenizer, "label_words": WORDS, **options})

    return build


@torch.no_grad()
def by_hand(module, sentence, word, score):
    """Log-likelihood of `word`, token by token, without padding or chunks."""
    prompt = module.tokenizer(f"{sentence} It was", return_tensors="pt")["input_ids"]
    found = []
    for token in module.tokenizer(word)["input_ids"]:
        found.append(module.network(input_ids=prompt).logits[0, -1].double().log_softmax(0)[token].item())
        prompt = torch.cat([prompt, torch.tensor([[token]])], 1)
    return sum(found) / (len(found) if score == "mean" else 1)


@pytest.mark.parametrize(
    ("model_type", "score", "chunk"),
    [("llama", "mean", 1024), ("llama", "sum", 7), ("qwen3", "mean", 7), ("gemma2", "mean", 7), ("llama", "mean", 0)],
)
def test_scores_are_those_by_hand(model_type, score, chunk, classifier, data):
    module, given = classifier(model_type, score=score, loss_chunk_tokens=chunk), data()
    given.setup()
    batch = next(iter(given.val_dataloader()))
    assert "attention_mask" in batch
    scores = module.scores(batch)
    assert scores.shape == (3, 2)
    assert scores.dtype == torch.float32
    for row, ids, mask in zip(scores, batch["input_ids"][:, 0], batch["attention_mask"][:, 0].bool(), strict=True):
        sentence = module.tokenizer.decode(ids[mask]).removesuffix(f" It was{WORDS[0]}")
        assert row.tolist() == pytest.approx([by_hand(module, sentence, word, score) for word in WORDS], abs=2e-5)


def test_the_loss_is_the_cross_entropy_of_the_scores(classifier, data):
    module, given = classifier(), data()
    given.setup()
    batch = next(iter(given.val_dataloader()))
    loss = module.training_step(batch, 0)
    by_hand = [
        math.log(sum(map(math.exp, row))) - row[target]
        for row, target in zip(module.scores(batch).tolist(), batch["target"].tolist(), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(by_hand) / 3, abs=1e-5)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_chunks_and_padding_change_nothing(classifier, data):
    given = data()
    given.setup()
    batch = next(iter(given.val_dataloader()))
    longer = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items() if name != "target"}
    longer["labels"][..., -5:] = -100
    whole = classifier(loss_chunk_tokens=0).scores(batch)
    for module in (classifier(loss_chunk_tokens=4), classifier(loss_chunk_tokens=4096)):
        torch.testing.assert_close(module.scores(batch), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(module.scores({**longer, "target": batch["target"]}), whole, rtol=0, atol=1e-5)


def test_label_words_that_share_first_tokens():
    first, second = choices([1, 2, 3], [[1, 2, 3, 7, 8], [1, 2, 3, 7, 9, 9]], target=1, start=[0], length=9).candidates
    assert first["input_ids"].tolist() == [0, 1, 2, 3, 7, 8]
    assert first["labels"].tolist() == [-100] * 4 + [7, 8]
    assert second["labels"].tolist() == [-100] * 4 + [7, 9, 9]


def test_a_word_that_melts_into_the_prompt_is_scored_from_there():
    # with the first word the prompt's last token becomes another one: both are scored from it
    first, second = choices([1, 2, 3], [[1, 2, 5], [1, 2, 3, 7]], target=0, start=[], length=9).candidates
    assert first["labels"].tolist() == [-100, -100, 5]
    assert second["labels"].tolist() == [-100, -100, 3, 7]


def test_a_long_prompt_is_cut_on_the_left():
    example = choices(range(1, 9), [[*range(1, 9), 20], [*range(1, 9), 30, 31]], target=0, start=[0], length=6)
    assert [candidate["input_ids"].tolist() for candidate in example.candidates] == [
        [0, 6, 7, 8, 20],
        [0, 6, 7, 8, 30, 31],
    ]
    with pytest.raises(ValueError, match=r"no room for a prompt: raise data\.sequence_length \(now 3\)"):
        choices([1], [[1, 2], [1, 3, 4]], target=0, start=[0], length=3)
    with pytest.raises(ValueError, match="Label word 1 adds no token"):
        choices([1, 2], [[1, 2, 3], [1, 2]], target=0, start=[], length=9)


def test_what_is_cut_is_said(data):
    with pytest.warns(
        UserWarning, match=r"\d of 5 sentences are cut on the left. Raise data.sequence_length \(now 12\)"
    ):
        data(sequence_length=12).setup()


def test_batches_have_the_documented_shapes():
    examples = [
        choices([1], [[1, 5], [1, 6, 7]], target=1, start=[], length=9),
        choices([1, 2], [[1, 2, 5], [1, 2, 6, 7]], target=0, start=[], length=9),
    ]
    batch = collate_choices(examples, pad=0)
    assert batch["input_ids"].tolist() == [[[1, 5, 0, 0], [1, 6, 7, 0]], [[1, 2, 5, 0], [1, 2, 6, 7]]]
    assert batch["attention_mask"].tolist() == [[[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
    assert batch["target"].tolist() == [1, 0]
    by_shape = batch_by_shape(2, 4, 10, choices=2)
    assert {name: value.shape for name, value in by_shape.items()} == {
        name: value.shape for name, value in batch.items() if name != "attention_mask"
    }


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)


def test_accuracy_counts_examples_over_batches_of_any_size(classifier, data):
    module, given = classifier(), data()
    metrics = trainer().validate(module, given, verbose=False)[0]
    targets = [example.target for example in given.val_dataloader().dataset]
    batches = list(given.val_dataloader())
    assert [len(batch["target"]) for batch in batches] == [3, 2]
    scores = torch.cat([module.scores(batch) for batch in batches])
    assert metrics["val/accuracy"] == pytest.approx((scores.argmax(1) == torch.tensor(targets)).float().mean().item())
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor(targets)).item()
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-5)
    given.val_batch_size = 5
    assert trainer().validate(module, given, verbose=False)[0] == pytest.approx(metrics, rel=1e-5)


def test_it_learns_and_generates(classifier, data):
    module, given = classifier(optimizer=partial(torch.optim.AdamW, lr=3e-3)), data()
    run = trainer(max_steps=40)
    run.fit(module, given)
    metrics = run.test(module, given, verbose=False)[0]
    assert set(metrics) == {"test/loss", "test/accuracy"}
    assert metrics["test/accuracy"] == 1.0
    assert metrics["test/loss"] < 0.3
    assert isinstance(module.generate("It was", max_new_tokens=2), str)


def test_goes_on_in_the_middle_of_an_epoch(classifier, data, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(**options):
        module = classifier(optimizer=partial(torch.optim.SGD, lr=0.1))
        trainer(max_steps=6, limit_val_batches=0, callbacks=[Stop()]).fit(module, data(), **options)
        return module.state_dict()

    whole = run()
    again = run(ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


def test_preview_shows_the_right_word(data):
    given = data(batch_size=1)
    given.setup()
    batch = next(iter(given.train_dataloader()))
    assert f" It was⟦{WORDS[int(batch['target'][0])]}⟧" in given.preview(batch)


def sentences(data, tokenizer):
    data.setup()
    sets = [loader.dataset for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    return [{tokenizer.decode(example.candidates[0]["input_ids"]) for example in examples} for examples in sets]


def test_splits_as_in_the_protocol(tokenizer, sst2):
    limits = {"train_examples": 6, "val_examples": 3, "test_examples": 4, "tokenizer": tokenizer}
    train, val, test = sentences(Sst2(path=sst2(train=ROWS, dev=ROWS[:5], test=ROWS[5:]), **limits), tokenizer)
    assert (len(train), len(val), len(test)) == (6, 3, 4)
    whole = [f"{row['sentence']} It was terrible" for row in ROWS]
    assert val <= set(whole[:5])
    assert test <= set(whole[5:])


@pytest.mark.parametrize("test", [[], [{"sentence": "no label"}], [{"sentence": "none", "label": -1}]])
def test_a_test_without_labels_is_not_tested_with(test, tokenizer, sst2):
    glue = {"train": ROWS, "validation": [{"sentence": "held out", "label": 1}]} | ({"test": test} if test else {})
    data = Sst2(path=sst2(**glue), train_examples=None, val_examples=4, tokenizer=tokenizer)
    train, val, tested = sentences(data, tokenizer)
    assert (len(train), len(val)) == (8, 4)
    assert not train & val
    assert tested == {"held out It was terrible"}


def test_the_seed_draws(tokenizer, sst2):
    path = sst2(train=ROWS, dev=ROWS, test=ROWS)
    drawn = [
        sentences(Sst2(path=path, train_examples=5, seed=seed, tokenizer=tokenizer), tokenizer)[0] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_real_data(tokenizer, shared_data):
    data = Sst2(path=str(shared_data / "sst2"), tokenizer=tokenizer)
    data.setup()
    sizes = [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert sizes == [1000, 500, 872]
    positive = sum(example.target for example in data.test_dataloader().dataset)
    assert positive == 444
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape[:2] == (8, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a", "label": 2}, r"train\.jsonl, line 1: 'label' is 2; needs 0 \(negative\) or 1"),
        ({"sentence": "a"}, r"line 1: has the fields \['sentence'\]; needs 'label'"),
        ({"label": 1}, "needs 'sentence'"),
        ({"sentence": None, "label": 1}, "'sentence' is NoneType, not text"),
    ],
)
def test_bad_lines(row, message, tokenizer, sst2):
    with pytest.raises(DataError, match=message):
        Sst2(path=sst2(train=[row], dev=ROWS, test=ROWS), tokenizer=tokenizer).setup()


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"dev": ROWS, "test": ROWS}, "has no train file with anything in it"),
        ({"train": ROWS, "test": [{"sentence": "no label"}]}, "has no dev file with anything in it"),
        ({"train": ROWS, "dev": ROWS, "validation": ROWS}, "needs 1"),
    ],
)
def test_missing_files(splits, message, tokenizer, sst2):
    with pytest.raises(DataError, match=message):
        Sst2(path=sst2(**splits), tokenizer=tokenizer).setup()


def test_bad_settings(classifier, small_model):
    with pytest.raises(ValueError, match="prompt='It was'"):
        Sst2(path="x", prompt="It was")
    with pytest.raises(ValueError, match=r"label_words=\[' a', ' a'\]: give two different ones"):
        Sst2(path="x", label_words=[" a", " a"])
    with pytest.raises(ValueError, match="score='max': the choice is 'mean' or 'sum'"):
        classifier(score="max")
    with pytest.raises(
        ValueError, match=r"batches with label words and a target; this one has \['input_ids', 'labels'\]"
    ):
        classifier().training_step(batch_by_shape(2, 4, 10), 0)


@pytest.mark.parametrize("count", [8, 12, 20])
def test_what_validates_is_never_trained_on(count, tokenizer, sst2):
    data = Sst2(path=sst2(train=ROWS, dev=ROWS[:2]), val_examples=count, tokenizer=tokenizer)
    if count < len(ROWS):
        train, val, _ = sentences(data, tokenizer)
        assert (len(train), len(val)) == (len(ROWS) - count, count)
        assert not train & val
    else:
        with pytest.raises(DataError, match=rf"val_examples={count} of 12 leave nothing to train on: pass data\.val"):
            data.setup()
