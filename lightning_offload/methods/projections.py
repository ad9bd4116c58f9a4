"""The projectors of a matrix (or of all that share them): drawn, judged by their bias, fitted anew."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_offload.errors import CheckpointError
from lightning_offload.memory.lanes import Event, Lanes
from lightning_offload.numerics.fitting import bias, fit, pca
from lightning_offload.numerics.projector import Projector, draw_block, draw_sparse, matching_scale

if TYPE_CHECKING:
    from lightning_offload.methods.lsp import LSPSettings


@dataclass(frozen=True, eq=False)
class Pair:
    """P and Q of a weight, what an update is multiplied by, and how many have been drawn up to these."""

    left: Projector
    right: Projector
    scale: Tensor | None = None
    draws: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.left.nbytes + self.right.nbytes

    @property
    def tensors(self) -> list[Tensor]:
        """Values and orders, flat."""
        held = (self.left.values, self.left.order, self.right.values, self.right.order)
        return [tensor.reshape(-1) for tensor in held if tensor is not None]


class HostPairs:
    """Copies of an old and a new pair in host memory, where moments are carried over.

    Args:
        key: Of the projections.
        like: A pair of the same kind.
        lanes: Where it runs.
    """

    def __init__(self, key: str, like: Pair, lanes: Lanes) -> None:
        self._lanes, self._like = lanes, like
        tensors = [tensor for _ in range(2) for tensor in like.tensors]
        self.tensors = [
            lanes.buffers(f"{key}.projectors.{at}", [tensor.numel()], tensor.dtype, "pinned")[0]
            for at, tensor in enumerate(tensors)
        ]
        self.readers: list[Event] = []

    @staticmethod
    def nbytes_for(shape: tuple[int, int], itemsize: int, settings: LSPSettings) -> int:
        """Bytes for a weight of this shape."""
        index = [2 + 2 * (rows > torch.iinfo(torch.int16).max) for rows in shape]
        sparse = settings.projector == "learned"
        return 2 * sum(
            rows * settings.nnz * (itemsize + sparse * wide) for rows, wide in zip(shape, index, strict=True)
        )

    @property
    def both(self) -> list[Pair]:
        """Old and new, for host functions."""
        half = len(self.tensors) // 2
        return [self._view(self.tensors[:half]), self._view(self.tensors[half:])]

    def send_down(self, old: Pair, new: Pair) -> Event:
        """Returns when they will have arrived."""
        return self._lanes.copy(
            self.tensors,
            [*old.tensors, *new.tensors],
            "d2h",
            after=[self._lanes.compute(), *self.readers],
            tag="projectors",
        )

    def _view(self, tensors: Sequence[Tensor]) -> Pair:
        found = iter(tensors)
        sides = []
        for like in (self._like.left, self._like.right):
            values = next(found).view(like.values.shape)
            order = None if like.order is None else next(found).view(like.order.shape)
            sides.append(Projector(values, like.dim, order))
        left, right = sides
        return Pair(left, right)


class Projections:
    """See the module docstring.

    Attributes:
        key: Name of the matrix, or of what shares them; decides, with the seed, what is drawn.
        pair: The newest.
        judged: The same, from a refit to the end of its step: the others are still in use.
        fitted: Whether the newest has seen a gradient, as far as its kind needs one.
        members: The matrices that use it, in the order in which they lend their gradients to a refit.
        offset: Steps by which its refits come after others'.
        on_host: See ``HostPairs``; ``None`` where moments are not carried over.

    Args:
        key: See above.
        shape: (m, n).
        dim: d.
        settings: Of the method, resolved.
        lanes: Where they are used.
        dtype: Of their values.
    """

    def __init__(
        self, key: str, shape: tuple[int, int], dim: int, settings: LSPSettings, lanes: Lanes, dtype: torch.dtype
    ) -> None:
        self.offset = 0
        self.members: list[str] = []
        self.key, self._shape, self._dim, self._settings, self._lanes = key, shape, dim, settings, lanes
        self._dtype = dtype
        self.fitted = settings.projector == "block"
        self.pair = self._draw(0)
        self.judged: Pair | None = None
        self.on_host = HostPairs(key, self.pair, lanes) if settings.transfers else None

    def is_due(self, name: str, step: int) -> bool:
        """Whether this step looks at the projectors, and does so with the gradient of ``name``."""
        every = self._settings.refit_every
        if not isinstance(every, int) or step <= every:
            return False
        looks, rest = divmod(step - 1 - self.offset, every)
        return rest == 0 and self.members[looks % len(self.members)] == name

    def first_fit(self, gradient: Tensor) -> None:
        """Fit what has never been used to the first gradient (m, n)."""
        self.pair, self.fitted = self._fit(self.pair, gradient), True

    def bias(self, gradient: Tensor) -> float:
        """Relative bias of the newest pair; waits for the device. Infinite where nothing is real."""
        return self._lanes.read(bias(self.pair.left, self.pair.right, gradient).relative, math.inf)

    def replaced(self, gradient: Tensor) -> Pair:
        """A new pair, drawn afresh and fitted to ``gradient`` (m, n)."""
        if self._settings.projector == "pca":  # starts from nothing
            drawn = replace(self.pair, draws=self.pair.draws + 1)
        else:
            drawn = self._draw(self.pair.draws)
        self.pair = drawn if self._settings.projector == "block" else self._fit(drawn, gradient)
        return self.pair

    def restore(self, left: Projector, right: Projector, draws: int, *, kind: str, fitted: bool) -> Pair:
        """Go on with a checkpoint's.

        Raises:
            CheckpointError: They are of another kind.
        """
        if kind != self._settings.projector:
            raise CheckpointError(
                f"The checkpoint has projected `{self.members[0]}` with projector={kind!r}, this run has "
                f"projector={self._settings.projector!r}: continue with the setting of the checkpoint, or load the "
                "weights alone (`load_from_checkpoint`)."
            )
        self.pair, self.fitted = self._made(left, right, draws), fitted
        return self.pair

    def _draw(self, before: int) -> Pair:
        """Random: all that ``block`` needs, the start of ``learned``, a place holder for ``pca``."""
        draw = partial(draw_sparse, values="signs") if self._settings.projector == "learned" else draw_block
        generator = torch.Generator().manual_seed(seed_for(self._settings.seed, self.key, before))
        left, right = (draw(rows, self._dim, self._settings.nnz, generator=generator) for rows in self._shape)
        return self._made(left, right, before + 1)

    def _fit(self, drawn: Pair, gradient: Tensor) -> Pair:
        settings = self._settings
        if settings.projector == "pca":
            return self._made(*pca(gradient, self._dim, settings.nnz), drawn.draws)
        fitted = fit(
            drawn.left,
            drawn.right,
            gradient,
            steps=settings.fit_steps,
            lr=settings.fit_lr,
            weight_decay=settings.fit_beta,
            reached=lambda relative: self._lanes.read(relative, math.inf) <= settings.bias_threshold,
        )
        # a gradient that is not finite must not spoil the steps that follow
        finite = torch.stack([side.values.isfinite().all() for side in fitted]).all()
        sides = zip(fitted, (drawn.left, drawn.right), strict=True)
        left, right = (replace(to, values=torch.where(finite, to.values, start.values)) for to, start in sides)
        return self._made(left, right, drawn.draws)

    def _made(self, left: Projector, right: Projector, draws: int) -> Pair:
        left, right = (side.to(self._lanes.device, self._dtype) for side in (left, right))
        return Pair(left, right, matching_scale(left, right) if self._settings.scale == "match" else None, draws)


def seed_for(seed: int | None, key: str, count: int) -> int:
    """A seed that depends on these alone."""
    digest = hashlib.blake2b(f"{seed}/{key}/{count}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
