"""Sparse adapters beside the feed-forward networks of a frozen model: parameters, hooks, and where rows come from.

``y = FFN(x) + ReLU(u) W_B`` (MEFT, arXiv 2406.04984; ``numerics.adapter``). While W_B is zero, +0.0 is added: the
model's logits are bit for bit what they were, save that a -0.0 of an FFN (dropout makes them) becomes +0.0, which no
sum after it can tell apart.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from lightning_offload.methods.ffn import FFN, find_ffns, input_of, output_of, with_output
from lightning_offload.methods.padding import Forwards, Padding
from lightning_offload.numerics.adapter import Gate, Picks, Scope, adapter, route, select, union

ADAPTER = ".meft."
"""In the name of every parameter of an adapter."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Of all adapters of a model.

    Attributes:
        width: Rows r, a multiple of ``experts``.
        experts: N; expert e owns rows e n to (e + 1) n - 1, n = r / N.
        active_experts: E, experts of a token.
        top_k: K, rows of a token.
        gate: Whether the router's logit multiplies u.
        scope: Whether a token uses its own rows, or those of all tokens.
        router_init: "keys": 50 times the mean of an expert's keys; "normal": as the keys.
        key_std: Standard deviation of initial keys; None: ``default_key_std``.
        seed: Of the keys, and of the router.
    """

    width: int
    experts: int
    active_experts: int
    top_k: int
    gate: Gate = "logit"
    scope: Scope = "token"
    router_init: Literal["keys", "normal"] = "keys"
    key_std: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that do not go together."""
        for name, holds, expected in (
            ("width", self.width % self.experts == 0, f"a multiple of experts={self.experts}"),
            ("active_experts", 1 <= self.active_experts <= self.experts, f"1 to experts={self.experts}"),
            ("top_k", 1 <= self.top_k <= self.width, f"1 to width={self.width}"),
        ):
            if not holds:
                raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)}")


def default_key_std(hidden_size: int) -> float:
    """The paper's 0.02 at its d = 4096, and at any d the same spread of ``x . key`` for inputs of one scale."""
    return 0.02 * math.sqrt(4096 / hidden_size)


@dataclass(frozen=True, eq=False)
class Fetched:
    """The rows that the tokens of a call use.

    Attributes:
        keys: (U, d), differentiable.
        values: (U, d), likewise.
        picks: Which of them each token uses, and its experts.
    """

    keys: Tensor
    values: Tensor
    picks: Picks


class RowSource(Protocol):
    """Where rows come from: the adapter's own parameters, or an engine that has them elsewhere."""

    def start(self, x: Tensor) -> None:
        """Begins to select and fetch, before the FFN runs.

        Args:
            x: (T, d), of the tokens that are not padding; detached.
        """

    def rows(self) -> Fetched:
        """What ``start`` began, after the FFN has run."""

    def again(self, picks: Picks) -> Fetched:
        """The rows of an earlier call, as a checkpoint computes it again."""


class SparseAdapter(nn.Module):
    """The rows of one FFN; itself the source of them.

    Keys are normal by a generator of ``seed`` and ``path`` alone, values zero.

    Args:
        path: Of the FFN in the model.
        hidden_size: d.
        settings: See there.
        forwards: Knows which tokens are padding.
        device: Of the parameters.
        dtype: Likewise; computed is in that of x.
    """

    def __init__(
        self,
        path: str,
        hidden_size: int,
        settings: AdapterSettings,
        forwards: Forwards,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.path, self.settings, self.forwards = path, settings, forwards
        self.source: RowSource | None = None
        self._call: _Call | None = None
        self._picks: Picks | None = None
        self._kept: list[weakref.ref[_Selection]] = []
        self._kept_by_checkpoint: list[_Selection] = []
        self._recomputed = False
        width, experts = settings.width, settings.experts
        seed = int.from_bytes(sha256(f"{settings.seed} {path}".encode()).digest()[:8], "little")
        random = torch.Generator().manual_seed(seed)
        std = default_key_std(hidden_size) if settings.key_std is None else settings.key_std
        keys = torch.empty(width, hidden_size).normal_(0.0, std, generator=random)
        if settings.router_init == "keys":
            router = 50 * keys.unflatten(0, (experts, -1)).mean(1)
        else:
            router = torch.empty(experts, hidden_size).normal_(0.0, std, generator=random)
        self.keys = nn.Parameter(keys.to(device, dtype))
        self.values = nn.Parameter(torch.zeros(width, hidden_size, device=device, dtype=dtype))
        self.router = nn.Parameter(router.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Passes x on: an ``nn.Sequential`` runs whatever is put into it."""
        return x

    def start(self, x: Tensor) -> None:
        """Selects among the adapter's own rows."""
        self._picks = self.pick(x, self.keys.to(x.dtype))

    def rows(self) -> Fetched:
        """The adapter's own rows, differentiable."""
        picks, self._picks = self._picks, None
        assert picks is not None
        return self.again(picks)

    def again(self, picks: Picks) -> Fetched:
        """The adapter's own rows, differentiable."""
        return Fetched(self.keys.index_select(0, picks.rows), self.values.index_select(0, picks.rows), picks)

    @torch.no_grad()
    def pick(self, x: Tensor, keys: Tensor, *, by_expert: bool = False) -> Picks:
        """Which rows each of the T tokens uses.

        Args:
            x: (T, d).
            keys: (r, d), on x's device.
            by_expert: See ``numerics.adapter.select``.
        """
        s = self.settings
        chosen = route(x, self.router, s.active_experts)
        logits = chosen.logits if s.gate == "logit" else None
        group = s.width // s.experts
        picked = select(x, keys, chosen.experts, logits, group=group, top_k=s.top_k, by_expert=by_expert)
        return Picks(*union(picked, s.width), chosen.experts)

    def hook(self, ffn: FFN) -> list[RemovableHandle]:
        """Has every call of ``ffn`` add the adapter's output to its own."""
        return [
            ffn.entry.register_forward_pre_hook(self._enter, with_kwargs=True),
            ffn.exit.register_forward_hook(self._leave),
        ]

    @_disable_dynamo  # rows are chosen and fetched here: a compiled block is left
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = input_of(args, kwargs)
        self._check_size("input", x)
        tokens = x.detach().reshape(-1, x.shape[-1])
        mark = tokens.sum(0)
        known = self._known(mark) if torch._C._current_graph_task_id() != -1 else None
        padding = self.forwards.padding(x) if known is None else known.padding
        if known is None:
            (self.source or self).start(tokens if padding is None else tokens[padding.kept])
        self._call = _Call(x, mark, padding, known)

    @_disable_dynamo  # rows are chosen and fetched here: a compiled block is left
    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, self._call = self._call, None
        assert call is not None
        source = self.source or self
        rows = source.rows() if call.known is None else source.again(call.known.picks)
        y = self._output(call, rows)
        if call.known is None:
            self._keep(_Selection(call.mark, call.padding, rows.picks), y)
        of_ffn = output_of(output)
        self._check_size("output", of_ffn)
        return with_output(output, of_ffn + y.view(of_ffn.shape).to(of_ffn.dtype))

    def _check_size(self, what: str, of_ffn: Tensor) -> None:
        if of_ffn.shape[-1] != self.keys.shape[1]:
            raise ValueError(
                f"The {what} of {self.path!r} is {tuple(of_ffn.shape)}, but its adapter was made for a last size of "
                f"{self.keys.shape[1]}; this is no feed-forward network of the blocks: name another with targets="
            )

    def _output(self, call: _Call, rows: Fetched) -> Tensor:
        s, x = self.settings, call.x.reshape(-1, call.x.shape[-1])
        if call.padding is not None:
            x = x.index_select(0, call.padding.kept)
        keys, values = rows.keys.to(x.dtype), rows.values.to(x.dtype)
        y = adapter(x, keys, values, self.router, rows.picks, width=s.width, gate=s.gate, scope=s.scope)
        if call.padding is None:
            return y
        return y.new_zeros(len(call.padding.padded), x.shape[1]).index_copy(0, call.padding.kept, y)

    def _keep(self, selection: _Selection, y: Tensor) -> None:
        """Keeps a selection as long as a checkpoint may compute its call again.

        That is while the graph lives that y belongs to; where the checkpoint built none (the reentrant one runs its
        first forward without gradients), until a forward that follows a recomputation.
        """
        self._kept = [kept for kept in self._kept if kept() is not None]
        if self._recomputed:
            self._kept_by_checkpoint, self._recomputed = [], False
        if y.grad_fn is not None:
            metadata: Any = y.grad_fn.metadata  # typed as a method
            metadata["meft"] = selection
            self._kept.append(weakref.ref(selection))
        elif self.forwards.backward_follows and not torch.is_grad_enabled():
            self._kept_by_checkpoint.append(selection)

    def _known(self, mark: Tensor) -> _Selection | None:
        """What was selected when the call that is computed again was computed first."""
        self._recomputed = True
        graphs = [selection for kept in self._kept if (selection := kept()) is not None]
        known = [*graphs, *self._kept_by_checkpoint]
        if len(known) == 1:
            return known[0]
        return next((selection for selection in reversed(known) if torch.equal(selection.mark, mark)), None)

    def __getstate__(self) -> dict[str, Any]:
        in_flight = {"source": None, "_call": None, "_picks": None}
        return self.__dict__ | in_flight | {"_kept": [], "_kept_by_checkpoint": []}


@dataclass(frozen=True, eq=False)
class _Selection:
    """What a call selected; ``mark``, the sum of its tokens, tells it from others."""

    mark: Tensor
    padding: Padding | None
    picks: Picks


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of the FFN that goes on; ``known`` if it is computed again."""

    x: Tensor
    mark: Tensor
    padding: Padding | None
    known: _Selection | None


@dataclass(frozen=True, eq=False)
class _Attachment:
    """What ``detach`` undoes: hooks, and the names of the parameters that were trained."""

    handles: list[RemovableHandle]
    trained: frozenset[str]


def attach_parameters(
    module: nn.Module,
    *,
    targets: str | Sequence[str] | None = None,
    layers: str | Sequence[int] = "all",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> list[SparseAdapter]:
    """Puts an adapter beside the FFN of each block, as ``<ffn path>.meft``, and freezes everything else.

    A second call gives what the first one made.

    Args:
        module: Any module with a decoder inside.
        targets: See ``find_ffns``.
        layers: Likewise.
        device: Of the adapters; None: where each FFN is, or in host memory where that has no values yet.
        dtype: Of the adapters.
        **settings: Of ``AdapterSettings``.

    Raises:
        ValueError: The FFNs are not one per block, or ``module`` has adapters of other settings.
    """
    asked = AdapterSettings(**settings)
    ffns = find_ffns(module, targets=targets, layers=layers)
    if there := [child for child in module.modules() if isinstance(child, SparseAdapter)]:
        _check_same(there, asked, ffns)
        return there
    forwards = Forwards()
    attachment = _Attachment([], frozenset(name for name, p in module.named_parameters() if p.requires_grad))
    module.requires_grad_(False)
    adapters = []
    for ffn in ffns:
        beside = next(ffn.entry.parameters()).device
        at = device or (torch.device("cpu") if beside.type == "meta" else beside)
        made = SparseAdapter(ffn.path, ffn.hidden_size, asked, forwards, device=at, dtype=dtype)
        ffn.holder.add_module("meft", made)
        attachment.handles.extend(made.hook(ffn))
        adapters.append(made)
    attachment.handles.extend(forwards.watch(_around(module, ffns)))
    module._meft = attachment  # type: ignore[assignment]
    return adapters


def backbone_names(module: nn.Module) -> set[str]:
    """Of the parameters beside which adapters are, or would be; tied ones have several."""
    return {name for name, _ in module.named_parameters(remove_duplicate=False) if ADAPTER not in name}


def detach(module: nn.Module) -> None:
    """Takes adapters and hooks off again; what was trained before is trained again.

    Raises:
        ValueError: Nothing was attached to ``module`` or to a part of it.
    """
    roots = [root for root in module.modules() if isinstance(root.__dict__.get("_meft"), _Attachment)]
    if not roots:
        raise ValueError(
            f"No adapters were attached to this {type(module).__name__}; detach takes the module that "
            "attach_parameters was given, or one around it"
        )
    for root in roots:
        attachment: Any = root.__dict__.pop("_meft")
        for handle in attachment.handles:
            handle.remove()
        for holder in [m for m in root.modules() if isinstance(m._modules.get("meft"), SparseAdapter)]:
            del holder.meft
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(name in attachment.trained)


def _around(module: nn.Module, ffns: list[FFN]) -> list[nn.Module]:
    """Every module around blocks."""
    paths = {""}
    for ffn in ffns:
        parts = ffn.block_path.split(".")
        paths |= {".".join(parts[:count]) for count in range(1, len(parts))}
    return [module.get_submodule(path) for path in sorted(paths)]


def _check_same(there: list[SparseAdapter], asked: AdapterSettings, ffns: list[FFN]) -> None:
    made = there[0].settings
    for name in (field.name for field in fields(asked)):
        if getattr(made, name) != getattr(asked, name):
            raise ValueError(
                f"{name}={getattr(asked, name)!r}, but adapters with {name}={getattr(made, name)!r} are attached; "
                "pass the same, or detach them first"
            )
    if [id(ffn.holder._modules.get("meft")) for ffn in ffns] != [id(child) for child in there]:
        raise ValueError(
            f"targets= and layers= name {len(ffns)} feed-forward networks, but adapters are attached to "
            f"{[child.path for child in there]}; pass the same, or detach them first"
        )
