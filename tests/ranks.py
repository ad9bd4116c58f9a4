"""Ranks as threads of one process: an engine on each, and a way to see what they exchange."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Room:
    """Where threads of one training meet; a mistaken order is an error instead of a deadlock."""

    def __init__(self, world: int, timeout_s: float = 60.0) -> None:
        self.world = world
        self._barrier = threading.Barrier(world, timeout=timeout_s)
        self._board: list[Any] = [None] * world
        self.calls: list[str] = []

    def exchange(self, rank: int, what: str, value: Any) -> list[Any]:
        """What every rank has put there, in rank order; all of them mean the same exchange."""
        self._board[rank] = (what, value)
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        assert len({what for what, _ in found}) == 1, f"ranks exchange different things: {[what for what, _ in found]}"
        if rank == 0:
            self.calls.append(what)
        return [value for _, value in found]

    def abort(self) -> None:
        self._barrier.abort()


class ThreadPeers:
    """See ``memory.peers.Peers``; sums in rank order."""

    def __init__(self, room: Room, rank: int) -> None:
        self.rank, self.world, self._room = rank, room.world, room
        self.sent_bytes: dict[str, int] = {}
        self.left = False

    def _all(self, kind: str, what: str, value: Any) -> list[Any]:
        return self._room.exchange(self.rank, f"{kind} {what}", value)

    def mean_(self, tensors: Sequence[Tensor], what: str) -> None:
        for tensor in tensors:
            tensor.div_(self.world)
            self.sent_bytes[what] = self.sent_bytes.get(what, 0) + tensor.nbytes
            found = self._all("mean", f"{what} {tuple(tensor.shape)}", tensor.detach().clone())
            total = found[0].clone()
            for other in found[1:]:
                total += other
            tensor.copy_(total)

    def share_(self, tensors: Sequence[Tensor], owner: int, what: str) -> None:
        for tensor in tensors:
            mine = self.rank == owner
            self.sent_bytes[what] = self.sent_bytes.get(what, 0) + tensor.nbytes * mine
            found = self._all(
                "share", f"{what} {tuple(tensor.shape)} {owner}", tensor.detach().clone() if mine else None
            )
            tensor.copy_(found[owner])

    def any(self, flags: Sequence[bool]) -> list[bool]:
        return [any(column) for column in zip(*self._all("any", str(len(flags)), list(flags)), strict=True)]

    def gather(self, rows: Sequence[Sequence[float]], what: str) -> list[list[list[float]]]:
        self.sent_bytes[what] = self.sent_bytes.get(what, 0) + sum(8 * len(row) for row in rows)
        return self._all("gather", what, [list(row) for row in rows])

    def gather_tensors(self, tensor: Tensor, what: str) -> list[Tensor]:
        self.sent_bytes[what] = self.sent_bytes.get(what, 0) + tensor.nbytes
        return [found.clone() for found in self._all("gather", what, tensor.clone())]

    def first(self, value: Value) -> Value:
        return copy.deepcopy(self._all("first", "", value)[0])

    def bring(self, value: Value, owner: int) -> Value:
        found = self._all("bring", str(owner), copy.deepcopy(value))[owner]
        return found if self.rank == 0 else value

    def leave(self) -> None:
        pass


def on_ranks(world: int, run: Callable[[ThreadPeers], Value]) -> list[Value]:
    """``run`` on every rank; what each returned, in rank order.

    Raises:
        Exception: The first that a rank has raised by itself.
    """
    room = Room(world)
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            results[rank] = run(ThreadPeers(room, rank))
        except threading.BrokenBarrierError as error:
            errors.append(error)
        except BaseException as error:
            errors.insert(0, error)
            room.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
