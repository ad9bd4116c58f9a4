"""Keys or values of one adapter in host memory, row by row: what host functions do with them, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_offload.methods.base import Trained, Verdict
from lightning_offload.methods.homes import CHUNK_NUMEL, clamp_, clip_
from lightning_offload.methods.part import CAST_BYTES
from lightning_offload.methods.rules import Rule
from lightning_offload.numerics.native import Kernels
from lightning_offload.numerics.native.kernels import VECTOR
from lightning_offload.numerics.row_adam import History, catch_up_, deferred_, lazy_, missed_steps

RowSteps = Literal["auto", "dense", "deferred", "lazy"]

MOSTLY = 0.1
"""Touched share of a table from which on stepping all of it is cheaper than gathering rows (``auto``).

With a gap to catch up, torch's operations step 1,600 of 6,144 rows of 4,096 in 2.8 times the time of the whole table.
"""

MOSTLY_FUSED = 0.3
"""The same with compiled kernels: at 0.26 rows take 0.7 of the time of the whole table, at 0.5 1.2 (as above)."""


@dataclass(eq=False, kw_only=True)
class Rows:
    """A table of r rows; all tensors are (r, d).

    Attributes:
        name: Of the parameter.
        master: fp32, the truth; the parameter's ``data``.
        shadow: What goes up: the master itself, or rounded to the dtype that the device computes in.
        kernels: Compiled, or none.
    """

    name: str
    master: Tensor
    shadow: Tensor
    kernels: Kernels | None = None

    @property
    def rounded(self) -> bool:
        """Whether the device is shown rounded rows."""
        return self.shadow is not self.master

    def gather(self, rows: Tensor, out: Tensor) -> None:
        """Copy rows as the device is to see them to ``out``, (U, d)."""
        torch.index_select(self.shadow, 0, rows, out=out)

    def catch_up(self, rows: Tensor | None = None) -> None:
        """These rows, or all, have seen every step."""

    def show(self, rows: Tensor | None = None) -> None:
        """What goes up is what the master says: in these rows, or in all."""
        if not self.rounded:
            return
        if rows is None:
            self.shadow.copy_(self.master)
            return
        for part in _row_chunks(len(rows), self.master.shape[1]):
            at = rows[part]
            self.shadow.index_copy_(0, at, self.master.index_select(0, at).to(self.shadow.dtype))


@dataclass(eq=False, kw_only=True)
class RowTable(Rows):
    """Rows that are trained.

    Attributes:
        trained: The parameter.
        states: Optimizer state by torch's name.
        total: fp32 sum of the gradients since the last step; zero outside ``touched``.
        steps: How rows are stepped.
        step: The table's own step count, fp32 scalar.
        touched: Rows with a gradient since the last step, (r,) bool.
        last: The step that each row saw last, (r,) int64, while there is a history.
        history: Of the steps that rows may have missed, begun by the first step of some rows, ended by a catch-up of
            all; so nothing of it is in a checkpoint, which follows one.
        eps: AdamW's, in that history.
    """

    trained: Trained
    states: dict[str, Tensor]
    total: Tensor
    steps: RowSteps
    step: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32, device="cpu"))
    touched: Tensor = field(init=False)
    last: Tensor = field(init=False)
    history: History | None = None
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Nothing has been touched."""
        self.total.zero_()
        self.touched = torch.zeros(len(self.master), dtype=torch.bool, device="cpu")
        self.last = torch.zeros(len(self.master), dtype=torch.int64, device="cpu")

    @staticmethod
    def bytes_per_element(shown: torch.dtype, rule: Rule) -> int:
        """Host bytes: master, state, sum, and what is shown where that is rounded."""
        return 4 + 4 * len(rule.states) + 4 + (shown.itemsize if shown != torch.float32 else 0)

    @property
    def step_bytes(self) -> int:
        """Host memory traffic of one element's step: sum read and zeroed, master and states read and written."""
        states = 8 + 8 + 8 * len(self.states)
        return states + CAST_BYTES if self.rounded and self._fused is None else states

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Add the gradient rows, (U, d), that are not zero."""
        if self.kernels is not None:
            self.kernels.add_rows_(self.total, self.touched, rows, gradient)
            return
        present = gradient.any(1)
        if not bool(present.all()):
            rows, gradient = rows[present], gradient[present]
        for part in _row_chunks(len(rows), self.master.shape[1]):
            at = rows[part]
            self.total.index_copy_(0, at, self.total.index_select(0, at).add_(gradient[part]))
        self.touched[rows] = True

    def catch_up(self, rows: Tensor | None = None) -> None:
        """See ``Rows.catch_up``."""
        if self.history is None:
            return
        asked = torch.arange(len(self.master), device="cpu") if rows is None else rows
        behind = asked[self.last[asked] < self.history.step]
        if len(behind) and self._fused is not None:
            missed = missed_steps(self.last[behind], self.history, self.eps, torch.float32)
            self._fused.step_rows_(*self._tensors, shown=self._shown, rows=behind, missed=missed, way="none")
            self.last[behind] = self.history.step
        elif len(behind):
            catch_up_(*self._tensors, behind, last=self.last, history=self.history, eps=self.eps)
            self.show(behind)
        if rows is None:
            self.history = None

    def make_step(self, rule: Rule, group: Mapping[str, Any], verdict: Verdict) -> None:
        """The optimizer step, or none where the verdict says so; sums are zero afterwards."""
        rows = self.touched.nonzero().flatten()
        if not verdict.skip:
            coefficient = 1.0
            if self._fused is None:
                clip_([self.total], verdict)
            else:
                coefficient = clamp_([self.total], verdict)
            most = (MOSTLY if self._fused is None else MOSTLY_FUSED) * len(self.master)
            if self.steps == "lazy":
                self._step_lazily(rule, rows, group, coefficient)
            elif self.steps == "deferred" or (self.steps == "auto" and len(rows) <= most):
                self._step_rows(rule, rows, group, coefficient)
            else:
                self._step_all(rule, group, coefficient)
        if verdict.skip or self._fused is None:
            self.forget(rows)

    def forget(self, rows: Tensor | None = None) -> None:
        """Sums are zero again."""
        rows = self.touched.nonzero().flatten() if rows is None else rows
        self.total.index_fill_(0, rows, 0.0)
        self.touched.zero_()

    # Stepping.

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.master, self.states["exp_avg"], self.states["exp_avg_sq"]

    @property
    def _fused(self) -> Kernels | None:
        """Kernels that take a row at a time."""
        return self.kernels if self.master.shape[1] % VECTOR == 0 and len(self.states) == 2 else None

    @property
    def _shown(self) -> Tensor | None:
        return self.shadow if self.rounded else None

    def _step_all(self, rule: Rule, group: Mapping[str, Any], coefficient: float) -> None:
        self.catch_up()
        if self._fused is not None:
            self.step += 1
            self._step_fused(rule, None, group, coefficient, way="adam")
            return
        states = {name: [tensor] for name, tensor in self.states.items()}
        rule.step_([self.master], [self.total], states, [self.step], group)
        self.show()

    def _step_fused(
        self,
        rule: Rule,
        rows: Tensor | None,
        group: Mapping[str, Any],
        coefficient: float,
        *,
        way: str,
        missed: Sequence[Tensor] = (),
    ) -> None:
        """These rows, or all: caught up, stepped, shown and their sums cleared in one pass."""
        assert self._fused is not None
        self._fused.step_rows_(
            *self._tensors,
            total=self.total,
            touched=self.touched,
            shown=self._shown,
            rows=rows,
            missed=missed,
            way=way,
            step=float(self.step),
            coefficient=coefficient,
            **rule.hyper(group),
        )

    def _step_rows(self, rule: Rule, rows: Tensor, group: Mapping[str, Any], coefficient: float) -> None:
        if self.history is not None and (self.history.betas, self.eps) != (_betas(group), group["eps"]):
            self.catch_up()  # steps that were missed had the old ones
        if self.history is None:
            done = int(self.step)
            self.history = History(_betas(group), done, torch.zeros(3, done + 1, dtype=torch.float64, device="cpu"))
            self.last.fill_(done)
        self.eps = group["eps"]
        self.step += 1
        if self._fused is not None:
            missed = missed_steps(self.last[rows], self.history, self.eps, torch.float32)
            self._step_fused(rule, rows, group, coefficient, way="adam", missed=missed)
            self.last[rows] = self.history.step + 1
        else:
            deferred_(
                *self._tensors,
                rows,
                self.total.index_select(0, rows),
                last=self.last,
                history=self.history,
                lr=float(group["lr"]),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            self.show(rows)
        self.history.advance(lr=float(group["lr"]), weight_decay=group["weight_decay"])

    def _step_lazily(self, rule: Rule, rows: Tensor, group: Mapping[str, Any], coefficient: float) -> None:
        self.step += 1
        if self._fused is not None:
            self._step_fused(rule, rows, group, coefficient, way="lazy")
            return
        grads = self.total.index_select(0, rows)
        lazy_(
            *self._tensors,
            rows,
            grads,
            step=int(self.step),
            lr=float(group["lr"]),
            betas=_betas(group),
            eps=group["eps"],
        )
        self.show(rows)


def _betas(group: Mapping[str, Any]) -> tuple[float, float]:
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2)


def _row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows of about ``CHUNK_NUMEL`` elements: gathered rows stay in cache."""
    count = max(1, CHUNK_NUMEL // width)
    for start in range(0, rows, count):
        yield slice(start, min(start + count, rows))
