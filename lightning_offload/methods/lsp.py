"""lsp: AdamW in a learned d x d subspace of each linear weight, on the host, layer by layer.

For a weight W (m x n) with gradient G and sparse projectors P (m x d), Q (n x d)::

    S = P^T G Q                                 compressed on the device, sent down
    M, V, D = AdamW(S)                          on the host, as soon as S has landed
    W <- (1 - lr wd) W - lr scale P D Q^T       once D has come up, before the layer's next forward

Without clipping no layer waits for another. Every ``refit_every`` steps a layer's projectors are replaced, if they
miss too much of its gradient, and its moments carried over. Source: LSP-Offload (arXiv 2406.10181, Algorithm 1).
Differs from it in what ``LSPSettings`` lists; ``preset="paper"`` is the paper.

``m``, ``n``: rows and columns of the weight; ``d``: ``dim``; ``r``: ``nnz``; alpha: ``bias_threshold``; CheckFreq:
``refit_every``; the paper's beta: ``fit_beta``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lightning_offload.memory.blocks import Unit
from lightning_offload.memory.budget import Machine
from lightning_offload.methods.activations import linear_modules
from lightning_offload.methods.base import DTypes, Rounding, Trained
from lightning_offload.methods.dims import largest_hidden_dim
from lightning_offload.methods.method import Method, Site, resolve_common
from lightning_offload.methods.rules import Rule
from lightning_offload.methods.sender import Sender
from lightning_offload.methods.settings import GradientSettings, require
from lightning_offload.methods.subspace import SubspaceOptimizer

UNSET: Any = None
"""Of settings that a preset decides, where nobody else has."""

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        "projector": "pca",
        "refit_every": 100,
        "bias_threshold": 0.8,
        "threshold_over": "matrix",
        "calibration": "train",
        "moments": "transfer",
        "scale": "match",
        "nnz": 8,
    },
    "paper": {
        "projector": "learned",
        "refit_every": 100,
        "bias_threshold": 0.2,
        "threshold_over": "all",
        "calibration": "batch",
        "moments": "paper",
        "scale": "none",
        "nnz": 8,
    },
}


@dataclass(frozen=True, kw_only=True)
class LSPSettings(GradientSettings):
    """Settings of ``lsp``. What is left out of the first eight takes the value of ``preset``.

    Attributes:
        projector: ``"learned"`` (the paper: positions at random, values fitted), ``"pca"`` (block-diagonal, the
            closed-form best of each block) or ``"block"`` (block-diagonal, orthonormal at random).
        nnz: Nonzeros per row of a projector, r.
        refit_every: Optimizer steps between two looks at a matrix; units take turns.
        bias_threshold: Relative bias ``||P P^T G Q Q^T - G|| / ||G||`` up to which projectors are kept.
        threshold_over: Whether each ``"matrix"`` is judged by itself, or the mean over ``"all"``, as in the paper.
        calibration: Gradients that projectors are fitted to: ``"train"`` is the one at hand, ``"batch"`` that of a
            batch of ``calibration_dataloader``.
        moments: At a refit: ``"transfer"`` (into the new subspace, sqrt(V) keeps its scale; a random one, ``"block"``,
            starts anew), ``"paper"`` or ``"reset"``.
        scale: ``"match"`` gives an update the size that AdamW's has; ``"none"`` is the paper.
        preset: ``None``, or ``"paper"``: the paper's choices of the above.
        dim: d, an integer or a fraction of min(m, n) rounded down to a multiple of ``nnz``; ``"auto"`` is the largest
            fraction whose traffic hides under backward on this machine.
        share: Projectors per ``"matrix"``, or per ``"type"`` (matrices of one shape and name, as in the paper's large
            runs); shared ones are fitted to one matrix at a time, in turn.
        fit_steps: Steps of AdamW on the values of learned projectors.
        fit_lr: Its learning rate, decayed to 0 along a cosine.
        fit_beta: Its weight decay (the paper gives no value for its regulariser).
        others: What is not projected (embeddings, head, norms, biases): ``"adamw"`` on the common path or ``"frozen"``.
        form: S from the ``"gradient"``, or from ``"activations"`` and output gradients without ever forming G.
        tokens: Of a micro-batch, for ``dim="auto"`` to reckon with.
        seed: Of everything drawn; ``None`` is torch's initial seed.
    """

    projector: Literal["learned", "pca", "block"] = UNSET
    nnz: int = UNSET
    refit_every: int | float = UNSET
    bias_threshold: float = UNSET
    threshold_over: Literal["matrix", "all"] = UNSET
    calibration: Literal["train", "batch"] = UNSET
    moments: Literal["transfer", "paper", "reset"] = UNSET
    scale: Literal["match", "none"] = UNSET
    preset: Literal["paper"] | None = None
    dim: int | float | Literal["auto"] = 0.5
    share: Literal["matrix", "type"] = "matrix"
    fit_steps: int = 100
    fit_lr: float = 0.06
    fit_beta: float = 0.01
    others: Literal["adamw", "frozen"] = "adamw"
    form: Literal["gradient", "activations"] = "gradient"
    tokens: int = 1024
    seed: int | None = None

    def __post_init__(self) -> None:
        """Fill in the preset; refuse values that cannot work, naming the setting."""
        require(self.preset in PRESETS, "preset", self.preset, "'paper' or None")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is UNSET:
                object.__setattr__(self, name, value)
        super().__post_init__()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(value in choices, name, value, f"one of {', '.join(map(repr, choices))}")
        require(_whole(self.nnz, 1), "nnz", self.nnz, "an integer >= 1")
        require(_whole(self.tokens, 1), "tokens", self.tokens, "an integer >= 1")
        require(_whole(self.fit_steps, 1), "fit_steps", self.fit_steps, "an integer >= 1")
        every = self.refit_every
        require(_whole(every, 1) or every == float("inf"), "refit_every", every, "an integer >= 1, or inf for never")
        for name in ("bias_threshold", "fit_lr", "fit_beta"):
            value = getattr(self, name)
            require(_number(value) and value >= 0, name, value, "a number >= 0")
        require(self.seed is None or _whole(self.seed, 0), "seed", self.seed, "an integer >= 0, or None")
        self._check_dim()
        if self.threshold_over == "all" and self.calibration == "train":
            raise ValueError(
                "`threshold_over='all'` needs every gradient before the first fit, which `calibration='train'` does "
                "not have; pass calibration='batch', or threshold_over='matrix'"
            )

    def _check_dim(self) -> None:
        dim, nnz = self.dim, self.nnz
        if dim == "auto":
            return
        if _whole(dim, 1):
            require(dim >= nnz, "dim", dim, f"at least nnz={nnz} (a row has nnz nonzeros in dim columns)")
            near = f"{dim - dim % nnz} or {dim - dim % nnz + nnz}"
            require(dim % nnz == 0, "dim", dim, f"a multiple of nnz={nnz}, so that columns form nnz bands; try {near}")
        else:
            fraction = isinstance(dim, float) and 0 < dim <= 1
            require(fraction, "dim", dim, "an integer, a fraction of min(m, n) in (0, 1], or 'auto'")

    @property
    def transfers(self) -> bool:
        """Whether moments are ever carried over into a new subspace."""
        anew = self.moments == "reset" or (self.moments == "transfer" and self.projector == "block")
        return not anew and isinstance(self.refit_every, int)

    def dim_of(self, rows: int, columns: int) -> int:
        """D of a weight of this shape; 0 where it is too small to be projected."""
        assert self.dim != "auto"
        if isinstance(self.dim, int):
            return self.dim
        dim = int(self.dim * min(rows, columns))
        return dim - dim % self.nnz


_CHOICES = {
    "projector": ("learned", "pca", "block"),
    "threshold_over": ("matrix", "all"),
    "calibration": ("train", "batch"),
    "moments": ("transfer", "paper", "reset"),
    "scale": ("match", "none"),
    "share": ("matrix", "type"),
    "others": ("adamw", "frozen"),
    "form": ("gradient", "activations"),
}


class LSP(Method):
    """The method ``lsp``: claims the linear weights of the blocks."""

    name: ClassVar[str] = "lsp"
    summary: ClassVar[str] = "AdamW in a d x d subspace of each linear weight"
    settings_type: ClassVar[type[GradientSettings]] = LSPSettings
    layer_wise: ClassVar[bool] = True
    rounding: ClassVar[Rounding] = "stochastic"
    settings: LSPSettings

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
        if settings.dim == "auto":
            if before and "dim" in before:
                dim, reason = before["dim"], "as in the run that is continued"
            else:
                candidates, fused = self._candidates(module, units), settings.native == "on"
                dim, reason = largest_hidden_dim(candidates, machine, dtypes, settings.tokens, fused=fused)
            settings = replace(settings, dim=dim)
            reasons.append(f"dim={dim}: {reason}")
        if settings.seed is None:
            seed = before["seed"] if before and "seed" in before else torch.initial_seed() % 2**63
            settings = replace(settings, seed=seed)
        self.settings = settings
        return reasons

    def decisive(self) -> dict[str, Any]:
        """See ``Method.decisive``."""
        return {name: getattr(self.settings, name) for name in ("accumulate", "dim", "seed")}

    def claim(self, module: nn.Module, units: Sequence[Unit]) -> set[int]:
        """See ``Method.claim``: linear weights of blocks that are not tied and not too small for ``nnz`` columns.

        Raises:
            ValueError: There is none, or ``dim`` is larger than one of them, or smaller than ``nnz`` in all.
        """
        settings, claimed = self.settings, set()
        weights = self._candidates(module, units)
        for name, weight in weights.items():
            dim = settings.dim_of(*weight.shape)
            if dim > min(weight.shape):
                raise ValueError(
                    f"`dim={dim}` is larger than min(m, n)={min(weight.shape)} of `{name}`, which is "
                    f"{tuple(weight.shape)}; pass a fraction (dim=0.5), or at most {min(weight.shape)}"
                )
            if dim:
                claimed.add(id(weight))
        if weights and not claimed:
            raise ValueError(_all_too_small(weights, settings))
        if not claimed:
            raise ValueError(
                f"method `lsp` found no linear weight to project in {type(module).__name__}: it looks for trained "
                f"`nn.Linear` (or GPT-2's `Conv1D`) weights in the blocks, not tied, of at least min_numel="
                f"{settings.min_numel:,} elements. Name the blocks (`blocks=[...]`), lower `min_numel`, or use "
                "`full_offload`"
            )
        return claimed

    def _candidates(self, module: nn.Module, units: Sequence[Unit]) -> dict[str, nn.Parameter]:
        return {
            name: weight
            for name, weight in linear_weights(module, units).items()
            if weight.requires_grad and weight.numel() >= self.settings.min_numel
        }

    def leaves_frozen(self) -> bool:
        """See ``Method.leaves_frozen``."""
        return self.settings.others == "frozen"

    def host_bytes(self, claimed: Sequence[Trained], rule: Rule, dtypes: DTypes) -> int:
        """See ``Method.host_bytes``."""
        return SubspaceOptimizer.host_bytes(claimed, rule, dtypes, self.settings)

    def make_part(self, claimed: Sequence[Trained], site: Site) -> Sender | None:
        """See ``Method.make_part``."""
        _check_rule(site.rule)
        return SubspaceOptimizer(claimed, site, self.settings)


def linear_weights(module: nn.Module, units: Sequence[Unit]) -> dict[str, nn.Parameter]:
    """Weights of linear layers in the blocks (anywhere, in a model without blocks), by name, but for tied ones."""
    owners = Counter(
        id(parameter)
        for part in module.modules()
        for _, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
    )
    blocks = [unit for unit in units if unit.is_block] or list(units)
    linear = {id(part.weight) for unit in blocks for part in linear_modules(unit.module)}
    return {
        name: parameter
        for unit in blocks
        for name, parameter in unit.parameters.items()
        if id(parameter) in linear and owners[id(parameter)] == 1
    }


def _all_too_small(weights: Mapping[str, nn.Parameter], settings: LSPSettings) -> str:
    """Where a fraction ``dim``, given or found by ``"auto"``, leaves every weight fewer columns than ``nnz``."""
    name = max(weights, key=lambda name: min(weights[name].shape))
    least, dim, nnz = min(weights[name].shape), settings.dim, settings.nnz
    columns = int(least * float(dim))
    ways = [f"nnz={columns}"] * (columns > 0) + [f"dim={nnz} (an integer)"] * (nnz <= least) or ["nnz=1, dim=1"]
    return (
        f"`dim={dim}` of min(m, n)={least}, the largest of the linear weights (`{name}`), is {columns} columns, fewer "
        f"than `nnz={nnz}`; pass {' or '.join(ways)}, or use `full_offload`"
    )


def _check_rule(rule: Rule) -> None:
    """AdamW's decay acts on the weight; what adds the weight to the gradient does not fit into the subspace."""
    if not rule.decoupled:
        raise ValueError(
            f"method `lsp` cannot project `{rule.name}`: it steps `torch.optim.AdamW` (or `Adam` with "
            "`decoupled_weight_decay=True`). Return AdamW from `configure_optimizers`, or use `full_offload`"
        )


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
