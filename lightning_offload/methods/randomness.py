"""Random states per stream: the process has one generator of each kind, and every stream must see it as if alone."""

from __future__ import annotations

import _random
import ctypes
import random
import sys
from typing import Any, Protocol

import torch


class Randomness:
    """Switches the generators of torch (CPU and the current CUDA device), Python and NumPy between streams.

    ``start(n)``, then ``switch(k)`` whenever stream k goes on; after ``switch(0)`` the process has what stream 0 left.
    A generator that nobody drew from is looked at and not written.
    """

    def __init__(self) -> None:
        self._sources: list[_Source] = []
        self._stream = 0
        self._seen: list[Any] = []  # what the generators held when the running stream got its turn
        self._of: list[list[Any]] = []

    def start(self, streams: int) -> None:
        """All streams begin with the states of now."""
        sources = _sources()
        if [source.key for source in sources] != [source.key for source in self._sources]:
            self._sources, self._seen = sources, [None] * len(sources)
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():  # modes of the caller
            self._read()
        self._stream, self._of = 0, [self._seen] * streams

    def switch(self, stream: int) -> None:
        """Stream ``stream`` goes on."""
        if stream == self._stream:
            return
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():  # modes of the caller
            self._read()
            self._of[self._stream] = self._seen
            self._stream = stream
            for source, held, wanted in zip(self._sources, self._seen, self._of[stream], strict=True):
                if held is not wanted:
                    source.write(wanted)
            self._seen = self._of[stream]

    def _read(self) -> None:
        self._seen = [source.read(last) for source, last in zip(self._sources, self._seen, strict=True)]


class _Source(Protocol):
    """One generator; ``read`` returns ``last`` itself where nothing was drawn since."""

    key: object

    def read(self, last: Any) -> Any: ...

    def write(self, state: Any) -> None: ...


def _sources() -> list[_Source]:
    found: list[_Source] = [_Torch(torch.default_generator), _Python()]
    if torch.cuda.is_initialized():
        found.append(_Torch(torch.cuda.default_generators[torch.cuda.current_device()]))
    if (numpy := sys.modules.get("numpy")) is not None and hasattr(numpy, "random"):
        found.append(_NumPy(numpy.random))
    return found


class _Torch:
    def __init__(self, generator: torch.Generator) -> None:
        self.key: object = generator
        self._generator = generator

    def read(self, last: Any) -> Any:
        state = self._generator.get_state()
        content = ctypes.string_at(state.data_ptr(), state.numel())
        return last if last is not None and last[0] == content else (content, state)

    def write(self, state: Any) -> None:
        self._generator.set_state(state[1])


class _Python:
    """``getstate`` makes 600 integers, so the generator's own bytes are looked at, whatever they mean.

    The second normal of a pair that is kept for later is an attribute.
    """

    def __init__(self) -> None:
        self._generator: Any = random.getstate.__self__  # type: ignore[attr-defined]
        self.key: object = self._generator
        header, end = object.__basicsize__, _random.Random.__basicsize__
        inline = sys.implementation.name == "cpython" and end - header >= _MT19937_BYTES
        self._span = (id(self._generator) + header, end - header) if inline else None

    def read(self, last: Any) -> Any:
        mark = (ctypes.string_at(*self._span), self._generator.gauss_next) if self._span is not None else None
        if mark is not None and last is not None and last[0] == mark:
            return last
        return mark, random.getstate()

    def write(self, state: Any) -> None:
        random.setstate(state[1])


class _NumPy:
    """NumPy's own way takes 60 us, so the words of its Mersenne Twister are looked at where they lie.

    Not in them is the second normal of a pair that is kept for later; while there is one, the long way is taken.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        generator = module.get_bit_generator() if hasattr(module, "get_bit_generator") else None
        self.key: object = generator
        plain = type(generator).__name__ == "MT19937"
        self._address = generator.ctypes.state_address if generator is not None and plain else None

    def read(self, last: Any) -> Any:
        words = ctypes.string_at(self._address, _MT19937_BYTES) if self._address is not None else None
        unmoved = words is not None and last is not None and last[0] == words
        if unmoved and not last[1]["has_gauss"]:
            return last
        state = self._module.get_state(legacy=False)
        return last if unmoved and state["has_gauss"] else (words, state)

    def write(self, state: Any) -> None:
        self._module.set_state(state[1])


_MT19937_BYTES = 625 * 4
