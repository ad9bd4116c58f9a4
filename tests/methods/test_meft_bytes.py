"""The traffic and the memory of rows in host memory, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_offload.methods import row_source
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.row_source import TURNS
from lightning_offload.numerics.adapter import Picks
from tests.helpers import WIDTH, pairwise, row_id
from tests.meft import (
    PLACEMENTS,
    FFNNet,
    adapted,
    adapters_in,
    make_engine,
    micro_batch,
    picked,
    rows_of,
    sizes,
    step,
    tokens_of,
)

DTYPES = {"fp32": DTypes(), "bf16": DTypes.of("bf16-true")}
DEPTH, STEPS, TOKENS = 3, 4, 12
FACTORS: dict[str, list[Any]] = {
    "placement": PLACEMENTS,
    "top_k": [3, 6, 12],
    "gate": ["logit", "none"],
    "scope": ["token", "union"],
    "dtypes": list(DTYPES),
    "micro_batches": [1, 3],
    "row_optimizer": ["dense", "deferred", "auto"],
}


def down_bytes(placement: str, picks: Picks, *, gate: str, prunes: bool, item: int) -> int:
    """What a call's selection and gradients take to the host."""
    gradients = 2 * len(picks.rows) * WIDTH * item
    tokens, experts = picks.experts.shape
    if placement == "host" and prunes:
        return gradients + tokens * WIDTH * item + 4 * tokens * experts * (2 if gate == "logit" else 1)
    return gradients + sizes({})["width"]


def up_bytes(placement: str, picks: Picks, *, prunes: bool, item: int) -> int:
    """What a call's rows and their numbers take to the device."""
    used, tables = len(picks.rows), {"host": 2, "keys": 1, "device": 0}[placement]
    places = picks.places.numel() if placement == "host" and prunes else 0
    return tables * used * WIDTH * item + 4 * (used + places)


def moved(engine: Engine, lane: str) -> int:
    """Without the three numbers and the norms that a step is decided by."""
    ledger = engine.lanes.ledger
    return ledger.moved(lane) - ledger.moved(lane, "verdict")


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=row_id)
def test_every_byte_of_both_lanes(row: dict[str, Any]) -> None:
    placement, top_k, gate, scope, dtypes, micro_batches, row_optimizer = row.values()
    if placement == "device" and row_optimizer == "deferred":
        row_optimizer = "auto"
    of_adapters = {"top_k": top_k, "gate": gate, "scope": scope}
    item, prunes = (4 if dtypes == "fp32" else 2), top_k < 12
    net = adapted(**of_adapters)
    engine = make_engine(net, placement, dtypes=DTYPES[dtypes], row_optimizer=row_optimizer, **of_adapters)
    table = sizes({})["width"] * WIDTH * item
    stays = {"host": 0, "keys": 1, "device": 2}[placement] * table * DEPTH
    assert moved(engine, "h2d") == stays  # to begin with
    with picked(net) as seen:
        for seed in range(STEPS):
            step(engine, *(tokens_of(seed + 10 * micro) for micro in range(micro_batches)))
    engine.flush()
    assert len(seen) == DEPTH * STEPS * micro_batches
    assert len({len(picks.rows) for picks in seen}) > 1
    assert moved(engine, "d2h") == sum(down_bytes(placement, p, gate=gate, prunes=prunes, item=item) for p in seen)
    up = sum(up_bytes(placement, picks, prunes=prunes, item=item) for picks in seen)
    assert moved(engine, "h2d") == up + stays * (1 + STEPS)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_evaluation_moves_no_gradients_and_padding_moves_nothing(placement: str) -> None:
    net = adapted()
    engine = make_engine(net, placement)
    before = moved(engine, "h2d"), moved(engine, "d2h")
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    with picked(net) as seen, torch.no_grad():
        net.loss(tokens_of(0), mask)
    assert [len(picks.experts) for picks in seen] == [TOKENS - 2] * DEPTH
    down = [down_bytes(placement, p, gate="logit", prunes=True, item=4) - 8 * len(p.rows) * WIDTH for p in seen]
    assert moved(engine, "d2h") - before[1] == sum(down)
    assert moved(engine, "h2d") - before[0] == sum(up_bytes(placement, p, prunes=True, item=4) for p in seen)


def test_the_traffic_of_the_papers_example_with_keys_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """U/r = 0.259 and 32 micro-batches per update: at most 0.41 of all adapter parameters per micro-batch."""
    micro_batches, width, hidden = 32, 1000, 128
    of_adapters = {"width": width, "experts": 10, "active_experts": 1, "top_k": 7, "gate": "none"}
    net = adapted(FFNNet(depth=2, width=hidden), **of_adapters)
    engine = make_engine(net, "keys", dtypes=DTYPES["bf16"], **of_adapters)
    monkeypatch.setattr(row_source, "select", lambda *args, **kwargs: torch.arange(259).view(37, 7))
    before = moved(engine, "h2d")
    with picked(net) as seen:
        step(engine, *(tokens_of(seed, batch=1, length=37) for seed in range(micro_batches)))
    engine.flush()
    assert {len(picks.rows) for picks in seen} == {259}
    parameters = 2 * width * hidden * len(adapters_in(net))
    both_ways = (engine.lanes.ledger.moved("h2d") - before + engine.lanes.ledger.moved("d2h")) / 2  # bf16: elements
    assert 0.40 < both_ways / micro_batches / parameters <= 0.41


@pytest.mark.parametrize("dtypes", list(DTYPES))
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("top_k", [6, 12])
def test_host_memory(top_k: int, placement: str, dtypes: str) -> None:
    net = adapted(top_k=top_k)
    engine = make_engine(net, placement, dtypes=DTYPES[dtypes], top_k=top_k)
    for seed in range(2):
        step(engine, tokens_of(seed))
    own, width = rows_of(engine), sizes({})["width"]
    shadow = 0 if dtypes == "fp32" else 2
    item = shadow or 4
    rows = 2 * DEPTH * width * WIDTH
    assert engine.host_bytes(engine.trained) == rows * (12 + 4 + shadow)
    assert {name: nbytes for name, nbytes in own.holdings.items() if "way" not in name} == {
        "masters": 4 * rows,
        "optimizer state": 8 * rows,
        "sums over micro-batches": 4 * rows,
    } | ({"rows as they go up": shadow * rows} if shadow else {})
    fetched = {"host": 2, "keys": 1, "device": 0}[placement]
    staging = (fetched + TURNS) * width * WIDTH * item + 4 * width  # rows up, gradients down, numbers
    if placement == "host" and top_k == 6:
        staging += TOKENS * (WIDTH * item + 4 * 3 + 4 * 3 + 4 * top_k)  # tokens, experts, logits; places
    assert own.holdings["rows and tokens on their way"] == staging
    report = engine.lanes.memory.report()
    of_steps = sum(usage.requested_bytes for name, usage in report.by_name.items() if name.startswith("verdict"))
    flags = DEPTH * width
    assert report.requested_bytes == engine.host_bytes(engine.trained) + staging + flags + of_steps


def test_the_device_holds_what_is_used_however_wide_the_adapter() -> None:
    """The same rows of 256 and of 4,096: the same bytes beside them."""
    held = []
    for width in (256, 4096):
        of_adapters = {"width": width, "experts": 8, "active_experts": 2, "top_k": 4}
        net = adapted(**of_adapters)
        engine = make_engine(_four_of_each(net, width // 8), "host", **of_adapters)
        with picked(net) as seen:
            for seed in range(3):
                step(engine, tokens_of(seed))
        held.append((engine.device_bytes, [len(picks.rows) for picks in seen]))
    assert held[0] == held[1]
    assert held[0][0] > 0


def _four_of_each(net: nn.Module, group: int) -> nn.Module:
    """The same rows are worth something in each width, four of each of the 8 experts."""
    at = (torch.arange(8)[:, None] * group + torch.arange(4)).flatten()
    for index, adapter in enumerate(adapters_in(net)):
        random = torch.Generator().manual_seed(index)
        with torch.no_grad():
            adapter.router.normal_(0, 0.3, generator=random)
            for table in (adapter.keys, adapter.values):
                table.zero_()
                table[at] = torch.randn(len(at), WIDTH, generator=random)
    return net


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_device_memory(placement: str) -> None:
    net = adapted()
    engine = make_engine(net, placement)
    for seed in range(2):
        with picked(net) as seen:
            micro_batch(engine, tokens_of(seed))
    own, table = rows_of(engine), 4 * sizes({})["width"] * WIDTH
    stays = {"host": 0, "keys": 1, "device": 2}[placement]
    assert own.resident_bytes == stays * DEPTH * table
    used = sum(len(picks.rows) for picks in seen)
    up = own.device_bytes - own.resident_bytes
    rows = 4 * (2 - stays) * WIDTH * used + 4 * used + (4 * 6 * TOKENS * DEPTH if placement == "host" else 0)
    assert rows <= up <= 1.4 * rows
    assert engine.device_bytes == own.device_bytes + engine.resident.nbytes
    engine.close()
    assert own.device_bytes == 0
