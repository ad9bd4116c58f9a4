"""What would make a plan fit: the smallest changes, each tried by planning it.

A trial is a dry run, so none is made of a change that cannot reach what is missing (no batch is small enough for
weights that are too many), and none twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_offload.errors import OffloadError
from lightning_offload.memory.blocks import has_checkpointing
from lightning_offload.methods.lsp import LSPSettings
from lightning_offload.methods.meft import MEFTSettings
from lightning_offload.methods.zo2 import ZO2Settings
from lightning_offload.planning.methods import FULL, NATIVE, SERIAL, SPARSE, SUBSPACE, ZEROTH
from lightning_offload.planning.result import THE_RUN_ITSELF, Advice, Plan
from lightning_offload.planning.scenario import Dry, Scenario

LEAST_CHUNK = 128
"""Tokens per chunk of the loss below which its matrix products become slow."""

EXPANDABLE = "PYTORCH_ALLOC_CONF=expandable_segments:True"
"""Not a key: it goes before the command."""

SMALLEST_BATCHES = 3
"""How many of the smallest sizes are tried until the model takes one: batch norm refuses a single sample."""

GUESSES = 2
"""Trials of a micro-batch that follow a straight line; those after them halve what is left."""

SUMS = "sums over micro-batches"
"""Row of host memory."""

_TRANSIENT = ("activations", "logits", "gradients", "batch", "allocator")


@dataclass(frozen=True)
class _Change:
    """One thing that is done differently: in words, on the command line, and to a scenario."""

    words: str
    override: str
    apply: Callable[[Scenario], Scenario]


@dataclass(frozen=True)
class _Tried:
    """A scenario after some changes, and what came of it."""

    scenario: Scenario
    plan: Plan
    changes: tuple[_Change, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the plan does."""
        return self.plan.fits


def advise(scenario: Scenario, plan: Plan) -> tuple[Advice, ...]:
    """Changes after which the plan fits, the smallest first: each that is enough alone; where none is, several at once.

    Nothing where all that is known here, alone or together, is not enough.
    """
    return () if plan.fits else _Search(scenario, plan).advice()


class _Search:
    """Trials from one plan that does not fit."""

    def __init__(self, scenario: Scenario, plan: Plan) -> None:
        self.asked = _Tried(scenario, plan)
        self._known: dict[frozenset[str], _Tried | None] = {frozenset(): self.asked}

    def advice(self) -> tuple[Advice, ...]:
        """See ``advise``."""
        if _is_too_large(self.asked.plan):
            return ()
        alone = [self._expandable(), *(self._alone(propose) for propose in (*_PROPOSALS, _keep_on_device))]
        enough = [tried for tried in alone if tried is not None and tried.fits]
        if not enough and (_can_reach(self.asked.plan) or any(propose(self.asked) for propose in _LASTING)):
            together = self._together()
            enough = [together] if together.fits else []
        return tuple(self._advice(tried) for tried in enough)

    def _expandable(self) -> _Tried | None:
        """The allocator's other way, which costs no trial and no time."""
        plan = self.asked.plan
        other = plan.device_expandable
        if other is None or other.bytes >= plan.device.bytes:
            return None
        change = _Change("expandable segments, by the environment", EXPANDABLE, lambda scenario: scenario)
        return _Tried(self.asked.scenario, replace(plan, device=other), (change,))

    def _alone(self, propose: _Proposal) -> _Tried | None:
        if propose in _TRANSIENT_ONLY and not _can_reach(self.asked.plan):
            return None
        if propose is _smaller_batch:
            return self._batch(self.asked)
        return next((self._try([change]) for change in propose(self.asked)), None)

    def _together(self) -> _Tried:
        """One change after the other until it fits; then without those that were not needed."""
        tried = self.asked
        for propose in _PROPOSALS:
            tried = self._also(tried, propose)
            if tried.fits:
                break
        for change in tried.changes if tried.fits else ():
            tried = self._without(tried, change)
        return tried

    def _also(self, tried: _Tried, propose: _Proposal) -> _Tried:
        """With this change too, where there is one that the model takes."""
        made = (self._try([*tried.changes, change]) for change in propose(tried))
        return next((taken for taken in made if taken is not None), tried)

    def _without(self, tried: _Tried, change: _Change) -> _Tried:
        """The same without this change where it still fits then; of micro-batches, with the largest that fit."""
        fewer = self._try([other for other in tried.changes if other.override != change.override])
        if fewer is not None and not fewer.fits and change.override.startswith("data."):
            fewer = self._batch(fewer)
        return fewer if fewer is not None and fewer.fits else tried

    def _batch(self, tried: _Tried) -> _Tried | None:
        """The largest micro-batch of ``_sizes`` that fits.

        A bisection that begins where memory would suffice if it grew by a straight line: two to five trials of the
        forty divisors of 40,000. A size that the model refuses (one sample, for batch norm) is too small.
        """
        whole, best = tried.scenario.batch_size, None
        sizes = _sizes(whole)
        low, high, guess, trials = 0, len(sizes), _likely_size(tried.plan, whole), 0
        while low < high:
            at = min(max(bisect_right(sizes, guess) - 1, low), high - 1) if trials < GUESSES else (low + high) // 2
            made = self._try([*tried.changes, _micro_batches(tried.scenario, sizes[at])])
            if made is not None and not made.fits:
                high = at
            else:
                low, best = at + 1, made or best
            guess = guess if made is None else _on_line(made.plan, sizes[at], tried.plan, whole)
            trials += 1
        return best

    def _try(self, changes: Sequence[_Change]) -> _Tried | None:
        """What comes of these changes; ``None`` where the model or its optimizer does not take them."""
        key = frozenset(change.override for change in changes)
        if key not in self._known:
            scenario = self.asked.scenario
            for change in changes:
                scenario = change.apply(scenario)
            try:
                self._known[key] = _Tried(scenario, Dry(scenario).plan(only_if_it_fits=True), tuple(changes))
            except (OffloadError, ValueError):
                self._known[key] = None
        return self._known[key]

    def _advice(self, tried: _Tried) -> Advice:
        asked = self.asked.plan
        return Advice(
            changes=tuple(change.words for change in tried.changes),
            overrides=tuple(change.override for change in tried.changes),
            device_bytes_saved=asked.device.bytes - tried.plan.device.bytes,
            host_bytes_saved=asked.host.bytes - tried.plan.host.bytes,
            step_s=tried.plan.step_s,
        )


_Proposal = Callable[[_Tried], list[_Change]]
"""Changes of one kind: the next is for a model that does not take the one before."""


def _offload(tried: _Tried) -> list[_Change]:
    """Where the CPU is the device its memory is the host's: nothing is gained."""
    if tried.scenario.method != NATIVE or tried.scenario.machine.device_type == "cpu":
        return []
    words = "optimizer state and masters in host memory (strategy `full_offload`)"
    return [_Change(words, "method=full", lambda scenario: replace(scenario, method=FULL))]


def _checkpoint(tried: _Tried) -> list[_Change]:
    scenario = tried.scenario
    if scenario.method == ZEROTH or scenario.checkpointing or not has_checkpointing(scenario.module):
        return []
    return [
        _Change(
            "activations computed again in backward (gradient checkpointing of the model)",
            "model.gradient_checkpointing=true",
            lambda scenario: replace(scenario, checkpointing=True),
        )
    ]


def _chunked_loss(tried: _Tried) -> list[_Change]:
    """For models that take their loss in chunks, as those of the package do."""
    scenario = tried.scenario
    now = getattr(scenario.module, "loss_chunk_tokens", None) if scenario.step is None else None
    tokens = tried.plan.tokens // scenario.micro_batches
    if now is None or scenario.loss_chunk_tokens is not None or min(now or tokens, tokens) <= LEAST_CHUNK:
        return []
    return [
        _Change(
            f"the loss in chunks of {LEAST_CHUNK} tokens (`loss_chunk_tokens` of the model)",
            f"model.loss_chunk_tokens={LEAST_CHUNK}",
            lambda scenario: replace(scenario, loss_chunk_tokens=LEAST_CHUNK),
        )
    ]


def _share_visits(tried: _Tried) -> list[_Change]:
    """Of zo2: the same traffic, the activations of a sample."""
    settings, size = tried.scenario.settings, tried.scenario.batch_size
    if not isinstance(settings, ZO2Settings) or settings.micro_batches >= size:
        return []
    return [
        _Change(
            f"the batch in {size} parts that share one visit of the weights (`micro_batches` of the strategy)",
            f"trainer.strategy.micro_batches={size}",
            lambda scenario: replace(scenario, settings=replace(scenario.settings, micro_batches=size)),  # type: ignore[call-arg]
        )
    ]


def _smaller_batch(tried: _Tried) -> list[_Change]:
    sizes = _sizes(tried.scenario.batch_size)
    return [_micro_batches(tried.scenario, size) for size in sizes[:SMALLEST_BATCHES]]


def _sizes(whole: int) -> list[int]:
    """Sizes of micro-batches to try in place of ``whole``, from the smallest.

    The divisors, which leave the samples per step as they are. A prime has none but 1; for it also the even sizes
    nearest to an equal share, with which a step has up to half a micro-batch more or less.
    """
    divisors = [size for size in range(1, whole) if whole % size == 0]
    if len(divisors) != 1:
        return divisors
    shares = (-(-whole // count) for count in range(2, whole))
    return sorted({1, *(share - share % 2 for share in shares if share > 1)})


def _micro_batches(scenario: Scenario, size: int) -> _Change:
    asked = scenario.batch_size * scenario.micro_batches
    count = round(asked / size)
    other = "" if count * size == asked else f", {count * size} samples per step instead of {asked}"
    return _Change(
        f"micro-batches of {size}, {count} of them per step (`accumulate_grad_batches={count}`){other}",
        f"data.batch_size={size} trainer.accumulate_grad_batches={count}",
        lambda scenario: replace(scenario.with_batch_size(size), micro_batches=count),
    )


def _accumulate_elsewhere(tried: _Tried) -> list[_Change]:
    """On the device where the host has too little, in host memory where the device has."""
    scenario, plan = tried.scenario, tried.plan
    if scenario.method not in (SERIAL, FULL, SUBSPACE):
        return []
    if scenario.micro_batches < 2 or scenario.machine.device_type == "cpu":
        return []
    sums = plan.host.holds.get(SUMS, 0)
    if sums and not plan.host.fits:
        return [_accumulate("device", "micro-batches accumulate on the device (`accumulate='device'` of the strategy)")]
    if not sums and not plan.device.fits:
        return [_accumulate("host", "micro-batches accumulate in host memory (`accumulate='host'` of the strategy)")]
    return []


def _accumulate(where: Literal["device", "host"], words: str) -> _Change:
    def apply(scenario: Scenario) -> Scenario:
        return replace(scenario, settings=replace(scenario.settings, accumulate=where))  # type: ignore[call-arg]

    return _Change(words, f"trainer.strategy.accumulate={where}", apply)


def _precision(tried: _Tried) -> list[_Change]:
    if tried.scenario.precision in ("bf16-true", "16-true"):
        return []
    if tried.scenario.method == ZEROTH:
        return [_narrow()]
    masters = "without fp32 masters" if tried.scenario.method == NATIVE else "fp32 masters on the host"
    return [
        _Change(
            f"bf16 weights, {masters} (`precision='bf16-true'`)",
            "precision=bf16-true",
            lambda scenario: replace(scenario, precision="bf16-true"),
        )
    ]


def _narrow() -> _Change:
    return _Change(
        "fp16 weights, small steps rounded stochastically (`precision='16-true'`)",
        "precision=16-true",
        lambda scenario: replace(scenario, precision="16-true"),
    )


def _project(tried: _Tried) -> list[_Change]:
    """No masters, and states of d x d; updates are in a subspace then. Saves a part of the arenas and nothing else."""
    arenas = sum(count for kind, count in tried.plan.host.holds.items() if kind != THE_RUN_ITSELF)
    if tried.scenario.method in (SUBSPACE, ZEROTH, SPARSE) or tried.plan.host.fits or _missing(tried.plan) > arenas:
        return []
    words = "updates in a subspace of each linear weight, whose state is d x d (strategy `lsp_offload`)"
    return [_Change(words, "method=lsp", lambda scenario: replace(scenario, method=SUBSPACE))]


def _smaller_dim(tried: _Tried) -> list[_Change]:
    """Half the dimension is a quarter of the state."""
    settings = tried.scenario.settings
    if not isinstance(settings, LSPSettings) or settings.dim == "auto" or tried.plan.host.fits:
        return []
    half: float = settings.dim / 2
    if isinstance(settings.dim, int):
        half = max(settings.dim // 2 // settings.nnz, 1) * settings.nnz
    return [
        _Change(
            f"subspaces of half the dimension (`dim={half}` of the strategy)",
            f"trainer.strategy.dim={half}",
            lambda scenario: replace(scenario, settings=replace(scenario.settings, dim=half)),  # type: ignore[call-arg]
        )
    ]


def _rows_at_home(tried: _Tried) -> list[_Change]:
    """Of meft: no keys, no values but those in use."""
    settings = tried.scenario.settings
    if not isinstance(settings, MEFTSettings) or settings.placement == "host" or tried.plan.device.fits:
        return []
    return [
        _Change(
            "keys in host memory too, where rows are then chosen (`placement='host'` of the strategy)",
            "trainer.strategy.placement=host",
            lambda scenario: replace(scenario, settings=replace(scenario.settings, placement="host")),  # type: ignore[call-arg]
        )
    ]


def _narrower(tried: _Tried) -> list[_Change]:
    """Of meft: half the rows, down to those that a token uses."""
    settings = tried.scenario.settings
    if not isinstance(settings, MEFTSettings) or tried.plan.host.fits:
        return []
    width = settings.width // 2
    if settings.width % 2 or width < settings.top_k or (settings.experts != "auto" and width % settings.experts):
        return []
    return [
        _Change(
            f"adapters of half as many rows (`width={width}` of the strategy)",
            f"trainer.strategy.width={width}",
            lambda scenario: replace(scenario, settings=replace(scenario.settings, width=width)),  # type: ignore[call-arg]
        )
    ]


def _keep_on_device(tried: _Tried) -> list[_Change]:
    """Where the host is what is too small; under bf16-true small updates would be lost without masters."""
    others = (NATIVE, ZEROTH, SPARSE)
    if tried.scenario.method in others or tried.plan.host.fits or tried.scenario.precision == "bf16-true":
        return []
    return [
        _Change(
            "everything on the device (no offload strategy)",
            "method=none",
            lambda scenario: replace(scenario, method=NATIVE),
        )
    ]


_PROPOSALS: tuple[_Proposal, ...] = (
    _offload,
    _checkpoint,
    _chunked_loss,
    _share_visits,
    _smaller_batch,
    _accumulate_elsewhere,
    _precision,
    _project,
    _smaller_dim,
    _rows_at_home,
    _narrower,
)
"""In the order in which they are put together: what changes least first."""

_TRANSIENT_ONLY = (_checkpoint, _chunked_loss, _share_visits, _smaller_batch)
"""Those that save nothing of what is held all the time."""

_LASTING = (_offload, _accumulate_elsewhere, _precision, _project, _smaller_dim, _rows_at_home, _narrower)
"""Those that do."""


def _is_too_large(plan: Plan) -> bool:
    """Whether the weights alone are too many for the device, even in 16 bits."""
    if plan.method == ZEROTH:
        return False
    return plan.device.limit_bytes is not None and 2 * plan.parameters > plan.device.limit_bytes


def _can_reach(plan: Plan) -> bool:
    """Whether there is room for what is held all the time, all of it in host memory where the device is another."""
    transient = _transient_bytes(plan)
    places = [(plan.device, transient), (plan.host, transient if plan.device.limit_bytes is None else 0)]
    return all(
        memory.fits or memory.bytes - 1.02 * transient <= (memory.limit_bytes or 0)  # kernels' workspaces: 2 %
        for memory, transient in places
    )


def _likely_size(plan: Plan, whole: int) -> float:
    """The batch that would fit if all that is transient grew with it."""
    return whole * (1 - _missing(plan) / max(_transient_bytes(plan), 1))


def _on_line(one: Plan, size: int, other: Plan, whole: int) -> float:
    """The batch between two that would fit if memory grew by a straight line."""
    slope = (_missing(other) - _missing(one)) / (whole - size)
    return size - _missing(one) / slope if slope > 0 else size


def _transient_bytes(plan: Plan) -> int:
    return sum(count for kind, count in plan.device.holds.items() if kind.startswith(_TRANSIENT))


def _missing(plan: Plan) -> int:
    """Bytes too many, of the place where that is most; negative where there is room."""
    places = (plan.device, plan.host)
    return max(memory.bytes - memory.limit_bytes for memory in places if memory.limit_bytes is not None)
