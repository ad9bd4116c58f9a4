"""Tiny random models of many families, built without any download: `ZOO[name]() -> (model, example inputs)`.

Inputs hold labels wherever the model has a head, so that `model(**inputs)` gives a loss for all but the plain ones.
Every model is in eval mode and the same at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, HIDDEN, LAYERS, HEADS = 96, 32, 3, 4

Built = tuple[nn.Module, dict[str, Tensor]]


def _seeded(build: Callable[[], Built]) -> Callable[[], Built]:
    def seeded() -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = build()
        return model.eval(), inputs

    return seeded


def text_inputs(batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _causal(config: Any) -> Built:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, attn_implementation="eager"), text_inputs()


def _llama_like(**more: Any) -> dict[str, Any]:
    base = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return base | more


def _opt_config(**more: Any) -> Any:
    from transformers import OPTConfig

    base = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_dim": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    base |= {"num_attention_heads": HEADS, "max_position_embeddings": 64, "word_embed_proj_dim": HIDDEN, "dropout": 0.0}
    return OPTConfig(**(base | more))


def opt() -> Built:
    return _causal(_opt_config())


def opt_350m_like() -> Built:
    """Post-norm, and embeddings narrower than the model (`project_in`, `project_out`)."""
    return _causal(_opt_config(word_embed_proj_dim=HIDDEN // 2, do_layer_norm_before=False))


def gpt2() -> Built:
    from transformers import GPT2Config

    size = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return _causal(GPT2Config(**size, **drop))


def gpt_neox() -> Built:
    from transformers import GPTNeoXConfig

    return _causal(GPTNeoXConfig(**_llama_like(tie_word_embeddings=False)))


def llama() -> Built:
    from transformers import LlamaConfig

    return _causal(LlamaConfig(**_llama_like(tie_word_embeddings=False)))


def qwen3() -> Built:
    from transformers import Qwen3Config

    return _causal(Qwen3Config(**_llama_like(head_dim=8, tie_word_embeddings=True)))


def gemma2() -> Built:
    from transformers import Gemma2Config

    return _causal(Gemma2Config(**_llama_like(head_dim=8, query_pre_attn_scalar=8)))


def mixtral() -> Built:
    from transformers import MixtralConfig

    return _causal(MixtralConfig(**_llama_like(num_local_experts=4, num_experts_per_tok=2)))


def phi() -> Built:
    from transformers import PhiConfig

    return _causal(PhiConfig(**_llama_like(resid_pdrop=0.0)))


def falcon() -> Built:
    from transformers import FalconConfig

    return _causal(FalconConfig(**_llama_like(alibi=False, bos_token_id=1, eos_token_id=2)))


def _bert_like(**more: Any) -> dict[str, Any]:
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _llama_like(**(drop | more))


def bert() -> Built:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_bert_like())), text_inputs()


def albert() -> Built:
    """One block that runs `LAYERS` times."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    return AlbertForMaskedLM(AlbertConfig(**_bert_like(embedding_size=16, classifier_dropout_prob=0.0))), text_inputs()


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"image_size": 16, "patch_size": 8, "num_labels": 5}
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = ViTForImageClassification(ViTConfig(**_bert_like(**size)))
    return model, {"pixel_values": pixels, "labels": torch.tensor([1, 3])}


def t5() -> Built:
    """Encoder and decoder over one shared embedding."""
    from transformers import T5Config, T5ForConditionalGeneration

    size = {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 2 * HIDDEN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
    }
    config = T5Config(**size, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return T5ForConditionalGeneration(config), text_inputs()


class PlainBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def sequential() -> Built:
    """No Hugging Face, no labels: stem, three blocks, head."""
    body = [PlainBlock(HIDDEN) for _ in range(LAYERS)]
    model = nn.Sequential(nn.Linear(8, HIDDEN), *body, nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 4))
    return model, {"input": torch.rand(2, 8, generator=torch.Generator().manual_seed(1))}


ZOO: dict[str, Callable[[], Built]] = {
    build.__name__: _seeded(build)
    for build in (
        opt,
        opt_350m_like,
        gpt2,
        gpt_neox,
        llama,
        qwen3,
        gemma2,
        mixtral,
        phi,
        falcon,
        bert,
        albert,
        vit,
        t5,
        sequential,
    )
}


def first_tensor(output: Any) -> Tensor:
    """The loss where there is one, else the output itself."""
    if isinstance(output, Tensor):
        return output
    return output.loss if output.loss is not None else output[0]
