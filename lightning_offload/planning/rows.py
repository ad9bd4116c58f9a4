"""What a step of ``meft`` waits for, and what the plan says of the rows that it moves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from lightning_offload.memory.ledger import Total
from lightning_offload.methods.dryrun import Timing
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.homes import weight_dtype
from lightning_offload.methods.meft import adapters_of
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.sparse_adapter import SparseAdapter
from lightning_offload.words import gigabytes, seconds

_STALLS = {
    "select": "the host, which steps, chooses and gathers rows",
    "gather": "the host, which steps and gathers rows",
    "rows": "the link up, by which rows come",
    "rows that stay": "the link up, by which rows come",
}
"""By the kind of what compute waits for."""


def bottleneck(timing: Timing) -> str:
    """What compute waits for longest, in words."""
    stalls: defaultdict[str, float] = defaultdict(float)
    for span in timing.spans:
        if span.lane == "stall":
            stalls[span.kind] += span.end_s - span.start_s
    longest_s, kind = max((spent_s, kind) for kind, spent_s in stalls.items())
    return f"{_STALLS.get(kind, kind)}: {seconds(longest_s)} of {seconds(sum(stalls.values()))} that the device waits"


def union_share(timing: Timing, engine: Engine, own: RowOptimizer, micro_batches: int) -> float:
    """The part of a layer's rows that a micro-batch is taken to use; at least a token's."""
    return timing.kinds["d2h", "row gradients"].bytes / _dense_bytes(engine, own, micro_batches)


def notes(timing: Timing, engine: Engine, own: RowOptimizer, micro_batches: int, tokens: int) -> Iterator[str]:
    """Which union is reckoned with, what crosses the link, and what is not reckoned.

    Args:
        timing: What came out.
        engine: That ran dry.
        own: Its rows.
        micro_batches: Per step.
        tokens: Of each.
    """
    dense = _dense_bytes(engine, own, micro_batches)
    share = union_share(timing, engine, own, micro_batches)
    yield (
        f"reckons with a union of {100 * share:.0f} % of a layer's rows (`union`); `OffloadStats` logs the real one, "
        "which depends on the data, as offload/union"
    )
    moved = sum(timing.lanes.get(lane, Total()).bytes for lane in ("d2h", "h2d"))
    yield f"the link carries {gigabytes(moved)} a step, {50 * moved / dense:.0f} % of what a dense adapter would move"
    if ("host", "select") in timing.kinds:
        gflop = 2e-9 * tokens * sum(_candidate_numel(adapter) for adapter in adapters_of(engine.module))
        yield (
            f"the host chooses rows by products of {gflop:,.1f} GFLOP a micro-batch, taken to last as long as reading "
            "the keys does; a slow CPU takes longer"
        )


def _dense_bytes(engine: Engine, own: RowOptimizer, micro_batches: int) -> int:
    """Of the gradients of all rows."""
    weights = [t.parameter for t in own.trained]
    return micro_batches * sum(p.numel() * weight_dtype(p, engine.dtypes).itemsize for p in weights)


def _candidate_numel(adapter: SparseAdapter) -> int:
    """Of the keys among which a token's are chosen."""
    settings = adapter.settings
    return settings.active_experts * settings.width // settings.experts * adapter.keys.shape[1]
