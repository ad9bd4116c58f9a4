"""Next-token loss without full fp32 logits: hidden states first, then head and cross-entropy chunk by chunk.

With V tokens of vocabulary and N of text, the plain path holds N x V logits several times over (head output, fp32
copy, their gradients): 8 x 2048 tokens of a 128k vocabulary are 8 GiB per fp32 copy. Here one chunk is alive at a time,
and its logits are computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
Reduction = Literal["sum", "none"]

#: architectures whose logits are exactly ``head(base_model(...).last_hidden_state)``; each is in the equality test.
#: Others (softcapped, scaled, several heads) take their own forward.
PLAIN_HEAD = frozenset(
    {
        "bloom",
        "falcon",
        "gpt2",
        "gpt_neox",
        "gptj",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "stablelm",
    }
)


#: architectures that do not tell packed examples apart by ``position_ids`` alone, and take a mask that does
MASKED = frozenset({"opt"})


class TokenLoss(NamedTuple):
    """Mean loss per learned token (nats), and how many tokens that is a mean of."""

    mean: Tensor
    tokens: Tensor


def has_plain_head(network: Any) -> bool:
    """Whether `network`'s logits are its output embedding applied to its backbone's last hidden state."""
    from transformers import PreTrainedModel

    if not isinstance(network, PreTrainedModel):  # wrapped: by an adapter library, by torch.compile
        return False
    config, head = network.config, network.get_output_embeddings()
    return (
        config.model_type in PLAIN_HEAD
        and isinstance(head, nn.Module)
        and network.base_model is not network
        and not getattr(config, "output_router_logits", False)  # mixtral then adds an auxiliary loss
    )


def next_token_loss(network: Any, batch: dict[str, Tensor], *, chunk_tokens: int) -> TokenLoss:
    """Cross-entropy of each token given those before it, averaged over the labels that are not -100.

    Args:
        network: a causal language model of transformers.
        batch: ``input_ids`` and ``labels`` (batch, sequence), int64; ``attention_mask`` when there is padding;
            ``position_ids`` when there are several examples in a sequence (see `packing`).
        chunk_tokens: tokens whose logits exist at the same time; 0 for the model's own forward.

    Differs from the model's own loss in rounding only; a batch without labels gives 0, not NaN.
    """
    total, targets = _losses(network, batch, chunk_tokens, "sum")
    tokens = (targets != IGNORED).sum()
    return TokenLoss(total / tokens.clamp(min=1), tokens)


def next_token_losses(network: Any, batch: dict[str, Tensor], *, chunk_tokens: int) -> Tensor:
    """`next_token_loss` not averaged: (batch, sequence), fp32, of the token after each; 0 where that is not learned."""
    losses, _ = _losses(network, batch, chunk_tokens, "none")
    return losses.view(batch["labels"].shape)


def _losses(network: Any, batch: dict[str, Tensor], chunk_tokens: int, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, or its sum; and the targets, (tokens,)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "position_ids" in inputs and network.config.model_type in MASKED:
        inputs["attention_mask"] = attention_within(inputs["position_ids"], network.dtype)
    # position t is scored against token t + 1; the last position has nothing to predict
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    if chunk_tokens and has_plain_head(network):
        head, hidden = network.get_output_embeddings(), network.base_model(**inputs, use_cache=False).last_hidden_state
        return chunked_cross_entropy(head, hidden.flatten(0, 1), targets, chunk_tokens, reduction), targets
    return _cross_entropy(network(**inputs, use_cache=False).logits.flatten(0, 1), targets, reduction), targets


def attention_within(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores so that a token sees its own example alone, and that up to itself.

    Args:
        positions: (batch, sequence), 0 where an example begins.
        dtype: of the result, (batch, 1, sequence, sequence).
    """
    example = (positions == 0).cumsum(1)
    seen = (example[:, :, None] == example[:, None]).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def chunked_cross_entropy(
    head: nn.Module, hidden: Tensor, targets: Tensor, chunk_tokens: int, reduction: Reduction = "sum"
) -> Tensor:
    """Cross-entropy of ``head(hidden)``, fp32: summed, or of each token.

    Args:
        head: called as a module on each chunk, and again in the backward pass, so that its hooks fire.
        hidden: (tokens, width).
        targets: (tokens,), -100 where nothing is learned.
        chunk_tokens: rows of `hidden` per call of `head`.
        reduction: ``"sum"``, or ``"none"`` for (tokens,), 0 where nothing is learned.
    """

    def chunk_loss(rows: Tensor, wanted: Tensor) -> Tensor:
        return _cross_entropy(head(rows), wanted, reduction)

    chunks = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    if len(hidden) <= chunk_tokens or not torch.is_grad_enabled():  # nothing to save by computing twice
        parts = [chunk_loss(*chunk) for chunk in chunks]
    else:
        parts = [checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(parts) if reduction == "none" else torch.stack(parts).sum()


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction=reduction)
