"""meft: a very wide sparse adapter beside each feed-forward network, whose rows live in host memory.

For each token a router picks E of N experts (contiguous groups of the r rows), inside them the K best rows::

    u_j = (x . key_j) p_e(j)            p: the router's logit (variant "repro"), or 1 ("paper")
    y   = FFN(x) + sum_j ReLU(u_j) value_j

over the token's own K rows ("repro"), or over the union of all tokens' ("paper"). The backbone is frozen. The union
goes to the device, the gradients of its rows come back, and AdamW runs on the host. Source: MEFT (arXiv 2406.04984),
section 3 and Algorithm 1; "repro" is what its released code computes. Differs from it in having a host side: the
code imitates it by masks.

========================  =====================
paper                     setting
========================  =====================
r                         ``width``
N                         ``experts``
experts activated         ``active_experts``
K                         ``top_k``
========================  =====================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.budget import GIB, Machine
from lightning_offload.methods.base import DTypes, Trained
from lightning_offload.methods.homes import weight_dtype
from lightning_offload.methods.method import Method, Site, resolve_common
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.row_tables import RowTable
from lightning_offload.methods.rules import Rule
from lightning_offload.methods.sender import Sender
from lightning_offload.methods.settings import GradientSettings, require
from lightning_offload.methods.sparse_adapter import SparseAdapter, attach_parameters
from lightning_offload.numerics.adapter import Gate, Scope

VARIANTS: dict[str, tuple[Gate, Scope]] = {"repro": ("logit", "token"), "paper": ("none", "union")}
"""Gate and scope of each variant."""

KEYS_SHARE = 0.25
"""Of the device memory that weights leave free: what keys may take for ``placement="auto"`` to keep them there."""


@dataclass(frozen=True, kw_only=True)
class MEFTSettings(GradientSettings):
    """Settings of ``meft``.

    Attributes:
        width: Rows (keys and values) per layer, r.
        experts: Groups of rows that the router chooses from, N; ``"auto"`` is ``4 ceil(sqrt(width))``, moved to the
            nearest divisor of ``width``.
        active_experts: Experts per token.
        top_k: Rows per token, K.
        variant: ``"repro"`` (the released code: the router's logit multiplies, a token uses its own rows) or
            ``"paper"`` (Algorithm 1: no logit, so that the router is not trained; a token uses the whole union).
        gate: ``"logit"`` or ``"none"``; ``None`` is the variant's.
        scope: ``"token"`` or ``"union"``; ``None`` is the variant's.
        placement: Where rows live beside the host: ``"host"`` (nowhere), ``"keys"`` (keys on the device too, for
            scoring), ``"device"`` (keys and values too), or ``"auto"``: ``"keys"`` while they fit.
        row_optimizer: ``"dense"`` (every row in every step), ``"deferred"`` (the same, paid when a row is touched; of
            keys that are scored every row is stepped), ``"lazy"`` (SparseAdam: rows that are not touched stand still)
            or ``"auto"``: dense while more than 0.1 of a layer's rows are touched per step, else deferred.
        layers: ``"all"``, or indices of blocks, negative ones from the end.
        targets: Feed-forward networks by name (the end of a path) or regular expression, where they are not found.
        router_init: ``"keys"`` (50 times the mean of the expert's keys) or ``"normal"``.
        key_std: Standard deviation of the initial keys; ``"auto"`` is ``0.02 sqrt(4096 / d)``, the paper's at its d.
        seed: Of the initial keys; ``None`` is torch's initial seed.
    """

    width: int = 1024
    experts: int | Literal["auto"] = "auto"
    active_experts: int = 8
    top_k: int = 64
    variant: Literal["repro", "paper"] = "repro"
    gate: Literal["logit", "none"] | None = None
    scope: Literal["token", "union"] | None = None
    placement: Literal["auto", "host", "keys", "device"] = "auto"
    row_optimizer: Literal["auto", "dense", "deferred", "lazy"] = "auto"
    layers: Literal["all"] | Sequence[int] = "all"
    targets: str | Sequence[str] | None = None
    router_init: Literal["keys", "normal"] = "keys"
    key_std: float | Literal["auto"] = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the setting."""
        super().__post_init__()
        for name in ("width", "active_experts", "top_k"):
            require(_whole(getattr(self, name), 1), name, getattr(self, name), "an integer >= 1")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(value in choices, name, value, f"one of {', '.join(map(repr, choices))}")
        require(self.experts == "auto" or _whole(self.experts, 1), "experts", self.experts, "an integer >= 1 or 'auto'")
        require(self.seed is None or _whole(self.seed, 0), "seed", self.seed, "an integer >= 0, or None")
        std = self.key_std
        is_number = isinstance(std, int | float) and not isinstance(std, bool) and 0 < std < math.inf
        require(std == "auto" or is_number, "key_std", std, "a number > 0 or 'auto'")
        self._check_places()
        if self.width % self.expert_count:
            near = sorted(_divisors(self.width), key=lambda n: abs(n - self.expert_count))[:2]
            raise ValueError(
                f"`experts={self.experts}` does not divide `width={self.width}`; the nearest that do are "
                f"{' and '.join(map(str, sorted(near)))}"
            )
        if self.experts == "auto" and self.expert_count < self.active_experts <= _wanted_experts(self.width):
            raise ValueError(
                f"`width={self.width}` has no divisor near {_wanted_experts(self.width)}, so experts='auto' is "
                f"{self.expert_count}, fewer than active_experts={self.active_experts}; take "
                f"width={_near_widths(self.width, self.active_experts)}, or give experts="
            )
        require(
            self.active_experts <= self.expert_count,
            "active_experts",
            self.active_experts,
            f"at most experts={self.expert_count}",
        )
        require(self.top_k <= self.width, "top_k", self.top_k, f"at most width={self.width}")
        if self.placement == "device" and self.row_optimizer == "deferred":
            raise ValueError(
                "`row_optimizer='deferred'` catches rows up when they are fetched, but `placement='device'` fetches "
                "none; pass row_optimizer='dense', or placement='keys' or 'host'"
            )

    def _check_places(self) -> None:
        layers, targets = self.layers, self.targets
        indices = _are(layers, lambda layer: _whole(layer, -(2**31)))
        require(layers == "all" or indices, "layers", layers, "'all' or a list of block indices")
        names = [targets] if isinstance(targets, str) else targets
        named = _are(names, lambda name: isinstance(name, str) and name != "")
        require(targets is None or named, "targets", targets, "a name, a list of names, or None")

    @property
    def expert_count(self) -> int:
        """N, with ``"auto"`` worked out."""
        return self.experts if self.experts != "auto" else default_experts(self.width)

    @property
    def prunes(self) -> bool:
        """Whether the K best of a token are fewer than the rows of its experts."""
        return self.top_k < self.active_experts * (self.width // self.expert_count)

    def of_adapters(self) -> dict[str, Any]:
        """What ``attach_parameters`` is to be given."""
        gate, scope = VARIANTS[self.variant]
        return {
            "width": self.width,
            "experts": self.expert_count,
            "active_experts": self.active_experts,
            "top_k": self.top_k,
            "gate": self.gate or gate,
            "scope": self.scope or scope,
            "router_init": self.router_init,
            "key_std": None if self.key_std == "auto" else float(self.key_std),
            "seed": torch.initial_seed() % 2**63 if self.seed is None else self.seed,
            "layers": self.layers,
            "targets": self.targets,
        }


_CHOICES = {
    "variant": ("repro", "paper"),
    "gate": ("logit", "none", None),
    "scope": ("token", "union", None),
    "placement": ("auto", "host", "keys", "device"),
    "row_optimizer": ("auto", "dense", "deferred", "lazy"),
    "router_init": ("keys", "normal"),
}


class MEFT(Method):
    """The method ``meft``: claims keys and values of the adapters, keeps routers on the device."""

    name: ClassVar[str] = "meft"
    summary: ClassVar[str] = "wide sparse adapters in host memory beside a frozen model"
    settings_type: ClassVar[type[GradientSettings]] = MEFTSettings
    shards: ClassVar[bool] = False
    settings: MEFTSettings

    def __init__(self, settings: MEFTSettings) -> None:
        super().__init__(settings)
        self._adapters: list[SparseAdapter] = []

    def resolve(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        machine: Machine,
        dtypes: DTypes,
        *,
        accumulates: bool,
        before: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """See ``Method.resolve``."""
        settings, reasons = resolve_common(
            self.settings, units, machine, dtypes, accumulates=accumulates, before=before
        )
        if settings.experts == "auto":
            reasons.append(f"experts={settings.expert_count}: 4 ceil(sqrt(width)), moved to a divisor of width")
            settings = replace(settings, experts=settings.expert_count)
        if not settings.prunes:
            group = settings.width // settings.expert_count
            reasons.append(
                f"top_k={settings.top_k} leaves nothing out: {settings.active_experts} experts of {group} rows are "
                f"{settings.active_experts * group}"
            )
        narrow = {p.dtype for unit in units for p in unit.parameters.values() if p.itemsize == 2}
        if dtypes.compute is None and narrow:
            reasons.append(
                f"rows go up in float32, though weights are in {str(narrow.pop()).removeprefix('torch.')}: "
                "precision='bf16-true' halves their bytes"
            )
        if settings.placement == "auto":
            placement, reason = _where(adapters_of(module), units, machine, dtypes)
            settings = replace(settings, placement=placement)
            reasons.append(f"placement={placement!r}: {reason}")
        self.settings = settings
        return reasons

    def decisive(self) -> dict[str, Any]:
        """See ``Method.decisive``."""
        names = ("accumulate", "row_optimizer", "active_experts", "top_k", "variant", "gate", "scope")
        return {name: getattr(self.settings, name) for name in names}

    def claim(self, module: nn.Module, units: Sequence[Unit]) -> set[int]:
        """See ``Method.claim``.

        Raises:
            ValueError: There are no adapters, or something else is to be trained too.
        """
        adapters = adapters_of(module)
        if not adapters:
            raise ValueError(
                f"method `meft` found no adapters in {type(module).__name__}: call "
                "`lightning_offload.methods.meft.attach(module, settings)` before the optimizer is made (the strategy "
                "does so before `configure_optimizers`)"
            )
        own = {id(parameter) for adapter in adapters for parameter in adapter.parameters()}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in own:
                raise ValueError(
                    f"`{name}` is to be trained, but method `meft` trains adapters alone, beside a frozen backbone: "
                    "set `requires_grad=False` on it, or use `lsp_offload` or `full_offload`"
                )
        self._adapters = adapters
        return {id(parameter) for adapter in adapters for parameter in (adapter.keys, adapter.values)}

    def stays(self, module: nn.Module) -> set[int]:
        """See ``Method.stays``: routers score every token of every forward."""
        return {id(adapter.router) for adapter in adapters_of(module)}

    def host_bytes(self, claimed: Sequence[Trained], rule: Rule, dtypes: DTypes) -> int:
        """See ``Method.host_bytes``: masters, state, sums; and what the device is shown, where that is rounded."""
        return sum(
            t.parameter.numel() * RowTable.bytes_per_element(weight_dtype(t.parameter, dtypes), rule) for t in claimed
        )

    def make_part(self, claimed: Sequence[Trained], site: Site) -> Sender | None:
        """See ``Method.make_part``.

        Raises:
            ValueError: An optimizer whose rows cannot be stepped alone, with a ``row_optimizer`` that does so.
        """
        return RowOptimizer(claimed, self._adapters, site, self.settings)


def adapters_of(module: nn.Module) -> list[SparseAdapter]:
    """The adapters in ``module``, in its order."""
    return [part for part in module.modules() if isinstance(part, SparseAdapter)]


def attach(module: nn.Module, settings: MEFTSettings, *, dtype: torch.dtype = torch.float32) -> list[SparseAdapter]:
    """The adapters in ``module``, made in ``dtype`` where there are none.

    Raises:
        ValueError: See ``attach_parameters``; or ``module`` has adapters of PEFT, which would be frozen.
    """
    refuse_other_adapters(module)
    asked, before = settings.of_adapters(), adapters_of(module)
    if before and settings.seed is None:
        asked["seed"] = before[0].settings.seed  # made in an earlier run: torch's seed may be another by now
    return attach_parameters(module, dtype=dtype, **asked)


def refuse_other_adapters(module: nn.Module) -> None:
    """Of PEFT, which would be frozen beside those of ``meft``.

    Raises:
        ValueError: There are some.
    """
    if any(type(part).__module__.startswith("peft.") for part in module.modules()):
        raise ValueError(
            f"this {type(module).__name__} has adapters of PEFT (LoRA), and `meft` would freeze them beside its own: "
            "train them by `full_offload`, or give the model without them"
        )


def join(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[str]:
    """Names of the adapters' parameters that no group has; they join the first."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for adapter in adapters_of(module) for p in adapter.parameters()}
    missing = [(name, p) for name, p in module.named_parameters() if id(p) in own and id(p) not in known]
    first, names = optimizer.param_groups[0], [name for name, _ in missing]
    first["params"] += [parameter for _, parameter in missing]
    if "param_names" in first:
        first["param_names"] += names
    return names


def default_experts(width: int) -> int:
    """``4 ceil(sqrt(width))``, moved to the nearest divisor of ``width``; of two the larger."""
    wanted = _wanted_experts(width)
    return min(_divisors(width), key=lambda n: (abs(n - wanted), -n))


def _where(
    adapters: Sequence[SparseAdapter], units: Sequence[Unit], machine: Machine, dtypes: DTypes
) -> tuple[Literal["host", "keys"], str]:
    keys = sum(a.keys.numel() * weight_dtype(a.keys, dtypes).itemsize for a in adapters)
    if machine.device_type == "cpu":
        return "keys", "device and host are one memory"
    own = {id(p) for adapter in adapters for p in adapter.parameters()}
    frozen = [p for unit in units for p in unit.parameters.values() if id(p) not in own]
    free = machine.device_free_bytes - sum(p.numel() * weight_dtype(p, dtypes).itemsize for p in frozen)
    said = f"keys take {keys / GIB:.2f} GiB of the {max(free, 0) / GIB:.1f} that weights leave free on the device"
    return ("keys", said) if keys <= KEYS_SHARE * free else ("host", said)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _wanted_experts(width: int) -> int:
    return 4 * math.ceil(math.sqrt(width))


def _near_widths(width: int, active_experts: int) -> str:
    """On either side, the nearest of which "auto" makes just as many experts as it wants."""

    def fits(other: int) -> bool:
        return other % _wanted_experts(other) == 0 and _wanted_experts(other) >= active_experts

    below = next(filter(fits, range(width, 0, -1)), None)
    above = next(filter(fits, count(width)))
    return " or ".join(str(other) for other in (below, above) if other is not None)


def _are(values: object, good: Callable[[Any], bool]) -> bool:
    """Whether it is a list of such, and not an empty one."""
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0 and all(map(good, values))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
