"""The rows of all adapters under an engine: they come up as they are used, their gradients add up on the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_offload.memory.lanes import Event, Place, nbytes, shared_buffers
from lightning_offload.memory.promises import bring
from lightning_offload.methods.base import Groups, Moment, Trained, Verdict
from lightning_offload.methods.homes import load_state, weight_dtype
from lightning_offload.methods.row_source import STAY, AdapterRows, Desk, LaneSource, Placement
from lightning_offload.methods.row_tables import Rows, RowSteps, RowTable
from lightning_offload.methods.rules import Rule
from lightning_offload.methods.sender import FactorsArrived, Sender
from lightning_offload.methods.sparse_adapter import SparseAdapter

if TYPE_CHECKING:
    from lightning_offload.methods.meft import MEFTSettings
    from lightning_offload.methods.method import Site


WIDE, PATIENCE = 0.5, 10
"""Share of the rows that a call uses from which on fetching them is pointless, and for how many steps in a row."""


class RowOptimizer(Sender):
    """See the module docstring, and ``Sender``. The parameters of the adapters become the masters.

    Args:
        trained: Keys and values of all adapters.
        adapters: The adapters.
        site: Where and with what.
        settings: Of the method, resolved.

    Raises:
        ValueError: Rows cannot be stepped alone by this optimizer, or it has a part of an adapter alone.
    """

    sums_on_host = True
    leaves = False

    def __init__(
        self, trained: Sequence[Trained], adapters: Sequence[SparseAdapter], site: Site, settings: MEFTSettings
    ) -> None:
        assert settings.placement != "auto"
        _check_rule(site.rule, settings.row_optimizer)
        self.trained = sorted(trained, key=lambda t: (t.unit.index, t.position))
        self._rule, self._lanes, self._dtypes = site.rule, site.lanes, site.dtypes
        self._placement: Placement = settings.placement
        self._prunes = settings.prunes
        self._row_optimizer: RowSteps = settings.row_optimizer if len(site.rule.states) == 2 else "dense"
        if self._row_optimizer == "auto" and not site.rule.decoupled:
            self._row_optimizer = "dense"
        self._table: dict[str, RowTable] = {}
        at = {id(t.parameter): t for t in self.trained}
        _check_whole(adapters, at)
        self._homes = [self._make_home(a, at[id(a.keys)], at[id(a.values)]) for a in adapters if id(a.keys) in at]
        self._home = {table.name: home for home in self._homes for table in home.tables}
        tables = list(self._table.values())
        self._desk = Desk(
            self._lanes,
            tables[0].shadow.dtype,
            max(table.master.numel() for table in tables),
            len(self._homes[0].fetched),
        )
        self._added: dict[str, Event] = {}  # the last addition to each sum since the last step
        self._asked = self._stepped = self._desk.used
        self._wide_steps = 0
        self._gradients_visible = site.gradients_visible
        self._shown: set[str] = set()  # whose sum is `p.grad`
        self._peers = site.peers

    # Part.

    def gradient_ready(self, trained: Trained, moment: Moment) -> None:
        """See ``Part.gradient_ready``: rows have their own way, ``p.grad`` stays empty."""

    def collect(self, step: int) -> None:
        """See ``Part.collect``: rows left as their gradients came; what users made of the sums counts."""
        for table in self._table.values():
            self._take_back(table)

    def has_gradient(self, trained: Trained) -> bool:
        """See ``Part.has_gradient``."""
        return trained.name in self._added

    def waits(self, trained: Trained) -> bool:
        """See ``Sender.waits``: asked as rows arrive."""
        return True

    def update(self, groups: Groups, verdict: Verdict, backward_done: Event) -> list[Event]:
        """See ``Part.update``.

        Raises:
            ValueError: A group that rows cannot be stepped alone with.
        """
        for table in self._table.values():
            _check_group(groups[table.trained.group], table.steps)
        self._warn_of_wide_unions()
        readers = []
        for home in self._homes:
            taken = [self._table[rows.name] for rows in home.tables if rows.name in self._added]
            if taken:
                readers.append(self._step(home, taken, groups, verdict))
                home.refresh(self._lanes)
        self._added = {}
        return readers

    def drop(self) -> None:
        """See ``Part.drop``."""
        for table in self._table.values():
            self._take_back(table)
            table.forget()
        self._added = {}

    def adopt(self) -> None:
        """See ``Part.adopt``: the parameter is the master; what is shown of it may be out of date."""
        for home in self._homes:
            for table in home.tables:
                table.show()
            home.refresh(self._lanes)
            home.flight.land()
        self._lanes.synchronize()

    def state_of(self, trained: Trained) -> dict[str, Tensor]:
        """See ``Part.state_of``; the tensors are the arenas' own memory."""
        table = self._table[trained.name]
        if float(table.step) == 0:
            return {}
        return ({"step": table.step.clone()} if self._rule.has_step else {}) | table.states

    def load_state_of(self, trained: Trained, state: Mapping[str, Any]) -> None:
        """See ``Part.load_state_of``; nothing is in flight, so no row is behind."""
        table = self._table[trained.name]
        load_state(self._rule, table.step, table.states, trained, state)

    def master_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.master_of``: the parameter is the master."""
        return None

    def pending_of(self, trained: Trained) -> Tensor | None:
        """See ``Part.pending_of``."""
        if trained.name in self._shown:
            return trained.parameter.grad
        return self._table[trained.name].total if trained.name in self._added else None

    # Beside the protocol.

    def load_pending_of(self, trained: Trained, gradient: Tensor) -> None:
        """See ``Sender.load_pending_of``."""
        table = self._table[trained.name]
        table.add(torch.arange(len(gradient), device="cpu"), gradient.to("cpu", torch.float32))
        self._added[trained.name] = self._nothing_after(self._lanes.compute())

    def host_norms(self) -> list[tuple[Trained, Tensor, list[Event]]]:
        """See ``Sender.host_norms``."""
        return [
            (table.trained, table.total, [self._added[name]])
            for name, table in self._table.items()
            if name in self._added
        ]

    def install(self, arrived: Callable[[Trained], None], factors: FactorsArrived) -> list[Callable[[], Any]]:
        """See ``Sender.install``."""
        self._arrived = arrived
        for home in self._homes:
            home.adapter.source = LaneSource(home, self._desk, self._gradient)
        return [partial(_own_rows_again, [home.adapter for home in self._homes])]

    def forward(self) -> AbstractContextManager[None]:
        """See ``Sender.forward``."""
        return self._desk.forward()

    def catch_up(self) -> None:
        """See ``Sender.catch_up``."""
        for home in self._homes:
            tables = [self._table[rows.name] for rows in home.tables]
            behind = [table for table in tables if table.steps in ("auto", "deferred")]
            if behind:
                self._lanes.host(
                    partial(_catch_up, behind),
                    after=home.before_host_work(),
                    priority=home.flight.order,
                    tag="catch up",
                )

    def free_rings(self) -> None:
        """See ``Sender.free_rings``."""
        self._desk.close()
        for home in self._homes:
            home.keys_up = home.values_up = None

    def step_all(self, groups: Groups, verdict: Verdict) -> None:
        """See ``Sender.step_all``: of all rows."""
        for table in self._table.values():
            table.touched.fill_(True)
            table.make_step(self._rule, groups[table.trained.group], verdict)

    def take_back(self, trained: Trained) -> None:
        """See ``Sender.take_back``: rows are sent as they are used."""

    def meet(self) -> None:
        """See ``Sender.meet``: every rank adds up the rows of all, in rank order."""
        self._lanes.synchronize()
        for table in self._table.values():
            self._take_back(table)
            rows = table.touched.nonzero().flatten()
            everyones = self._peers.gather_tensors(rows, "places of rows")
            gradients = self._peers.gather_tensors(table.total[rows], "gradients of rows")
            table.forget()
            for some, gradient in zip(everyones, gradients, strict=True):
                if len(some):
                    table.add(some, gradient.div_(self._peers.world))
                    self._added[table.name] = self._nothing_after(self._lanes.compute())
            if self._gradients_visible() and table.name in self._added:
                self._show(table)

    def describe(self) -> str:
        """See ``Sender.describe``."""
        settings = self._homes[0].adapter.settings
        up = {"host": "", "keys": ", keys on the device too", "device": ", and on the device"}[self._placement]
        return (
            f"trains {len(self._homes)} adapters of {settings.width:,} rows, {settings.top_k:,} of them per token from "
            f"{settings.active_experts} of {settings.experts} experts, in host memory{up}"
        )

    def label(self, trained: Sequence[Trained]) -> str:
        """See ``Sender.label``."""
        return f"rows ({self._placement})"

    @property
    def holdings(self) -> dict[str, int]:
        """See ``Sender.holdings``."""
        tables = self._table.values()
        held = {
            "masters": [table.master for table in tables],
            "optimizer state": [state for table in tables for state in table.states.values()],
            "sums over micro-batches": [table.total for table in tables],
            "rows as they go up": [table.shadow for table in tables if table.rounded],
        }
        on_their_way = {"rows and tokens on their way": self._desk.staging_bytes}
        return {name: nbytes(tensors) for name, tensors in held.items() if tensors} | on_their_way

    @property
    def device_bytes(self) -> int:
        """See ``Sender.device_bytes``: rows that are up, and what stays there."""
        return self._desk.device_bytes + self.resident_bytes

    def device_bytes_of(self, trained: Sequence[Trained]) -> int:
        """See ``Sender.device_bytes_of``: the parameters are in host memory."""
        names = {t.name for t in trained}
        stay = [(home.keys, home.keys_up) for home in self._homes] + [(h.values, h.values_up) for h in self._homes]
        return nbytes(up for rows, up in stay if up is not None and rows.name in names)

    @property
    def resident_bytes(self) -> int:
        """Device bytes of keys and values that stay there."""
        return nbytes(up for home in self._homes for up in (home.keys_up, home.values_up) if up is not None)

    def expect_union(self, share: float) -> None:
        """What share of the rows a call uses, for lanes on which nothing is real."""
        self._desk.expected_union = share

    @property
    def union_share(self) -> float:
        """Rows used per row there is, over all calls so far."""
        return self._desk.share_since((0, 0))

    def take_union_share(self) -> float:
        """Rows used per row there is, over the calls since this was asked last."""
        before, self._asked = self._asked, self._desk.used
        return self._desk.share_since(before)

    def load_extras(self, extras: Mapping[str, Any]) -> None:
        """See ``Sender.load_extras``: there are none."""

    # Buffers.

    def _make_home(self, adapter: SparseAdapter, keys: Trained, values: Trained) -> AdapterRows:
        stays = STAY[self._placement]
        scored_here = self._prunes and not stays[0]
        tables = self._make_table(keys, stays[0], whole=scored_here), self._make_table(values, stays[1])
        self._table |= {table.name: table for table in tables}
        return AdapterRows.on(self._lanes, adapter, *tables, keys.flight, self._placement)

    def _make_table(self, trained: Trained, stays: bool, *, whole: bool = False) -> RowTable:
        """What the device keeps or the host scores is stepped whole: both read rows that nobody has caught up."""
        parameter, name = trained.parameter, trained.name
        shape, numel, shown = parameter.shape, parameter.numel(), weight_dtype(parameter, self._dtypes)
        rounded = shown != torch.float32

        # one region for all that is alike: the system maps a limited number of them
        kinds: list[tuple[torch.dtype, Place]] = [(torch.float32, "pinned" if stays and not rounded else "host")]
        kinds += [(torch.float32, "host")] * (1 + len(self._rule.states))
        kinds += [(shown, "pinned" if stays else "host")] * rounded
        master, total, *others = (t.view(shape) for t in shared_buffers(self._lanes, name, [numel] * len(kinds), kinds))
        bring(parameter)
        with torch.no_grad():
            master.copy_(parameter.detach())
        parameter.data = master
        shadow = others.pop() if rounded else master
        lazy = self._row_optimizer == "lazy"
        table = RowTable(
            name=name,
            trained=trained,
            master=master,
            states=dict(zip(self._rule.states, others, strict=True)),
            total=total,
            shadow=shadow,
            kernels=self._rule.kernels,
            steps="dense" if (stays or whole) and not lazy else self._row_optimizer,
        )
        table.show()
        return table

    # Down.

    def _gradient(self, table: Rows, rows: Tensor, gradient: Tensor) -> None:
        name, home, lanes = table.name, self._home[table.name], self._lanes
        self._take_back(self._table[name])
        slot = self._desk.down.take(gradient.numel())
        landing = slot.buffer[: gradient.numel()].view(gradient.shape)
        free = [slot.free] if slot.free is not None else []
        landed = lanes.copy(
            [landing],
            [gradient.contiguous()],
            "d2h",
            after=[lanes.compute(), *free],
            priority=home.flight.order,
            tag="row gradients",
        )
        before = [event for event in (self._added.get(name), home.stepped) if event is not None]
        slot.free = self._added[name] = lanes.host(
            partial(self._table[name].add, rows, landing),
            after=[landed, *before],
            priority=home.flight.order,
            tag="accumulate",
            traffic_bytes=gradient.numel() * (8 + gradient.element_size()),
        )
        self._arrived(self._table[name].trained)
        if self._gradients_visible():
            self._show(self._table[name])

    def _show(self, table: RowTable) -> None:
        """Users see the sum itself."""
        self._lanes.synchronize()
        table.trained.parameter.grad = table.total
        self._shown.add(table.name)

    def _take_back(self, table: RowTable) -> None:
        """What users have made of the sum: ``None`` is a sum that is forgotten."""
        if table.name not in self._shown:
            return
        self._shown.discard(table.name)
        parameter = table.trained.parameter
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and gradient is not table.total:
            table.total.copy_(gradient)
        torch.any(table.total, 1, out=table.touched)
        if gradient is None:
            table.forget()
            del self._added[table.name]
        else:
            self._added[table.name] = self._nothing_after(self._lanes.compute())

    def _nothing_after(self, *events: Event) -> Event:
        """What was done on this thread, as the host's work on a sum."""
        return self._lanes.host(lambda: None, after=events, tag="accumulate")

    # Stepping.

    def _warn_of_wide_unions(self) -> None:
        """Once, after ``PATIENCE`` steps in a row whose calls used most of the rows there are."""
        before, self._stepped = self._stepped, self._desk.used
        share = self._desk.share_since(before)
        if self._wide_steps < PATIENCE and self._placement != "device":
            self._wide_steps = self._wide_steps + 1 if share > WIDE else 0
            if self._wide_steps == PATIENCE:
                warnings.warn(_explain_wide_unions(share), stacklevel=2)

    def _step(self, home: AdapterRows, tables: list[RowTable], groups: Groups, verdict: Verdict) -> Event:
        after = [self._added[table.name] for table in tables]
        # an evaluation has read rows since; or backward is made again, and no forward has waited for the last step's
        after += [event for event in (home.chosen, home.refreshed) if event is not None]
        after += [verdict.host_ready] if verdict.host_ready is not None else []

        def step() -> None:
            for table in tables:
                table.make_step(self._rule, groups[table.trained.group], verdict)

        home.stepped = self._lanes.host(
            step,
            after=after,
            priority=home.flight.order,
            tag="step",
            traffic_bytes=sum(table.master.numel() * table.step_bytes for table in tables),
        )
        return home.stepped


def _explain_wide_unions(share: float) -> str:
    return (
        f"Each micro-batch has used more than {WIDE:.0%} of the adapters' rows for {PATIENCE} steps in a row (the last "
        f"step's {share:.0%}), so fetching only those spares little: use shorter or fewer sequences per micro-batch, "
        "a wider adapter (`width=`), or keep the rows on the device with `placement='device'`"
    )


def _check_group(group: Mapping[str, Any], steps: RowSteps) -> None:
    if steps == "lazy" and group["weight_decay"]:
        raise ValueError(
            f"`row_optimizer='lazy'` leaves untouched rows as they are, so weight_decay={group['weight_decay']} "
            "would act on some rows alone: set weight_decay=0, or pass row_optimizer='deferred'"
        )
    if steps in ("auto", "deferred") and group["betas"][0] ** 2 >= group["betas"][1]:
        raise ValueError(
            f"`row_optimizer={steps!r}` needs betas[0]**2 < betas[1], got betas={tuple(group['betas'])}: pass "
            "row_optimizer='dense'"
        )


def _check_whole(adapters: Sequence[SparseAdapter], trained: Mapping[int, Trained]) -> None:
    for adapter in adapters:
        known = [name for name in ("keys", "values") if id(getattr(adapter, name)) in trained]
        if len(known) == 1:
            raise ValueError(
                f"Of the adapter `{adapter.path}.meft` only `{known[0]}` are trained, but keys and values live and "
                "travel together: give the optimizer both with requires_grad=True (one of them in a group with lr=0 "
                "and weight_decay=0 stands still), or neither"
            )
    if not trained:
        raise ValueError("No keys and values of the adapters are in the optimizer: build it from `self.parameters()`")


def _own_rows_again(adapters: Sequence[SparseAdapter]) -> None:
    for adapter in adapters:
        adapter.source = None


def _catch_up(tables: Sequence[Rows]) -> None:
    for table in tables:
        table.catch_up()


def _check_rule(rule: Rule, steps: RowSteps) -> None:
    if steps in ("deferred", "lazy") and not (rule.decoupled if steps == "deferred" else len(rule.states) == 2):
        what = "AdamW" if steps == "deferred" else "Adam's moments (SparseAdam)"
        raise ValueError(
            f"`row_optimizer={steps!r}` steps rows by {what}, not by `{rule.name}`: return `torch.optim.AdamW` from "
            "`configure_optimizers`, or pass row_optimizer='dense'"
        )
