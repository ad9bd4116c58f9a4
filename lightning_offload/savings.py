"""What would save memory in a run that has run out of it: settings, each with the bytes that it saves in this run.

The bytes follow from what the run holds and from the formulas by which arenas are laid out; nothing is tried, for
there is no memory to try it with (``planning`` tries, before a run).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_offload.memory.blocks import Unit, has_checkpointing, partition
from lightning_offload.methods.base import DTypes, Flight, Trained
from lightning_offload.methods.homes import weight_dtype
from lightning_offload.methods.host import HostOptimizer
from lightning_offload.methods.lsp import LSP, LSPSettings
from lightning_offload.methods.meft import MEFT, MEFTSettings
from lightning_offload.methods.method import Method
from lightning_offload.methods.row_optimizer import RowOptimizer
from lightning_offload.methods.rules import rule_for
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2, ZO2Settings, resident_units, stored_dtype
from lightning_offload.precision import AnyMethod
from lightning_offload.tables import AnyEngine, device_holds

Place = Literal["device", "host"]

EXPANDABLE = "expandable_segments:True"


@dataclass(frozen=True)
class Run:
    """A run that has run out of memory.

    Attributes:
        who: The strategy's name, or the module's class where it brings its own method.
        module: Attached to a Trainer.
        device: Where it computes.
        method: What trains it; its settings are resolved where an engine was made.
        dtypes: Which dtype lives where.
        engine: What holds memory; ``None`` before there is one, and in an evaluation outside of fit.
    """

    who: str
    module: LightningModule
    device: torch.device
    method: AnyMethod
    dtypes: DTypes
    engine: AnyEngine | None = None

    @property
    def trainer(self) -> Trainer:
        """The module's."""
        return self.module.trainer

    @property
    def ranks(self) -> int:
        """Processes of this training."""
        return self.trainer.world_size if isinstance(self.trainer.strategy, DDPStrategy) else 1

    def strategy_of(self, method: str) -> str:
        """Another method's, for as many devices."""
        return f"`strategy='{method}_offload{'_ddp' * (self.ranks > 1)}'`"

    @property
    def units(self) -> Sequence[Unit]:
        """The module's."""
        return self.engine.units if self.engine is not None else partition(self.module, self.method.settings.blocks)

    @property
    def micro_batches(self) -> int:
        """Per optimizer step."""
        own: Any = getattr(self.module, "offload", None)
        mixed = own.get("accumulate_grad_batches", 1) if isinstance(own, Mapping) else 1
        return max(self.trainer.accumulate_grad_batches, mixed)

    @property
    def transient_bytes(self) -> int | None:
        """On the device: activations and all else that neither module nor engine knows of; not counted on the CPU."""
        if self.device.type != "cuda":
            return None
        known = sum(device_holds(self.engine, self.module, self.device).values())
        return max(torch.cuda.max_memory_allocated(self.device) - known, 0)


@dataclass(frozen=True)
class Saving:
    """A setting and what it saves.

    Attributes:
        words: As the user writes it.
        device_bytes: Saved on the device; ``None`` where nobody counts.
        host_bytes: Saved in host memory.
        kind: What would be less, where the bytes are not known or are at most so many.
    """

    words: str
    device_bytes: int | None = 0
    host_bytes: int = 0
    kind: str = ""

    def bytes_at(self, place: Place, device: torch.device) -> int | None:
        """Saved where memory has run out; the CPU as the device has the host's memory."""
        if device.type == "cpu":
            return None if self.device_bytes is None else self.device_bytes + self.host_bytes
        return self.device_bytes if place == "device" else self.host_bytes


def savings(run: Run, place: Place, at_most: int = 3) -> list[Saving]:
    """Those that save most where memory has run out, the most first; one of which nobody counts the bytes is last."""
    amounts = [(s, s.bytes_at(place, run.device)) for propose in _PROPOSALS if (s := propose(run)) is not None]
    counted = sorted([pair for pair in amounts if (pair[1] or 0) > 0], key=lambda pair: pair[1] or 0, reverse=True)
    uncounted = [saving for saving, count in amounts if count is None][:1]
    return [saving for saving, _ in counted][: at_most - len(uncounted)] + uncounted


def arena_bytes(run: Run, method: Method, dtypes: DTypes) -> int:
    """What the host arenas hold under ``method`` and ``dtypes`` for what the optimizer trains."""
    optimizer, settings = run.trainer.strategy.optimizers[0], method.settings
    rule, claims, stays = rule_for(optimizer, None), method.claim(run.module, run.units), method.stays(run.module)
    trained = _trained(optimizer, run.units)
    claimed = [t for t in trained if id(t.parameter) in claims]
    others = [t for t in trained if id(t.parameter) not in claims | stays and not method.leaves_frozen()]
    common = sum(
        t.parameter.numel()
        * HostOptimizer.bytes_per_element(
            weight_dtype(t.parameter, dtypes), rule, accumulate_on_host=settings.accumulate == "host"
        )
        for t in others
        if t.parameter.numel() >= settings.min_numel
    )
    own = method.host_bytes(claimed, rule, dtypes)
    return common // run.ranks + (own // run.ranks if method.shards else own)  # each steps about as much


def _trained(optimizer: torch.optim.Optimizer, units: Sequence[Unit]) -> list[Trained]:
    owner = {id(p): (name, unit) for unit in units for name, p in unit.parameters.items()}
    return [
        Trained(owner[id(p)][0], p, owner[id(p)][1], Flight(0), index, 0)
        for index, group in enumerate(optimizer.param_groups)
        for p in group["params"]
        if id(p) in owner and p.requires_grad
    ]


def _streamed(run: Run, dtypes: DTypes) -> list[int]:
    """Bytes of each unit that `zo2` streams at its defaults."""
    stay = resident_units(run.units, ZO2Settings(min_numel=run.method.settings.min_numel), dtypes)
    return [
        sum(p.numel() * stored_dtype(p, dtypes).itemsize for p in unit.parameters.values())
        for unit in run.units
        if unit.index not in stay
    ]


def _fits_in_arenas(run: Run) -> Method | None:
    """The run's method where its arenas can be reckoned: it has gradients, and its ``"auto"`` are resolved."""
    method = run.method
    if isinstance(method, ZO2) or not run.trainer.strategy.optimizers or run.trainer.evaluating:
        return None
    settings = method.settings
    is_open = settings.accumulate == "auto" or (isinstance(settings, LSPSettings) and settings.dim == "auto")
    return None if is_open else method


def _with(method: Method, **settings: Any) -> Method:
    made: Any = type(method)
    return made(replace(method.settings, **settings))  # type: ignore[no-any-return]


# Each of these is a change, or none where it would change nothing.


def _half_batch(run: Run) -> Saving | None:
    trainer = run.trainer
    loader = trainer.train_dataloader if trainer.training else None
    size = getattr(loader, "batch_size", None)
    if size == 1:
        return None
    half = f"`batch_size={-(-size // 2)}`" if isinstance(size, int) else "half the `batch_size` of the data loader"
    if not trainer.training:
        words = half
    elif isinstance(run.method, ZO2):
        words = f"`micro_batches={2 * run.method.settings.micro_batches}` (parts that share a visit of the weights)"
    else:
        words = f"{half} with `accumulate_grad_batches={2 * run.micro_batches}`"
    transient = run.transient_bytes
    return Saving(words, None if transient is None else transient // 2, kind="half of what activations hold")


def _recompute(run: Run) -> Saving | None:
    if isinstance(run.method, ZO2) or not run.trainer.training or not has_checkpointing(run.module):
        return None
    blocks, transient = sum(unit.is_block for unit in run.units), run.transient_bytes
    if blocks < 2:
        return None
    kept = None if transient is None else transient * (blocks - 1) // blocks
    words = "gradient checkpointing (`gradient_checkpointing_enable()` of the model)"
    return Saving(words, kept, kind=f"at most, all activations but those of one of {blocks} blocks")


def _narrow(run: Run) -> Saving | None:
    if run.dtypes.compute is not None:
        return None
    name = "16-true" if isinstance(run.method, ZO2) else "bf16-true"
    narrow, on_host, method = DTypes.of(name), 0, _fits_in_arenas(run)
    held = device_holds(run.engine, run.module, run.device)
    if method is not None:
        on_host = arena_bytes(run, method, run.dtypes) - arena_bytes(run, method, narrow)
    elif isinstance(run.engine, ZerothEngine):
        on_host = run.engine.streaming.host_bytes // 2
    else:
        on_host = 0
    beside = ("buffers of the module", "what the method holds beside them")
    return Saving(f"`precision='{name}'`", sum(n for kind, n in held.items() if kind not in beside) // 2, on_host)


def _accumulate(run: Run) -> Saving | None:
    method = _fits_in_arenas(run)
    if method is None or isinstance(method, MEFT) or run.micro_batches < 2 or run.ranks > 1:
        return None
    here = method.settings.accumulate
    other = "device" if here == "host" else "host"
    more = arena_bytes(run, _with(method, accumulate=other), run.dtypes) - arena_bytes(run, method, run.dtypes)
    if other == "device":
        return Saving("`accumulate='device'`", 0 if run.device.type == "cuda" else more, -more)
    gradients = device_holds(run.engine, run.module, run.device).get("gradients", 0)
    return Saving("`accumulate='host'`", gradients, -more)


def _project(run: Run) -> Saving | None:
    method = _fits_in_arenas(run)
    if method is None or method.name != "full" or not rule_for(run.trainer.strategy.optimizers[0], None).decoupled:
        return None
    settings = method.settings
    kept: dict[str, Any] = {name: getattr(settings, name) for name in ("min_numel", "blocks", "accumulate")}
    other = LSP(LSPSettings(**kept))
    saved = arena_bytes(run, method, run.dtypes) - arena_bytes(run, other, run.dtypes)
    return Saving(f"{run.strategy_of('lsp')} (updates in a subspace of each linear weight)", 0, saved)


def _stream(run: Run) -> Saving | None:
    own = getattr(run.module, "offload_method", None)  # of a mixin: the method is the module's
    if own or isinstance(run.method, ZO2) or not (streamed := _streamed(run, run.dtypes)):
        return None
    held = device_holds(run.engine, run.module, run.device)
    slots = min(ZO2Settings().slots, len(streamed)) * max(streamed)
    on_device = sum(streamed) - slots + held.get("gradients", 0)
    method = _fits_in_arenas(run)
    on_host = arena_bytes(run, method, run.dtypes) - sum(streamed) if method is not None else 0
    return Saving(f"{run.strategy_of('zo2')} (weights are streamed, no backward, SGD)", on_device, on_host)


def _fewer_dims(run: Run) -> Saving | None:
    method = _fits_in_arenas(run)
    settings = method.settings if method is not None else None
    if method is None or not isinstance(settings, LSPSettings) or settings.dim == "auto":
        return None
    half: float = settings.dim / 2
    if isinstance(settings.dim, int):
        half = max(settings.dim // 2 // settings.nnz, 1) * settings.nnz
    saved = arena_bytes(run, method, run.dtypes) - arena_bytes(run, _with(method, dim=half), run.dtypes)
    return Saving(f"`dim={half}`", 0, saved)


def _fewer_rows(run: Run) -> Saving | None:
    settings, engine = run.method.settings, run.engine
    if not isinstance(settings, MEFTSettings) or isinstance(engine, ZerothEngine) or engine is None:
        return None
    width = settings.width // 2
    if settings.width % 2 or width < settings.top_k or (settings.experts != "auto" and width % settings.experts):
        return None
    on_device = engine.own.resident_bytes // 2 if isinstance(engine.own, RowOptimizer) else 0
    rows = engine.own.trained if engine.own is not None else ()
    return Saving(f"`width={width}`", on_device, engine.host_bytes(rows) // 2)


def _rows_at_home(run: Run) -> Saving | None:
    own = run.engine.own if run.engine is not None and not isinstance(run.engine, ZerothEngine) else None
    if not isinstance(own, RowOptimizer):
        return None
    return Saving("`placement='host'`", own.resident_bytes)


def _nothing_resident(run: Run) -> Saving | None:
    engine = run.engine
    if not isinstance(engine, ZerothEngine) or engine.method.settings.resident == "auto":
        return None
    blocks = [berth for berth in engine.streaming.berths if berth.resident and berth.unit.is_block]
    return Saving("`resident='auto'`", sum(t.nbytes for berth in blocks for t in berth.stored))


def _expandable(run: Run) -> Saving | None:
    known = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if run.device.type != "cuda" or EXPANDABLE in known:
        return None
    unused = torch.cuda.memory_reserved(run.device) - torch.cuda.memory_allocated(run.device)
    words = f"`PYTORCH_ALLOC_CONF={EXPANDABLE}` in the environment"
    return Saving(words, unused, kind="at most, what torch's allocator holds in fragments")


_PROPOSALS: tuple[Callable[[Run], Saving | None], ...] = (
    _half_batch,
    _recompute,
    _narrow,
    _accumulate,
    _project,
    _stream,
    _fewer_dims,
    _fewer_rows,
    _rows_at_home,
    _nothing_resident,
    _expandable,
)
