"""A replay of torch's caching allocator: what a device would have *reserved* for a sequence of allocations.

No constant factor turns live bytes into reserved ones (1.04 to 1.8 over real models), but the rules do: pieces are
rounded to 512 bytes, small ones share segments of 2 MiB, others of 20 MiB or of their own size; the smallest free piece
that fits is taken and split, neighbours are merged, and segments that are wholly free are given back before memory is
said to be short. With expandable segments each pool is one range of addresses, mapped page by page as it is used.
Source: ``c10/cuda/CUDACachingAllocator.cpp``, for one stream and the default settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1 << 20
_ROUND = 512
_SMALL = MIB
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_OWN_SEGMENT = 10 * MIB
_PAGES = _SMALL_SEGMENT, _LARGE_SEGMENT  # of expandable segments, small pool and large
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Reserved:
    """What the allocator would hold.

    Attributes:
        peak_bytes: The most that was reserved, beyond the limit too.
        allocated_peak_bytes: The most that was in use, each piece with its rounding.
        fits: Whether it stayed within the limit. Now and then a lower limit fits where a higher one does not: memory
            that is kept for longer is split among more.
    """

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

    def put(self, piece: _Piece) -> None:
        """Give a piece back, merged with free neighbours."""
        piece.free = True
        for neighbour in (piece.before, piece.after):
            if neighbour is not None and neighbour.free:
                self.drop(neighbour)
                piece = _merge(*sorted((piece, neighbour), key=lambda p: p.start))
        insort(self._free, _entry(piece), key=lambda entry: entry[:3])

    def drop(self, piece: _Piece) -> None:
        """Forget a free piece."""
        self._free.pop(bisect_left(self._free, _entry(piece)[:3], key=lambda entry: entry[:3]))

    def free(self) -> list[_Piece]:
        """What is not used."""
        return [entry[3] for entry in self._free]

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


class _Allocator(ABC):
    """A small and a large pool, and what was reserved for them."""

    def __init__(self, limit_bytes: int | None, small: _Pool, large: _Pool) -> None:
        self.peak_bytes = 0
        self.fits = True
        self._reserved_bytes = 0
        self._limit_bytes = limit_bytes
        self._pools = small, large

    @abstractmethod
    def take(self, size: int) -> _Piece:
        """A piece of ``size`` bytes, which are rounded already."""

    @abstractmethod
    def _release(self) -> int:
        """Give back what is not used; its bytes."""

    def put(self, piece: _Piece) -> None:
        """Give a piece back."""
        self._pool(piece.size).put(piece)

    def _pool(self, size: int) -> _Pool:
        return self._pools[size > _SMALL]

    def _reserve(self, nbytes: int) -> None:
        if self._limit_bytes is not None and self._reserved_bytes + nbytes > self._limit_bytes:
            self._reserved_bytes -= self._release()
            self.fits = self.fits and self._reserved_bytes + nbytes <= self._limit_bytes
        self._reserved_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self._reserved_bytes)


class _Segments(_Allocator):
    """Segments that are reserved and given back whole."""

    def __init__(self, limit_bytes: int | None) -> None:
        super().__init__(limit_bytes, _Pool(_ROUND), _Pool(_SMALL + 1))
        self._count = 0

    def take(self, size: int) -> _Piece:
        pool = self._pool(size)
        found = pool.take(size)
        if found is not None:
            return found
        segment = _segment_bytes(size)
        self._reserve(segment)
        self._count += 1
        pool.put(_Piece(self._count, 0, segment))
        found = pool.take(size)
        assert found is not None
        return found

    def _release(self) -> int:
        freed = 0
        for pool in self._pools:
            for piece in pool.free():
                if piece.before is None and piece.after is None:
                    pool.drop(piece)
                    freed += piece.size
        return freed


class _Expandable(_Allocator):
    """One endless range of addresses per pool, of which those pages are reserved that were used."""

    def __init__(self, limit_bytes: int | None) -> None:
        super().__init__(limit_bytes, _Pool(_ROUND), _Pool(_ROUND))
        self._mapped: tuple[set[int], set[int]] = set(), set()
        for pool in self._pools:
            pool.put(_Piece(0, 0, _ENDLESS))

    def take(self, size: int) -> _Piece:
        found = self._pool(size).take(size)
        assert found is not None
        mapped, page = self._mapped[size > _SMALL], _PAGES[size > _SMALL]
        new = set(range(found.start // page, -(-(found.start + size) // page))) - mapped
        if new:
            self._reserve(len(new) * page)
            mapped |= new
        return found

    def _release(self) -> int:
        freed = 0
        for pool, mapped, page in zip(self._pools, self._mapped, _PAGES, strict=True):
            before = len(mapped)
            end = max(mapped, default=0) + 1
            for piece in pool.free():
                mapped.difference_update(range(-(-piece.start // page), min(end, (piece.start + piece.size) // page)))
            freed += (before - len(mapped)) * page
        return freed


def replay(
    allocations: Iterable[tuple[int, int]], limit_bytes: int | None = None, *, expandable: bool = False
) -> Reserved:
    """Run a sequence of allocations through the allocator.

    Args:
        allocations: (number, bytes) for memory that is taken, (number, 0) when it is given back, in order.
        limit_bytes: What the device has for segments; ``None`` is no limit.
        expandable: As with ``PYTORCH_ALLOC_CONF=expandable_segments:True``. Exact until the limit is in the way; then
            pages that are not used are given back, and torch may choose other addresses for what comes next.

    Returns:
        The most that was reserved (or would have been, where it exceeds the limit), and the most that was in use.
    """
    allocator = (_Expandable if expandable else _Segments)(limit_bytes)
    taken: dict[int, _Piece] = {}
    used = used_peak = 0
    for number, nbytes in allocations:
        if nbytes:
            assert number not in taken, f"{number} is taken twice"
            piece = taken[number] = allocator.take(-(-nbytes // _ROUND) * _ROUND)
            used += piece.size
            used_peak = max(used_peak, used)
        elif number in taken:
            piece = taken.pop(number)
            used -= piece.size
            allocator.put(piece)
    return Reserved(allocator.peak_bytes, used_peak, allocator.fits)


def _segment_bytes(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
