"""What the compiled loops compute: each is an operator of torch's, so that dispatch modes see what is read and written.

Dtypes are fp32, bf16 and fp16; tensors are contiguous, on the CPU. Every call is one parallel region on at most the
caller's ``torch.get_num_threads()``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_offload.numerics.noise import Distribution, Draw
    from lightning_offload.numerics.zeroth import Copy, Rounding, Update

TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
DISTRIBUTIONS = {"popcount": 0, "gaussian": 1, "rademacher": 2}
WAYS = {"none": 0, "adam": 1, "lazy": 2}
VECTOR = 8
"""Rows of a multiple of so many elements have no part that torch's kernel would round otherwise."""
THREAD_NUMEL = 1 << 14
"""Elements that are worth a thread."""

_LIBRARY = torch.library.Library("lightning_offload", "FRAGMENT")
_SCHEMAS = {
    "adam_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] shown, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool decoupled, float coefficient) -> ()",
    "add_rows_": "(Tensor(a!) total, Tensor(b!) touched, Tensor rows, Tensor gradient) -> ()",
    "step_rows_": "(Tensor(a!) p, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? total, Tensor(e!)? touched, "
    "Tensor(f!)? shown, Tensor? rows, Tensor[] missed, str way, float step, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool decoupled, float coefficient) -> ()",
    "advance_": "(Tensor(a!) weight, Tensor(b!)[] outs, int[] draws, float[] numbers, float[] scales, "
    "str distribution, bool stochastic) -> ()",
    "norm": "(Tensor x) -> Tensor",
    "perturb": "(Tensor weight, Tensor(b!)[] outs, int[] draws, float[] numbers, float[] scales, "
    "str distribution, bool stochastic) -> ()",
}


class Kernels:
    """The loops of one library.

    Args:
        library: Compiled from ``kernels.cpp``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        _register(library)

    def adam_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        shown: Sequence[Tensor],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        coefficient: float = 1.0,
    ) -> None:
        """One step of AdamW or Adam, with the bits of ``numerics.adam.adam_`` between torch's casts.

        Args:
            params: Weights, fp32; empty: of zeros that nobody keeps, which leaves a delta in ``shown``.
            grads: Gradients, each of the weight's numel and all of one dtype; left as they are.
            exp_avgs: First moments, fp32.
            exp_avg_sqs: Second moments, fp32.
            steps: Step counts, fp32 scalars; advanced here.
            shown: Rounded copies of the new weights, to nearest, all of one dtype; may be ``grads``, or empty.
            lr: Learning rate.
            beta1: Decay of the first moment.
            beta2: Decay of the second moment.
            eps: Beside the square root.
            weight_decay: Zero with deltas.
            decoupled: AdamW's decay (True) or Adam's.
            coefficient: Clips: multiplies gradients, which are then rounded to their dtype, as torch does.
        """
        torch.ops.lightning_offload.adam_(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(steps),
            list(shown),
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            decoupled,
            coefficient,
        )

    def add_rows_(self, total: Tensor, touched: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """``total[rows[i]] += gradient[i]`` in fp32, and a mark on rows whose gradient is not zero.

        Args:
            total: (r, d) fp32.
            touched: (r,) bool.
            rows: (U,) int64, unique.
            gradient: (U, d).
        """
        torch.ops.lightning_offload.add_rows_(total, touched, rows, gradient)

    def step_rows_(
        self,
        p: Tensor,
        m: Tensor,
        v: Tensor,
        *,
        total: Tensor | None = None,
        touched: Tensor | None = None,
        shown: Tensor | None = None,
        rows: Tensor | None = None,
        missed: Sequence[Tensor] = (),
        way: str,
        step: float = 1,
        lr: float = 0.0,
        beta1: float = 0.0,
        beta2: float = 0.0,
        eps: float = 0.0,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        coefficient: float = 1.0,
    ) -> None:
        """Catches rows up, steps them, clears their gradients and shows them, with one pass over each row.

        ``"adam"`` has the bits of the dense step. Catching up and ``"lazy"`` differ from ``numerics.row_adam`` by an
        ulp of the divisor: square roots are correctly rounded here, torch's large ones are not.

        Args:
            p: Weights, (r, d) fp32, d a multiple of ``VECTOR``.
            m: First moments.
            v: Second moments.
            total: Gradients, (r, d) fp32, zero where ``touched`` says no; cleared.
            touched: (r,) bool; cleared.
            shown: Rounded copy, (r, d).
            rows: (U,) int64, unique; None for all.
            missed: Of each of ``rows`` what `catch_up_` applies, fp32: decay of the weight, shift, eps, decays of
                both moments (of the first 1: nothing was missed).
            way: ``"none"``, ``"adam"``, or ``"lazy"`` (SparseAdam).
            step: This step's number.
            lr: Learning rate.
            beta1: Decay of the first moment.
            beta2: Decay of the second moment.
            eps: Of the step.
            weight_decay: Of the step.
            decoupled: AdamW's decay or Adam's.
            coefficient: Clips.
        """
        torch.ops.lightning_offload.step_rows_(
            p,
            m,
            v,
            total,
            touched,
            shown,
            rows,
            list(missed),
            way,
            step,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            decoupled,
            coefficient,
        )

    def advance_(
        self,
        weight: Tensor,
        updates: Sequence[Update],
        draw: Draw | None,
        copies: Sequence[Copy],
        distribution: Distribution,
        rounding: Rounding,
    ) -> None:
        """``numerics.zeroth.advance_``, with its bits; Gaussian noise within 8 ulp of 1 of torch's logarithm and waves.

        Args:
            weight: See there.
            updates: See there.
            draw: See there.
            copies: See there.
            distribution: See there.
            rounding: See there.
        """
        drawn = [update.draw for update in updates] + [draw for draw in (draw,) if draw is not None]
        operators = torch.ops.lightning_offload
        (operators.advance_ if updates else operators.perturb)(  # which only reads the weight
            weight,
            [copy.out for copy in copies],
            [word for one in drawn for word in (*one.key, one.parameter, one.direction)],
            [number for u in updates for number in (u.coefficient, u.lr, u.weight_decay)],
            [copy.scale for copy in copies],
            distribution,
            rounding == "stochastic",
        )

    def norm(self, x: Tensor) -> float:
        """2-norm, summed in fp64; not finite where an element is not.

        Args:
            x: Any shape.
        """
        return float(torch.ops.lightning_offload.norm(x))


_int, _double, _float = ctypes.c_int64, ctypes.c_double, ctypes.c_float
_registered: list[ctypes.CDLL] = []


def _register(library: ctypes.CDLL) -> None:
    """Operators are the process's: the first library has them."""
    if _registered:
        return
    library.offload_square_sum.restype = ctypes.c_double  # AttributeError: the library is another
    for name, schema in _SCHEMAS.items():
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, _IMPLEMENTATIONS[name], "CPU")
        _LIBRARY.impl(name, _nothing_real, "Meta")
    _registered.append(library)


def _nothing_real(*args: Any) -> Tensor | None:
    """For tensors without memory; a norm is the one operator of one argument."""
    return torch.empty((), dtype=torch.float64, device="meta") if len(args) == 1 else None


def _adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    shown: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    coefficient: float,
) -> None:
    sizes = [m.numel() for m in exp_avgs]
    _check_like(exp_avgs, params or exp_avgs, exp_avg_sqs, grads, shown or exp_avgs)
    _check_dtype(torch.float32, params, exp_avgs, exp_avg_sqs)
    gradient_type, shown_type, count = _type_of(grads), _type_of(shown), len(sizes)
    if count == 0:
        return
    torch._foreach_add_(steps, 1)
    _registered[0].offload_adam(
        _int(count),
        (_int * count)(*sizes),
        _pointers(params),
        _pointers(exp_avgs),
        _pointers(exp_avg_sqs),
        _pointers(grads),
        _pointers(shown),
        (_double * count)(*(float(step) for step in steps)),
        gradient_type,
        shown_type,
        *(_double(number) for number in (lr, beta1, beta2, eps, weight_decay)),
        int(decoupled),
        _float(coefficient),
        _threads(sum(sizes)),
    )


def _add_rows_(total: Tensor, touched: Tensor, rows: Tensor, gradient: Tensor) -> None:
    _check_rows(rows, total, touched)
    assert gradient.is_contiguous(), f"strides {gradient.stride()}: the kernels count elements in memory order"
    assert gradient.shape == (len(rows), total.shape[1]), f"{tuple(gradient.shape)} for {len(rows)} rows"
    _check_dtype(torch.float32, [total])
    _registered[0].offload_add_rows(
        _pointer(total),
        _pointer(touched),
        _pointer(rows),
        _int(len(rows)),
        _int(total.shape[1]),
        _pointer(gradient),
        TYPES[gradient.dtype],
        _threads(gradient.numel()),
    )


def _step_rows_(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    total: Tensor | None,
    touched: Tensor | None,
    shown: Tensor | None,
    rows: Tensor | None,
    missed: list[Tensor],
    way: str,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    coefficient: float,
) -> None:
    count, width = len(p) if rows is None else len(rows), p.shape[1]
    assert width % VECTOR == 0, f"rows of {width} elements, no multiple of {VECTOR}"
    if rows is not None or touched is not None:
        _check_rows(rows, p, touched)
    assert way == "none" or (total is not None and touched is not None), "gradients of no row"
    _check_like([p], [m], [v], [p if total is None else total], [p if shown is None else shown])
    _check_dtype(torch.float32, [p, m, v, *missed, *([total] if total is not None else [])])
    assert len(missed) in (0, 5), f"{len(missed)} columns of missed steps"
    assert all(column.shape == (count,) and column.is_contiguous() for column in missed), "missed steps of other rows"
    _registered[0].offload_step_rows(
        _pointer(p),
        _pointer(m),
        _pointer(v),
        _pointer(total),
        _pointer(touched),
        _pointer(shown),
        0 if shown is None else TYPES[shown.dtype],
        _pointer(rows),
        _int(count),
        _int(width),
        _pointers(missed),
        WAYS[way],
        *(_double(number) for number in (step, lr, beta1, beta2, eps, weight_decay)),
        int(decoupled),
        _float(coefficient),
        _threads(count * width),
    )


def _norm(x: Tensor) -> Tensor:
    _check_like([x])
    threads, count = _threads(x.numel()), _int(x.numel())
    total: float = _registered[0].offload_square_sum(_pointer(x), TYPES[x.dtype], count, threads)
    return torch.tensor(math.sqrt(total), dtype=torch.float64, device="cpu")


def _advance_(
    weight: Tensor,
    outs: list[Tensor],
    draws: list[int],
    numbers: list[float],
    scales: list[float],
    distribution: str,
    stochastic: bool,
) -> None:
    updates, copies = len(numbers) // 3, len(outs)
    _check_like([weight] * (copies + 1), [weight, *outs])
    words = (ctypes.c_uint32 * len(draws))(*draws)
    shown = (ctypes.c_uint32 * 4)(*draws[-4:])
    _registered[0].offload_advance(
        _pointer(weight),
        TYPES[weight.dtype],
        _int(weight.numel()),
        DISTRIBUTIONS[distribution],
        _int(updates),
        words,
        *((_float * updates)(*numbers[at::3]) for at in range(3)),
        int(stochastic),
        shown,
        _int(copies),
        (_float * copies)(*scales),
        _pointers(outs),
        (ctypes.c_int32 * copies)(*(TYPES[out.dtype] for out in outs)),
        _threads(weight.numel()),
    )


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "adam_": _adam_,
    "add_rows_": _add_rows_,
    "step_rows_": _step_rows_,
    "advance_": _advance_,
    "perturb": _advance_,
    "norm": _norm,
}


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _pointers(tensors: Sequence[Tensor]) -> Any:
    """An array of addresses; of nothing null."""
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors)) if tensors else None


def _type_of(tensors: Sequence[Tensor]) -> int:
    assert len({tensor.dtype for tensor in tensors}) <= 1, "several dtypes in one call"
    return TYPES[tensors[0].dtype] if tensors else 0


def _threads(numel: int) -> int:
    return max(1, min(torch.get_num_threads(), numel // THREAD_NUMEL))


def _check_like(reference: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    for tensors in (reference, *others):
        for tensor, like in zip(tensors, reference, strict=True):
            assert tensor.is_contiguous(), f"strides {tensor.stride()}: the kernels count elements in memory order"
            assert tensor.numel() == like.numel(), f"{tensor.numel()} elements beside {like.numel()}"


def _check_dtype(dtype: torch.dtype, *tensors: Sequence[Tensor]) -> None:
    for tensor in (tensor for some in tensors for tensor in some):
        assert tensor.dtype == dtype, f"{tensor.dtype} where the kernels have {dtype}"


def _check_rows(rows: Tensor | None, table: Tensor, touched: Tensor | None) -> None:
    if touched is not None:
        assert touched.shape == table.shape[:1], f"{tuple(touched.shape)} marks for {len(table)} rows"
        assert touched.dtype == torch.bool, f"marks are bool, not {touched.dtype}"
    assert all(t.is_contiguous() for t in (rows, table, touched) if t is not None), "rows that are not contiguous"
    if rows is not None and rows.numel():
        assert rows.dtype == torch.int64, f"places of rows are int64, not {rows.dtype}"
        least, most = (int(place) for place in rows.aminmax())
        if least < 0 or most >= len(table):
            raise IndexError(f"row {least if least < 0 else most} of a table of {len(table)}")
