"""Adapters made a part of the feed-forward networks that they are beside: more neurons of the same kind.

``W_2 ReLU(W_1 x + b_1) + b_2 + values^T ReLU(keys x)`` is one network of ``ffn_dim + width`` neurons. It is exact where
the network is two linear layers with ReLU between them, no router's logit multiplies, and every token uses every row.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_offload.adapters import adapted_ffns, adapters_by_path, network_of
from lightning_offload.checkpoint import compare_weights
from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.methods.ffn import FFN, input_of, output_of
from lightning_offload.methods.sparse_adapter import ADAPTER, AdapterSettings, SparseAdapter, detach
from lightning_offload.stock import is_stock

Module = TypeVar("Module", bound=nn.Module)

_WIDTHS = ("ffn_dim", "intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size")
_PROBE = (2, 16)


@torch.no_grad()
def merge_meft_adapter(module: Module, *, dense: bool = False) -> Module:
    """Make adapters a part of the model, in place: afterwards it is a stock one with wider feed-forward networks.

    Logits are those of before up to the order of sums: 1e-5 of the largest in float32, roundings in 16 bits.

    Args:
        module: A transformers model with adapters, or a module around one.
        dense: Use every row for every token, although training used the best alone: the merged model then gives other
            outputs than the one that was trained.

    Returns:
        ``module``.

    Raises:
        OffloadError: It would not be exact; says why. Nothing has been changed then.
        ValueError: ``module`` has no adapters.
        TypeError: It holds no transformers model.
    """
    network = network_of(module)
    adapters = adapters_by_path(network)
    kind = type(module).__name__
    if not adapters:
        raise ValueError(f"this {kind} has no adapters to merge")
    if not is_stock(network):
        raise TypeError(f"merging needs a transformers model, whose config says how wide networks are; got a {kind}")
    if any(adapter.source is not None for adapter in adapters.values()):
        raise OffloadError("the rows of these adapters are in the hands of a Trainer; merge them after it has fitted")
    merged = [_Merged(ffn, *_linears(ffn), ffn.holder.get_submodule("meft")) for ffn in adapted_ffns(network)]  # type: ignore[arg-type]
    _check_networks(network, merged)  # before settings: those can be changed
    _check_settings(merged[0].adapter.settings, dense=dense)
    widths = _new_widths(network, merged)
    detach(module)
    for one in merged:
        for tensors, name, value in one.wider():
            setattr(tensors, name, nn.Parameter(value, requires_grad=getattr(tensors, name).requires_grad))
        one.first.out_features = one.second.in_features = one.width
    for name, width in widths.items():
        setattr(network.config, name, width)
    return module


@dataclass(frozen=True, eq=False)
class _Merged:
    """A network of two linear layers, and the adapter that is to be a part of it."""

    ffn: FFN
    first: nn.Linear
    second: nn.Linear
    adapter: SparseAdapter

    @property
    def width(self) -> int:
        return self.first.out_features + self.adapter.settings.width

    def wider(self) -> Iterator[tuple[nn.Linear, str, Tensor]]:
        """Layer, name and value of what changes; rows take the dtype that the network computes in."""
        keys, values = (rows.detach().to(self.first.weight) for rows in (self.adapter.keys, self.adapter.values))
        yield self.first, "weight", torch.cat([self.first.weight, keys])
        if self.first.bias is not None:
            yield self.first, "bias", torch.cat([self.first.bias, self.first.bias.new_zeros(len(keys))])
        yield self.second, "weight", torch.cat([self.second.weight, values.T], 1)


@dataclass(eq=False)
class _Seen:
    """What went through a network, in the order of its parts."""

    x: Tensor | None = None
    into_first: Tensor | None = None
    out_of_first: Tensor | None = None
    into_second: Tensor | None = None
    out_of_second: Tensor | None = None
    y: Tensor | None = None


def _check_settings(settings: AdapterSettings, *, dense: bool) -> None:
    if settings.gate != "none":
        raise OffloadError(
            f"gate={settings.gate!r} cannot be merged: the router's logit multiplies each row, which no feed-forward "
            "network does; keep the adapter (`save_meft_adapter`), or train with variant='paper' or gate='none'"
        )
    everything = settings.top_k >= settings.width and settings.active_experts >= settings.experts
    if not (everything or dense):
        raise OffloadError(
            f"top_k={settings.top_k} of width={settings.width} rows and {settings.active_experts} of "
            f"{settings.experts} experts cannot be merged exactly: the merged network uses every row for every token. "
            f"Pass dense=True to have that all the same, with other outputs; or train with "
            f"top_k={settings.width}, experts=1, active_experts=1, or keep the adapter (`save_meft_adapter`)"
        )


def _linears(ffn: FFN) -> tuple[nn.Linear, nn.Linear]:
    found = [part for part in ffn.holder.modules() if isinstance(part, nn.Linear)]
    if ffn.entry is not ffn.exit:
        found = [part for part in (ffn.entry, ffn.exit) if isinstance(part, nn.Linear)]
    if len(found) != 2 or found[0].out_features != found[1].in_features:
        raise _not_relu(ffn)
    return found[0], found[1]


def _not_relu(ffn: FFN) -> OffloadError:
    parts = ", ".join(f"{name} ({type(part).__name__})" for name, part in ffn.holder.named_children() if name != "meft")
    return OffloadError(
        f"`{ffn.path}` is no ReLU network of two linear layers, so rows under ReLU are no part of it; it has {parts}. "
        "Keep the adapter beside it (`save_meft_adapter`)"
    )


def _check_networks(network: Any, merged: Sequence[_Merged]) -> None:
    """Have tokens go through, and look whether anything but ReLU lies between the two layers.

    Raises:
        OffloadError: Something does.
    """
    seen = [_Seen() for _ in merged]
    modes = {part: part.training for part in network.modules()}
    with ExitStack() as stack:
        for one, record in zip(merged, seen, strict=True):
            for handle in _watch(one, record):
                stack.callback(handle.remove)
        network.eval()
        try:
            tokens = torch.randint(network.get_input_embeddings().num_embeddings, _PROBE).to(network.device)
            more = {"decoder_input_ids": tokens} if network.config.is_encoder_decoder else {}
            network(input_ids=tokens, use_cache=False, **more)
        finally:
            for part, training in modes.items():
                part.training = training
    for one, record in zip(merged, seen, strict=True):
        if not _is_relu_network(record):
            raise _not_relu(one.ffn)


def _watch(one: _Merged, record: _Seen) -> Iterator[RemovableHandle]:
    def entering(name: str) -> Any:
        return lambda _, args, kwargs: setattr(record, name, input_of(args, kwargs))

    def leaving(name: str) -> Any:
        return lambda _, args, output: setattr(record, name, output_of(output))

    yield one.ffn.entry.register_forward_pre_hook(entering("x"), with_kwargs=True)
    yield one.first.register_forward_pre_hook(entering("into_first"), with_kwargs=True)
    yield one.first.register_forward_hook(leaving("out_of_first"))
    yield one.second.register_forward_pre_hook(entering("into_second"), with_kwargs=True)
    # before the adapter adds its own output
    yield one.ffn.exit.register_forward_hook(leaving("y"), prepend=True)
    yield one.second.register_forward_hook(leaving("out_of_second"), prepend=True)


def _is_relu_network(record: _Seen) -> bool:
    values = [getattr(record, field.name) for field in fields(record)]
    if any(value is None for value in values):
        return False
    x, into_first, out_of_first, into_second, out_of_second, y = values
    same = [(x, into_first), (out_of_first.relu(), into_second), (out_of_second, y)]
    return all(torch.equal(one, other) for one, other in same)


def _new_widths(network: Any, merged: Sequence[_Merged]) -> dict[str, int]:
    """What the config is to say.

    Raises:
        OffloadError: It has no words for networks of these widths.
    """
    shapes = {name: t.to("meta") for name, t in network.state_dict().items() if ADAPTER not in name}
    names = {id(part): name for name, part in network.named_modules()}
    for one in merged:
        for layer, name, value in one.wider():
            shapes[f"{names[id(layer)]}.{name}"] = value.to("meta")
    config = copy.deepcopy(network.config)
    old, added = {one.first.out_features for one in merged}, merged[0].adapter.settings.width
    widths = {name: width + added for name in _WIDTHS if (width := getattr(config, name, None)) in old}
    for name, width in widths.items():
        setattr(config, name, width)
    try:
        with torch.device("meta"):
            compare_weights(type(network)(config).state_dict(), shapes, source="The merged model")
    except CheckpointError as error:
        raise OffloadError(
            f"The config of {type(network).__name__} has no words for what would come out: adapters are beside "
            f"{len(merged)} feed-forward networks, and it knows one width for all ({error})"
        ) from error
    return widths
