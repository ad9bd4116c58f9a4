"""Streams in lock-step: the bits of forwards of their own, in the order promised, whatever goes wrong."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import gc
import random
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_offload.errors import OffloadError, RaceError
from lightning_offload.memory.blocks import Unit, partition
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.memory.lanes import Lanes
from lightning_offload.methods.lockstep import Lockstep
from lightning_offload.methods.uses import Recorder
from tests.families import FAMILIES
from tests.helpers import lanes_of
from tests.zoo import ZOO, first_tensor

EPS = 1e-2


class Recording:
    """Notes every call of the visitor."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def arrive(self, unit: Unit) -> None:
        self.calls.append(("arrive", unit.index))

    def present(self, unit: Unit, stream: int) -> None:
        self.calls.append(("present", unit.index, stream))

    def leave(self, unit: Unit) -> None:
        self.calls.append(("leave", unit.index))


def sign(stream: int) -> float:
    return (1 - 2 * (stream % 2)) * (1 + stream // 2)


class Perturbing(Recording):
    """Points each weight at `W + sign * eps * z`; at rest at NaN, so that a use without a visit shows."""

    def __init__(self, units: list[Unit], eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps
        self.home = {id(p): p.data for unit in units for p in unit.parameters.values()}
        self.rest = {key: torch.full_like(value, float("nan")) for key, value in self.home.items()}
        for unit in units:
            self._point(unit, self.rest)

    def noisy(self, unit: Unit, stream: int) -> dict[int, Tensor]:
        made = {}
        for place, p in enumerate(unit.parameters.values()):
            generator = torch.Generator().manual_seed(1000 * unit.index + place)
            z = torch.randn(p.shape, generator=generator)
            made[id(p)] = self.home[id(p)] + sign(stream) * self.eps * z.to(p.dtype)
        return made

    def present(self, unit: Unit, stream: int) -> None:
        super().present(unit, stream)
        self._point(unit, self.noisy(unit, stream))

    def leave(self, unit: Unit) -> None:
        super().leave(unit)
        self._point(unit, self.rest)

    def all_of(self, units: list[Unit], stream: int) -> None:
        torch.clear_autocast_cache()
        for unit in units:
            self._point(unit, self.noisy(unit, stream))

    def restore(self, units: list[Unit]) -> None:
        for unit in units:
            self._point(unit, self.home)

    def _point(self, unit: Unit, where: dict[int, Tensor]) -> None:
        for p in unit.parameters.values():
            p.data = where[id(p)]


@contextlib.contextmanager
def installed(lockstep: Lockstep) -> Iterator[Lockstep]:
    removers = lockstep.install()
    try:
        yield lockstep
    finally:
        for remove in removers:
            remove()
        lockstep.close()


def outside_calls(module: nn.Module, units: list[Unit], forward: Callable[[], Any]) -> list[int]:
    """Units with weights that are used while nobody calls a module that holds them."""
    recorder = Recorder(units)
    with torch.no_grad(), recorder.watching():
        forward()
    uses = recorder.uses(module)
    return [u.index for u in units if (u.name in uses.early) or set(u.parameters) & set(uses.functional)]


def check_equal(module: nn.Module, forward: Callable[[], Tensor], streams: int) -> Perturbing:
    """Losses in lock-step are those of whole forwards with whole models perturbed; the weights are as before."""
    units = partition(module)
    always = outside_calls(module, units, forward)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    visitor = Perturbing(units)
    state = torch.get_rng_state()
    expected = []
    for stream in range(streams):
        visitor.all_of(units, stream)
        torch.set_rng_state(state)
        with torch.no_grad():
            expected.append(forward())
    torch.set_rng_state(state)
    assert not torch.equal(expected[0], expected[1])
    for unit in units:
        visitor.leave(unit)
    visitor.calls.clear()
    with installed(Lockstep(module, units, visitor, always=always)) as lockstep:
        losses = lockstep.run(lambda stream: forward(), streams)
    visitor.restore(units)
    for ours, theirs in zip(losses, expected, strict=True):
        assert torch.equal(ours, theirs)
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]), name
    check_order(visitor.calls, lockstep.visits, streams)
    return visitor


def check_order(calls: list[tuple[Any, ...]], visits: tuple[int, ...], streams: int) -> None:
    """Each visit arrives, presents every stream, and leaves once; a unit is never there twice."""
    assert tuple(call[1] for call in calls if call[0] == "arrive") == visits
    there: dict[int, set[int]] = {}
    for kind, index, *stream in calls:
        if kind == "arrive":
            assert index not in there
            there[index] = set()
        elif kind == "present":
            there[index].add(stream[0])
        else:
            assert there.pop(index) == set(range(streams))
    assert not there


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("name", ZOO)
def test_streams_compute_the_bits_of_forwards_of_their_own(name: str, streams: int) -> None:
    module, inputs = ZOO[name]()
    check_equal(module, lambda: first_tensor(module(**inputs)), streams)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_further_families(name: str) -> None:
    module, inputs = FAMILIES[name]()
    check_equal(module, lambda: first_tensor(module(**inputs)), 2)


def stack(width: int = 4, layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def recorded(module: nn.Module, **more: Any) -> tuple[Lockstep, Recording]:
    visitor = Recording()
    return Lockstep(module, partition(module), visitor, **more), visitor


def test_order_of_calls() -> None:
    module = stack(layers=2)
    lockstep, visitor = recorded(module)
    with installed(lockstep):
        lockstep.run(lambda stream: module(torch.ones(1, 4)), 3)
    expected = []
    for index in (0, 1):
        expected += [("arrive", index), *[("present", index, k) for k in range(3)], ("leave", index)]
    assert visitor.calls == expected
    assert lockstep.visits == (0, 1)


class Parent(nn.Module):
    """Owns a weight of its own around two children, and uses it before, between and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.second(self.scale * self.first(self.scale * x))


def test_parent_is_presented_again_after_each_turn() -> None:
    module = nn.ModuleDict({"parent": Parent()})["parent"]
    visitor = check_equal(module, lambda: module(torch.ones(1, 4)), 2)
    parent = 0
    assert visitor.calls.count(("arrive", parent)) == visitor.calls.count(("leave", parent)) == 1
    assert visitor.calls.count(("present", parent, 0)) == 3
    assert visitor.calls[-1] == ("leave", parent)


class Tied(nn.Module):
    """A head that is an entry of two units, and is called in chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.body = stack()
        self.head = nn.Linear(4, 8)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.embed(ids))
        return torch.cat([self.head(part) for part in hidden.split(1)])


def test_module_of_two_units_and_called_in_chunks() -> None:
    module, ids = Tied(), torch.tensor([[1, 2], [3, 4], [5, 6]])
    visitor = check_equal(module, lambda: module(ids), 2)
    embed, bias = 0, 4
    assert visitor.calls.count(("arrive", embed)) == 4
    assert visitor.calls.count(("arrive", bias)) == 3
    # one turn for both: each is presented once per stream and visit
    assert visitor.calls.count(("present", embed, 1)) == 4


def test_a_unit_inside_itself_is_visited_once() -> None:
    outer, inner = nn.Sequential(), nn.Linear(4, 4)
    outer.add_module("inner", inner)
    unit = Unit(0, "outer", outer, False, dict(inner.named_parameters()), (outer, inner))
    visitor = Recording()
    with installed(Lockstep(outer, [unit], visitor)) as lockstep:
        lockstep.run(lambda stream: outer(torch.ones(1, 4)), 2)
    assert visitor.calls == [("arrive", 0), ("present", 0, 0), ("present", 0, 1), ("leave", 0)]


def test_albert_visits_its_block_once_per_layer() -> None:
    module, inputs = ZOO["albert"]()
    lockstep, _ = recorded(module)
    with installed(lockstep):
        lockstep.run(lambda stream: module(**inputs).loss, 2)
    assert max(map(lockstep.visits.count, lockstep.visits)) == 3


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.body, self.idle = nn.Linear(4, 4), stack(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(nn.functional.linear(x, self.used.weight))
        return nn.functional.linear(hidden, self.used.weight, self.used.bias)


def test_weights_used_outside_any_call_are_presented_at_every_turn() -> None:
    module = Functional()
    visitor = check_equal(module, lambda: module(torch.ones(1, 4)), 2)
    assert visitor.calls[0] == ("arrive", 0)
    assert visitor.calls.count(("present", 0, 1)) == 4  # the start, and three blocks


def test_a_unit_that_never_runs_is_not_visited() -> None:
    module = Functional()
    lockstep, visitor = recorded(module, always=[0])
    with installed(lockstep):
        lockstep.run(lambda stream: module(torch.ones(1, 4)), 2)
    idle = next(u.index for u in partition(module) if u.name == "idle")
    assert idle not in lockstep.visits
    assert ("arrive", idle) not in visitor.calls


def test_dropout_masks_agree_between_streams() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)).train()
    check_equal(module, lambda: module(torch.ones(3, 4)), 4)
    units = partition(module)
    visitor = Perturbing(units, eps=0.0)
    with installed(Lockstep(module, units, visitor)) as lockstep:
        first, *others = lockstep.run(lambda stream: module(torch.ones(3, 4)), 4)
    assert all(torch.equal(first, other) for other in others)


def draws() -> tuple[float, ...]:
    return random.random(), random.gauss(0, 1), float(np.random.normal()), float(np.random.rand()), float(torch.rand(1))


@pytest.mark.parametrize("odd", [False, True], ids=["pairs", "second normal kept"])
def test_generators_are_those_of_a_run_alone(odd: bool) -> None:
    module = stack()
    seen: list[list[tuple[float, ...]]] = [[] for _ in range(3)]

    def forward(stream: int) -> None:
        x = torch.ones(1, 4)
        for layer in module:
            x = layer(x)
            if odd:
                seen[stream].append((random.gauss(0, 1), float(np.random.normal())))
            if stream != 2:  # which draws less than the others
                seen[stream].append(draws())

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    lockstep, _ = recorded(module)
    with installed(lockstep):
        lockstep.run(forward, 3)
        after = draws()
    ours, seen = seen, [[] for _ in range(3)]
    for stream in (2, 1, 0):
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        forward(stream)
    assert ours == seen
    assert draws() == after


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.threads = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.addmm.default
        self.threads.add(threading.get_ident())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is nn.functional.linear
        return func(*args, **(kwargs or {}))


def test_modes_of_the_caller_see_every_stream() -> None:
    module = stack()
    lockstep, _ = recorded(module)
    with installed(lockstep):
        with Counting() as operations, Functions() as functions, torch.device("meta"):
            made = lockstep.run(lambda stream: torch.ones(1), 3)
        assert [tensor.device.type for tensor in made] == ["meta"] * 3
        with operations, functions:
            lockstep.run(lambda stream: module(torch.ones(1, 4)), 3)
        assert operations.count == functions.count == 9
        assert len(operations.threads) == 3
        lockstep.run(lambda stream: module(torch.ones(1, 4)), 3)  # the workers have let go of them
        assert operations.count == functions.count == 9


def test_fake_mode() -> None:
    with FakeTensorMode() as mode:
        module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
        lockstep, _ = recorded(module)
        with installed(lockstep):
            made = lockstep.run(lambda stream: module(torch.ones(1, 4)), 3)
    assert all(isinstance(tensor, FakeTensor) and tensor.fake_mode is mode for tensor in made)


class Copied(Recording):
    """Streams beyond the first read weights that a copy has brought, `waiting` for it or not."""

    def __init__(self, lanes: Lanes, waiting: bool) -> None:
        super().__init__()
        self.lanes, self.waiting = lanes, waiting
        (self.slot,), (self.home,) = (lanes.buffers(name, [16], torch.float32, "device") for name in ("slot", "home"))

    def present(self, unit: Unit, stream: int) -> None:
        if stream > 0:
            copied = self.lanes.copy([self.slot], [self.home], "h2d", after=[self.lanes.compute()])
            if self.waiting:
                self.lanes.wait_compute(copied)
            next(iter(unit.parameters.values())).data = self.slot.view(4, 4)


@pytest.mark.parametrize("stream", [1, 2])
def test_checked_lanes_see_what_every_stream_reads(stream: int) -> None:
    lanes = lanes_of("checked")
    assert isinstance(lanes, CheckedLanes)
    module = stack(layers=1)
    visitor = Copied(lanes, waiting=True)
    visitor.home.zero_()
    with installed(Lockstep(module, partition(module, blocks=["0"]), visitor)) as lockstep, lanes.checking():
        lockstep.run(lambda _: module(torch.ones(1, 4)), stream + 1)
        visitor.waiting = False
        with pytest.raises(RaceError, match="slot"):
            lockstep.run(lambda _: module(torch.ones(1, 4)), stream + 1)


@pytest.mark.parametrize("cache", [True, False])
def test_autocast_of_the_caller(cache: bool) -> None:
    module = stack()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        plain = module(torch.ones(1, 4))  # casts of the plain weights may be kept now
        assert plain.dtype is torch.bfloat16
        check_equal(module, lambda: module(module(torch.ones(1, 4))), 4)
        assert torch.equal(module(torch.ones(1, 4)), plain)


@pytest.mark.parametrize("cache", [True, False])
def test_autocast_inside_a_stream(cache: bool) -> None:
    module = stack()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return module(module(torch.ones(1, 4)))

    check_equal(module, forward, 4)


def thread_state() -> tuple[Any, ...]:
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_num_threads(),
        bool(torch.tensor(1e-40) / 2),
        SETTING.get(),
    )


SETTING: contextvars.ContextVar[str] = contextvars.ContextVar("setting", default="none")


def test_thread_local_state_of_each_run() -> None:
    lockstep, _ = recorded(stack())
    plain = lockstep.run(lambda stream: thread_state(), 3)
    assert len(set(plain)) == 1
    assert plain[0][1] is False
    token = SETTING.set("given")
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.float16, cache_enabled=False):
            other = lockstep.run(lambda stream: thread_state(), 3)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)
        SETTING.reset(token)
    assert other == [(True, False, True, torch.float16, False, 2, False, "given")] * 3
    assert lockstep.run(lambda stream: thread_state(), 3) == plain
    lockstep.close()


class Boom(Exception):
    pass


PLACES = ["before", "arrive", "present", "inside", "leave", "between", "after"]


class Failing(Recording):
    """Stream `who` fails at `place`, which is in the forward or in the visitor at the second of three units."""

    def __init__(self, place: str, who: int, boom: BaseException) -> None:
        super().__init__()
        self.place, self.who, self.boom = place, who, boom

    def fail(self, at: str, stream: int) -> None:
        if at == self.place and stream == self.who:
            raise self.boom

    def arrive(self, unit: Unit) -> None:
        super().arrive(unit)
        if unit.index == 1:
            self.fail("arrive", self.who)

    def present(self, unit: Unit, stream: int) -> None:
        super().present(unit, stream)
        if unit.index == 1:
            self.fail("present", stream)

    def leave(self, unit: Unit) -> None:
        super().leave(unit)
        if unit.index == 1:
            self.fail("leave", self.who)

    def forward(self, module: nn.Sequential, stream: int) -> Tensor:
        self.fail("before", stream)
        x = module[0](torch.ones(1, 4))
        self.fail("between", stream)
        hook = module[1].register_forward_pre_hook(lambda *_: self.fail("inside", stream))
        try:
            x = module[1](x)
        finally:
            hook.remove()
        x = module[2](x)
        self.fail("after", stream)
        return x


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_what_a_stream_raises_ends_the_run(place: str, who: int, kind: type[BaseException]) -> None:
    module, boom = stack(), kind("boom")
    visitor = Failing(place, who, boom)
    lockstep = Lockstep(module, partition(module), visitor)
    state = torch.get_rng_state()
    with installed(lockstep):
        for _ in range(2):
            with pytest.raises(kind) as raised:
                lockstep.run(lambda stream: visitor.forward(module, stream), 3)
            assert raised.value is boom
            assert any(entry.name == "fail" for entry in raised.traceback)
            for unit in range(3):
                assert visitor.calls.count(("arrive", unit)) == visitor.calls.count(("leave", unit))
            assert lockstep.stream == 0
            assert torch.equal(torch.get_rng_state(), state)
        visitor.place = "nowhere"
        visitor.calls.clear()
        assert len(lockstep.run(lambda stream: visitor.forward(module, stream), 3)) == 3
        check_order(visitor.calls, (0, 1, 2), 3)


def test_a_stream_that_swallows_exceptions_ends_too() -> None:
    module = stack()
    lockstep, _ = recorded(module)

    def forward(stream: int) -> None:
        if stream == 2:
            raise Boom
        for _ in range(3):
            with contextlib.suppress(Exception):
                module(torch.ones(1, 4))

    with installed(lockstep), pytest.raises(Boom):
        lockstep.run(forward, 3)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals that can be sent to a thread")
@pytest.mark.parametrize("who", [0, 1, 2])
def test_interrupt_while_any_stream_runs(who: int) -> None:
    module = stack()
    lockstep, visitor = recorded(module)
    main = threading.get_ident()
    arrived = threading.Event()

    def interrupt(signum: int, frame: Any) -> None:
        arrived.set()
        raise KeyboardInterrupt

    def forward(stream: int) -> None:
        module[0](torch.ones(1, 4))
        if stream == who:
            torch.manual_seed(99)
            signal.pthread_kill(main, signal.SIGINT)
            arrived.wait(0.1)  # a signal that comes just before the main thread blocks does not wake it
        module[1](torch.ones(1, 4))
        module[2](torch.ones(1, 4))

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with installed(lockstep):
            for _ in range(5):
                arrived.clear()
                with pytest.raises(KeyboardInterrupt):
                    lockstep.run(forward, 3)
                assert (torch.initial_seed() == 99) == (who == 0)
                for unit in range(3):
                    assert visitor.calls.count(("arrive", unit)) == visitor.calls.count(("leave", unit))
            assert len(lockstep.run(lambda stream: module(torch.ones(1, 4)), 3)) == 3
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals that can be sent to a thread")
def test_interrupts_between_any_two_steps() -> None:
    module = stack()
    lockstep, visitor = recorded(module)
    main, inside, interrupted = threading.get_ident(), False, 0

    def interrupt(signum: int, frame: Any) -> None:
        if inside:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with installed(lockstep):
            for attempt in range(200):
                timer = threading.Timer(1e-5 * attempt, signal.pthread_kill, (main, signal.SIGUSR1))
                timer.start()
                try:
                    inside = True
                    for _ in range(20):
                        lockstep.run(lambda stream: module(torch.ones(1, 4)), 3)
                except KeyboardInterrupt:
                    interrupted += 1
                finally:
                    inside = False
                timer.join()
                assert lockstep.stream == 0
                visitor.calls.clear()
                assert len(lockstep.run(lambda stream: module(torch.ones(1, 4)), 3)) == 3
                check_order(visitor.calls, (0, 1, 2), 3)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert interrupted > 0


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["ab", "aa"], "visit 2: stream 0 enters 'b', but stream 1 enters 'a'"),
        (["ab", "a"], "visit 2: stream 0 enters 'b', but stream 1 ends"),
        (["a", "ab"], "visit 2: stream 0 ends, but stream 1 enters 'b'"),
        (["ab", "ab", "ac"], "visit 2: stream 0 enters 'b', but stream 2 enters 'c'"),
        (["", "a"], "visit 1: stream 0 ends, but stream 1 enters 'a'"),
        (["a", ""], "visit 1: stream 0 enters 'a', but stream 1 ends"),
    ],
)
def test_streams_that_disagree(paths: list[str], message: str) -> None:
    module = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    visitor = Recording()
    lockstep = Lockstep(module, partition(module, blocks=["a", "b", "c"]), visitor)
    with installed(lockstep):
        for _ in range(2):
            with pytest.raises(OffloadError, match=message):
                lockstep.run(lambda stream: [module[name](torch.ones(1, 4)) for name in paths[stream]], len(paths))
            assert all(visitor.calls.count(("arrive", u)) == visitor.calls.count(("leave", u)) for u in range(3))
        lockstep.run(lambda stream: module["a"](torch.ones(1, 4)), 2)
        assert lockstep.visits == (0,)


@pytest.mark.parametrize("streams", [1, 2])
def test_run_inside_run_is_refused(streams: int) -> None:
    module = stack()
    lockstep, _ = recorded(module)
    with installed(lockstep):
        with pytest.raises(OffloadError, match=r"run\(\) was called inside run\(\)"):
            lockstep.run(lambda stream: lockstep.run(lambda _: None, 1), streams)
        with pytest.raises(OffloadError, match=r"close\(\) was called inside"):
            lockstep.run(lambda stream: lockstep.close(), streams)
        assert lockstep.run(lambda stream: stream, streams) == list(range(streams))


def test_no_streams() -> None:
    with pytest.raises(ValueError, match="streams=0"):
        recorded(stack())[0].run(lambda stream: None, 0)


def test_one_forward_outside_run_is_one_stream() -> None:
    module = stack(layers=2)
    lockstep, visitor = recorded(module)
    threads = threading.active_count()
    with installed(lockstep):
        module(torch.ones(1, 4)).sum().backward()
        assert visitor.calls == [
            (k, i, *([0] if k == "present" else [])) for i in (0, 1) for k in ("arrive", "present", "leave")
        ]
        lockstep.run(lambda stream: module(torch.ones(1, 4)), 1)
    assert threading.active_count() == threads
    visitor.calls.clear()
    module(torch.ones(1, 4))
    assert visitor.calls == []


def test_forward_that_raises_outside_run_leaves() -> None:
    module = stack(layers=2)
    lockstep, visitor = recorded(module)
    with installed(lockstep), pytest.raises(RuntimeError):
        module(torch.ones(1, 5))
    assert visitor.calls[-1] == ("leave", 0)


def test_forward_interrupted_outside_run_is_settled_by_the_next_run() -> None:
    module = Parent()
    lockstep, visitor = recorded(module)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with installed(lockstep):
        handle = module.second.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            module(torch.ones(1, 4))
        handle.remove()
        module(torch.ones(1, 4))  # what is still there is used as it is
        visitor.calls.clear()
        lockstep.run(lambda stream: module(torch.ones(1, 4)), 2)
    assert ("leave", 0) in visitor.calls[:2]
    check_order(visitor.calls[visitor.calls.index(("arrive", 0)) :], lockstep.visits, 2)


def test_a_copy_of_the_module_is_not_visited() -> None:
    module = stack()
    lockstep, visitor = recorded(module)
    with installed(lockstep):
        copy.deepcopy(module)(torch.ones(1, 4))
    assert visitor.calls == []


def stream_threads() -> int:
    return sum(thread.name.startswith("offload-stream") for thread in threading.enumerate())


def test_threads_are_kept_and_end() -> None:
    module = stack()
    before = stream_threads()
    lockstep, _ = recorded(module)
    idents: set[int] = set()
    with installed(lockstep):
        for _ in range(50):
            lockstep.run(lambda stream: idents.add(threading.get_ident()), 3)
        assert len(idents) == 3
        assert stream_threads() == before + 2
        lockstep.close()
        lockstep.close()
        assert stream_threads() == before
        assert lockstep.run(lambda stream: stream, 2) == [0, 1]
    assert stream_threads() == before


def test_threads_end_with_an_object_that_was_never_closed() -> None:
    lockstep, _ = recorded(stack())
    lockstep.install()
    lockstep.run(lambda stream: stream, 3)
    threads = [t for t in threading.enumerate() if t.name.startswith("offload-stream")]
    gone = weakref.ref(lockstep)
    del lockstep, _
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_results_and_failures_are_not_kept() -> None:
    module = stack()
    lockstep, _ = recorded(module)

    class Big:
        pass

    refs = []

    def make(stream: int) -> Big:
        made = Big()
        refs.append(weakref.ref(made))
        if len(refs) == 6:
            raise Boom
        return made

    gc.collect()
    gc.disable()
    try:
        lockstep.run(make, 3)
        with contextlib.suppress(Boom):
            lockstep.run(make, 3)
        lockstep.close()
        assert [ref() for ref in refs] == [None] * 6
    finally:
        gc.enable()
