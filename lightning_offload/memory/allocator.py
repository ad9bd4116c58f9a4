"""A replay of torch's caching allocator: what a device would have *reserved* for a sequence of allocations.

No constant factor turns live bytes into reserved ones (1.04 to 1.8 over real models), but the rules do: pieces are
rounded to 512 bytes, small ones share segments of 2 MiB, others of 20 MiB or of their own size; the smallest free piece
that fits is taken and split, neighbours are merged, and segments that are wholly free are given back before memory is
said to be short. Source: ``c10/cuda/CUDACachingAllocator.cpp``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1 << 20
_ROUND = 512
_SMALL = MIB
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_OWN_SEGMENT = 10 * MIB


@dataclass(frozen=True)
class Reserved:
    """What the allocator would hold: at most, and whether a limit was ever in the way."""

    peak_bytes: int
    allocated_peak_bytes: int
    fits: bool


@dataclass(eq=False)
class _Piece:
    segment: int
    start: int
    size: int
    free: bool = True
    before: _Piece | None = None
    after: _Piece | None = None


class _Pool:
    """Free pieces of one kind, smallest first."""

    def __init__(self, leftover: int) -> None:
        self._leftover = leftover  # a remainder smaller than this stays with its piece
        self._free: list[tuple[int, int, int, _Piece]] = []

    def take(self, size: int) -> _Piece | None:
        at = bisect_left(self._free, size, key=lambda entry: entry[0])
        if at == len(self._free):
            return None
        piece = self._free.pop(at)[3]
        self._split(piece, size)
        piece.free = False
        return piece

    def put(self, piece: _Piece) -> _Piece:
        """Give a piece back, merged with free neighbours."""
        piece.free = True
        for neighbour in (piece.before, piece.after):
            if neighbour is not None and neighbour.free:
                self.drop(neighbour)
                piece = _merge(*sorted((piece, neighbour), key=lambda p: p.start))
        insort(self._free, _entry(piece), key=lambda entry: entry[:3])
        return piece

    def drop(self, piece: _Piece) -> None:
        self._free.pop(bisect_left(self._free, _entry(piece)[:3], key=lambda entry: entry[:3]))

    def whole(self) -> list[_Piece]:
        """Segments of which nothing is used."""
        return [entry[3] for entry in self._free if entry[3].before is None and entry[3].after is None]

    def _split(self, piece: _Piece, size: int) -> None:
        if piece.size - size < self._leftover:
            return
        rest = _Piece(piece.segment, piece.start + size, piece.size - size, before=piece, after=piece.after)
        if piece.after is not None:
            piece.after.before = rest
        piece.size, piece.after = size, rest
        insort(self._free, _entry(rest), key=lambda entry: entry[:3])


def _entry(piece: _Piece) -> tuple[int, int, int, _Piece]:
    return piece.size, piece.segment, piece.start, piece


def _merge(left: _Piece, right: _Piece) -> _Piece:
    left.size += right.size
    left.after = right.after
    if right.after is not None:
        right.after.before = left
    left.free = True
    return left


def replay(allocations: Iterable[tuple[int, int]], limit_bytes: int | None = None) -> Reserved:
    """Run a sequence of allocations through the allocator.

    Args:
        allocations: (number, bytes) for memory that is taken, (number, 0) when it is given back, in order.
        limit_bytes: What the device has for segments; ``None`` is no limit.

    Returns:
        The most that was reserved (or would have been, where it exceeds the limit), and the most that was in use.
    """
    small, large = _Pool(_ROUND), _Pool(_SMALL + 1)
    taken: dict[int, tuple[_Pool, _Piece]] = {}
    reserved = peak = used = used_peak = segments = 0
    fits = True
    for number, nbytes in allocations:
        if not nbytes:
            if number in taken:
                pool, piece = taken.pop(number)
                used -= piece.size
                pool.put(piece)
            continue
        size = -(-nbytes // _ROUND) * _ROUND
        pool = small if size <= _SMALL else large
        found = pool.take(size)
        if found is None:
            segment = _segment_bytes(size)
            if limit_bytes is not None and reserved + segment > limit_bytes:
                for each in (small, large):
                    for whole in each.whole():
                        each.drop(whole)
                        reserved -= whole.size
                fits = fits and reserved + segment <= limit_bytes
            segments += 1
            reserved += segment
            pool.put(_Piece(segments, 0, segment))
            found = pool.take(size)
            assert found is not None
        taken[number] = pool, found
        used += found.size
        peak, used_peak = max(peak, reserved), max(used_peak, used)
    return Reserved(peak, used_peak, fits)


def _segment_bytes(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
