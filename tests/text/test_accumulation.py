"""The loss of an accumulation window is the mean over all that it learns."""

import json
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_offload import OffloadMixin
from lightning_offload.text import TINY_PATH, CausalLM, Glue, Jsonl, PythonDocs, SequenceClassifier, TextData
from lightning_offload.text.batches import ResumableLoader, ResumableSampler
from lightning_offload.text.loss import next_token_loss
from tests.lit import lsp, offload
from tests.text.conftest import TINY_SHAPE
from tests.zo2 import zo2

ROWS = [{"prompt": f"Say {n}: ", "completion": "word " * (1 + (n * 5) % 13)} for n in range(11)]


@pytest.fixture
def data(jsonl, tokenizer):
    """A function from settings to examples with 2 to 14 learned tokens."""
    file = jsonl(*ROWS)
    return lambda **options: Jsonl(path=file, val_path=file, tokenizer=tokenizer, **options)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    return L.Trainer(accelerator="cpu", **{"enable_checkpointing": False, **quiet, **options})


def trained(module, data, **options):
    """The weights after the fit, as one vector."""
    run = trainer(**options)
    run.fit(module, data)
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


SGD = partial(torch.optim.SGD, lr=0.5)
ADAM = partial(torch.optim.AdamW, lr=1e-2, eps=1e-2)  # of an eps that does not blow up what is rounded
METHODS = {
    "none": (lambda: "auto", SGD, 1e-6),
    "full": (offload, SGD, 1e-6),
    "lsp": (partial(lsp, refit_every=2), ADAM, 1e-5),
    "zo2": (partial(zo2, eps=1e-2), partial(torch.optim.SGD, lr=3e-3), 1e-5),
}


@pytest.mark.parametrize("method", METHODS)
def test_windows_are_one_big_batch(method, small_model, data):
    strategy, optimizer, bound = METHODS[method]  # 11 examples: windows of 8 and of 3

    def run(**options):
        module = small_model(optimizer=optimizer)
        return trained(module, data(batch_size=options.pop("size")), strategy=strategy(), max_epochs=2, **options)

    parts, whole = run(size=2, accumulate_grad_batches=4), run(size=8)
    start = torch.cat([parameter.detach().flatten() for parameter in small_model().parameters()])
    assert (whole - start).abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=0, atol=bound)


def test_the_plain_mean_is_something_else(small_model, data, monkeypatch):
    whole = trained(small_model(optimizer=SGD), data(batch_size=8), max_epochs=1)
    monkeypatch.setattr(TextData, "loss_weight", lambda self, batch_idx: 1.0)
    parts = trained(small_model(optimizer=SGD), data(batch_size=2), max_epochs=1, accumulate_grad_batches=4)
    assert (parts - whole).abs().max() > 1e-3


class Records(L.LightningModule):
    """Learns nothing; writes down the steps by the tokens that each batch of theirs counts."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps, self.shares = [], []

    def training_step(self, batch, batch_idx):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        window = self.trainer.accumulate_grad_batches
        share = self.trainer.datamodule.loss_weight(batch_idx) / (window * self.trainer.world_size)
        self.shares.append((tokens, share))
        return self.weight * 1.0

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(self.shares)
        self.shares = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def windows(data, ckpt_path=None, **options):
    module = Records()
    trainer(**options).fit(module, data, ckpt_path=ckpt_path)
    assert not module.shares
    return module.steps


def check(steps, sizes):
    assert [len(step) for step in steps] == sizes
    for step in steps:
        whole = sum(tokens for tokens, _ in step)
        assert [share for _, share in step] == pytest.approx([tokens / whole for tokens, _ in step])
    assert len({tokens for step in steps for tokens, _ in step}) > 3


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"accumulate_grad_batches": 4, "max_epochs": 3}, [4, 2] * 3),
        (
            {"accumulate_grad_batches": 4, "max_epochs": 3, "limit_train_batches": 5},
            [4, 1] * 3,
        ),  # across epochs of data
        ({"accumulate_grad_batches": 2, "max_steps": 4}, [2, 2, 2, 2]),
        ({"accumulate_grad_batches": 7, "max_epochs": 2}, [6, 6]),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 4, 2: 3})], "max_epochs": 3}, [1] * 6 + [4, 2, 3, 3]),
        ({"accumulate_grad_batches": 3, "max_epochs": 2, "overfit_batches": 4}, [3, 1, 3, 1]),
    ],
)
def test_every_window_counts_its_own_tokens(options, sizes, data):
    if "callbacks" in options:
        steps = windows(data(batch_size=2), **options)
        assert [share for _, share in (step[0] for step in steps[:6])] == [1.0] * 6
        check(steps[6:], sizes[6:])
        return
    check(windows(data(batch_size=2), **options), sizes)


def test_workers_and_a_stop_in_the_middle_of_a_window(data, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx == 7:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    options = {"accumulate_grad_batches": 4, "max_epochs": 3}
    whole = windows(data(batch_size=2, num_workers=2), callbacks=[Stop()], **options)
    check(whole, [4, 2] * 3)
    rest = windows(data(batch_size=2, num_workers=2), ckpt_path=tmp_path / "a.ckpt", **options)
    assert rest[0] == whole[2][2:]
    assert rest[1:] == whole[3:]


def test_a_window_that_was_stopped_in_its_middle_is_finished_to_the_bit(small_model, data, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.fit_loop.total_batch_idx == 7:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(**options):
        module = small_model(optimizer=SGD)
        run = trainer(strategy=offload(), accumulate_grad_batches=4, max_epochs=3, callbacks=[Stop()])
        run.fit(module, data(batch_size=2), **options)
        return module.state_dict()

    whole = run()
    again = run(ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


@torch.no_grad()
def test_several_devices_and_batches_are_one_mean(small_model, data):
    module, given = small_model(), data(batch_size=2)
    given.setup()
    examples, weights = given.train_dataloader().dataset, given._weights

    def loader(rank):
        sampler = ResumableSampler(examples, num_replicas=2, rank=rank, shuffle=True, seed=3)
        return ResumableLoader(examples, batch_size=2, sampler=sampler, collate_fn=given._collate)

    mean, learned, shares = 0.0, 0, 0.0
    for ranked in map(loader, (0, 1)):  # 11 examples and one again: 3 batches each, the last shorter than the others
        for number, batch in enumerate(ranked):
            own, whole = ranked.weigh(weights, before=number, count=3)
            loss = next_token_loss(module.network, batch, chunk_tokens=0)
            assert own == loss.tokens
            mean, learned, shares = mean + own / whole * loss.mean, learned + own, shares + own / whole
    assert shares == pytest.approx(1)
    order = ResumableSampler(examples, num_replicas=2, rank=0, shuffle=True, seed=3).order(0)
    assert len(order) == 12
    big = next_token_loss(module.network, given._collate([examples[at] for at in order]), chunk_tokens=0)
    assert big.tokens == learned
    assert mean.item() == pytest.approx(big.mean.item(), abs=1e-5)


class Manual(OffloadMixin, CausalLM):
    offload = {"accumulate_grad_batches": 4}

    def loss(self, batch, batch_idx):
        mean = next_token_loss(self.network, batch, chunk_tokens=0).mean
        return mean * self.trainer.datamodule.loss_weight(batch_idx, accumulate_grad_batches=4)


def test_who_steps_by_hand_asks_for_the_weight(small_model, data):
    torch.manual_seed(0)
    module = Manual(config=TINY_SHAPE, init="random", optimizer=SGD)
    parts = trained(module, data(batch_size=2), max_epochs=1)
    whole = trained(small_model(optimizer=SGD), data(batch_size=8), max_epochs=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_examples_of_a_classifier_count_alike(tmp_path, tokenizer):
    for name in ("train", "dev"):
        rows = [{"sentence": "good " * (n + 1), "label": n % 2} for n in range(11)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(size, window):
        torch.manual_seed(0)
        module = SequenceClassifier(
            config=TINY_SHAPE, init="random", num_labels=2, optimizer=SGD, tokenizer_path=TINY_PATH
        )
        data = Glue(path=str(tmp_path), task="sst2", batch_size=size, tokenizer=tokenizer)
        return trained(module, data, max_epochs=2, accumulate_grad_batches=window)

    torch.testing.assert_close(run(2, 4), run(8, 1), rtol=0, atol=1e-6)


def test_packed_text_has_equal_weights_but_for_the_end_of_an_epoch(tokenizer):
    data = PythonDocs(sequence_length=64, batch_size=2, limit_train_tokens=704, tokenizer=tokenizer)
    steps = windows(data, accumulate_grad_batches=4, max_epochs=1)
    assert [[tokens for tokens, _ in step] for step in steps] == [[126] * 4, [126, 63]]
    assert [share for _, share in steps[1]] == pytest.approx([2 / 3, 1 / 3])


def test_logged_is_the_plain_mean(small_model, data):
    module = small_model(optimizer=partial(torch.optim.SGD, lr=0.0))
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            mean = next_token_loss(module.network, batch, chunk_tokens=0).mean
            seen.append((trainer.callback_metrics["train/loss"].item(), mean.item()))

    trainer(max_epochs=1, accumulate_grad_batches=4, callbacks=[Look()]).fit(module, data(batch_size=2))
    assert len(seen) == 6
    for logged, mean in seen:
        assert logged == pytest.approx(mean, rel=1e-5)
