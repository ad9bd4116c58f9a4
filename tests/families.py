"""The long tail of the zoo: more Hugging Face architectures, tiny and random, from nothing but their names.

`FAMILIES[name]() -> (model, example inputs)`, as in `tests.zoo`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.zoo import HEADS, HIDDEN, LAYERS, VOCAB, Built, _llama_like, _seeded, text_inputs

_GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4, "moe_intermediate_size": HIDDEN}
_ENCODER_DECODER = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_MPT = {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64, "expansion_ratio": 2}

CAUSAL: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "codegen": _GPT,
    "cohere": _llama_like(),
    "gemma": _llama_like(head_dim=8),
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "num_layers": 2,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": _GPT,
    "granite": _llama_like(),
    "granitemoe": _llama_like(**_MOE),
    "mamba": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 4},
    "mistral": _llama_like(),
    "mpt": _MPT,
    "nemotron": _llama_like(),
    "olmo": _llama_like(),
    "olmo2": _llama_like(),
    "olmoe": _llama_like(**_MOE),
    "phi3": _llama_like(),
    "qwen2": _llama_like(),
    "qwen2_moe": _llama_like(**_MOE, shared_expert_intermediate_size=HIDDEN),
    "qwen3_moe": _llama_like(**_MOE, head_dim=8),
    "recurrent_gemma": _llama_like(lru_width=HIDDEN, attention_window_size=8),
    "rwkv": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "context_length": 64},
    "smollm3": _llama_like(),
    "stablelm": _llama_like(),
    "starcoder2": _llama_like(),
    "xglm": {"d_model": HIDDEN, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 2 * HIDDEN},
}
"""Decoders, by the name that transformers gives them."""

MASKED: dict[str, dict[str, Any]] = {
    "deberta-v2": _llama_like(),
    "distilbert": {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 2 * HIDDEN},
    "electra": _llama_like(embedding_size=16),
    "modernbert": _llama_like(),
    "roberta": _llama_like(max_position_embeddings=70, pad_token_id=1),
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "bart": _ENCODER_DECODER,
    "mbart": _ENCODER_DECODER,
    "pegasus": _ENCODER_DECODER,
}


def _built(auto: str, name: str, config: dict[str, Any]) -> Built:
    import transformers

    small = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False} | config
    made = transformers.AutoConfig.for_model(name, **small)
    return getattr(transformers, auto).from_config(made), text_inputs()


FAMILIES: dict[str, Callable[[], Built]] = {
    name: _seeded(partial(_built, auto, name, config))
    for auto, configs in (
        ("AutoModelForCausalLM", CAUSAL),
        ("AutoModelForMaskedLM", MASKED),
        ("AutoModelForSeq2SeqLM", SEQ2SEQ),
    )
    for name, config in configs.items()
}
