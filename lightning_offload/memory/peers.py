"""The other ranks of a training on several devices, and all that is ever exchanged with them.

Every rank makes the same calls in the same order. Nothing here says when: engines do, in an order that does not depend
on data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_offload.errors import PeersLostError
from lightning_offload.memory.lanes import lane_context, nbytes

Value = TypeVar("Value")


class Peers(Protocol):
    """What an engine asks of the other ranks.

    Attributes:
        rank: Of this process, from 0.
        world: How many there are.
        left: Whether nothing is exchanged any more.
        sent_bytes: Payload that this rank has given to exchanges so far, by what it was.
    """

    rank: int
    world: int
    left: bool
    sent_bytes: dict[str, int]

    def mean_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Every tensor becomes its mean over ranks, each first divided by ``world``, in its own dtype."""
        ...

    def share_(self, tensors: Sequence[Tensor], owner: int, what: str) -> None:
        """Every tensor becomes that of rank ``owner``."""
        ...

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, whether some rank has it; waits for all of them."""
        ...

    def gather(self, rows: Sequence[Sequence[float]], what: str) -> list[list[list[float]]]:
        """The rows of every rank, in rank order; fp64, of equal lengths wherever there are any."""
        ...

    def gather_tensors(self, tensor: Tensor, what: str) -> list[Tensor]:
        """The tensor of every rank, in rank order: CPU tensors that may differ in their first dimension."""
        ...

    def first(self, value: Value) -> Value:
        """What rank 0 has; small, of plain types."""
        ...

    def bring(self, value: Value, owner: int) -> Value:
        """On rank 0: what rank ``owner`` has, CPU tensors and plain types; elsewhere the rank's own."""
        ...

    def leave(self) -> None:
        """Something has gone wrong here: from now on nothing is exchanged any more."""
        ...


class Alone:
    """One rank: nothing is exchanged."""

    rank, world, left = 0, 1, False

    def __init__(self) -> None:
        self.sent_bytes: dict[str, int] = {}

    def mean_(self, tensors: Sequence[Tensor], what: str) -> None:
        """See ``Peers.mean_``."""

    def share_(self, tensors: Sequence[Tensor], owner: int, what: str) -> None:
        """See ``Peers.share_``."""

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """See ``Peers.any``."""
        return list(flags)

    def gather(self, rows: Sequence[Sequence[float]], what: str) -> list[list[list[float]]]:
        """See ``Peers.gather``."""
        return [[list(row) for row in rows]]

    def gather_tensors(self, tensor: Tensor, what: str) -> list[Tensor]:
        """See ``Peers.gather_tensors``."""
        return [tensor]

    def first(self, value: Value) -> Value:
        """See ``Peers.first``."""
        return value

    def bring(self, value: Value, owner: int) -> Value:
        """See ``Peers.bring``."""
        return value

    def leave(self) -> None:
        """See ``Peers.leave``."""


class ProcessPeers:
    """Processes of the default group of ``torch.distributed``, which has been initialised.

    Tensors travel by its own backend, on the compute lane; what is on the host by gloo.

    Args:
        timeout: How long to wait for another rank.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.sent_bytes: dict[str, int] = {}
        self.left = False
        self._timeout = timeout
        self._groups: dict[str | None, Any] = {}

    def mean_(self, tensors: Sequence[Tensor], what: str) -> None:
        """See ``Peers.mean_``; several small ones of a dtype travel as one."""
        for same in _alike(tensors):
            with self._exchange(what, nbytes(same)), lane_context(same[0].device):
                whole = same[0] if len(same) == 1 and same[0].is_contiguous() else _flat(same)
                whole.div_(self.world)
                if not self.left:
                    dist.all_reduce(whole, group=self._group_of(whole))
                if whole is not same[0]:
                    _spread(whole, same)

    def share_(self, tensors: Sequence[Tensor], owner: int, what: str) -> None:
        """See ``Peers.share_``."""
        for tensor in tensors:
            with self._exchange(what, nbytes([tensor]) * (self.rank == owner)), lane_context(tensor.device):
                whole = tensor.contiguous()
                if not self.left:  # as bytes: no backend knows every dtype
                    dist.broadcast(whole.reshape(-1).view(torch.uint8), owner, group=self._group_of(whole))
                if whole is not tensor:
                    tensor.copy_(whole)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """See ``Peers.any``."""
        found = torch.tensor(list(flags), dtype=torch.uint8, device="cpu")
        with self._exchange("control", found.nbytes):
            if not self.left and len(found):
                dist.all_reduce(found, dist.ReduceOp.MAX, group=self._host)
        return [bool(flag) for flag in found.tolist()]

    def gather(self, rows: Sequence[Sequence[float]], what: str) -> list[list[list[float]]]:
        """See ``Peers.gather``."""
        mine = torch.tensor([list(row) for row in rows], dtype=torch.float64, device="cpu")
        mine = mine.reshape(len(rows), len(rows[0]) if rows else 0)
        found: list[list[list[float]]] = [rows.tolist() for rows in self.gather_tensors(mine, what)]
        return found

    def gather_tensors(self, tensor: Tensor, what: str) -> list[Tensor]:
        """See ``Peers.gather_tensors``."""
        if self.left:
            return [tensor]
        shape = torch.tensor([len(tensor), math.prod(tensor.shape[1:])], device="cpu")
        shapes = [torch.empty_like(shape) for _ in range(self.world)]
        with self._exchange(what, shape.nbytes):
            dist.all_gather(shapes, shape, group=self._host)
        sizes = [int(found[0]) for found in shapes]
        width = max(int(found[1]) for found in shapes if int(found[0])) if any(sizes) else 1
        # gloo gathers equal sizes alone
        padded = tensor.new_zeros(max(sizes), width)
        padded[: len(tensor)] = tensor.reshape(len(tensor), width) if len(tensor) else padded[:0]
        gathered = [torch.empty_like(padded) for _ in range(self.world)]
        with self._exchange(what, padded.nbytes):
            if padded.numel():
                dist.all_gather(gathered, padded, group=self._host)
        tail = tensor.shape[1:] if len(tensor) else ((width,) if tensor.dim() > 1 else ())
        return [found[:size].reshape(size, *tail) for found, size in zip(gathered, sizes, strict=True)]

    def first(self, value: Value) -> Value:
        """See ``Peers.first``."""
        held: list[Any] = [value]
        with self._exchange("control", 0):
            if not self.left:
                dist.broadcast_object_list(held, 0, group=self._host)
        found: Value = held[0]
        return found

    def bring(self, value: Value, owner: int) -> Value:
        """See ``Peers.bring``."""
        held: list[Any] = [value]
        with self._exchange("state", 0):
            if not self.left and owner and self.rank == owner:
                dist.send_object_list(held, 0, group=self._host)
            if not self.left and owner and self.rank == 0:
                dist.recv_object_list(held, owner, group=self._host)
        found: Value = held[0]
        return found

    def leave(self) -> None:
        """See ``Peers.leave``."""
        self.left = True

    def close(self) -> None:
        """Let go of connections; an exchange after this makes them again. Every rank calls it."""
        groups, self._groups = self._groups, {}
        if not self.left:  # else somebody may hang in one of them
            for group in groups.values():
                dist.barrier(group)
                dist.destroy_process_group(group)

    def _group(self, backend: str | None) -> Any:
        """Of its own: whatever else uses the default group may do so in between."""
        if backend not in self._groups:
            self._groups[backend] = dist.new_group(timeout=self._timeout, backend=backend)
        return self._groups[backend]

    @property
    def _host(self) -> Any:
        return self._group("gloo")

    def _group_of(self, tensor: Tensor) -> Any:
        return self._group("gloo" if tensor.device.type == "cpu" else None)

    @contextmanager
    def _exchange(self, what: str, sent_bytes: int) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.left = True  # what follows is only cleaning up
            raise PeersLostError(
                f"Rank {self.rank} of {self.world} lost the others while it exchanged {what} ({_first_line(error)}). "
                "Another process has ended, or is further behind than the strategy's `timeout`: look at its output. "
                "Start all of them again, with `ckpt_path=` of the last checkpoint."
            ) from error
        self.sent_bytes[what] = self.sent_bytes.get(what, 0) + sent_bytes


def owners(sizes: Sequence[int], world: int) -> list[int]:
    """Which rank steps what, so that all have about as much to do: the largest first, to who has least."""
    loads, found = [0] * world, [0] * len(sizes)
    for at in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        found[at] = loads.index(min(loads))
        loads[found[at]] += sizes[at]
    return found


PIECE_BYTES = 1 << 25
"""Most bytes of tensors that travel as one, beside those that are larger by themselves."""


def _alike(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of one dtype and place each, and together no larger than a piece."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        held = kinds.setdefault((tensor.dtype, tensor.device), [])
        if held and nbytes(held) + tensor.nbytes > PIECE_BYTES:
            yield list(held)
            held.clear()
        held.append(tensor)
    yield from (held for held in kinds.values() if held)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _spread(whole: Tensor, tensors: Sequence[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(whole[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
