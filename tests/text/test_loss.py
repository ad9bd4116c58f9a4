import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_offload.text.loss import PLAIN_HEAD, chunked_cross_entropy, has_plain_head, next_token_loss

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
SHAPES = {
    **dict.fromkeys(PLAIN_HEAD | {"gemma2", "cohere", "granite"}, SMALL),
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gemma2": {**SMALL, "head_dim": 16, "final_logit_softcapping": 1.0},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 8},
    "mixtral": {**SMALL, "num_local_experts": 2},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "qwen3": {**SMALL, "head_dim": 16, "tie_word_embeddings": True},
}


def network_of(kind, **other):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPES[kind], **other}))
    with torch.no_grad():
        for parameter in network.parameters():  # freshly drawn weights give losses that hardly tell logits apart
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network.eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 11))
    labels = ids.clone()
    labels[0, :4] = -100
    mask = torch.ones_like(ids)
    mask[1, 8:], labels[1, 8:] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_equals_the_models_own_loss_and_gradients(kind, batch):
    network = network_of(kind)
    assert has_plain_head(network) == (kind in PLAIN_HEAD)
    theirs = network(**batch).loss
    expected = gradients(network, theirs)
    ours = next_token_loss(network, batch, chunk_tokens=5)
    assert ours.mean.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert ours.tokens == (batch["labels"][:, 1:] != -100).sum()
    found = gradients(network, ours.mean)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("chunk", [0, 1, 7, 33, 1000])
def test_any_chunk_gives_the_same(chunk, batch):
    network = network_of("llama")
    loss = next_token_loss(network, batch, chunk_tokens=chunk).mean
    assert loss.item() == pytest.approx(network(**batch).loss.item(), abs=1e-5)
    with torch.no_grad():
        assert next_token_loss(network, batch, chunk_tokens=chunk).mean.item() == pytest.approx(loss.item(), abs=1e-6)


def test_a_router_loss_takes_the_models_own_forward():
    assert not has_plain_head(network_of("mixtral", output_router_logits=True))


def test_a_wrapped_model_takes_its_own_forward(batch):
    class Wrapper(torch.nn.Module):  # as adapter libraries and torch.compile do it
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, **inputs):
            return self.inner(**inputs)

    network = Wrapper(network_of("llama"))
    assert network.config.model_type in PLAIN_HEAD
    assert not has_plain_head(network)
    assert next_token_loss(network, batch, chunk_tokens=4).mean.item() == pytest.approx(network(**batch).loss.item())


def test_hooks_of_the_head_see_every_chunk_and_never_more(batch):
    network = network_of("llama")
    rows = []
    network.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    next_token_loss(network, batch, chunk_tokens=10).mean.backward()
    assert rows[:4] == [10, 10, 10, 3]
    assert sorted(rows[4:]) == [3, 10, 10, 10]  # once more in the backward pass
    assert max(rows) <= 10


def test_a_batch_without_labels_is_zero(batch):
    network = network_of("llama")
    loss = next_token_loss(network, {**batch, "labels": torch.full_like(batch["labels"], -100)}, chunk_tokens=4)
    assert loss.mean.item() == 0
    assert loss.tokens == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients(network, loss.mean).values())


def test_bfloat16_logits_are_scored_in_float32():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False, dtype=torch.bfloat16)
    hidden, targets = torch.randn(6, 8, dtype=torch.bfloat16), torch.randint(0, 50, (6,))
    loss = chunked_cross_entropy(head, hidden, targets, 2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(head(hidden).float(), targets).item() * 6)
