"""Examples that share a sequence do not see each other."""

from functools import partial

import lightning as L
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_offload.errors import OffloadError
from lightning_offload.text import TINY_PATH, CausalLM, Jsonl, batch_by_shape
from lightning_offload.text.batches import answered
from lightning_offload.text.loss import next_token_loss, next_token_losses
from lightning_offload.text.packing import APART, check_packing, collate_packed, pack_examples
from tests.lit import lsp, offload
from tests.zo2 import zo2

ROWS = [{"prompt": f"Say {n}: ", "completion": "word " * (1 + (n * 5) % 13)} for n in range(10)]
TEXTS = [{"text": "some words " * (1 + (n * 5) % 7)} for n in range(6)]
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
OLD = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
WINDOW = {**SHAPE, "sliding_window": 6}
SHAPES = {
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gpt2": OLD,
    "gptj": OLD | {"rotary_dim": 4},
    "mistral": WINDOW,
    "mixtral": SHAPE | {"num_local_experts": 4},
    "opt": SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2_moe": SHAPE | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SHAPE | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}


def examples():
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 64, (size,), generator=draw).tolist() for size in (5, 9, 3, 12, 7, 2, 11, 4)]
    return [answered(row[: len(row) // 3], row[len(row) // 3 :]) for row in ids]


def network(kind, attention=None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPES.get(kind, SHAPE), **ENDS)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def apart(net, chunk_tokens=0):
    """Loss of each learned token of each example alone, and in packed sequences, in one order."""
    alone = [
        next_token_losses(net, {name: value[None] for name, value in example.items()}, chunk_tokens=chunk_tokens)
        for example in examples()
    ]
    packed = pack_examples(examples(), 16)
    assert len(packed) == 4
    together = next_token_losses(net, collate_packed(packed, pad=0), chunk_tokens=chunk_tokens)
    return (torch.cat([part[part != 0] for part in parts]).sort().values for parts in (alone, [together]))


@pytest.mark.parametrize("kind", sorted(APART))
@torch.no_grad()
def test_every_token_has_the_loss_that_it_has_alone(kind):
    net = network(kind)
    alone, together = apart(net)
    assert len(alone) == len(together) > 30
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    batch = collate_packed(pack_examples(examples(), 16), pad=0)
    del batch["position_ids"]
    leaking = next_token_losses(net, batch, chunk_tokens=0)
    assert (leaking[leaking != 0].sort().values - alone).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_in_other_implementations_of_attention_and_in_chunks(kind):
    for net, chunk in ((network(kind, "eager"), 0), (network(kind), 5)):
        alone, together = apart(net, chunk)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_mask_of_ones_would_let_them_see_each_other():
    net, batch = network("llama"), collate_packed(pack_examples(examples(), 16), pad=0)
    right = next_token_loss(net, batch, chunk_tokens=0).mean
    leaking = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    assert (next_token_loss(net, leaking, chunk_tokens=0).mean - right).abs() > 1e-4


@pytest.mark.parametrize("kind", ["bloom", "gpt_oss"])
@torch.no_grad()
def test_those_that_are_refused_would_leak(kind):
    net = network(kind)
    alone, together = apart(net)
    assert (together - alone).abs().max() > 1e-4
    with pytest.raises(OffloadError, match=rf"`data.packing=true`: it is not known whether a {kind} model keeps"):
        check_packing(net)


def test_examples_are_packed_tightly_and_none_is_lost():
    whole = examples()
    packed = pack_examples(whole, 16)
    assert sorted(len(sequence["input_ids"]) for sequence in packed) == [5, 16, 16, 16]
    pieces = []
    for sequence in packed:
        starts = (sequence["position_ids"] == 0).nonzero().flatten()[1:].tolist()
        assert (sequence["labels"][[0, *starts]] == -100).all()
        pieces += [piece.tolist() for piece in sequence["input_ids"].tensor_split(starts)]
    assert sorted(pieces) == sorted(example["input_ids"].tolist() for example in whole)
    assert sum(int((sequence["labels"] != -100).sum()) for sequence in packed) == sum(
        int((example["labels"][1:] != -100).sum()) for example in whole
    )


def test_padding_is_an_example_of_its_own():
    batch = collate_packed(pack_examples(examples(), 16), pad=9)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    short = int((batch["input_ids"] == 9).sum(1).argmax())
    assert batch["position_ids"][short, 5:].tolist() == list(range(11))
    assert (batch["labels"][short, 5:] == -100).all()


def test_a_batch_by_shape_has_positions_too():
    batch = batch_by_shape(2, 4, 10, packing=True)
    assert set(batch) == set(collate_packed(pack_examples(examples(), 16), pad=0))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


@pytest.fixture
def data(jsonl, tokenizer):
    def build(rows=ROWS, **options):
        file = jsonl(*rows)
        return Jsonl(path=file, val_path=file, sequence_length=32, tokenizer=tokenizer, **options)

    return build


def trained(module, data, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    run = L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)
    run.fit(module, data)
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


SGD, ZEROTH = partial(torch.optim.SGD, lr=0.5), partial(torch.optim.SGD, lr=3e-3)
ADAM = partial(torch.optim.AdamW, lr=1e-2, eps=1e-2)


@pytest.mark.parametrize(
    ("strategy", "optimizer", "bound"),
    [("auto", SGD, 1e-6), (offload, SGD, 1e-6), (lsp, ADAM, 1e-5), (partial(zo2, eps=1e-2), ZEROTH, 1e-5)],
    ids=["none", "full", "lsp", "zo2"],
)
@pytest.mark.parametrize("rows", [ROWS, TEXTS], ids=["answers", "texts"])
def test_training_is_the_same_packed_or_not(rows, strategy, optimizer, bound, small_model, data):
    def run(**options):
        module = small_model(optimizer=optimizer)
        made = strategy if strategy == "auto" else strategy()
        return trained(module, data(rows, batch_size=99, **options), strategy=made, max_steps=3)

    alone, together = run(), run(packing=True)
    start = torch.cat([parameter.detach().flatten() for parameter in small_model().parameters()])
    assert (alone - start).abs().max() > 1e-3
    torch.testing.assert_close(together, alone, rtol=0, atol=bound)


def test_windows_of_packed_sequences_are_one_big_batch(small_model, data):
    parts = trained(
        small_model(optimizer=SGD), data(batch_size=1, packing=True), accumulate_grad_batches=99, max_epochs=2
    )
    whole = trained(small_model(optimizer=SGD), data(batch_size=99), max_epochs=2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_validation_is_not_packed(small_model, data):
    given = data(packing=True, batch_size=4)
    given.setup()
    assert len(given.train_dataloader().dataset) < len(given.val_dataloader().dataset) == 10
    assert "position_ids" in next(iter(given.train_dataloader()))
    assert "position_ids" not in next(iter(given.val_dataloader()))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, max_steps=1)
    module = small_model(match_answers="exact", max_answer_tokens=2)
    assert "val/exact_match" in run.validate(module, given, verbose=False)[0]


def test_goes_on_in_the_middle_of_an_epoch_with_workers(small_model, data, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(workers, **options):
        module = small_model(optimizer=SGD)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
        run = L.Trainer(
            accelerator="cpu", enable_checkpointing=False, **quiet, max_steps=8, callbacks=[Stop()], strategy=offload()
        )
        run.fit(module, data(batch_size=1, packing=True, num_workers=workers), **options)
        return module.state_dict()

    whole = run(0)
    again = run(2, ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


def test_the_preview_shows_where_an_example_ends(data):
    given = data(packing=True)
    given.setup()
    several = next(row for row in given.train_dataloader().dataset if (row["position_ids"] == 0).sum() == 2)
    short = {name: values[:4] for name, values in several.items()}
    text = given.preview(given._collate([several]))
    assert text.count("⟦word") == text.count("Say ") == 2
    assert text.count("⟧\n--- next in the same sequence ---\nSay ") == 1
    padded = given.preview(given._collate([short, several]))
    assert padded.startswith("Say ")
    assert "(4 tokens; " in padded


def test_an_unknown_architecture_is_refused_before_anything_runs(data):
    config = {"model_type": "bloom", "vocab_size": 2048, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    module = CausalLM(config=config, init="random", tokenizer_path=TINY_PATH)
    with pytest.raises(OffloadError, match="whether a bloom model keeps"):
        trained(module, data(packing=True), max_steps=1)
