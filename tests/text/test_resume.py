from itertools import islice

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_offload.text import PythonDocs
from lightning_offload.text.batches import ResumableSampler


class Recorder(L.LightningModule):
    """Learns nothing; writes down which sequences it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["input_ids"][:, :8].tolist()))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def make_data(tokenizer):
    def make(**options):
        options = {"batch_size": 2, "limit_train_tokens": 704, "limit_val_tokens": 64, **options}
        return PythonDocs(
            sequence_length=64, tokenizer=tokenizer, **options
        )  # 11 sequences: 6 batches, the last of one

    return make


def run(data, *, ckpt_path=None, saving=None, **options):
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=saving is not None,
        callbacks=[saving] if saving else [],
        limit_val_batches=0,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (4, 0), (6, 0), (9, 0), (9, 1), (12, 0)])
def test_goes_on_at_the_next_sample(make_data, tmp_path, stop, workers):
    whole = run(make_data(), max_epochs=3)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    run(make_data(num_workers=workers), max_steps=stop, saving=saving)
    rest = run(make_data(num_workers=workers), max_epochs=3, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert rest == whole[stop:]


@pytest.mark.parametrize("stop", [4, 6])
def test_goes_on_from_a_checkpoint_of_the_end(make_data, tmp_path, stop):
    whole = run(make_data(), max_steps=9)
    saving = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    run(make_data(), max_steps=stop, saving=saving)
    rest = run(make_data(), max_steps=9, ckpt_path=tmp_path / "end.ckpt")
    # Lightning counts the stop as an epoch's end; the samples go on all the same
    assert [rows for _, rows in rest] == [rows for _, rows in whole[stop:]]


def test_a_part_of_each_epoch_goes_through_all_samples(make_data):
    seen = [rows for _, rows in run(make_data(), max_epochs=3, limit_train_batches=2)]
    assert seen == [rows for _, rows in run(make_data(), max_epochs=1)]


def test_every_epoch_has_its_own_order_of_the_same_samples(make_data):
    seen = run(make_data(), max_epochs=2)
    first, second = ([row for when, rows in seen if when == epoch for row in rows] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert run(make_data(), max_epochs=1) == seen[:6]
    assert run(make_data(seed=1), max_epochs=1) != seen[:6]


def test_another_batch_size_goes_on_at_the_same_sample(make_data):
    samples = [row for batch in loader_of(make_data()) for row in batch["input_ids"].tolist()]
    first = loader_of(make_data())
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    second = loader_of(make_data(batch_size=4))
    second.load_state_dict(first.state_dict())
    rest = [row for batch in islice(second, 2) for row in batch["input_ids"].tolist()]
    assert rest == samples[6:]
    assert second.state_dict() == {"epoch": 0, "used": 11, "seed": 0, "samples": 11}


def test_other_data_is_an_error(make_data):
    state = loader_of(make_data()).state_dict()
    with pytest.raises(ValueError, match="the checkpoint's has seed=0, this run's 1"):
        loader_of(make_data(seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match="samples=11, this run's 5"):
        loader_of(make_data(limit_train_tokens=320)).load_state_dict(state)


def test_several_devices_share_the_samples():
    whole = [list(ResumableSampler(range(12), num_replicas=2, rank=rank, seed=3)) for rank in (0, 1)]
    assert sorted(whole[0] + whole[1]) == list(range(12))
    for rank in (0, 1):
        sampler = ResumableSampler(range(12), num_replicas=2, rank=rank, seed=3)
        sampler.start = 4
        assert list(sampler) == whole[rank][2:]


def loader_of(data):
    data.setup()
    return data.train_dataloader()


def test_overfitting_takes_the_same_batches_every_epoch(make_data):
    seen = run(make_data(), overfit_batches=2, max_epochs=3)
    first = [batch for epoch, batch in seen if epoch == 0]
    assert len(first) == 2
    for epoch in (1, 2):
        assert [batch for at, batch in seen if at == epoch] == first
