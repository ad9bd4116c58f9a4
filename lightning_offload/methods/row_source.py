"""Where an adapter's rows come from under an engine: the host, chosen and brought up while the frozen network computes.

Of each call of a network: the device routes; whoever has the keys selects (the host, or the device under ``placement``
"keys" and "device"); the host learns the union, catches its rows up and gathers what the device has not; that goes up.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_offload.memory.lanes import Event, Lanes, lane_context
from lightning_offload.memory.slots import Loans, Slot, Staging
from lightning_offload.methods.base import Flight
from lightning_offload.methods.row_tables import Rows
from lightning_offload.methods.sparse_adapter import Fetched, SparseAdapter
from lightning_offload.numerics.adapter import Picks, places_of, route, select, union

Placement = Literal["host", "keys", "device"]

TURNS = 2
"""Host buffers for gradients: one that is being filled, one that is added. One call follows the other, so of what
calls need there is one."""

PUBLISHED_UNION = 0.259
"""Share of the rows that a micro-batch uses, where nothing is real: that of the paper's example (2 x 256 tokens)."""

STAY: dict[Placement, tuple[bool, bool]] = {"host": (False, False), "keys": (True, False), "device": (True, True)}
"""Whether keys, and values, stay on the device."""

Told = Callable[[Rows, Tensor, Tensor], None]
"""Told of the gradient rows of a table: their numbers on the host, and (U, d) on the device."""


@dataclass(eq=False)
class AdapterRows:
    """The rows of one adapter.

    Attributes:
        adapter: The module.
        keys: On the host.
        values: On the host.
        flight: Of the unit that the adapter is in.
        keys_up: Keys on the device, (r, d), where they stay there.
        values_up: Values, likewise.
        flags: Host memory for which rows are used, (r,) bool.
        chosen: The last work of the host for a forward.
        stepped: The last step.
        refreshed: The last copy of what stays on the device.
    """

    adapter: SparseAdapter
    keys: Rows
    values: Rows
    flight: Flight
    keys_up: Tensor | None = None
    values_up: Tensor | None = None
    flags: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool, device="cpu"))
    chosen: Event | None = None
    stepped: Event | None = None
    refreshed: Event | None = None

    @classmethod
    def on(
        cls, lanes: Lanes, adapter: SparseAdapter, keys: Rows, values: Rows, flight: Flight, placement: Placement
    ) -> AdapterRows:
        """With the buffers that a placement asks for, filled."""
        home = cls(adapter, keys, values, flight)
        (home.flags,) = lanes.buffers(f"{keys.name}.used", [adapter.settings.width], torch.bool, "pinned")
        keys_stay, values_stay = STAY[placement]
        home.keys_up = _bring_to_stay(lanes, keys) if keys_stay else None
        home.values_up = _bring_to_stay(lanes, values) if values_stay else None
        return home

    @property
    def tables(self) -> tuple[Rows, Rows]:
        """Keys and values."""
        return self.keys, self.values

    @property
    def fetched(self) -> list[Rows]:
        """What is not on the device."""
        return [t for t, up in ((self.keys, self.keys_up), (self.values, self.values_up)) if up is None]

    def refresh(self, lanes: Lanes) -> None:
        """What stays on the device, after it has changed on the host; compute sees it from the unit's next call on."""
        stay = [(up, rows) for up, rows in ((self.keys_up, self.keys), (self.values_up, self.values)) if up is not None]
        if not stay:
            return
        stepped = [self.stepped] if self.stepped is not None else []
        arrived = self.refreshed = lanes.copy(
            [up for up, _ in stay],
            [rows.shadow for _, rows in stay],
            "h2d",
            after=[*stepped, lanes.compute()],  # compute still reads the old ones
            priority=self.flight.order,
            tag="rows that stay",
        )
        self.flight.launch(lambda: lanes.wait_compute(arrived))

    def before_host_work(self) -> list[Event]:
        """After these the tables may be read, and rows caught up."""
        return [event for event in (self.chosen, self.stepped) if event is not None]


class Desk:
    """What the sources of one engine share: lanes, buffers in turn, what was counted.

    Attributes:
        lanes: Where it runs.
        training: Whether a forward of training runs: what it is lent it keeps until the next one.
        lent: What is up, for a checkpoint that computes a call again.
        used: Rows that were used, and rows there were, summed over all calls.
        expected_union: Share of the rows that a call uses, before it is known and where nothing is real.

    Args:
        lanes: See above.
        dtype: In which rows are on the device.
        numel: Of the largest table.
        fetches: How many tables of an adapter come up.
    """

    def __init__(self, lanes: Lanes, dtype: torch.dtype, numel: int, fetches: int) -> None:
        self.lanes, self.training = lanes, False
        self.lent: list[Fetched] = []
        self.used = (0, 0)
        self.expected_union = PUBLISHED_UNION
        self.up = Staging(lanes, "rows up", dtype, 1, numel=fetches * numel)
        self.down = Staging(lanes, "row gradients", dtype, TURNS, numel=numel)
        self.tokens = Staging(lanes, "tokens", dtype, 1)
        self.chosen = Staging(lanes, "experts", torch.int32, 1)
        self.logits = Staging(lanes, "logits", torch.float32, 1)
        self.numbers = Staging(lanes, "row numbers", torch.int32, 1)
        self.rows = Loans(lanes, "rows", dtype)
        self.indices = Loans(lanes, "row indices", torch.int32)

    @property
    def staging_bytes(self) -> int:
        """Host bytes in which rows and tokens wait."""
        stages = (self.up, self.down, self.tokens, self.chosen, self.logits, self.numbers)
        return sum(stage.nbytes for stage in stages)

    @property
    def device_bytes(self) -> int:
        """Device bytes of rows that are up."""
        return self.rows.nbytes + self.indices.nbytes

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward of training: what the one before was lent is given back."""
        self.give_back()
        self.training = True
        try:
            yield
        finally:
            self.training = False

    def give_back(self) -> None:
        """Nobody needs the rows that are up."""
        self.lent = []
        self.rows.give_back()
        self.indices.give_back()

    def share_since(self, before: tuple[int, int]) -> float:
        """Rows used per row there is, over the calls since ``used`` was ``before``; 0 without any."""
        rows = self.used[1] - before[1]
        return (self.used[0] - before[0]) / rows if rows else 0.0

    def close(self) -> None:
        """Let go of device buffers."""
        self.lent = []
        self.rows.close()
        self.indices.close()


@dataclass(eq=False)
class _Call:
    """One call of the network.

    Attributes:
        tokens: T.
        experts: (T, E) on the device.
        places: (T, K') on the device: places in the union, where the device has selected.
        fetched: Where the host puts fetched rows.
        numbers: Where the host puts the numbers of the rows, and places where it has selected.
        count: U; known after ``AdapterRows.chosen``, expected before.
        rows: (U,) on the host, likewise.
    """

    tokens: int
    experts: Tensor
    places: Tensor | None
    fetched: Slot
    numbers: Slot
    count: int
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))


class LaneSource:
    """The rows of one adapter, on lanes; see ``RowSource``.

    Attributes:
        told: Told of gradient rows.

    Args:
        rows: Of the adapter.
        desk: Shared by all.
        told: See above.
    """

    def __init__(self, rows: AdapterRows, desk: Desk, told: Told) -> None:
        self._home, self._desk, self.told = rows, desk, told
        self._settings = settings = rows.adapter.settings
        self._group = settings.width // settings.experts
        candidates = settings.active_experts * self._group
        self._picked = min(settings.top_k, candidates)
        self._selects_on_host = settings.top_k < candidates and rows.keys_up is None
        self._call: _Call | None = None

    def start(self, x: Tensor) -> None:
        """See ``RowSource.start``."""
        with lane_context(self._desk.lanes.device):
            if not self._desk.training:
                self._desk.give_back()
            chosen = route(x, self._home.adapter.router, self._settings.active_experts)
            logits = chosen.logits if self._settings.gate == "logit" else None
            if self._selects_on_host:
                self._call = self._choose_on_host(x, chosen.experts, logits)
            else:
                self._call = self._choose_on_device(x, chosen.experts, logits)

    def rows(self) -> Fetched:
        """See ``RowSource.rows``: compute waits for them, the main thread for their number."""
        call, self._call = self._call, None
        assert call is not None
        with lane_context(self._desk.lanes.device):
            fetched = self._bring_up(call)
        self._desk.lent.append(fetched)
        return fetched

    def again(self, picks: Picks) -> Fetched:
        """See ``RowSource.again``: they are still up."""
        return next(fetched for fetched in self._desk.lent if fetched.picks is picks)

    # Choosing.

    def _choose_on_host(self, x: Tensor, experts: Tensor, logits: Tensor | None) -> _Call:
        home, desk, lanes = self._home, self._desk, self._desk.lanes
        slots = [desk.tokens.take(x.numel()), desk.chosen.take(experts.numel())]
        sent = [x.to(home.keys.shadow.dtype).contiguous(), experts.to(torch.int32)]
        if logits is not None:
            slots.append(desk.logits.take(logits.numel()))
            sent.append(logits)
        landing = [slot.buffer[: t.numel()].view(t.shape) for slot, t in zip(slots, sent, strict=True)]
        free = [slot.free for slot in slots if slot.free is not None]
        after = [lanes.compute(), *free]
        landed = lanes.copy(landing, sent, "d2h", after=after, priority=home.flight.order, tag="tokens")
        call = self._make_call(experts, None)

        def choose() -> None:
            shown, chosen, *scores = landing
            picks = select(
                shown,
                home.keys.shadow,
                chosen.long(),
                scores[0] if scores else None,
                group=self._group,
                top_k=self._settings.top_k,
                by_expert=True,
            )
            rows, places = union(picks, self._settings.width)
            self._learn(call, rows)
            call.numbers.buffer[len(rows) : len(rows) + places.numel()] = places.flatten()

        home.chosen = self._on_host(choose, call, [landed])
        for slot in slots:
            slot.free = home.chosen
        return call

    def _choose_on_device(self, x: Tensor, experts: Tensor, logits: Tensor | None) -> _Call:
        home, lanes = self._home, self._desk.lanes
        keys = home.keys.shadow if home.keys_up is None else home.keys_up  # not read where nothing is left out
        picks = select(x, keys, experts, logits, group=self._group, top_k=self._settings.top_k)
        used, places = places_of(picks, self._settings.width)
        after = [lanes.compute(), *([home.chosen] if home.chosen is not None else [])]
        landed = lanes.copy([home.flags], [used], "d2h", after=after, priority=home.flight.order, tag="rows used")
        call = self._make_call(experts, places)
        home.chosen = self._on_host(lambda: self._learn(call, home.flags.nonzero().flatten()), call, [landed])
        return call

    def _make_call(self, experts: Tensor, places: Tensor | None) -> _Call:
        home, desk, width = self._home, self._desk, self._settings.width
        fetched = desk.up.take(sum(t.master.numel() for t in home.fetched))
        numbers = desk.numbers.take(width + (len(experts) * self._picked if places is None else 0))
        count = min(max(int(desk.expected_union * width), self._picked), len(experts) * self._picked, width)
        return _Call(len(experts), experts, places, fetched, numbers, count)

    def _on_host(self, choose: Callable[[], None], call: _Call, after: list[Event]) -> Event:
        home = self._home
        free = [slot.free for slot in (call.fetched, call.numbers) if slot.free is not None]
        moved = sum(2 * t.shadow.element_size() * t.master.shape[1] * call.count for t in home.fetched)
        call.fetched.free = call.numbers.free = chosen = self._desk.lanes.host(
            choose,
            after=[*after, *free, *home.before_host_work()],
            priority=home.flight.order,
            tag="select" if self._selects_on_host else "gather",
            traffic_bytes=moved + (home.keys.shadow.nbytes if self._selects_on_host else 0),
        )
        return chosen

    def _learn(self, call: _Call, rows: Tensor) -> None:
        """The union is known: on the host, its rows are caught up and gathered."""
        call.rows, call.count = rows, len(rows)
        call.numbers.buffer[: len(rows)] = rows
        start = 0
        for table in self._home.fetched:
            table.catch_up(rows)
            shape = len(rows), table.master.shape[1]
            numel = math.prod(shape)
            table.gather(rows, call.fetched.buffer[start : start + numel].view(shape))
            start += numel

    # Coming up.

    def _bring_up(self, call: _Call) -> Fetched:
        home, desk, lanes = self._home, self._desk, self._desk.lanes
        assert home.chosen is not None
        lanes.wait_compute(home.chosen)  # from here on ``count`` is known
        count, width = call.count, home.keys.master.shape[1]
        desk.used = desk.used[0] + count, desk.used[1] + self._settings.width
        fetched = len(home.fetched) * count * width
        chosen = count + (call.tokens * self._picked if call.places is None else 0)
        rows = desk.rows.lend(fetched, max(len(home.fetched) * home.keys.master.numel(), 1))
        numbers = desk.indices.lend(chosen, self._settings.width + call.tokens * self._picked)
        up = lanes.copy(
            [rows[:fetched], numbers[:chosen]],
            [call.fetched.buffer[:fetched], call.numbers.buffer[:chosen]],
            "h2d",
            after=[home.chosen],
            priority=home.flight.order,
            tag="rows",
        )
        lanes.wait_compute(up)
        union_rows = numbers[:count].long()
        places = call.places
        if places is None:
            places = numbers[count:chosen].view(call.tokens, self._picked).long()
        shown = iter(rows[:fetched].view(len(home.fetched), count, width))
        keys, values = (
            next(shown) if up_there is None else up_there.index_select(0, union_rows)
            for up_there in (home.keys_up, home.values_up)
        )
        return Fetched(
            self._leaf(home.keys, keys, call.rows),
            self._leaf(home.values, values, call.rows),
            Picks(union_rows, places, call.experts),
        )

    def _leaf(self, table: Rows, shown: Tensor, rows: Tensor) -> Tensor:
        """What autograd gives the gradient of these rows to."""
        leaf = shown.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(_telling(weakref.ref(self), weakref.ref(table), rows))
        return leaf


def _telling(source: weakref.ref[LaneSource], table: weakref.ref[Rows], rows: Tensor) -> Callable[[Tensor], None]:
    """Weak: autograd keeps hooks where no collector sees them, and the source keeps what is up, hooks and all."""

    def tell(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        told_by, shown = source(), table()
        if told_by is not None and shown is not None and gradient is not None:
            told_by.told(shown, rows, gradient)

    return tell


def _bring_to_stay(lanes: Lanes, table: Rows) -> Tensor:
    (flat,) = lanes.buffers(f"{table.name}.resident.rows", [table.master.numel()], table.shadow.dtype, "device")
    up = flat.view(table.master.shape)
    lanes.wait_compute(lanes.copy([up], [table.shadow], "h2d", tag="rows that stay"))
    return up
