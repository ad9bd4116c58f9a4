"""The traffic and the memory of zo2, to the byte."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

from lightning_offload.memory.arena import aligned
from lightning_offload.memory.budget import GIB
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.streaming import Berth
from lightning_offload.methods.zeroth import ZerothEngine
from tests.helpers import Net, pairwise, row_id
from tests.methods.test_zo2_independence import Kept
from tests.zeroth import assert_equal, built, by_engine, by_oracle, make_engine, token_batches

PAGE = mmap.PAGESIZE


def stored_bytes(berths: list[Berth]) -> int:
    return sum(leaf.parameter.numel() * leaf.rest.element_size() for berth in berths for leaf in berth.leaves)


def trained_bytes(berths: list[Berth]) -> int:
    return sum(leaf.parameter.numel() * leaf.rest.element_size() for berth in berths for leaf in berth.trained)


def moved(engine: ZerothEngine) -> tuple[int, int]:
    return engine.lanes.ledger.moved("h2d", "weights"), engine.lanes.ledger.moved("d2h", "weights back")


FACTORS: dict[str, list[Any]] = {
    "settings": [
        {},
        {"slots": 4},
        {"slots": 4, "prefetch": 2},
        {"directions": 3},
        {"noise": "mezo"},
        {"resident": ["blocks.2"]},
    ],
    "every": [1, 2, 4],
    "micro_batches": [1, 3],
    "frozen": [False, True],
}


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=row_id)
def test_each_micro_batch_moves_what_is_streamed_once(row: dict[str, Any]) -> None:
    settings, every, micro_batches, frozen = row.values()
    net, steps = Net(depth=6, tied=True, frozen=frozen), 6
    wire = {} if settings.get("noise") == "mezo" else {"compute": torch.float32, "wire": torch.float16}
    engine = make_engine(net, dtypes=DTypes(**wire), write_back_every=every, **settings)
    blocks = [berth for berth in engine.streaming.berths if berth.unit.is_block and not berth.resident]
    assert blocks == engine.streaming.streamed
    assert len(blocks) == 6 - ("resident" in settings)
    once, down = stored_bytes(blocks), trained_bytes(blocks)
    ahead = stored_bytes(blocks[: settings.get("prefetch", 1)])
    for step in range(steps):
        for micro in range(micro_batches):
            engine.micro_batch(net.loss, token_batches(1))
            done = step * micro_batches + micro + 1
            # a forward before the first finds the order out; from then on the next one's first units come up ahead
            assert moved(engine) == ((1 + done) * once + ahead, step // every * down)
        engine.step()
    before = moved(engine)[0]
    engine.flush()
    behind = blocks if not frozen else [berth for berth in blocks if berth.trained]
    assert moved(engine)[1] == (steps - 1) // every * down + down  # all are behind by one step at least
    assert stored_bytes(behind) - ahead <= moved(engine)[0] - before <= stored_bytes(behind)
    engine.detach()


def test_units_that_fit_into_the_slots_come_up_once() -> None:
    net = Net(depth=2)
    engine = make_engine(net)
    for _ in range(5):
        engine.micro_batch(net.loss, token_batches(1))
        engine.step()
    once = stored_bytes(engine.streaming.streamed)
    assert moved(engine) == (once, 4 * once)
    engine.detach()


@pytest.mark.parametrize(("fit", "kept"), [(0.5, 0), (1.0, 1), (2.5, 2), (5.0, 5)])
def test_gib_of_residents_keep_the_last_blocks_that_fit(fit: float, kept: int) -> None:
    net, block_bytes = Net(depth=5), sum(p.numel() * 2 for p in Net().blocks[0].parameters())
    dtypes = DTypes(compute=torch.float32, wire=torch.float16)
    engine = make_engine(net, dtypes=dtypes, min_numel=0, resident=fit * block_bytes / GIB)
    assert [berth.unit.name for berth in engine.streaming.streamed] == [f"blocks.{at}" for at in range(5 - kept)]
    engine.detach()


def test_evaluation_brings_nothing_back() -> None:
    net = Net(depth=4)
    engine = make_engine(net)
    engine.micro_batch(net.loss, token_batches(1))
    engine.step()
    engine.flush()
    before = moved(engine)
    with torch.no_grad():
        for _ in range(3):
            net.loss(token_batches(1)[0])
    once = stored_bytes(engine.streaming.streamed)
    up, down = (after - then for after, then in zip(moved(engine), before, strict=True))
    assert down == 0
    assert 2 * once <= up <= 3 * once + once // 4
    engine.detach()


def mapped(numels: list[int], itemsize: int) -> int:
    """One region: each tensor begins at a multiple of 256 bytes, and the whole is full pages."""
    end = 0
    for numel in numels:
        end = aligned(end, 256) + numel * itemsize
    return aligned(end, PAGE)


@pytest.mark.parametrize("wire", [None, torch.float16])
@pytest.mark.parametrize("family", ["opt", "mixtral", "t5", "gpt2"])
def test_host_memory_is_the_weights_and_what_pages_add(family: str, wire: torch.dtype | None) -> None:
    model, _ = built(family, torch.float32, 1)
    engine = make_engine(model, dtypes=DTypes(compute=torch.float32, wire=wire))
    report = engine.lanes.memory.report()
    itemsize = 2 if wire else 4
    streamed = engine.streaming.streamed
    assert report.requested_bytes == stored_bytes(streamed) == engine.streaming.host_bytes
    assert stored_bytes(streamed) == itemsize * sum(berth.unit.numel for berth in streamed) > 0
    wanted = sum(mapped([leaf.parameter.numel() for leaf in berth.leaves], itemsize) for berth in streamed)
    assert report.allocated_bytes == wanted
    engine.detach()


def test_host_memory_of_blocks_of_a_real_size_is_within_one_percent_of_the_weights() -> None:
    net = Net(depth=3, width=256, inner=1024)
    engine = make_engine(net)
    report = engine.lanes.memory.report()
    assert report.requested_bytes > 2**22
    assert report.requested_bytes <= report.allocated_bytes <= 1.01 * report.requested_bytes
    engine.detach()


def packed(numels: list[int], itemsize: int) -> int:
    return sum(aligned(numel * itemsize, 256) for numel in numels)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("slots", [3, 5, 20])
def test_device_memory_is_slots_one_scratch_buffer_and_what_stays(slots: int, frozen: bool) -> None:
    net = Net(depth=6, frozen=frozen)
    engine = make_engine(net, slots=slots, dtypes=DTypes(compute=torch.float32, wire=torch.float16))
    block = [p.numel() for p in net.blocks[0].parameters()]
    stay = [p.numel() for name, p in net.named_parameters() if not name.startswith("blocks")]
    largest = max(packed(block, 4), packed([net.embed.weight.numel()], 4), packed([net.head.weight.numel()], 4))
    wanted = min(slots - 1, 6) * packed(block, 2) + largest + 2 * sum(stay)
    assert engine.device_bytes == wanted
    engine.micro_batch(net.loss, token_batches(1))
    engine.step()
    assert engine.device_bytes == wanted
    engine.detach()
    assert engine.device_bytes == 0  # what stays is fp32 again, and the module's own


def test_a_unit_around_others_has_scratch_buffers_of_its_own_one_for_each_kind_of_forward() -> None:
    net = Kept()
    engine = make_engine(net)
    before = engine.device_bytes
    engine.micro_batch(net.loss, token_batches(1))
    engine.step()
    held = [berth for berth in engine.streaming.berths if berth.own]
    assert {berth.unit.name for berth in held} == {"", "embed"}
    grown = 2 * sum(packed([leaf.parameter.numel() for leaf in berth.leaves], 4) for berth in held)
    assert engine.device_bytes == before + grown
    engine.detach()


def test_mixed_dtypes_of_one_unit() -> None:
    net = Net(depth=4).bfloat16()
    for block in net.blocks:
        block.norm.float()
    engine = make_engine(net)
    streamed = engine.streaming.streamed
    by_dtype = [
        mapped([x.parameter.numel() for x in berth.leaves if x.rest.dtype == dtype], dtype.itemsize)
        for berth in streamed
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert all(by_dtype)
    assert engine.lanes.memory.report().allocated_bytes == sum(by_dtype)
    engine.detach()
    batches = token_batches(4)
    ours = by_engine(net, batches, dtypes=DTypes(rounding="nearest"))
    assert_equal(ours, by_oracle(net, batches, distribution="popcount"))
