"""The least a step can take: counted arithmetic and bytes over measured rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_offload.memory.blocks import partition
from lightning_offload.memory.rates import Rates
from lightning_offload.methods.lsp import LSPSettings, linear_weights

BYTES_FUSED = 28
"""Memory traffic of one AdamW step per parameter: gradient read, master and two moments read and written.

The same with 16-bit gradients and weights: two bytes less to read, two more to write.
"""


BYTES_SUBSPACE = 16
"""The same of one element of a subspace, beside its gradient and its delta: two moments read and written."""


@dataclass(frozen=True)
class Counts:
    """What one step has to do.

    Attributes:
        forward_flops: Matrix products of the forward pass.
        backward_flops: Those of the backward pass, what it computes again included.
        parameters: Trained elements.
        wire_bytes: Of one element on the link.
        projected: Trained elements that lsp projects.
        squares: Elements of their subspaces, at its default.
    """

    forward_flops: float
    backward_flops: float
    parameters: int
    wire_bytes: int = 2
    projected: int = 0
    squares: int = 0

    @classmethod
    def of(cls, network: nn.Module, *, batch: int, length: int, recompute: bool, wire_bytes: int = 2) -> Counts:
        """Of a causal language model of transformers, by its shape (the meta device will do).

        Matrix products alone: every weight matrix that is not an embedding, of experts those that a token takes, and
        attention among the tokens before.
        """
        config: Any = network.config
        experts = getattr(config, "num_local_experts", 1)
        share = getattr(config, "num_experts_per_tok", 1) / experts
        matrices = 0.0
        for module in network.modules():
            if isinstance(module, nn.Embedding):
                continue
            for weight in module.parameters(recurse=False):
                matrices += weight.numel() * (1.0 if weight.ndim == 2 else share if weight.ndim == 3 else 0.0)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attended = config.num_hidden_layers * config.num_attention_heads * width * (length + 1)
        forward = batch * length * (2 * matrices + 2 * attended)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        linear, settings = linear_weights(network, partition(network)).values(), LSPSettings()
        projected, squares = sum(p.numel() for p in linear), sum(settings.dim_of(*p.shape) ** 2 for p in linear)
        return cls(forward, (3 if recompute else 2) * forward, trained, wire_bytes, projected, squares)


def full_bound_s(counts: Counts, rates: Rates) -> float:
    """Bound of ``full`` in seconds: ``T_bwd + max(T_fwd, T_host, T_up)``, and no lane less than its own work.

    The host steps when the last norm is known, so after the backward pass; it and the weights on their way up hide
    under the next forward. A plan's ``bound_s`` adds what is not counted here: elementwise operations, casts, the step
    of what stays on the device.
    """
    return _bound_s(counts, rates, BYTES_FUSED * counts.parameters, counts.parameters)


def lsp_bound_s(counts: Counts, rates: Rates) -> float:
    """The same of ``lsp``, clipped as ``full`` is, where d x d stands for each projected weight.

    What is not counted: to compress and to apply.
    """
    others = counts.parameters - counts.projected
    host_bytes = BYTES_FUSED * others + (BYTES_SUBSPACE + 2 * counts.wire_bytes) * counts.squares
    return _bound_s(counts, rates, host_bytes, others + counts.squares)


def zo2_bound_s(counts: Counts, rates: Rates) -> float:
    """Two forwards, or the linear weights of the blocks up and down at once, each slowing the other.

    What is not counted: noise and updates.
    """
    flops_per_s = 1e12 * (rates.bf16_tflops if counts.wire_bytes == 2 else rates.fp32_tflops)
    link_bytes = counts.projected * counts.wire_bytes
    up_s, down_s = link_bytes / (1e9 * rates.h2d_gb_per_s), link_bytes / (1e9 * rates.d2h_gb_per_s)
    return max(2 * counts.forward_flops / flops_per_s, rates.both_ways_s(up_s, down_s))


def _bound_s(counts: Counts, rates: Rates, host_bytes: int, link_elements: int) -> float:
    flops_per_s = 1e12 * (rates.bf16_tflops if counts.wire_bytes == 2 else rates.fp32_tflops)
    forward_s, backward_s = counts.forward_flops / flops_per_s, counts.backward_flops / flops_per_s
    host_s, link_bytes = host_bytes / (1e9 * rates.host_gb_per_s), link_elements * counts.wire_bytes
    down_s, up_s = link_bytes / (1e9 * rates.d2h_gb_per_s), link_bytes / (1e9 * rates.h2d_gb_per_s)
    return max(backward_s + max(forward_s, host_s, up_s), down_s)
