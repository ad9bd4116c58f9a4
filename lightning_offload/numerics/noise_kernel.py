"""Updates and perturbed copies on a GPU by one Triton kernel, with no memory beside the results.

Popcount and Rademacher noise and all roundings have the bits of the torch form (`zeroth`), Gaussian noise is within
ulps of it. The kernels are defined in a function, which puts them and `tl` among this module's globals: Triton's
interpreter looks nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_offload.numerics.noise import LANES, ROUNDING_DOMAIN, Distribution, Draw

if TYPE_CHECKING:
    from lightning_offload.numerics.zeroth import Copy, Rounding, Update

BLOCK = 1024
"""Elements per program: a multiple of all `LANES`, times 8."""
MOST_UPDATES = 8
"""Per launch: each number of them is compiled once."""


def launch(
    weight: Tensor,
    updates: Sequence[Update],
    draw: Draw | None,
    copies: Sequence[Copy],
    distribution: Distribution,
    rounding: Rounding,
) -> None:
    """`zeroth.advance_`: see there.

    Args:
        weight: contiguous, on CUDA; on the CPU in Triton's interpreter.
        updates: to apply, in order; every eight of them read and write the weight once.
        draw: which ``z`` perturbs the copies.
        copies: at most two.
        distribution: of every ``z``.
        rounding: of the updates.
    """
    assert len(copies) <= 2, f"{len(copies)} copies; the kernel writes at most two"
    while weight.numel() and len(updates) > MOST_UPDATES:
        _launch(weight, updates[:MOST_UPDATES], None, (), distribution, rounding)
        updates = updates[MOST_UPDATES:]
    if weight.numel() and (updates or copies):
        _launch(weight, updates, draw, copies, distribution, rounding)


def _launch(
    weight: Tensor,
    updates: Sequence[Update],
    draw: Draw | None,
    copies: Sequence[Copy],
    distribution: Distribution,
    rounding: Rounding,
) -> None:
    drawn = [update.draw for update in updates] + [draw] * bool(copies)
    used = [each for each in drawn if each is not None]
    outs = [copy.out.detach() for copy in copies]
    grid = (-(-weight.numel() // BLOCK),)
    with torch.cuda.device_of(weight):
        _kernel()[grid](
            weight.detach(),
            *(outs + [weight.detach()] * (2 - len(outs))),
            weight.numel(),
            tuple(_unspecialized(word) for each in used for word in (*each.key, each.parameter, each.direction)),
            tuple(float(x) for update in updates for x in (update.coefficient, update.lr, update.weight_decay)),
            tuple(float(copy.scale) for copy in copies),
            updates=len(updates),
            copies=len(copies),
            distribution=distribution,
            lanes=LANES[distribution],
            stochastic=rounding == "stochastic" and weight.dtype != torch.float32,
            domain=ROUNDING_DOMAIN,
            block=BLOCK,
            enable_fp_fusion=False,  # every product is rounded by itself, as torch rounds it
        )


def _unspecialized(word: int) -> int:
    """Twice the 32-bit word, in 64 bits and odd: Triton compiles ints in tuples anew by width, for 1 and for 16 n."""
    return 1 << 40 | word << 1 | 1


@cache
def _kernel() -> Any:
    """Defines the kernels; `tl` and the smaller ones become globals of this module."""
    global tl, _set_bits, _normals, _word, _philox, _noise, _bits, _stochastic, _narrow, _advance
    import triton
    import triton.language as tl

    @triton.jit
    def _set_bits(x):
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24).to(tl.float32)

    @triton.jit
    def _normals(u, v):
        radius = tl.sqrt(tl.log((u.to(tl.float32) + 1.0) * 2.3283064365386963e-10) * -2.0)
        angle = v.to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
        return radius * tl.cos(angle), radius * tl.sin(angle)

    @triton.jit
    def _word(word):
        return tl.cast(word >> 1, tl.uint32)

    @triton.jit
    def _philox(words, i: tl.constexpr, call, domain: tl.constexpr):
        key = tl.cast(_word(words[4 * i + 1]), tl.uint64) << 32 | _word(words[4 * i])
        zero = tl.zeros_like(call).to(tl.uint32)
        c2, c3 = zero + _word(words[4 * i + 2]), zero + (_word(words[4 * i + 3]) | domain)
        return tl.philox(key, call.to(tl.uint32), (call >> 32).to(tl.uint32), c2, c3)

    @triton.jit
    def _noise(words, i: tl.constexpr, first, distribution: tl.constexpr, lanes: tl.constexpr, block: tl.constexpr):
        call = first // lanes + tl.arange(0, block // lanes)
        a, b, c, d = _philox(words, i, call, 0)
        if distribution == "popcount":
            z = tl.interleave(_set_bits(a) + _set_bits(b), _set_bits(c) + _set_bits(d))
            z = (z - 32.0) * 0.25
        elif distribution == "gaussian":
            z0, z1 = _normals(a, b)
            z2, z3 = _normals(c, d)
            z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
        else:
            signs = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
            bit = (signs[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
            z = tl.reshape(bit, (block,)).to(tl.float32) * 2.0 - 1.0
        return z

    @triton.jit
    def _bits(words, i: tl.constexpr, first, domain: tl.constexpr, block: tl.constexpr):
        call = first // 8 + tl.arange(0, block // 8)
        a, b, c, d = _philox(words, i, call, domain)
        pairs = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        return tl.interleave(pairs & 0xFFFF, pairs >> 16)

    @triton.jit
    def _stochastic(values, bits, half: tl.constexpr):
        whole = values.to(tl.uint32, bitcast=True)
        if half:
            rounded = ((whole + (bits >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
            size = tl.abs(values) * 16777216.0
            lower = tl.floor(size)
            up = (bits.to(tl.float32) + 0.5) < (size - lower) * 65536.0
            small = (lower + up.to(tl.float32)) * 5.9604644775390625e-08
            small = (small.to(tl.uint32, bitcast=True) | (whole & 0x80000000)).to(tl.float32, bitcast=True)
            rounded = tl.where(tl.abs(values) < 6.103515625e-05, small, rounded)
        else:
            rounded = ((whole + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(values != values, values, rounded)

    @triton.jit
    def _narrow(values, stored: tl.constexpr):
        if stored == tl.bfloat16:  # by hand: the interpreter cuts off where hardware rounds to nearest
            whole = values.to(tl.uint32, bitcast=True)
            nearest = ((whole + 0x7FFF + ((whole >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
            values = tl.where(values != values, values, nearest)
        return values.to(stored)

    @triton.jit
    def _advance(
        weight,
        plus,
        minus,
        numel,
        words,
        numbers,
        scales,
        updates: tl.constexpr,
        copies: tl.constexpr,
        distribution: tl.constexpr,
        lanes: tl.constexpr,
        stochastic: tl.constexpr,
        domain: tl.constexpr,
        block: tl.constexpr,
    ):
        first = tl.program_id(0).to(tl.int64) * block
        at = first + tl.arange(0, block)
        inside = at < numel
        stored: tl.constexpr = weight.dtype.element_ty
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(updates):
            z = _noise(words, i, first, distribution, lanes, block)
            change = z * numbers[3 * i]
            change = tl.where(numbers[3 * i + 2] == 0.0, change, change + w * numbers[3 * i + 2])
            w = w - change * numbers[3 * i + 1]
            if stochastic:
                bits = _bits(words, i, first, domain, block)
                w = _stochastic(w, bits, stored == tl.float16)
            w = _narrow(w, stored).to(tl.float32)
        if updates > 0:
            tl.store(weight + at, w.to(stored), mask=inside)
        if copies > 0:
            z = _noise(words, updates, first, distribution, lanes, block)
            tl.store(plus + at, _narrow(z * scales[0] + w, plus.dtype.element_ty), mask=inside)
            if copies > 1:
                tl.store(minus + at, _narrow(z * scales[1] + w, minus.dtype.element_ty), mask=inside)

    return _advance
