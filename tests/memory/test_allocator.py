"""The replay of torch's caching allocator: known answers, and a second one written without any care for speed."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_offload.memory.allocator import MIB, Reserved, _Expandable, _Segments, replay

pytestmark = pytest.mark.timeout(60)

KIB = 1024
Allocations = list[tuple[int, int]]


def taken(*sizes: float) -> Allocations:
    """One after the other, numbered from 1, in MiB."""
    return [(number, int(size * MIB)) for number, size in enumerate(sizes, 1)]


def given_back(*numbers: int) -> Allocations:
    return [(number, 0) for number in numbers]


def again(*pieces: tuple[int, float]) -> Allocations:
    return [(number, int(size * MIB)) for number, size in pieces]


ALL_BUT_ONE_KIB = 2 * MIB - KIB


@pytest.mark.parametrize(
    ("allocations", "reserved_mib", "used_bytes"),
    [
        ([], 0, 0),
        ([(1, 1)], 2, 512),
        ([(1, 512), (2, 513)], 2, 3 * 512),
        (taken(1), 2, MIB),
        ([(1, MIB + 1)], 20, MIB + 512),  # no longer small
        (taken(1, 1), 2, 2 * MIB),
        (taken(1, 0.75, 0.5), 4, 9 * MIB // 4),  # what is left of the first segment is too small
        (taken(9.5, 9.5), 20, 19 * MIB + MIB),  # a rest of 1 MiB stays with its piece
        (taken(9.5, 9), 20, 37 * MIB // 2),  # a larger one does not
        (taken(9.5, 9, 1.25), 20, 20 * MIB),
        (taken(9.5, 9.5, 1.25), 40, 85 * MIB // 4),
        (taken(10), 10, 10 * MIB),  # a segment of its own
        (taken(11.25), 12, 12 * MIB),  # in whole 2 MiB, and the rest is not split off
        (taken(11, 33, 0.25), 48, 185 * MIB // 4),
        (taken(40) + given_back(1) + again((2, 40)), 40, 40 * MIB),  # is used again
        (taken(40) + given_back(1) + again((2, 30), (3, 10)), 40, 40 * MIB),  # and split
        (taken(40) + given_back(1) + again((2, 42)), 82, 42 * MIB),  # too small: a second one
        (taken(0.5) + given_back(1) + again((2, 4)), 22, 4 * MIB),  # pools do not share
        (taken(12, 10) + given_back(1, 2) + again((3, 10), (4, 12)), 22, 22 * MIB),  # the smallest that fits
        (taken(40) + given_back(1) + again((2, 20), (3, 20)) + given_back(2, 3) + again((4, 40)), 40, 40 * MIB),
        (taken(40) + given_back(1) + again((2, 20), (3, 20)) + given_back(3, 2) + again((4, 40)), 40, 40 * MIB),
        (
            taken(60) + given_back(1) + again((2, 20), (3, 20), (4, 20)) + given_back(2, 4, 3) + again((5, 60)),
            60,
            60 * MIB,
        ),
        (taken(12, 12) + given_back(1, 2) + again((3, 24)), 48, 24 * MIB),  # segments are never merged
        (given_back(7) + taken(10) + given_back(1, 1), 10, 10 * MIB),  # memory from before is not known here
    ],
)
def test_known_answers(allocations: Allocations, reserved_mib: int, used_bytes: int) -> None:
    assert replay(allocations) == Reserved(reserved_mib * MIB, used_bytes, fits=True)


@pytest.mark.parametrize(
    ("allocations", "limit_mib", "peak_mib", "fits"),
    [
        (taken(10, 10), 20, 20, True),
        (taken(10, 10.25), 20, 22, False),
        (taken(20) + given_back(1) + again((2, 22)), 22, 22, True),  # the first is given back
        (taken(20) + given_back(1) + again((2, 22)), 21, 22, False),
        (taken(20) + given_back(1) + again((2, 12), (3, 22)), 40, 42, False),  # it is split: it cannot be
        (taken(20, 0.5) + given_back(1, 2) + again((3, 22)), 22, 22, True),  # of both pools
        (taken(40) + given_back(1) + again((2, 12), (3, 20)) + given_back(2) + again((4, 22)), 50, 62, False),
        (taken(20, 22) + given_back(1, 2) + again((3, 24)), 30, 42, False),  # once too much is too much
    ],
)
def test_what_is_wholly_free_is_given_back_at_a_limit(
    allocations: Allocations, limit_mib: int, peak_mib: int, fits: bool
) -> None:
    result = replay(allocations, limit_mib * MIB)
    assert (result.peak_bytes, result.fits) == (peak_mib * MIB, fits)


def test_a_higher_limit_can_fail_where_a_lower_one_fits() -> None:
    """At 140 MiB the three are given back for the fourth; at 170 MiB they stay, and are pinned by smaller pieces."""
    allocations = taken(40, 40, 40) + given_back(1, 2, 3) + again((4, 42), (5, 21), (6, 21), (7, 21), (8, 20))
    assert replay(allocations, 140 * MIB).fits
    assert not replay(allocations, 170 * MIB).fits
    assert replay(allocations, 182 * MIB).fits


def test_a_number_is_taken_once() -> None:
    with pytest.raises(AssertionError, match="7 is taken twice"):
        replay([(7, 1), (7, 1)])


# Expandable segments.


@pytest.mark.parametrize(
    ("allocations", "reserved_mib", "used_bytes"),
    [
        ([], 0, 0),
        ([(1, 1)], 2, 512),
        (taken(1, 0.75, 0.5), 4, 9 * MIB // 4),
        (taken(1, 0.75, 0.5, 1), 4, 13 * MIB // 4),  # a piece may lie across pages
        (taken(10, 9.5), 20, 39 * MIB // 2),
        (taken(10, 9.5, 1.25), 40, 83 * MIB // 4),
        (taken(9.5, 9.5), 20, 19 * MIB),  # every rest is split off
        (taken(10, 4) + given_back(1) + again((3, 9.5)), 20, 14 * MIB),
        (taken(10, 4) + given_back(1) + again((3, 9.5), (4, 5)), 20, 37 * MIB // 2),
        (taken(41), 60, 41 * MIB),
        (taken(12, 12) + given_back(1, 2) + again((3, 24)), 40, 24 * MIB),
        (taken(40) + given_back(1) + again((2, 42)), 60, 42 * MIB),  # it grows
        (taken(40, 4) + given_back(1) + again((3, 42)), 100, 46 * MIB),  # what is behind a piece cannot
        (taken(0.5) + given_back(1) + again((2, 4)), 22, 4 * MIB),
        # what can grow is taken last, however small it is
        (taken(8, 4, 6) + given_back(1, 3) + again((4, 2), (5, 6), (6, 8)), 20, 20 * MIB),
    ],
)
def test_known_answers_of_expandable_segments(allocations: Allocations, reserved_mib: int, used_bytes: int) -> None:
    assert replay(allocations, expandable=True) == Reserved(reserved_mib * MIB, used_bytes, fits=True)


@pytest.mark.parametrize(
    ("allocations", "limit_mib", "peak_mib", "fits"),
    [
        (taken(20, 20), 40, 40, True),
        (taken(20, 20.25), 40, 60, False),
        (taken(40, 4) + given_back(1) + again((3, 42)), 80, 60, True),  # the two pages before are given back
        (taken(40, 4) + given_back(1) + again((3, 10), (4, 42)), 80, 80, True),  # one of them
        (taken(4) + given_back(1) + again((2, 0.5)), 20, 20, True),
        (taken(4) + again((2, 0.5)), 20, 22, False),
    ],
)
def test_pages_that_are_not_used_are_given_back_at_a_limit(
    allocations: Allocations, limit_mib: int, peak_mib: int, fits: bool
) -> None:
    result = replay(allocations, limit_mib * MIB, expandable=True)
    assert (result.peak_bytes, result.fits) == (peak_mib * MIB, fits)


# Properties.

SIZES = st.one_of(st.integers(1, 3 * MIB), st.integers(1, 40 * MIB), st.sampled_from([512, MIB, 10 * MIB, 20 * MIB]))


@st.composite
def sequences(draw: st.DrawFn) -> Allocations:
    """Pieces that are taken, and given back in any order; some stay."""
    found: Allocations = []
    live: list[int] = []
    for number in range(draw(st.integers(1, 30))):
        if live and draw(st.booleans()):
            found.append((live.pop(draw(st.integers(0, len(live) - 1))), 0))
        else:
            found.append((number, draw(SIZES)))
            live.append(number)
    return found


def live_peak(allocations: Allocations, to: int) -> int:
    """The most that is alive, each piece rounded up to a multiple of ``to``."""
    live: dict[int, int] = {}
    peak = 0
    for number, nbytes in allocations:
        live[number] = -(-nbytes // to) * to
        peak = max(peak, sum(live.values()))
    return peak


@given(sequences(), st.booleans())
def test_reserved_is_no_less_than_used_and_used_no_less_than_alive(allocations: Allocations, expandable: bool) -> None:
    result = replay(allocations, expandable=expandable)
    assert result.fits
    assert result.peak_bytes % (2 * MIB) == 0
    assert result.peak_bytes >= result.allocated_peak_bytes >= live_peak(allocations, 512)
    if expandable:
        assert result.allocated_peak_bytes == live_peak(allocations, 512)


@given(sequences(), st.integers(0, 200), st.booleans())
def test_a_limit_changes_nothing_that_it_does_not_stand_in_the_way_of(
    allocations: Allocations, limit_mib: int, expandable: bool
) -> None:
    free = replay(allocations, expandable=expandable)
    held = replay(allocations, limit_mib * MIB, expandable=expandable)
    if free.peak_bytes <= limit_mib * MIB:
        assert held == free
    if live_peak(allocations, 512) > limit_mib * MIB:
        assert not held.fits
    assert held.fits == (held.peak_bytes <= limit_mib * MIB)


@given(sequences(), st.booleans(), st.sampled_from([None, 0, 60 * MIB]))
def test_no_two_pieces_overlap(allocations: Allocations, expandable: bool, limit: int | None) -> None:
    allocator = (_Expandable if expandable else _Segments)(limit)
    live = {}
    for number, nbytes in allocations:
        if nbytes:
            size = -(-nbytes // 512) * 512
            live[number] = allocator.take(size)
            assert live[number].size >= size
        else:
            allocator.put(live.pop(number))
        for one, other in combinations(live.values(), 2):
            apart = one.start + one.size <= other.start or other.start + other.size <= one.start
            same_pool = (one.size > MIB) == (other.size > MIB)
            assert apart or (same_pool or not expandable) <= (one.segment != other.segment)


@given(sequences(), st.booleans())
def test_when_all_is_given_back_a_limit_leaves_nothing_else(allocations: Allocations, expandable: bool) -> None:
    live = {number for number, nbytes in allocations if nbytes} - {
        number for number, nbytes in allocations if not nbytes
    }
    empty = allocations + given_back(*live)
    whole = (replay(empty, expandable=expandable).peak_bytes // (20 * MIB) + 1) * 20 * MIB
    assert replay([*empty, (1000, whole)], whole, expandable=expandable) == Reserved(whole, whole, fits=True)


def slow_replay(allocations: Allocations) -> int:
    """Segments as lists of [size, owner], searched from end to end."""
    segments: dict[bool, list[list[list[int]]]] = {True: [], False: []}
    peak = 0
    for number, nbytes in allocations:
        if not nbytes:
            for pieces in [*segments[True], *segments[False]]:
                for piece in pieces:
                    if piece[1] == number:
                        piece[1] = -1
                for at in range(len(pieces) - 2, -1, -1):
                    if pieces[at][1] == pieces[at + 1][1] == -1:
                        pieces[at : at + 2] = [[pieces[at][0] + pieces[at + 1][0], -1]]
            continue
        size = (nbytes + 511) // 512 * 512
        is_small = size <= MIB
        own = segments[is_small]
        fitting = [(p[0], s, a) for s, ps in enumerate(own) for a, p in enumerate(ps) if p[1] == -1 and p[0] >= size]
        if not fitting:
            whole = (
                2 * MIB if is_small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            )
            own.append([[whole, -1]])
            fitting = [(whole, len(own) - 1, 0)]
        found, segment, at = min(fitting, key=lambda fit: (fit[0], fit[1], fit[2]))
        splits = found > size if is_small else found - size > MIB
        own[segment][at : at + 1] = [[size, number], [found - size, -1]] if splits else [[found, number]]
        peak = max(peak, sum(piece[0] for own in segments.values() for pieces in own for piece in pieces))
    return peak


@given(sequences())
def test_reserved_equals_a_slow_replay(allocations: Allocations) -> None:
    assert replay(allocations).peak_bytes == slow_replay(allocations)
