"""One function run several times at once, by threads of which exactly one runs: each gives the others their turn.

Threads, because grad mode, autocast, dispatch modes and the current CUDA stream belong to one, and a forward may change
them half way. They hand a baton on through one lock each: about 10 us, where a condition variable takes 80.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from lightning_offload.errors import OffloadError
from lightning_offload.memory.ambient import Ambient

T = TypeVar("T")


class Stopped(BaseException):
    """Ends a stream because another one failed; ``except Exception`` must not swallow it."""


class Turns:
    """Stream 0 runs on the caller's thread, the others on daemon threads that live until ``close``."""

    def __init__(self) -> None:
        self._inboxes: list[_Inbox] = []
        self._round: _Round[Any] | None = None
        self._finalizer = weakref.finalize(self, _dismiss, self._inboxes)

    @property
    def stream(self) -> int:
        """Whose turn it is; 0 outside ``run``."""
        return 0 if self._round is None else self._round.holder

    @property
    def running(self) -> bool:
        """Whether a run is under way."""
        return self._round is not None

    def run(self, fn: Callable[[int], T], streams: int, switch: Callable[[int], None]) -> list[T]:
        """``[fn(0), ..., fn(streams - 1)]``; ``fn`` calls ``give`` wherever the others may go on.

        Each stream gives equally often. ``switch(k)`` is called on the thread of stream k whenever it gets its turn.

        Raises:
            OffloadError: A run is under way.
            BaseException: What ``fn`` or ``switch`` raised first, after every stream has ended.
        """
        if self._round is not None:
            raise OffloadError("a lock-step run was started inside another one; let the first one end before the next")
        round_ = _Round(fn, streams, switch)
        self._round = round_
        try:
            self._start(round_)
            round_.lead()
        except Stopped:
            pass
        except BaseException as raised:
            round_.fail(raised)
        finally:
            try:
                round_.drain()
            finally:
                self._round = None
        failure, round_.failure = round_.failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # its traceback holds this frame
        return round_.results

    def give(self) -> None:
        """Let every other stream go on to its next ``give``, or its end; does not return if one of them fails."""
        if self._round is not None:
            self._round.give()

    def close(self) -> None:
        """Joins the threads; a later run starts new ones. Idempotent."""
        if self._round is not None:
            raise OffloadError("close() was called inside a lock-step run; let the run end first")
        threads = [inbox.thread for inbox in self._inboxes]
        _dismiss(self._inboxes)
        for thread in threads:
            thread.join()

    def _start(self, round_: _Round[T]) -> None:
        while len(self._inboxes) < round_.streams - 1:
            self._inboxes.append(_Inbox(len(self._inboxes) + 1))
        for stream, inbox in zip(range(1, round_.streams), self._inboxes, strict=False):
            context = contextvars.copy_context()
            round_.summon(stream, partial(inbox.post, partial(context.run, round_.follow, stream)))


class _Inbox:
    """Where a thread waits for work. The thread knows nothing else, so that it keeps nobody alive."""

    def __init__(self, stream: int) -> None:
        self._wake = _closed_door()
        self._tasks: deque[Callable[[], object]] = deque()
        self._dismissed = False
        self.thread = threading.Thread(target=self._serve, name=f"offload-stream-{stream}", daemon=True)
        self.thread.start()

    def post(self, task: Callable[[], object]) -> None:
        self._tasks.append(task)
        _open(self._wake)

    def dismiss(self) -> None:
        self._dismissed = True
        _open(self._wake)

    def _serve(self) -> None:
        while not self._dismissed:
            self._wake.acquire()
            while self._tasks:
                self._tasks.popleft()()


class _Round(Generic[T]):
    """One run. Its locks die with it, so whatever an interruption leaves behind does not reach the next one."""

    def __init__(self, fn: Callable[[int], T], streams: int, switch: Callable[[int], None]) -> None:
        self.streams = streams
        self.holder = 0
        self.results: list[T] = [None] * streams  # type: ignore[list-item]
        self.failure: BaseException | None = None
        self._fn, self._switch = fn, switch
        self._ambient = Ambient.capture()
        self._posts: dict[int, Callable[[], None]] = {}
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._doors = [_closed_door() for _ in range(streams)]
        self._exits = [_closed_door() for _ in range(streams)]

    def summon(self, stream: int, post: Callable[[], None]) -> None:
        self._posts[stream] = post
        post()

    def fail(self, raised: BaseException) -> None:
        if self.failure is None:
            self.failure = raised

    def _check(self) -> None:
        if self.failure is not None:
            raise Stopped

    def give(self) -> None:
        self._check()
        if self.streams > 1:
            stream = self.holder
            _open(self._doors[(stream + 1) % self.streams])
            self._take(stream)

    def lead(self) -> None:
        """Stream 0."""
        self._switch(0)
        self.results[0] = self._fn(0)
        self.give()

    def follow(self, stream: int) -> None:
        """Any other stream, on its own thread; nothing if it was summoned before."""
        if stream in self._begun:
            return
        self._begun.add(stream)
        try:
            with self._ambient.entered():
                self._take(stream)
                self.results[stream] = self._fn(stream)
        except Stopped:
            pass
        except BaseException as raised:
            self.fail(raised)
        self._ended.add(stream)
        # whoever fails leaves it to stream 0 to end the others
        _open(self._doors[(stream + 1) % self.streams if self.failure is None else 0])
        _open(self._exits[stream])

    def drain(self) -> None:
        """Return when every other stream has ended, whatever interrupts; then it is stream 0's turn.

        An interruption may have come between any two steps, so whoever has not ended is summoned anew and let in.
        """
        while True:
            try:
                for stream, post in self._posts.items():
                    while stream not in self._ended:
                        self.fail(Stopped())
                        post()
                        _open(self._doors[stream])
                        self._exits[stream].acquire()
                if self.holder != 0:  # interrupted while another stream ran
                    self.holder = 0
                    self._switch(0)
                self._posts.clear()  # they hold this run
                return
            except BaseException as raised:
                self.fail(raised)

    def _take(self, stream: int) -> None:
        self._doors[stream].acquire()
        self._check()
        self.holder = stream
        self._switch(stream)


def _closed_door() -> threading.Lock:
    door = threading.Lock()
    door.acquire()
    return door


def _open(door: threading.Lock) -> None:
    if door.locked():
        # after an interruption two may open the same door
        try:
            door.release()
        except RuntimeError:
            return


def _dismiss(inboxes: list[_Inbox]) -> None:
    while inboxes:
        inboxes.pop().dismiss()
