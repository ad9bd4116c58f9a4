from __future__ import annotations

import pytest
import torch

from lightning_offload.errors import RaceError
from lightning_offload.memory.arena import HostMemory
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import InlineLanes
from lightning_offload.memory.slots import Loans, Ring, Staging
from tests.streams import thread_lanes


def test_slots_are_handed_out_in_turn_and_never_allocated_again() -> None:
    ring = Ring(InlineLanes(HostMemory(pin=False)), "gradients", 5, torch.bfloat16, 3)
    addresses = [ring.take().buffer.data_ptr() for _ in range(9)]
    assert len(set(addresses)) == 3
    assert addresses[:3] * 3 == addresses
    assert ring.nbytes == 5 * 2 * 3


def fill_and_send(lanes: CheckedLanes, *, returns: bool) -> None:
    """Three sends through a ring of two; ``returns``: whether the reader of a slot is made known."""
    ring = Ring(lanes, "gradients", 4, torch.float32, 2)
    homes = lanes.buffers("wire", [4] * 3, torch.float32, "pinned")
    with lanes.checking():
        for home in homes:
            slot = ring.take()
            slot.buffer.fill_(1)
            sent = lanes.copy([home], [slot.buffer], "d2h", after=[lanes.compute()], tag="gradients")
            slot.free = sent if returns else None


def test_compute_waits_for_the_last_reader_before_it_fills_a_slot_again() -> None:
    fill_and_send(CheckedLanes(HostMemory(pin=False)), returns=True)


def test_a_slot_whose_reader_is_not_made_known_is_a_race() -> None:
    with pytest.raises(RaceError, match=r"`gradients\[0\]`"):
        fill_and_send(CheckedLanes(HostMemory(pin=False)), returns=False)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(5))
def test_a_ring_is_enough_for_any_number_of_transfers(seed: int) -> None:
    with thread_lanes(seed) as lanes:
        ring = Ring(lanes, "gradients", 4, torch.float32, 2)
        homes = lanes.buffers("wire", [4] * 20, torch.float32, "pinned")
        for index, home in enumerate(homes):
            slot = ring.take()
            slot.buffer.fill_(index)
            slot.free = lanes.copy([home], [slot.buffer], "d2h", after=[lanes.compute()])
        lanes.synchronize()
        assert [home.tolist() for home in homes] == [[float(index)] * 4 for index in range(20)]


def test_staging_takes_turns_and_at_least_doubles_what_is_too_small() -> None:
    staging = Staging(InlineLanes(HostMemory(pin=False)), "rows", torch.bfloat16, 2, numel=10)
    first, second = staging.take(3), staging.take(10)
    assert first is not second
    assert staging.take(10) is first
    assert staging.take(11).buffer.numel() == 20
    assert staging.take(50).buffer.numel() == 50
    assert staging.take(20).buffer.numel() == 20
    assert staging.nbytes == 2 * (20 + 50)


def test_loans_are_given_back_together_and_the_smallest_that_fits_is_lent() -> None:
    lanes = CheckedLanes(HostMemory(pin=False))
    loans = Loans(lanes, "rows", torch.float32)
    small, large = loans.lend(8, 1000), loans.lend(40, 1000)
    assert (small.numel(), large.numel()) == (10, 50)  # room for a larger need of the same borrower
    assert loans.lend(8, 9).numel() == 9  # never more than there can be
    loans.give_back()
    assert loans.lend(10, 1000) is small
    assert loans.lend(10, 1000) is large
    assert loans.lend(60, 1000).numel() == 75  # instead of the third, which is too small
    assert loans.nbytes == 4 * (10 + 50 + 75)
    loans.close()
    assert loans.nbytes == 0
