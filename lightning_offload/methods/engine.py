"""The engine: hangs a method on a module and an optimizer, and drives it through training steps.

It knows nothing of Lightning; ten lines drive it::

    engine = Engine(module, optimizer, Full(FullSettings()), lanes, DTypes())
    for batch in batches:
        with engine.micro_batch():
            loss = module(batch)
        engine.stepping = True
        loss.backward()
        engine.step()
    engine.detach()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_offload.errors import CheckpointError, OffloadError, PeersLostError
from lightning_offload.memory.blocks import Unit, partition
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.lanes import Lanes
from lightning_offload.memory.ledger import Span
from lightning_offload.memory.peers import Alone, Peers, owners
from lightning_offload.methods.arrivals import Arrivals
from lightning_offload.methods.base import Clip, DTypes, Moment, Part, StepReport, Trained, Verdict
from lightning_offload.methods.homes import settle, settled_dtype, weight_dtype
from lightning_offload.methods.host import HostOptimizer
from lightning_offload.methods.method import Method, Site
from lightning_offload.methods.muster import Muster
from lightning_offload.methods.part import form_gradient
from lightning_offload.methods.resident import ResidentOptimizer
from lightning_offload.methods.rules import check_groups, frozen_groups, refuse_new_groups, rule_for
from lightning_offload.methods.sender import Sender
from lightning_offload.methods.uses import Uses
from lightning_offload.methods.verdict import Judge, Tally
from lightning_offload.numerics.norms import adopt_

MASTERS, GRADIENTS, SKIPS, METHOD, SETTINGS = "masters", "gradients", "skips", "method", "settings"
OWN = "state"
"""Keys of the checkpointed extras; everything else is rebuilt."""


class Engine:
    """See the module docstring.

    Attributes:
        stepping: Set before the backward of the last micro-batch of a step; gradients then leave as they arrive.
        gradients_visible: Whether somebody reads or writes ``p.grad`` between backward and step; gradients then stay.

    Args:
        module: The module to train; its ``Parameter`` objects must be final. Weights may be on the CPU or on the
            device, in any dtype: masters are taken from them before they are rounded to ``dtypes.compute``.
        optimizer: Carries learning rate and groups; its own state stays empty.
        method: What happens to claimed parameters.
        lanes: Where it happens.
        dtypes: Which dtype lives where.
        machine: Checked for host memory before anything is allocated; ``None`` skips the check.
        expects_clip: Whether steps will be clipped, so that norms are taken as gradients leave.
        uses: What a dry run has found out about the forward; learned from the first one all the same.
        units: The module's, where it has been split already.
        peers: The other ranks, with the same module and optimizer; a parameter is stepped on the host of one of them.

    Raises:
        PartitionError: A model or ``blocks`` that cannot be split.
        HostMemoryError: The arenas do not fit, with ``on_misfit="error"``.
        ValueError: An optimizer or a parameter that cannot be offloaded.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        lanes: Lanes,
        dtypes: DTypes,
        *,
        machine: Machine | None = None,
        expects_clip: bool = False,
        uses: Uses | None = None,
        units: Sequence[Unit] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.module, self.optimizer, self.method, self.lanes, self.dtypes = module, optimizer, method, lanes, dtypes
        self.peers: Peers = peers or Alone()
        self.stepping = False
        self.gradients_visible = False
        self.units = list(units) if units is not None else partition(module, method.settings.blocks)
        self.arrivals = Arrivals(module, self.units, lanes, uses, self.peers)
        self.muster = Muster(self.peers, self._deliver, self._waits, self._forget)
        self.rule = rule_for(optimizer, method.settings.kernels)
        self._expects_clip = expects_clip
        self._steps = 0
        self._undo: list[Callable[[], Any]] = []
        self.closed = False

        settings = method.settings
        claims = method.claim(module, self.units)
        try:
            if method.leaves_frozen():
                self._freeze_all_but(claims)
            self.trained = self._find_trained()
            claimed = [t for t in self.trained if id(t.parameter) in claims]
            others = [t for t in self.trained if id(t.parameter) not in claims]
            stays = method.stays(module)
            small = [t for t in others if t.parameter.numel() < settings.min_numel or id(t.parameter) in stays]
            on_host = [t for t in others if t not in small]
            self._choose_owners([*claimed, *on_host])
            if machine is not None:
                self._require_host(machine, claimed, on_host)
            # several ranks decide together: a part of the norms is not known here
            checks = settings.skip_nonfinite and not method.layer_wise
            decides_late = expects_clip or checks or self.peers.world > 1
            site = Site(
                self.rule,
                lanes,
                dtypes,
                settings.accumulate == "host",
                decides_late,
                lambda: self.gradients_visible,
                self.peers,
                self.muster.mean_,
            )
            self.own = method.make_part(claimed, site)
            self.host = HostOptimizer(on_host, site)
            self.resident = ResidentOptimizer(small, self.rule, lanes, dtypes, self.muster.mean_)
            self.senders: tuple[Sender, ...] = (*([self.own] if self.own is not None else []), self.host)
            self.parts: tuple[Part, ...] = (*self.senders, self.resident)
            self._part_of = {id(t): part for part in self.parts for t in part.trained}
            self._judge = Judge(lanes, len(self.trained), settings.max_skips) if decides_late else None
            self._tally = None
            if settings.skip_nonfinite and not decides_late:
                self._tally = Tally(lanes, len(small), settings.max_skips)
            self._verdict: Verdict | None = None
            self._calibrating: Callable[[Trained], None] | None = None
            self.muster.expect([t for part in self.senders if part.leaves for t in part.trained], self.resident.trained)
            self._settle_frozen()
            self._install()
        except BaseException:
            self.unhook()
            raise

    @property
    def report(self) -> StepReport:
        """What the last step did that the host has finished judging."""
        judge = self._judge or self._tally
        return judge.report if judge is not None else StepReport()

    # What the strategy calls, in the order of a step.

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one forward of training: each unit waits for its own weights."""
        with self.arrivals.forward(), self.own.forward() if self.own is not None else nullcontext():
            yield
        if self.own is not None or self.peers.world > 1:
            self.publish()  # units that this forward has not used: nothing of a step before is under way in backward
        self.arrivals.marks.forward_done()

    def gradient_arrived(self, trained: Trained) -> None:
        """Backward has put a gradient into ``p.grad``; it leaves if it is complete and nobody looks at it."""
        part = self._part_of[id(trained)]
        assert isinstance(part, Sender)
        if not part.waits(trained):
            return
        if self._calibrating is not None:
            self.muster.arrived(trained)
            return
        if self._leaves:
            self.muster.arrived(trained)
        self.arrivals.marks.gradient(trained)

    def _deliver(self, trained: Trained) -> None:
        """It is this gradient's turn."""
        if self._calibrating is None:
            self._part_of[id(trained)].gradient_ready(trained, self._moment())
            return
        self.muster.mean_([trained.gradient()], "gradients to fit to")
        if self.peers.world == 1 or trained.gradient().any():
            self._calibrating(trained)
        trained.parameter.grad = None

    def _waits(self, trained: Trained) -> bool:
        part = self._part_of[id(trained)]
        return part.waits(trained) if isinstance(part, Sender) else trained.parameter.grad is not None

    def _forget(self, trained: Trained) -> None:
        part = self._part_of[id(trained)]
        if isinstance(part, Sender):
            part.take_back(trained)

    def factors_arrived(self, trained: Trained, left: Tensor, right: Tensor) -> None:
        """Backward has found the factors of a gradient, (tokens, m) and (tokens, n), and does not form it.

        ``gradient_arrived`` follows once all uses of the weight have been seen.
        """
        if self._calibrating is not None or self.gradients_visible:
            form_gradient(trained, left, right)
        else:
            assert self.own is not None
            self.own.factors_ready(trained, left, right, self._moment())

    @property
    def calibration_due(self) -> bool:
        """Whether the step to come needs a ``calibrate`` before it."""
        return self.own is not None and self.own.calibration_due(self._steps + 1)

    def calibrate(self, backward: Callable[[], None]) -> None:
        """Fit what is due to the gradients of a batch apart; none of them is left behind.

        Args:
            backward: Forward and backward of the batch; called twice where all are judged together.
        """
        assert self.own is not None
        self.flush()
        kept = [(p, p.grad) for p in self.module.parameters()]
        try:
            for use in self.own.calibrations(self._steps + 1):
                for parameter, _ in kept:
                    parameter.grad = None
                self._calibrating = use
                backward()
                self.muster.finish()
                self.muster.reset()
        finally:
            self._calibrating = None
            for parameter, gradient in kept:
                parameter.grad = gradient

    def step(self, clip: Clip | None = None) -> None:
        """Issue one optimizer step with every gradient there is, clipped as ``clip`` says.

        Returns before it is done: ``flush`` waits for it.

        Raises:
            NonFiniteError: More than ``max_skips`` steps in a row had a non-finite gradient norm (raised here, or by
                the next call that finds it).
            OffloadError: A parameter became trainable after the engine was attached, or it is closed.
        """
        if self.closed:
            raise OffloadError(
                "The optimizer was stepped after the end of the fit that it belongs to: call `fit` again."
            )
        self._refuse_strangers()
        self.arrivals.marks.step()
        self.stepping = True
        self.meet(visible=False)
        for part in self.parts:
            part.collect(self._steps + 1)
        self.muster.reset()
        present = [t for t in self.trained if self._part_of[id(t)].has_gradient(t)]
        self.stepping = False
        if not present:
            self.arrivals.marks.done()
            return
        backward_done = self.lanes.compute()
        verdict = self._decide(clip, present)
        groups = frozen_groups(self.optimizer)
        readers = [reader for part in self.parts for reader in part.update(groups, verdict, backward_done)]
        if self._judge is not None:
            self._judge.readers += readers
        if self._tally is not None:
            self._tally.count(verdict, readers)
        self._verdict = None
        self._steps += 1
        self.arrivals.marks.done()

    def meet(self, *, visible: bool) -> None:
        """Backward is over: gradients are those of all ranks.

        Args:
            visible: Others look at them before the step, so all of them are averaged now.
        """
        if self.muster.met or self.peers.world == 1:
            return
        self.publish()  # where nothing has run forward
        for part in self.senders:
            part.meet()
        if visible:
            self.muster.meet()
        else:
            self.muster.finish()

    def publish(self) -> None:
        """Compute issued from here on sees every new weight."""
        self.arrivals.publish()

    @property
    def unit_names(self) -> Sequence[str]:
        """In the order of their first call."""
        return self.arrivals.uses.order

    def stop_trace(self) -> list[Span]:
        """What lanes did since ``lanes.ledger.start_trace()``, each for the unit at its place in ``unit_names``."""
        return self.lanes.ledger.stop_trace()

    def flush(self) -> None:
        """Wait until nothing is in flight: every parameter of the module equals its rounded master."""
        if self.own is not None and not self.closed:
            self.own.catch_up()
        try:
            self.lanes.synchronize()
        finally:
            self.arrivals.publish()  # after a worker's error too: what has been made is not lost
        self.lanes.synchronize()

    def adopt(self) -> None:
        """Take over weights that somebody else wrote: where a weight differs from its rounded master."""
        self.flush()
        for part in self.parts:
            part.adopt()

    def drop(self) -> None:
        """After an exception: let what is in flight land, and forget the gradients of the unfinished step."""
        try:
            self.flush()
        finally:
            self.stepping, self._verdict = False, None
            self.muster.reset()
            for part in self.parts:
                part.drop()

    def detach(self) -> None:
        """Remove everything the engine hung on the module and the optimizer; weights keep their latest values."""
        try:
            self.close()
        finally:
            self.unhook()
            self.muster.release()

    def unhook(self) -> None:
        """Remove everything the engine hung on the module and the optimizer; for those who call it by hand."""
        while self._undo:
            self._undo.pop()()

    def close(self) -> None:
        """Land what is in flight, stop workers, free device buffers; state stays readable. Idempotent."""
        try:
            self.flush()
        finally:
            self.lanes.close()
            for part in self.senders:
                part.free_rings()
            self.closed = True

    # State, by parameter name.

    def weights(self) -> list[tuple[Trained, Tensor]]:
        """Every offloaded weight as a CPU tensor that shares the arenas' memory: no second copy."""
        self.flush()
        return [(t, self.host.weight_of(t)) for t in self.host.trained if t.owner == self.peers.rank]

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state as ``torch.optim.Optimizer.state_dict`` has it, as CPU tensors."""
        self.flush()
        self._refuse_parted()
        packed: dict[str, Any] = self.optimizer.state_dict()
        states = {t.position: self.peers.bring(self._part_of[id(t)].state_of(t), t.owner) for t in self.trained}
        packed["state"] = {position: state for position, state in sorted(states.items()) if state}
        return packed

    def load_optimizer_state(self, packed: dict[str, Any]) -> None:
        """The inverse of ``optimizer_state``; moments keep the engine's dtype, whatever dtype they come in.

        Raises:
            CheckpointError: The state belongs to another optimizer or another model.
        """
        self.flush()
        check_groups(self.optimizer, self.rule, packed["param_groups"])
        try:
            self.optimizer.load_state_dict({"state": {}, "param_groups": packed["param_groups"]})
        except ValueError as error:
            raise CheckpointError(f"The checkpoint's optimizer state does not fit this optimizer: {error}") from error
        for t in self.trained:
            self._part_of[id(t)].load_state_of(t, packed["state"].get(t.position, {}))

    def extras(self) -> dict[str, Any]:
        """What torch's layout has no place for: masters, gradients of an unfinished window, skips."""
        self.flush()
        masters = {
            t.name: m.cpu() for t in self.trained if (m := self.peers.bring(self._master_of(t), t.owner)) is not None
        }
        own = self.own.extras() if self.own is not None else {}
        owner = {t.name: t.owner for t in self.trained}
        report = self.report
        skips = {"in_a_row": report.skipped_in_a_row, "total": report.skipped_total, "steps": self._steps}
        return {
            METHOD: self.method.name,
            SETTINGS: self.method.decisive(),
            OWN: {name: self.peers.bring(held, owner[name]) for name, held in own.items()},
            MASTERS: masters,
            GRADIENTS: self._gradients(),
            SKIPS: skips,
        }

    def _refuse_parted(self) -> None:
        if self.peers.left:
            raise PeersLostError(
                "Nothing can be saved after an exception on several devices: what other ranks step is with them. "
                "Continue with the last checkpoint."
            )

    def _master_of(self, trained: Trained) -> Tensor | None:
        return self._part_of[id(trained)].master_of(trained)

    @torch.no_grad()
    def _gradients(self) -> dict[str, Tensor]:
        """Of an unfinished window; of several ranks the mean, with which each of them may go on."""
        found = {}
        for t in self.trained:
            pending = self._part_of[id(t)].pending_of(t)
            found[t.name] = t.parameter.grad if pending is None else pending
        anywhere = self.peers.any([found[t.name] is not None for t in self.trained])
        gradients = {}
        for t in (t for t, there in zip(self.trained, anywhere, strict=True) if there):
            pending = found[t.name]
            pending = torch.zeros_like(t.parameter) if pending is None else pending.detach()
            if self.peers.world > 1:
                pending = pending.clone()
                self.peers.mean_([pending], "state")
            gradients[t.name] = pending.cpu()
        return gradients

    @torch.no_grad()
    def load_extras(self, extras: dict[str, Any]) -> None:
        """The inverse of ``extras``, after the weights of the same checkpoint have been loaded."""
        self.flush()
        for t in self.trained:
            master = self._master_of(t)
            if master is not None and t.name in extras[MASTERS]:
                master.copy_(extras[MASTERS][t.name])
                adopt_(master, t.parameter.to(master.device))  # weights that others had written were saved as written
        if self.own is not None and extras[METHOD] == self.method.name:
            self.own.load_extras(extras[OWN])
        self.load_gradients(extras[GRADIENTS])
        skips = extras[SKIPS]
        self._steps = skips["steps"]
        for judge in filter(None, (self._judge, self._tally)):
            judge.resume(self._steps, skipped_in_a_row=skips["in_a_row"], skipped_total=skips["total"])

    def load_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put the gradients of an unfinished window, by name, where they accumulate."""
        for t in self.trained:
            if t.name not in gradients:
                continue
            part = self._part_of[id(t)]
            is_sent = gradients[t.name].shape != t.parameter.shape
            if isinstance(part, Sender) and (part.sums_on_host or is_sent):
                part.load_pending_of(t, gradients[t.name])
            else:
                t.parameter.grad = gradients[t.name].to(t.parameter.device, t.parameter.dtype, copy=True)

    # Attaching.

    def _find_trained(self) -> list[Trained]:
        """The optimizer's trainable parameters, in its order, with the units that own them."""
        owner = {id(p): (name, unit) for unit in self.units for name, p in unit.parameters.items()}
        trained, position = [], 0
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in owner:
                    raise ValueError(
                        f"Parameter {position} of the optimizer (shape {tuple(parameter.shape)}) is not a parameter of "
                        "the module. Build the optimizer from `self.parameters()`, after the module is final."
                    )
                name, unit = owner[id(parameter)]
                if parameter.requires_grad:
                    _check_dtype(name, parameter)
                    trained.append(Trained(name, parameter, unit, self.arrivals.flights[unit.index], index, position))
                position += 1
        return trained

    def _choose_owners(self, trained: Sequence[Trained]) -> None:
        chosen = owners([t.parameter.numel() for t in trained], self.peers.world)
        for t, owner in zip(trained, chosen, strict=True):
            t.owner = owner

    def host_bytes(self, trained: Sequence[Trained]) -> int:
        """Exactly what the host arenas hold for these parameters."""
        own = {id(t) for t in self.own.trained} if self.own is not None else set()
        claimed = [t for t in trained if id(t) in own]
        common = {id(t) for t in self.host.trained}
        return self._arena_bytes(claimed, [t for t in trained if id(t) in common])

    def _arena_bytes(self, claimed: Sequence[Trained], on_host: Sequence[Trained]) -> int:
        accumulates = self.method.settings.accumulate == "host"
        if self.method.shards:
            claimed = [t for t in claimed if t.owner == self.peers.rank]
        on_host = [t for t in on_host if t.owner == self.peers.rank]
        common = sum(
            t.parameter.numel()
            * HostOptimizer.bytes_per_element(
                weight_dtype(t.parameter, self.dtypes), self.rule, accumulate_on_host=accumulates
            )
            for t in on_host
        )
        return common + self.method.host_bytes(claimed, self.rule, self.dtypes)

    @property
    def device_bytes(self) -> int:
        """What the engine holds on the device beside the weights: gradients on their way, small parameters' state."""
        return sum(part.device_bytes for part in self.senders) + self.resident.nbytes

    def _require_host(self, machine: Machine, claimed: Sequence[Trained], on_host: Sequence[Trained]) -> None:
        moving = coming = 0
        if self.lanes.device.type != "cpu":  # weights leave host memory for the device as their masters are made
            moving = sum(p.numel() * p.element_size() for p in self.module.parameters() if p.device.type == "cpu")
        else:  # where they come to stay
            coming = sum(p.numel() * p.element_size() for p in self.module.parameters() if p.is_meta)
        numel = sum(t.parameter.numel() for t in (*claimed, *on_host))
        machine.require_host(
            self._arena_bytes(claimed, on_host) + coming,
            freed_bytes=moving,
            what=f"method `{self.method.name}` on {numel:,} parameters",
            on_misfit=self.method.settings.on_misfit,
        )

    def _decide(self, clip: Clip | None, present: Sequence[Trained]) -> Verdict:
        """What this step is decided by."""
        verdict = self._own_verdict()
        if clip is not None and self.steps_early:
            raise OffloadError(
                "The step is to be clipped, but its units may step before: attach with `expects_clip=True` "
                "(`Trainer(gradient_clip_val=...)` from the start)"
            )
        verdict.clip, verdict.names = clip, [t.name for t in present]
        if self._judge is not None:
            self._judge.decide(verdict, present, [norm for part in self.senders for norm in part.host_norms()])
        elif self._tally is not None:
            self._tally.decide(verdict, [t for t in present if self._part_of[id(t)] is self.resident])
        return verdict

    def _own_verdict(self) -> Verdict:
        """Of the step that is under way."""
        if self._verdict is None:
            skips = self.method.settings.skip_nonfinite
            self._verdict = Verdict(None, skips, self._steps + 1, local=self._tally is not None)
        return self._verdict

    def _freeze_all_but(self, claims: set[int]) -> None:
        for parameter in self.module.parameters():
            if parameter.requires_grad and id(parameter) not in claims:
                parameter.requires_grad_(False)
                self._undo.append(partial(parameter.requires_grad_, True))

    def _settle_frozen(self) -> None:
        """Weights that are not trained: to the device, in the compute dtype."""
        trained = {id(t.parameter) for t in self.trained}
        for unit in self.units:
            for parameter in unit.parameters.values():
                if id(parameter) not in trained:
                    settle(parameter, self.lanes.device, settled_dtype(parameter, self.dtypes))

    def _install(self) -> None:
        self._undo += self.arrivals.install()
        self.arrivals.marks.expect([t for part in self.senders for t in part.trained])
        for part in self.senders:
            self._undo += part.install(self.gradient_arrived, self.factors_arrived)
        flush, adopt = self.flush, self.adopt
        self._undo += [
            self.module.register_state_dict_pre_hook(lambda *_: flush()).remove,
            self.module.register_load_state_dict_pre_hook(lambda *_: flush()).remove,
            self.module.register_load_state_dict_post_hook(lambda *_: adopt()).remove,
        ]
        self._undo.append(refuse_new_groups(self.optimizer))

    @property
    def _leaves(self) -> bool:
        """Whether a gradient goes as it arrives."""
        return (self.stepping or self.method.settings.accumulate == "host") and not self.gradients_visible

    def _moment(self) -> Moment:
        early = (frozen_groups(self.optimizer), self._own_verdict()) if self._eager else None
        return Moment(self._steps + 1, self.stepping, early)

    @property
    def _eager(self) -> bool:
        """Whether a unit may step under backward: nothing is decided by all gradients together.

        Never in the first step, in which a parameter may turn out to receive its gradient twice.
        """
        return self.stepping and self.steps_early and self._steps > 0

    @property
    def steps_early(self) -> bool:
        """Whether units step under backward once the first step has been made."""
        return self._judge is None and not self._expects_clip

    def _refuse_strangers(self) -> None:
        known = {id(t.parameter) for t in self.trained}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in known:
                    self.method.claim(self.module, self.units)  # what is wrong with it, if the method knows
                    name = next(n for u in self.units for n, p in u.parameters.items() if p is parameter)
                    raise OffloadError(
                        f"`{name}` has a gradient but was frozen when training was set up, so it has no state on the "
                        "host. Set `requires_grad=True` before `fit`, or start a new `fit`."
                    )


def _check_dtype(name: str, parameter: nn.Parameter) -> None:
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"`{name}` is trained in {parameter.dtype}, which cannot be offloaded; use float32 or bfloat16 weights"
        )
