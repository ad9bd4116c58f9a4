import math
from functools import partial

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from lightning_offload.errors import OffloadError
from lightning_offload.text import TINY_PATH, CausalLM, Jsonl, MuonAdamW, PythonDocs, linear_decay, wsd
from lightning_offload.text.pretrained import check_positions

SHAPE = {"model_type": "llama", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
SHAPE["num_attention_heads"] = 2
NARROW = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 32}


@pytest.fixture
def trainer():
    def build(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **{"max_steps": 2, **options})

    return build


@pytest.fixture
def data(tokenizer):
    return PythonDocs(
        sequence_length=32, batch_size=2, limit_train_tokens=640, limit_val_tokens=160, tokenizer=tokenizer
    )


def test_fits_and_logs(small_model, data, trainer):
    module, run = small_model(), trainer(limit_train_batches=2, max_steps=-1, max_epochs=1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run.fit(module, data)
    assert run.global_step == 2
    logged = run.callback_metrics
    assert {"train/loss", "val/loss", "val/perplexity", "val/bits_per_byte"} <= set(logged)
    assert logged["val/perplexity"].item() == pytest.approx(math.exp(logged["val/loss"]), rel=1e-5)
    bits = logged["val/loss"].item() / math.log(2) / data.bytes_per_token
    assert logged["val/bits_per_byte"].item() == pytest.approx(bits, rel=1e-5)
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_validation_loss_is_weighted_by_tokens(small_model, data, trainer):
    module = small_model()
    run = trainer()
    once = run.validate(module, data, verbose=False)[0]["val/loss"]
    # 5 sequences: batches of 2, 2 and 1
    data.val_batch_size = 5
    assert run.validate(module, data, verbose=False)[0]["val/loss"] == pytest.approx(once, rel=1e-6)
    run.fit(module, data)  # validation outside of inference mode, after one inside
    assert run.test(module, data, verbose=False)[0]["test/loss"] < once


def test_checkpoints_load_with_weights_only(small_model, data, trainer, tmp_path):
    module = small_model(optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=linear_decay)
    run = trainer()
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert loaded["state_dict"].keys() == module.state_dict().keys()
    assert all(name.startswith("network.") for name in loaded["state_dict"])


def test_scheduler_gets_the_trainers_steps(small_model, data, trainer):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = small_model(optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=linear_decay)
    trainer(max_steps=4, callbacks=[Rates()]).fit(module, data)
    assert rates == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("limits", [{"max_steps": 13}, {"max_steps": -1, "max_epochs": 2}])
def test_goes_on_with_a_schedule_that_asks_for_the_steps(small_model, data, trainer, tmp_path, limits):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    whole, again = small_model(scheduler=linear_decay), small_model(scheduler=linear_decay)
    trainer(**limits, callbacks=[Stop()]).fit(whole, data)
    trainer(**limits).fit(again, data, ckpt_path=tmp_path / "a.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_wsd_and_its_errors():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = wsd(optimizer, total_steps=10, warmup_steps=3, decay=0.4)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    with pytest.raises(ValueError, match="decay=0"):
        wsd(optimizer, total_steps=10, decay=0)


def test_groups(small_model):
    module = small_model(no_decay_norms=True)
    decayed, flat = module.configure_optimizers().param_groups
    assert flat["weight_decay"] == 0 < decayed["weight_decay"]
    assert {parameter.ndim for parameter in flat["params"]} == {1}
    assert len(decayed["params"]) + len(flat["params"]) == len(list(module.parameters()))
    (only,) = small_model().configure_optimizers().param_groups
    assert (only["lr"], only["fused"], only["foreach"]) == (1e-3, True, None)


def test_gradient_checkpointing_gives_the_same_loss(small_model, data, trainer):
    losses = []
    for on in (False, True):
        run = trainer()
        run.fit(small_model(gradient_checkpointing=on), data)
        losses.append(run.callback_metrics["train/loss"].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_model_by_shape_has_to_say_that_it_is_random(data, trainer):
    with pytest.raises(ValueError, match=r"given by its shape.*init='random'"):
        trainer().fit(CausalLM(config=SHAPE, tokenizer_path=TINY_PATH), data)
    with torch.device("meta"):
        assert next(CausalLM(config=SHAPE).parameters()).is_meta


def test_random_weights_in_the_shape_of_a_folder(small_model):
    module = CausalLM(path=TINY_PATH, init="random", dtype="bfloat16")
    assert module.network.dtype == torch.bfloat16
    assert not torch.equal(
        module.network.lm_head.weight, CausalLM(path=TINY_PATH, dtype="bfloat16").network.lm_head.weight
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "path or config, not neither"),
        ({"path": "a", "config": {}}, ValueError, "path or config, not both"),
        ({"path": "./no/such/folder"}, OffloadError, r"no folder at path='\./no/such/folder'. Pass path="),
        ({"config": {"hidden_size": 8}}, ValueError, "no model_type"),
        ({"config": {"model_type": "lama"}}, ValueError, "lama"),
        ({"config": SHAPE, "init": "zeros"}, ValueError, "init='zeros'"),
        ({"config": SHAPE, "dtype": "int8"}, ValueError, "dtype='int8'"),
        ({"config": SHAPE, "gradient_checkpointing": "off"}, ValueError, "gradient_checkpointing='off': give true or"),
        ({"config": SHAPE, "no_decay_norms": "no"}, ValueError, "no_decay_norms='no': give true or false"),
        ({"config": SHAPE, "loss_chunk_tokens": -1}, ValueError, "loss_chunk_tokens=-1"),
        ({"config": SHAPE, "tokenizer_path": "./none"}, OffloadError, r"tokenizer_path='\./none'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        CausalLM(**arguments)


def test_a_shape_may_come_from_a_config_library(tmp_path):
    shape = {**SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    module = CausalLM(config=OmegaConf.create(shape), init="random")
    module.network.save_pretrained(tmp_path)
    assert CausalLM(path=str(tmp_path)).network.config.rope_parameters["rope_theta"] == 5000.0


def test_a_nan_loss_is_reported_as_one(small_model, data, trainer):
    module = small_model()
    with torch.no_grad():
        module.network.lm_head.weight[5] = torch.nan
    assert math.isnan(trainer().validate(module, data, verbose=False)[0]["val/loss"])


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(OffloadError, match=r"holds no config\.json"):
        CausalLM(path=str(tmp_path))


def test_muon_takes_the_matrices_and_resumes(small_model, data, trainer, tmp_path):
    factory = partial(MuonAdamW, embedding_rows=2048)
    module = small_model(optimizer=factory, scheduler=partial(wsd, warmup_steps=1))
    run = trainer(max_steps=4)
    run.fit(module, data)
    muon, adamw = run.optimizers[0].param_groups
    assert {tuple(parameter.shape) for parameter in muon["params"]} == {(32, 32), (64, 32), (32, 64)}
    assert {parameter.numel() for parameter in adamw["params"]} == {32, 2048 * 32}
    assert muon["lr"] < muon["initial_lr"] == 0.02

    half = trainer(max_steps=2)
    first = small_model(optimizer=factory, scheduler=partial(wsd, warmup_steps=1, total_steps=4))
    half.fit(first, data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = small_model(optimizer=factory, scheduler=partial(wsd, warmup_steps=1, total_steps=4))
    trainer(max_steps=4).fit(second, data, ckpt_path=tmp_path / "half.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}, False),
        ({"model_type": "opt", **NARROW, "num_hidden_layers": 1, "ffn_dim": 32, "word_embed_proj_dim": 16}, False),
        ({**SHAPE, "max_position_embeddings": 32}, True),  # turned by angles: no table ends
        ({**SHAPE, "vocab_size": 32, "max_position_embeddings": 32}, True),
    ],
)
def test_sequences_longer_than_a_table_of_positions(shape, fits, tokenizer, jsonl, trainer):
    model = CausalLM(config={"vocab_size": 2048, **shape}, init="random")
    texts = [{"text": "word another " * 60}] * 4
    data = Jsonl(path=jsonl(*texts), sequence_length=33, tokenizer=tokenizer)
    if fits:
        check_positions(model.network, data.sequence_length)
        return
    with pytest.raises(OffloadError, match=r"sequence_length=33 is more than the model's 32 positions: pass data\.seq"):
        trainer(max_steps=1).fit(model, data)
