"""The engine of ``zo2``: forwards in lock-step over weights that visit the device, and updates one step late.

It knows nothing of Lightning; ten lines drive it::

    engine = ZerothEngine(module, optimizer, ZO2(ZO2Settings()), lanes, DTypes())
    for batch in batches:
        engine.micro_batch(module.loss, [batch])
        engine.step()
    engine.detach()

An update is a row of numbers (``Entry``). A unit applies those it has not seen when it is next on the device, before
its forwards; ``flush`` makes every unit see all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_offload.errors import CheckpointError, NonFiniteError, OffloadError
from lightning_offload.memory.blocks import Unit, partition
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.lanes import Lanes
from lightning_offload.memory.ledger import Span
from lightning_offload.memory.peers import Alone, Peers
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.engine import METHOD, OWN, SETTINGS
from lightning_offload.methods.lockstep import Lockstep, refuse_compiled
from lightning_offload.methods.noises import MezoNoise, Noise, PhiloxNoise
from lightning_offload.methods.perturbed import Perturbed, Stream
from lightning_offload.methods.rules import frozen_groups, refuse_new_groups, refuse_step_hooks
from lightning_offload.methods.steplog import Entry, Header, hash_weights
from lightning_offload.methods.streaming import Leaf
from lightning_offload.methods.uses import Recorder, Uses
from lightning_offload.methods.zo2 import ZO2, compute_dtype, resident_units, stored_dtype
from lightning_offload.numerics.zeroth import DTYPES

STEPS, ENTRIES, SUMS, SKIPS, SEEDS, BASE = "steps", "entries", "sums", "skips", "seeds", "base"
"""Keys of what a checkpoint keeps of a run."""


@dataclass(frozen=True)
class ZerothReport:
    """What the last step did.

    Attributes:
        step: Its number, from 1.
        loss_plus: Mean of l+ over its directions.
        loss_minus: Mean of l-.
        coefficient: Mean of the projected gradients after clipping.
        skipped: Whether it changed nothing because a loss was not finite.
        skipped_in_a_row: How many steps up to this one did.
        skipped_total: Skipped steps since the start.
        reordered_total: Steps in which forwards visited units in another order than before, which costs time.
    """

    step: int = 0
    loss_plus: float = math.nan
    loss_minus: float = math.nan
    coefficient: float = math.nan
    skipped: bool = False
    skipped_in_a_row: int = 0
    skipped_total: int = 0
    reordered_total: int = 0

    @property
    def loss(self) -> float:
        """Mean of l+ and l-."""
        return (self.loss_plus + self.loss_minus) / 2


class ZerothEngine:
    """See the module docstring.

    Attributes:
        log: Every update so far.
        report: What the last step did.

    Args:
        module: The module to train; its ``Parameter`` objects must be final.
        optimizer: ``torch.optim.SGD`` without momentum; carries learning rate, decay and groups.
        method: With its settings.
        lanes: Where it runs.
        dtypes: Which dtype lives where.
        machine: Checked for host memory before anything is allocated; ``None`` skips the check.
        uses: What a dry run has found out about the forward; else the first ``micro_batch`` runs one forward more,
            to find it out.
        units: The module's, where it has been split already.

    Raises:
        PartitionError: A model or ``blocks`` that cannot be split.
        HostMemoryError: The weights do not fit, with ``on_misfit="error"``.
        ValueError: An optimizer, a dtype or a name that it cannot work with.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: ZO2,
        lanes: Lanes,
        dtypes: DTypes,
        *,
        machine: Machine | None = None,
        uses: Uses | None = None,
        units: Sequence[Unit] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.peers: Peers = peers or Alone()
        self.module, self.optimizer, self.method, self.lanes, self.dtypes = module, optimizer, method, lanes, dtypes
        self.units = list(units) if units is not None else partition(module, method.settings.blocks)
        refuse_compiled(module, self.units)
        self.log: list[Entry] = []
        self.report = ZerothReport()
        self.closed = False
        self._steps = 0
        self._seed: int | None = None  # of the step that has begun
        self._reordered = False  # the step that has begun
        self._sums: list[tuple[int, list[float]]] = []  # weight and losses of each part so far, by kind
        self._before: list[tuple[int, list[float]]] = []  # those of a step that a checkpoint has begun
        self._undo: list[Callable[[], Any]] = []
        self._base: str | None = None
        settings = method.settings
        if self.peers.world % settings.direction_ranks:
            raise ValueError(
                f"`direction_ranks={settings.direction_ranks}` does not divide {self.peers.world} rank(s): directions "
                "are shared out by `zo2_offload_ddp`, among a divisor of its devices"
            )
        share = settings.direction_ranks
        self._directions = range(self.peers.rank % share, settings.directions, share)
        _check_optimizer(optimizer)
        group_of = _groups_of(module, optimizer)
        resident = resident_units(self.units, settings, dtypes)
        if machine is not None:
            self._require_host(machine, resident)
        self._check_dtypes(group_of)
        self.streaming = Perturbed(
            module,
            self.units,
            lanes,
            stored=lambda p: stored_dtype(p, dtypes),
            compute=lambda p: compute_dtype(p, dtypes),
            group_of=group_of,
            resident=resident,
            slots=settings.slots - 1,  # the scratch buffer is one of them
            prefetch=settings.prefetch,
        )
        self.streaming.write_back_every = settings.write_back_every
        self.streaming.noise = self.noise = self._make_noise()
        self._learned = False
        self.lockstep = self._make_lockstep(())
        self._hooks = self.lockstep.install()
        self._undo.append(self._take_off_lockstep)
        self._install()
        if uses is not None:
            self._learn(uses)

    # What the strategy calls, in the order of a step.

    def micro_batch(self, run: Callable[[Any], Tensor], parts: Sequence[Any], weights: Sequence[int] = ()) -> Tensor:
        """The forwards of one micro-batch.

        Before the first one, the first part is run once more where nobody has told how the forward uses the weights:
        with the weights as they are, without logging, and with metrics and random states put back.

        Args:
            run: The loss of one part, a scalar; called ``2 * directions`` times for each.
            parts: Of the batch; they share one visit of the weights.
            weights: How much each part counts (its samples, its tokens); all alike by default.

        Returns:
            l+ of the first direction, over all parts, detached.

        Raises:
            OffloadError: The forwards of one visit disagree on the order of units.
        """
        if self._seed is None:
            self._seed = self.noise.seed()
            if self.method.settings.noise == "mezo":  # it draws one
                self._seed = self.peers.first(self._seed)
        counts = list(weights) or [1] * len(parts)
        streams = [
            Stream(direction, sign, part)
            for direction in self._directions
            for sign in (1, -1)
            for part in range(len(parts))
        ]
        if not self._learned:
            self.rehearse(run, parts[0])
        losses = self._losses(run, parts, streams)
        for part, count in enumerate(counts):
            mine = [loss for stream, loss in zip(streams, losses, strict=True) if stream.part == part]
            self._sums.append((count, [self.lanes.read(loss, 0.0) for loss in mine]))
        self.lanes.mark("")
        if len(parts) == 1:
            return losses[0]
        return torch.stack([loss * count for loss, count in zip(losses, counts, strict=False)]).sum() / sum(counts)

    def rehearse(self, run: Callable[[Any], Tensor], part: Any) -> None:
        """Find out from one forward, which leaves nothing, in what order weights are used, and what no visit announces.

        Raises:
            OffloadError: A weight that is streamed is used outside any call.
        """
        recorder = Recorder(self.units)
        try:
            with recorder.watching():
                self.lockstep.rehearse(lambda: _checked(run(part)))
        except RuntimeError:
            self._require_calls(recorder.uses(self.module))  # may say what is wrong
            raise
        self.streaming.follow(self.lockstep.visits)
        self.streaming.give_back()  # those of forwards that see weights as they are
        self._learn(recorder.uses(self.module))

    def step(self, clip: Clip | None = None) -> None:
        """Make an update of the losses since the last step; weights take it when they are next on the device.

        Raises:
            NonFiniteError: More than ``max_skips`` steps in a row had a loss that is not finite, or one where torch
                is to detect anomalies.
            OffloadError: Other parameters are to be trained than at first.
        """
        sums = self._window()
        self._sums, self._before = [], []
        if not sums:
            return
        self._refuse_changes()
        self.lanes.mark("step")
        self._step(sums, clip)
        self.lanes.mark("")

    def _window(self) -> list[tuple[int, list[float]]]:
        """Losses of this step so far, of all ranks."""
        return [*self._before, *self._everyones()]

    def _everyones(self) -> list[tuple[int, list[float]]]:
        """Losses of all ranks: those that share out the directions of a batch have a part of each."""
        rows = [[float(count), *losses] for count, losses in self._sums]
        found = self.peers.gather(rows, "losses")
        share, merged = self.method.settings.direction_ranks, []
        for first in range(0, self.peers.world, share):
            for parts in zip(*found[first : first + share], strict=True):
                losses = [0.0] * (2 * self.method.settings.directions)
                for at, (_, *mine) in enumerate(parts):
                    for place, loss in enumerate(mine):
                        losses[2 * (at + place // 2 * share) + place % 2] = loss
                merged.append((int(parts[0][0]), losses))
        return merged

    def _step(self, sums: Sequence[tuple[int, list[float]]], clip: Clip | None) -> None:
        self._steps += 1
        seed, self._seed = self._seed, None
        if seed is None:  # this rank has had no batch
            seed = self.noise.seed()
        plus, minus = _means(sums)
        slopes = _slopes(plus, minus, self.method.settings.eps)
        finite = all(map(math.isfinite, slopes))
        if clip is not None:
            slopes = [max(-clip.value, min(clip.value, slope)) if slope == slope else slope for slope in slopes]
        self.report = replace(
            self.report,
            step=self._steps,
            loss_plus=math.fsum(plus) / len(plus),
            loss_minus=math.fsum(minus) / len(minus),
            coefficient=sum(slopes) / len(slopes),
            skipped=self.method.settings.skip_nonfinite and not finite,
            reordered_total=self.report.reordered_total + self._reordered,
        )
        self._reordered = False
        if not finite and torch.is_anomaly_enabled():
            raise NonFiniteError(
                f"Step {self._steps} had a loss that is not finite (l+ = {self.report.loss_plus}, l- = "
                f"{self.report.loss_minus}), and `detect_anomaly=True` makes the first one an error. No weight was "
                "changed. Look at the batch and at the learning rate; without `detect_anomaly` up to `max_skips` such "
                "steps in a row are left out."
            )
        if self.report.skipped:
            self._skip()
            return
        self.report = replace(self.report, skipped_in_a_row=0)
        entries = self._entries(seed, slopes)
        self.log += entries
        with torch.no_grad():
            self.streaming.push(entries)

    def flush(self) -> None:
        """Every weight at rest has seen every update, and nothing is in flight. Idempotent."""
        with torch.no_grad():
            self.streaming.catch_up()
        self.lanes.mark("")
        self.lanes.synchronize()

    def adopt(self) -> None:
        """Somebody else has written weights at rest: they are the truth."""
        self.streaming.forget()

    def restart_log(self) -> None:
        """Other weights have been loaded: the log begins with them."""
        self.adopt()
        self.log, self._base = [], None

    def drop(self) -> None:
        """After an exception: forget the losses of the unfinished step."""
        self._sums, self._before, self._seed = [], [], None
        self.streaming.rest()
        self.lanes.synchronize()

    def detach(self) -> None:
        """Remove everything the engine hung on the module; streamed weights stay in host memory."""
        try:
            self.close()
        finally:
            self.unhook()

    def unhook(self) -> None:
        """Remove everything the engine hung on the module."""
        while self._undo:
            self._undo.pop()()

    def close(self) -> None:
        """Flush, stop workers, free device buffers; the weights and the log stay readable. Idempotent."""
        if self.closed:
            return
        try:
            self.flush()
        finally:
            self.closed = True
            self.lockstep.close()
            self.streaming.close()
            self.lanes.close()

    # State, by parameter name.

    def weights(self) -> list[tuple[Leaf, Tensor]]:
        """Every streamed weight as a CPU tensor that shares the arenas' memory: no second copy."""
        self.flush()
        return [(leaf, leaf.parameter.data) for berth in self.streaming.streamed for leaf in berth.leaves]

    def optimizer_state(self) -> dict[str, Any]:
        """Groups alone: there are no moments."""
        packed: dict[str, Any] = self.optimizer.state_dict()
        return packed

    def load_optimizer_state(self, packed: dict[str, Any]) -> None:
        """The inverse of ``optimizer_state``.

        Raises:
            CheckpointError: The state belongs to another optimizer or another model.
        """
        try:
            self.optimizer.load_state_dict({"state": {}, "param_groups": packed["param_groups"]})
        except ValueError as error:
            raise CheckpointError(f"The checkpoint's optimizer state does not fit this optimizer: {error}") from error

    def extras(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights, which have seen every entry of the log."""
        self.flush()
        own = {
            STEPS: self._steps,
            ENTRIES: [(e.step, e.direction, e.seed, e.coefficient, e.lr, e.weight_decay) for e in self.log],
            SUMS: self._window(),
            SKIPS: (self.report.skipped_in_a_row, self.report.skipped_total),
            SEEDS: (self._seed, self.noise.state()),
            BASE: self._base,
        }
        return {METHOD: self.method.name, SETTINGS: self.method.decisive(), OWN: own}

    def load_extras(self, extras: Mapping[str, Any]) -> None:
        """The inverse of ``extras``, after the weights of the same checkpoint have been loaded.

        Raises:
            CheckpointError: It was made with other settings that decide the bits of a step.
        """
        self.adopt()
        self.streaming.skip_to_head()
        asked, held = self.method.decisive(), extras[SETTINGS]
        if changed := [name for name in asked if held.get(name, asked[name]) != asked[name]]:
            name = changed[0]
            raise CheckpointError(
                f"The checkpoint was made with {name}={held[name]!r}, this run has {name}={asked[name]!r}: continue "
                "with the setting of the checkpoint, or load the weights alone (`load_from_checkpoint`)."
            )
        own = extras[OWN]
        self._steps, self._base = own[STEPS], own[BASE]
        self._sums, self._before = [], list(own[SUMS])  # of all ranks, each of which adds its own
        self.log = [Entry(*row) for row in own[ENTRIES]]
        in_a_row, total = own[SKIPS]
        self.report = ZerothReport(step=self._steps, skipped_in_a_row=in_a_row, skipped_total=total)
        self._seed, state = own[SEEDS]
        self.noise.load(state)

    def header(self) -> Header:
        """What the log refers to; hashes the weights where that has not been done, so ask before the first step.

        Raises:
            OffloadError: Weights that nobody hashed have been updated since.
        """
        if self._base is None:
            if self.log:
                raise OffloadError(
                    "The weights that this run began with were not hashed then, so its log has nothing to refer to: "
                    "pass `log_file` from a run's first step on; without one this run can go on, but not be replayed"
                )
            self._base = hash_weights(self.module.parameters())
        settings = self.method.settings
        everywhere = settings.noise == "philox" and settings.distribution != "gaussian"
        leaves = sorted((x for berth in self.streaming.berths for x in berth.leaves), key=lambda leaf: leaf.place)
        names = {leaf.name: leaf for leaf in leaves}
        groups = len(self.optimizer.param_groups)
        return Header(
            base=self._base,
            noise=settings.noise,
            distribution=settings.distribution,
            eps=settings.eps,
            directions=settings.directions,
            rounding=self.dtypes.rounding,
            groups=tuple(tuple(n for n, leaf in names.items() if leaf.group == at) for at in range(groups)),
            stored={name: str(leaf.rest.dtype) for name, leaf in names.items()},
            shapes={name: tuple(leaf.parameter.shape) for name, leaf in names.items()},
            device=None if everywhere else self.lanes.device.type,
            compiled=not everywhere
            and self.lanes.device.type == "cpu"
            and isinstance(self.noise, PhiloxNoise)
            and self.noise.compiled,
        )

    @property
    def device_bytes(self) -> int:
        """What the engine holds on the device: slots, scratch, resident weights."""
        return self.streaming.device_bytes

    @property
    def unit_names(self) -> Sequence[str]:
        """In the order of their first visit."""
        return [self.units[index].name for index in self.streaming.places]

    def stop_trace(self) -> list[Span]:
        """What lanes did since ``lanes.ledger.start_trace()``, each for the unit at its place in ``unit_names``."""
        shown = self.streaming
        at = {index: place for place, index in enumerate(shown.places, start=1)}
        spans = self.lanes.ledger.stop_trace()
        return [replace(s, order=at[shown.unit_of(s.order)] if s.order >= 0 else -1) for s in spans]

    @property
    def trained(self) -> list[Leaf]:
        """The trained parameters."""
        return [leaf for berth in self.streaming.berths for leaf in berth.trained]

    # Forwards.

    def _losses(self, run: Callable[[Any], Tensor], parts: Sequence[Any], streams: Sequence[Stream]) -> list[Tensor]:
        """Of every stream, fp32 scalars."""
        assert self._seed is not None
        shown = self.streaming
        shown.streams, shown.step, shown.seed = streams, self._steps + 1, self._seed
        before = self.lockstep.visits
        try:
            losses = self.lockstep.run(lambda k: _checked(run(parts[streams[k].part])), len(streams))
        finally:
            shown.streams = ()
        self._compare(before, self.lockstep.visits)
        shown.follow(self.lockstep.visits)
        return losses

    def _compare(self, before: Sequence[int], visits: Sequence[int]) -> None:
        """Count a step in which the order changed, and say so once."""
        if not before or before == visits:
            return
        if not self._reordered and not self.report.reordered_total:
            warnings.warn(
                f"method `{self.method.name}`: forwards of step {self._steps + 1} visit units in another order than "
                "before (layer drop, a choice by the batch?). The result is the same, but weights that came up ahead "
                "of time were the wrong ones, and the link idles. `report.reordered_total` counts such steps.",
                stacklevel=2,
            )
        self._reordered = True

    # Stepping.

    def _entries(self, seed: int, slopes: Sequence[float]) -> list[Entry]:
        groups = frozen_groups(self.optimizer)
        lr = tuple(float(group["lr"]) for group in groups)
        decay = tuple(float(group["weight_decay"]) for group in groups)
        none = (0.0,) * len(decay)
        return [
            Entry(self._steps, direction, seed, slope / len(slopes), lr, none if direction else decay)
            for direction, slope in enumerate(slopes)
        ]

    def _skip(self) -> None:
        """The step is dropped whole: no update, no decay; the next one draws anew."""
        report = self.report
        self.report = replace(
            report,
            skipped_in_a_row=report.skipped_in_a_row + 1,
            skipped_total=report.skipped_total + 1,
        )
        if self.report.skipped_in_a_row > self.method.settings.max_skips:
            raise NonFiniteError(
                f"{self.report.skipped_in_a_row} steps in a row had a loss that is not finite (step {self._steps}: "
                f"l+ = {report.loss_plus}, l- = {report.loss_minus}). No weight was changed in these steps. Lower the "
                "learning rate or `eps`, or look at the data; `max_skips` is how many are put up with."
            )

    # Attaching.

    def _make_noise(self) -> Noise:
        settings = self.method.settings
        if settings.noise == "philox":
            assert settings.seed is not None, "resolve the method first"
            rounding, kernels = self.dtypes.rounding, settings.kernels
            return PhiloxNoise(settings.seed, settings.eps, settings.distribution, rounding, kernels)
        leaves = sorted(self.trained, key=lambda leaf: leaf.place)
        return MezoNoise(leaves, settings.eps, self.lanes.device)

    def _check_dtypes(self, trained: Collection[int]) -> None:
        """Before any weight has moved."""
        named = {n: p for n, p in self.module.named_parameters() if id(p) in trained}
        for name, parameter in named.items():
            kept, seen = stored_dtype(parameter, self.dtypes), compute_dtype(parameter, self.dtypes)
            if self.method.settings.noise == "philox" and not {kept, seen} <= set(DTYPES):
                raise ValueError(
                    f"noise='philox' moves weights in float32, but `{name}` is kept in {kept} and seen in {seen}: pass "
                    "a model in float32 or 16 bits, or noise='mezo' with one dtype for both"
                )
            if self.method.settings.noise == "mezo" and kept != seen:
                raise ValueError(
                    f"noise='mezo' keeps weights as forwards see them, but `{name}` is kept in {kept} and seen in "
                    f"{seen}: leave `wire` and `master` of `OffloadPrecision` out"
                )

    def _require_calls(self, uses: Uses) -> None:
        owner = {name: unit for unit in self.units for name in unit.parameters}
        for name in uses.functional:
            if not self.streaming.is_resident(owner[name].index):
                raise OffloadError(
                    f"`{name}` is used outside its module's call, where nothing tells that it is needed, so "
                    f"`{owner[name].name}` cannot be streamed: pass resident=[{owner[name].name!r}]"
                )

    def _learn(self, uses: Uses) -> None:
        """Hold what forwards use outside any call."""
        self._require_calls(uses)
        self._learned = True
        outside = {unit.index for unit in self.units if unit.name in uses.early - uses.skipped}
        outside |= {unit.index for unit in self.units if not unit.parameters.keys().isdisjoint(uses.functional)}
        for place in outside:
            self.streaming.hold(place)
        if outside:
            self._hang_lockstep(outside)

    def _hang_lockstep(self, always: Collection[int]) -> None:
        """In the place of the one before."""
        self._take_off_lockstep()
        self.lockstep = self._make_lockstep(always)
        self._hooks = self.lockstep.install()

    def _make_lockstep(self, always: Collection[int]) -> Lockstep:
        return Lockstep(self.module, self.units, self.streaming, always=always)

    def _take_off_lockstep(self) -> None:
        while self._hooks:
            self._hooks.pop()()
        self.lockstep.close()

    def _install(self) -> None:
        flush, restart = self.flush, self.restart_log
        self._undo += [
            self.module.register_state_dict_pre_hook(lambda *_: flush()).remove,
            self.module.register_load_state_dict_pre_hook(lambda *_: flush()).remove,
            self.module.register_load_state_dict_post_hook(lambda *_: restart()).remove,
            refuse_new_groups(self.optimizer),
        ]

    def _refuse_changes(self) -> None:
        trained = {id(leaf.parameter) for leaf in self.trained}
        changed = trained ^ _groups_of(self.module, self.optimizer).keys()
        if not changed:
            return
        name, now = next((n, p.requires_grad) for n, p in self.module.named_parameters() if id(p) in changed)
        raise OffloadError(
            f"`{name}.requires_grad` has become {now} since training was set up, when it was decided which weights are "
            "moved. Set it before `fit`, or start a new `fit`."
        )

    def _require_host(self, machine: Machine, resident: set[int]) -> None:
        streamed = [p for unit in self.units if unit.index not in resident for p in unit.parameters.values()]
        machine.require_host(
            sum(p.numel() * stored_dtype(p, self.dtypes).itemsize for p in streamed),
            freed_bytes=sum(p.numel() * p.element_size() for p in streamed if p.device.type == "cpu"),
            what=f"method `{self.method.name}` on {sum(p.numel() for p in streamed):,} streamed parameters",
            on_misfit=self.method.settings.on_misfit,
        )


def _means(sums: Sequence[tuple[int, list[float]]]) -> tuple[list[float], list[float]]:
    """l+ and l- of each direction, over all parts; exact in double precision where there is one."""
    total = sum(count for count, _ in sums)
    means = [
        math.fsum(count * loss for count, loss in zip([c for c, _ in sums], kind, strict=True)) / total
        for kind in zip(*(losses for _, losses in sums), strict=True)
    ]
    return means[0::2], means[1::2]


def _slopes(plus: Sequence[float], minus: Sequence[float], eps: float) -> list[float]:
    """``(l+ - l-) / (2 eps)`` in fp32, as MeZO has it."""
    above, below = (torch.tensor(losses, dtype=torch.float32, device="cpu") for losses in (plus, minus))
    slopes: list[float] = ((above - below) / (2 * eps)).tolist()
    return slopes


def _groups_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """The group of each trained parameter, by id."""
    known = {id(parameter) for parameter in module.parameters()}
    groups: dict[int, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                raise ValueError(
                    f"Parameter {position} of the optimizer's group {index} (shape {tuple(parameter.shape)}) is not a "
                    "parameter of the module. Build the optimizer from `self.parameters()`, after the module is final."
                )
            if parameter.requires_grad:
                groups[id(parameter)] = index
    return groups


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer)
    if not optimizer.param_groups:
        raise ValueError(
            "`configure_optimizers` returned no optimizer, which method `zo2` takes its parameters and learning rate "
            "from. Return `torch.optim.SGD(params, lr=1e-6)`."
        )
    if kind is not torch.optim.SGD:
        raise ValueError(
            f"`{kind.__name__}` cannot be used with method `zo2`: it has no gradients to keep moments of, and moments "
            "would take two or three times the memory of the weights. Return `torch.optim.SGD(params, lr=1e-6)` from "
            "`configure_optimizers`."
        )
    refuse_step_hooks(optimizer)
    for option in ("momentum", "dampening", "nesterov", "maximize"):
        if any(group[option] for group in optimizer.param_groups):
            raise ValueError(f"`SGD({option}=...)` cannot be used with method `zo2`: leave `{option}` out")


def _checked(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise OffloadError(
            f"method `zo2` needs a loss from every forward, a tensor of one element; got {type(loss).__name__}"
            + (f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else "")
        )
    return loss.detach().reshape(()).float()
