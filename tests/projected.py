"""Method ``lsp`` without an engine: dense projectors, torch's AdamW on a d x d parameter, updates applied at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_offload.methods.base import Clip
from lightning_offload.methods.lsp import LSP, LSPSettings
from lightning_offload.methods.projections import seed_for
from lightning_offload.numerics.fitting import fit, pca
from lightning_offload.numerics.projector import Projector, columns_of, draw_block, draw_sparse
from tests.helpers import VOCAB, Run, adamw


def settings_of(**changes: Any) -> LSPSettings:
    """Small enough for the nets of ``helpers``, with refits; nothing left to be resolved."""
    small = {"min_numel": 0, "nnz": 3, "dim": 9, "accumulate": "device", "seed": 5, "fit_steps": 6, "others": "adamw"}
    return LSPSettings(**{**small, "refit_every": 2, "bias_threshold": 0.0, **changes})


def lsp(**changes: Any) -> LSP:
    return LSP(settings_of(**changes))


def projected_names(net: nn.Module) -> list[str]:
    """What lsp claims of a ``helpers.Net``."""
    linear = (f"{name}.weight" for name, part in net.named_modules() if isinstance(part, nn.Linear))
    return [n for n in linear if n.startswith("blocks.") and net.get_parameter(n).requires_grad]


def assert_projected(run: Run, before: nn.Module, *, steps: int, exactly: bool = True) -> None:
    """Deltas came up, for every projected weight in every step, and changed it."""
    assert run.engine is not None
    assert run.engine.own is not None
    names, ledger = projected_names(before), run.engine.lanes.ledger
    assert [t.name for t in run.engine.own.trained] == names != []
    homes = run.engine.own._home.values()
    per_step = sum(home.wire.nbytes for home in homes)
    assert per_step == sum(home.pair.left.dim**2 * home.trained.parameter.element_size() for home in homes)
    moved = ledger.moved("h2d", "deltas")
    assert moved == per_step * steps if exactly else 0 < moved <= per_step * steps
    assert ledger.moved("d2h", "compressed gradients") >= moved
    for name in names:
        assert not torch.equal(run.weights[name].float(), before.get_parameter(name).float()), name


def dense(p: Projector) -> Tensor:
    return torch.zeros(p.rows, p.dim, dtype=torch.float64).scatter(1, columns_of(p), p.values.double())


def relative_bias(p: Tensor, q: Tensor, gradient: Tensor) -> float:
    g = gradient.double()
    return float((p @ p.T @ g @ q @ q.T - g).norm() / g.norm())


def carried(m: Tensor, v: Tensor, a: Tensor, c: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Moments in the new subspace, written out: A = P_new^T P_old, C = Q_old^T Q_new."""
    weights = torch.einsum("ij,kl->ikjl", a.square(), c.T.square())  # of V[j, l] in V'[i, k]
    if rule == "transfer":
        rows, columns = a.square(), c.square().T
        rows = torch.where(rows.sum(1, keepdim=True) > 1e-12, rows / rows.sum(1, keepdim=True), 1 / rows.shape[1])
        columns = torch.where(
            columns.sum(1, keepdim=True) > 1e-12, columns / columns.sum(1, keepdim=True), 1 / columns.shape[1]
        )
        weights = torch.einsum("ij,kl->ikjl", rows, columns)
    return a @ m @ c, torch.einsum("ikjl,jl->ik", weights, v)


@dataclass(eq=False)
class Shared:
    """The projectors of a matrix, or of several."""

    key: str
    shape: tuple[int, int]
    settings: LSPSettings
    dtype: torch.dtype
    members: list[str] = field(default_factory=list)
    offset: int = 0
    draws: int = 0
    fitted: bool = False
    refits: int = 0
    next: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.drawn = self.draw()
        self.pair = self.dense(*self.drawn)
        self.fitted = self.settings.projector == "block"

    def draw(self) -> tuple[Projector, Projector]:
        generator = torch.Generator().manual_seed(seed_for(self.settings.seed, self.key, self.draws))
        self.draws += 1
        make: Callable[..., Projector] = draw_sparse if self.settings.projector == "learned" else draw_block
        dim = self.settings.dim_of(*self.shape)
        left, right = (make(rows, dim, self.settings.nnz, generator=generator) for rows in self.shape)
        return left, right

    def fit(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        s, (left, right) = self.settings, self.drawn
        if s.projector == "pca":
            left, right = pca(gradient, left.dim, s.nnz)
        if s.projector == "learned":
            left, right = fit(
                left,
                right,
                gradient,
                steps=s.fit_steps,
                lr=s.fit_lr,
                weight_decay=s.fit_beta,
                reached=lambda relative: float(relative) <= s.bias_threshold,
            )
        return self.dense(left, right)

    def dense(self, left: Projector, right: Projector) -> tuple[Tensor, Tensor]:
        return dense(left.to(dtype=self.dtype)), dense(right.to(dtype=self.dtype))

    def is_due(self, name: str, step: int) -> bool:
        if self.settings.refit_every == math.inf or step <= self.settings.refit_every:
            return False
        looks, rest = divmod(step - 1 - self.offset, int(self.settings.refit_every))
        return rest == 0 and self.members[looks % len(self.members)] == name


@dataclass(eq=False)
class Matrix:
    """A projected weight and its AdamW."""

    weight: nn.Parameter
    shared: Shared
    group: int
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        dim = self.shared.drawn[0].dim
        self.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(dim, dim))], weight_decay=0.0)

    @property
    def subspace(self) -> nn.Parameter:
        parameter: nn.Parameter = self.optimizer.param_groups[0]["params"][0]
        return parameter

    @property
    def state(self) -> dict[str, Tensor]:
        return self.optimizer.state[self.subspace]

    @torch.no_grad()
    def step(self, gradient: Tensor, group: dict[str, Any]) -> None:
        self.optimizer.param_groups[0].update({key: group[key] for key in ("lr", "betas", "eps")})
        self.subspace.zero_().grad = gradient
        self.optimizer.step()
        p, q = self.shared.pair
        scale = math.sqrt(p.shape[0] * q.shape[0]) / float(p.norm() * q.norm())
        update = p @ self.subspace.double() @ q.T * (scale if self.shared.settings.scale == "match" else 1.0)
        self.weight.copy_((1 - group["lr"] * group["weight_decay"]) * self.weight.double() + update)

    def carry_over(self, new: tuple[Tensor, Tensor]) -> None:
        rule = self.shared.settings.moments
        anew = rule == "reset" or (rule, self.shared.settings.projector) == ("transfer", "block")
        if anew or not self.state:
            self.optimizer.state.clear()
            return
        (p, q), m, v = self.shared.pair, self.state["exp_avg"], self.state["exp_avg_sq"]
        mean, square = carried(m.double(), v.double(), new[0].T @ p, q.T @ new[1], rule)
        m.copy_(mean)
        v.copy_(square)


class Dense:
    """All projected weights of a net."""

    def __init__(
        self,
        module: nn.Module,
        settings: LSPSettings,
        groups: list[dict[str, Any]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.settings, self.step = settings, 1
        self.shared: dict[str, Shared] = {}
        self.matrices: dict[str, Matrix] = {}
        self.sums: dict[str, Tensor] = {}
        names = projected_names(module)
        blocks = sorted({name.split(".")[1] for name in names})
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        for name in names:
            weight = module.get_parameter(name)
            below, (m, n) = name.split(".", 2)[2], weight.shape
            key = name if settings.share == "matrix" else f".{below} {m} x {n}"
            shared = self.shared.setdefault(key, Shared(key, (m, n), settings, dtype))
            shared.members.append(name)
            self.matrices[name] = Matrix(weight, shared, group_of[id(weight)])
        for place, shared in enumerate(self.shared.values()):
            turns, own = len(self.shared), place
            if settings.share == "matrix":
                turns, own = len(blocks), blocks.index(shared.key.split(".")[1])
            if settings.refit_every != math.inf:
                shared.offset = own * int(settings.refit_every) // turns

    def take(self, name: str, gradient: Tensor, *, last: bool) -> None:
        shared = self.matrices[name].shared
        if not shared.fitted:
            shared.pair, shared.fitted = shared.fit(gradient), True
        p, q = shared.pair
        compressed = (p.T @ gradient.double() @ q).float()
        if last and shared.is_due(name, self.step):
            threshold = self.settings.bias_threshold
            if threshold == 0 or relative_bias(p, q, gradient) > threshold:
                shared.drawn = shared.draw()
                shared.next, shared.refits = shared.fit(gradient), shared.refits + 1
        self.sums[name] = self.sums[name] + compressed if name in self.sums else compressed

    def update(self, groups: list[dict[str, Any]]) -> None:
        for name, total in self.sums.items():
            self.matrices[name].step(total, groups[self.matrices[name].group])
        for shared in self.shared.values():
            if shared.next is not None:
                for name in shared.members:
                    self.matrices[name].carry_over(shared.next)
                shared.pair, shared.next = shared.next, None
        self.sums.clear()
        self.step += 1


def dense_train(
    net: nn.Module,
    settings: LSPSettings,
    *,
    steps: int = 5,
    micro_batches: int = 1,
    clip: Clip | None = None,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    schedule: bool = False,
    spoil: Callable[[nn.Module, int], None] | None = None,
) -> tuple[Run, Dense]:
    """The loop of ``helpers.train``, in fp32."""
    module = copy.deepcopy(net)
    if settings.others == "frozen":
        for name, p in module.named_parameters():
            p.requires_grad_(name in projected_names(net))
    optimizer = make_optimizer(module)
    projected = Dense(module, settings, optimizer.param_groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if schedule else None
    run, arrived = Run([], {}, optimizer=optimizer, module=module), list[str]()
    for name, matrix in projected.matrices.items():
        matrix.weight.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    torch.manual_seed(7)
    data = torch.Generator().manual_seed(11)
    for step in range(steps):
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            loss = module.loss(torch.randint(0, VOCAB, (2, 6), generator=data)) / micro_batches
            run.losses.append(loss.item())
            arrived.clear()
            loss.backward()
            if spoil is not None:
                arrived.clear()  # gradients stay visible, and are taken in the order of the model
                spoil(module, step)
            waiting = [n for n, m in projected.matrices.items() if last and m.weight.grad is not None]
            for name in dict.fromkeys([*arrived, *waiting]):
                matrix = projected.matrices[name]
                leaves = settings.accumulate == "host" or (settings.form == "activations" and matrix.shared.fitted)
                if last or leaves:
                    projected.take(name, matrix.weight.grad, last=last)
                    matrix.weight.grad = None
        _clip(projected, module, clip)
        projected.update(optimizer.param_groups)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    run.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return run, projected


@torch.no_grad()
def _clip(projected: Dense, module: nn.Module, clip: Clip | None) -> None:
    gradients = [*projected.sums.values(), *(p.grad for p in module.parameters() if p.grad is not None)]
    if clip is not None and clip.algorithm == "norm":
        total = torch.stack([g.norm() for g in gradients]).norm()
        for gradient in gradients:
            gradient.mul_(min(1.0, clip.value / (float(total) + 1e-6)))
    elif clip is not None:
        for gradient in gradients:
            gradient.clamp_(-clip.value, clip.value)
