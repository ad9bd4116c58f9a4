"""FLOPs, bytes and live memory beside torch's own counters, and beside formulas where torch counts nothing."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lightning_offload.methods.meter import Meter, Work, seconds
from tests.zoo import ZOO, first_tensor

pytestmark = pytest.mark.timeout(120)

EAGER = ["opt", "gpt2", "llama", "gemma2", "falcon", "sequential"]


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    module, inputs = ZOO[name]()
    return module.train(), inputs


def backward(module: nn.Module, inputs: dict[str, Tensor]) -> None:
    first_tensor(module(**inputs)).square().mean().backward()


def holding(module: nn.Module, inputs: dict[str, Tensor]) -> Meter:
    meter = Meter()
    for parameter in module.parameters():
        meter.hold(parameter, "weights")
    for buffer in module.buffers():
        meter.hold(buffer, "buffers")
    for tensor in inputs.values():
        meter.hold(tensor, "batch")
    return meter


# FLOPs.


@pytest.mark.parametrize("name", EAGER)
def test_flops_of_a_step_equal_torchs_counter(name: str) -> None:
    meter, counter = Meter(), FlopCounterMode(display=False)
    for mode in (meter, counter):
        module, inputs = built(name)
        with mode:
            backward(module, inputs)
    assert meter.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_flops_of_attention_on_the_cpu(heads: int, key_heads: int, masked: bool) -> None:
    """Forward: scores and output; backward: scores again, and the gradients of scores, values, queries and keys."""
    batch, here, there, width = 2, 8, 16, 32
    query = torch.rand(batch, heads, here, width, requires_grad=True)
    key, value = (torch.rand(batch, key_heads, there, width, requires_grad=True) for _ in range(2))
    mask = torch.zeros(here, there) if masked else None
    one = 2 * batch * heads * here * there * width
    with Meter() as meter:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=heads != key_heads)
        assert meter.flops == 2 * one
        output.sum().backward()
    assert meter.flops == 7 * one


def test_flops_of_grouped_products_count_each_token_once() -> None:
    """As mixtures of experts compute: tokens sorted by expert, one weight each; three products with the gradients."""
    tokens, experts, wide, narrow = 24, 3, 32, 16
    x = torch.rand(tokens, wide, requires_grad=True)
    weight = torch.rand(experts, wide, narrow, requires_grad=True)
    ends = torch.tensor([8, 8, tokens], dtype=torch.int32)
    one = 2 * tokens * wide * narrow
    with Meter() as meter:
        output = torch._grouped_mm(x, weight, offs=ends)
        assert meter.flops == one
        output.square().sum().backward()
    assert meter.flops == 3 * one


def test_a_mixture_counts_the_experts_it_uses() -> None:
    """Beside the same model whose experts are a loop of plain products."""
    counts = []
    for implementation in ("grouped_mm", "eager"):
        module, inputs = built("mixtral")
        module.set_experts_implementation(implementation)
        with Meter() as meter:
            module(**inputs)
        counts.append(meter.flops)
    assert counts[0] == counts[1] > 0


def test_attention_in_a_model_counts_what_eager_attention_counts_and_the_scores_once_more() -> None:
    counts = []
    for implementation in ("eager", "sdpa"):
        module, inputs = built("llama")
        module.set_attn_implementation(implementation)
        with Meter() as meter:
            backward(module, inputs)
        counts.append(meter.flops)
    config = module.config
    again = 2 * inputs["input_ids"].numel() * inputs["input_ids"].shape[1] * config.hidden_size
    assert counts[1] - counts[0] == again * config.num_hidden_layers


# Live memory.


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "sequential"])
def test_live_memory_equals_the_allocations_of_a_real_step(name: str) -> None:
    """Within 2 %: kernels allocate inside (norms keep sums per row or per thread, losses their weights)."""
    module, inputs = built(name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        backward(module, inputs)
    module, inputs = built(name)
    meter = holding(module, inputs)
    before = meter.peak.bytes
    with meter:
        backward(module, inputs)
    live = peak = 0
    records = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    for record in sorted(records, key=lambda event: event.start_ns()):
        live += record.nbytes()
        peak = max(peak, live)
    assert meter.peak.bytes - before == pytest.approx(peak, rel=0.02)
    assert sum(p.grad.nbytes for p in module.parameters() if p.grad is not None) <= live
    assert alive(meter) - before == live


def alive(meter: Meter) -> int:
    return sum(dict(meter.allocations).values())


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_live_memory_of_a_fake_step_equals_torchs_tracker(name: str) -> None:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracker's hooks, on a model that returns no tensor
        module, inputs = built(name)
        tracker = MemTracker()
        tracker.track_external(module, *inputs.values())
        with tracker:
            backward(module, inputs)
    with FakeTensorMode():
        module, inputs = built(name)
        meter = holding(module, inputs)
        with meter:
            backward(module, inputs)
    expected = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert meter.peak.bytes == expected["Total"] > 0


@pytest.mark.parametrize("name", ["opt", "llama", "sequential"])
def test_fake_and_real_steps_take_the_same_memory(name: str) -> None:
    results = []
    for mode in (FakeTensorMode(), warnings.catch_warnings()):
        with mode:
            module, inputs = built(name)
            meter = holding(module, inputs)
            with meter:
                backward(module, inputs)
        results.append((meter.peak, meter.flops, [nbytes for _, nbytes in meter.allocations if nbytes]))
    assert results[0] == results[1]


def test_kinds_add_up() -> None:
    module, inputs = built("opt")
    meter = holding(module, inputs)
    with meter:
        backward(module, inputs)
    kinds = dict(meter.peak.kinds)
    assert sum(kinds.values()) == meter.peak.bytes
    assert kinds["weights"] == sum(p.nbytes for p in module.parameters())
    assert kinds["batch"] == sum(t.nbytes for t in inputs.values())
    assert kinds["activations"] > 0


def live(meter: Meter) -> dict[str, int]:
    """What is alive now, by kind."""
    return {kind: nbytes for kind, nbytes in meter._live.items() if nbytes}


def test_what_is_made_is_of_the_kind_it_is_counted_as_until_it_is_held_as_another() -> None:
    with Meter() as meter:
        one = torch.zeros(100)
        with meter.counting_as("slots"):
            other = torch.zeros(50)
        assert live(meter) == {"activations": 400, "slots": 200}
        meter.hold(one, "gradients")
        meter.hold(one[10:], "gradients")  # the same memory
        assert live(meter) == {"gradients": 400, "slots": 200}
        del one
        assert live(meter) == {"slots": 200}
        meter.hold(other, "weights")
        assert live(meter) == {"weights": 200}
    assert meter.peak.bytes == 600


def test_what_is_hidden_takes_neither_memory_nor_time() -> None:
    work: list[Work] = []
    with Meter(work.append) as meter:
        with meter.counting_as(None):
            hidden = torch.zeros(100)
            inner = hidden.mm(hidden.view(100, 1)) if hidden.dim() == 2 else hidden * 2
        assert (work, live(meter)) == ([], {})
        hidden.add_(1)
        view, same = hidden.view(10, 10), torch.ops.aten._unsafe_view(hidden, [4, 25])
        assert live(meter) == {}
        assert len(work) == 1
        made = view + 1
        assert live(meter) == {"activations": made.nbytes}
        del inner, same
        with meter.counting_as(None):
            del made
        assert live(meter) == {}


def in_place(x: Tensor) -> Tensor:
    return x.add_(1).mul_(2)


def out(x: Tensor) -> Tensor:
    return torch.add(x, 1, out=x)


def views(x: Tensor) -> tuple[Any, ...]:
    return x.view(2, 50), x[3:], x.expand(4, 100), x.unsqueeze(0).transpose(0, 1), x.split(10), x.detach(), x.t()


def reshaped(x: Tensor) -> Tensor:
    return torch.ops.aten._unsafe_view(x.reshape(10, 10), [100])


def foreach(x: Tensor) -> list[Tensor]:
    torch._foreach_add_([x], 1)
    return [x]


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("make", [in_place, out, views, reshaped, foreach])
def test_no_memory_is_counted_twice(make: Callable[[Tensor], object], held: bool) -> None:
    x = torch.zeros(100)
    meter = Meter()
    if held:
        meter.hold(x, "weights")
    with meter:
        kept = make(x)
    assert live(meter) == ({"weights": 400} if held else {})
    del kept


def test_an_operation_that_writes_and_makes_counts_what_it_makes() -> None:
    noise = torch.zeros(100)
    with Meter() as meter:
        made = torch.ops.aten.rrelu_with_noise(torch.ones(100), noise, 0.1, 0.3, True)
        assert live(meter) == {"activations": made.nbytes}


def test_each_result_counts_and_a_shared_one_once() -> None:
    with Meter() as meter:
        values, indices = torch.zeros(10, 10).max(0)
        assert live(meter) == {"activations": 10 * 4 + 10 * 8}
        chunks = torch.ones(12).chunk(3)
        del values, indices
        assert live(meter) == {"activations": 48}
        last = chunks[2]
        del chunks
        assert live(meter) == {"activations": 48}  # one piece keeps the whole
        del last
        assert live(meter) == {}


def test_memory_of_a_cycle_is_given_back_when_it_is_collected() -> None:
    with Meter() as meter:
        gc.disable()
        try:
            cycle: list[object] = [torch.zeros(100)]
            cycle.append(cycle)
            del cycle
            assert live(meter) == {"activations": 400}
            gc.collect()
        finally:
            gc.enable()
        assert live(meter) == {}
    numbers = [number for number, _ in meter.allocations]
    assert meter.allocations == [(numbers[0], 400), (numbers[0], 0)]


def test_memory_given_back_after_the_mode_is_given_back_and_addresses_are_used_again() -> None:
    with Meter() as meter:
        kept = torch.zeros(100)
    del kept
    assert live(meter) == {}
    with meter:
        for _ in range(5):
            torch.zeros(1000)
    taken = [number for number, nbytes in meter.allocations if nbytes]
    assert len(set(taken)) == len(taken) == 6
    assert meter.peak.bytes == 4000


def test_empty_tensors_take_nothing() -> None:
    with Meter() as meter:
        nothing = torch.empty(0)
        meter.hold(nothing, "weights")
    assert (meter.allocations, meter.peak.bytes) == ([], 0)


# Bytes of one operation.

X = torch.zeros(20, 30)
NARROW = torch.zeros(20, 30, dtype=torch.bfloat16)
TABLE = torch.zeros(1000, 8)
PICK = torch.tensor([1, 2, 3])

BYTES: dict[str, tuple[Callable[[], object], int]] = {
    "add": (lambda: X + X, 3 * 2400),
    "add in place": (lambda: X.clone().add_(X), 2 * 2400 + 3 * 2400),
    "scalar": (lambda: X * 2, 2 * 2400),
    "cast": (lambda: X.bfloat16(), 2400 + 1200),
    "copy": (lambda: NARROW.copy_(X), 2400 + 1200),
    "fill": (lambda: X.fill_(0), 2400),
    "zero": (lambda: X.zero_(), 2400),
    "make": (lambda: torch.zeros(10), 40),
    "reduce": (lambda: X.sum(), 2400 + 4),
    "product": (lambda: X.mm(X.t()), 2 * 2400 + 1600),
    "look up": (lambda: F.embedding(PICK, TABLE), 2 * 96),
    "index": (lambda: TABLE[PICK], 2 * 96),
    "select": (lambda: TABLE.index_select(0, PICK), 2 * 96),
    "gather": (lambda: TABLE.gather(0, PICK.view(3, 1)), 2 * 12),
    "expanded": (lambda: torch.zeros(1, 30).expand(20, 30) + X, 120 + 120 + 2 * 2400),
    "of expanded": (lambda: TABLE[:1].expand(20, 8) + 0, 32 + 640),
    "several": (lambda: torch.cat([X, X]), 4 * 2400),
    "many in place": (lambda: torch._foreach_add_([X, X], [X, X]), 6 * 2400),
    "view": (lambda: X.view(-1), 0),
    "no kernel": (lambda: (torch.empty(5), X.new_empty(3), torch.empty_like(X), X.new_empty_strided((2,), (1,))), 0),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_read_and_written(name: str) -> None:
    run, expected = BYTES[name]
    work: list[Work] = []
    with Meter(work.append):
        run()
    assert sum(each.bytes for each in work) == expected


def test_questions_are_no_work() -> None:
    """How a fake tensor says where it is, and a real one what it holds."""
    work: list[Work] = []
    with FakeTensorMode():
        fake = torch.zeros(3)
        with Meter(work.append):
            assert fake.device == torch.device("cpu")
    one = torch.ones(())
    with Meter(work.append) as meter:
        assert one.item() == 1
    assert (work, meter.allocations) == ([], [])


def test_work_is_narrow_where_it_computes_in_16_bits() -> None:
    work: list[Work] = []
    with Meter(work.append):
        NARROW.mm(NARROW.t())
        X.mm(X.t())
    assert work == [Work(24000, 2 * 1200 + 800, narrow=True), Work(24000, 2 * 2400 + 1600, narrow=False)]


def test_a_fused_optimizer_reads_and_writes_parameters_and_moments_and_reads_gradients() -> None:
    weight = nn.Parameter(torch.zeros(100))
    weight.grad = torch.ones(100)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    work: list[Work] = []
    with Meter(work.append):
        optimizer.step()
    assert max(each.bytes for each in work) == (3 * 2 + 1) * 400 + 4  # and the count of steps


@pytest.mark.parametrize(
    ("work", "expected_s"),
    [
        (Work(1000, 0, narrow=False), 10.0),
        (Work(1000, 0, narrow=True), 5.0),
        (Work(1000, 400, narrow=True), 20.0),
        (Work(0, 0, narrow=False), 0.5),
    ],
)
def test_seconds_are_those_of_the_slowest(work: Work, expected_s: float) -> None:
    assert seconds(work, wide_flops=100, narrow_flops=200, bytes_per_s=20, least_s=0.5) == expected_s
