"""What a forward is seen to do with the weights, and an engine that is told so beforehand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_offload.memory.blocks import partition
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.methods.uses import Recorder, Uses
from tests.helpers import Net, adamw, assert_same, lanes_of, train
from tests.streams import thread_lanes
from tests.zoo import ZOO, _bert_like, first_tensor, text_inputs

pytestmark = pytest.mark.timeout(60)

TOKENS = torch.arange(12).view(2, 6)
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
ORDER = ("embed", *BLOCKS, "norm", "head")


def hooks(model: nn.Module) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return [len(getattr(module, name)) for module in model.modules() for name in names]


def uses_of(model: nn.Module, run: Callable[[], object]) -> Uses:
    before = hooks(model)
    recorder = Recorder(partition(model))
    with recorder.watching():
        run()
    assert hooks(model) == before
    return recorder.uses(model)


def test_a_plain_model_uses_each_unit_in_its_own_call() -> None:
    net = Net()
    assert uses_of(net, lambda: net.loss(TOKENS)) == Uses(order=ORDER)


def test_a_tied_head_is_a_second_user() -> None:
    net = Net(tied=True)
    expected = Uses(order=("embed", *BLOCKS, "norm"), users={"embed.weight": ("head",)})
    assert uses_of(net, lambda: net(TOKENS)) == expected


def test_a_functional_use_is_early_and_named() -> None:
    net = Net(functional_head=True)
    expected = Uses(order=("embed", *BLOCKS, "norm"), early=frozenset({"head"}), functional=("head.weight",))
    assert uses_of(net, lambda: net(TOKENS)) == expected


def test_a_module_that_is_skipped_may_be_needed_at_once() -> None:
    net = Net(sometimes_unused=True)
    order = ("embed", "blocks.0", "blocks.1", "norm", "head")
    gone = frozenset({"blocks.2"})
    assert uses_of(net, lambda: net(TOKENS)) == Uses(order=order, early=gone, skipped=gone)


@pytest.mark.parametrize("recompute", ["reentrant", "non_reentrant"])
def test_a_recomputation_is_no_repeat(recompute: str) -> None:
    net = Net(recompute=recompute)
    recorder = Recorder(partition(net))
    with recorder.watching():
        loss = net.loss(TOKENS)
    loss.backward()
    assert recorder.uses(net) == Uses(order=ORDER)


class Twice(nn.Module):
    """Two layers of one width, called out of order, one of them again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.layers[1](x)
        return self.layers[0](x)


def test_a_module_that_runs_again_is_counted() -> None:
    model = Twice()
    uses = uses_of(model, lambda: model(torch.ones(2, 4)))
    assert uses == Uses(order=("first", "layers.1", "layers.0"), repeats={"layers.1": 3})


LOOKS: dict[str, tuple[Callable[[nn.Linear, Tensor], object], bool]] = {
    "linear": (lambda head, x: F.linear(x, head.weight), True),
    "product": (lambda head, x: x @ head.weight.T, True),
    "data": (lambda head, x: x @ head.weight.data.mT, True),
    "in a list": (lambda head, x: torch.cat([x, head.weight]), True),
    "by keyword": (lambda head, x: F.linear(x, weight=head.weight), True),
    "a row": (lambda head, x: head.weight[0], True),
    "dtype": (lambda head, x: x.to(head.weight.dtype), False),
    "shape": (lambda head, x: (head.weight.shape, head.weight.size(0), head.weight.numel(), len(head.weight)), False),
    "place": (lambda head, x: (head.weight.device, head.weight.is_floating_point(), head.weight.grad), False),
}


class Looks(nn.Module):
    def __init__(self, look: Callable[[nn.Linear, Tensor], object]) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 4, bias=False)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        self.look(self.head, x)
        for layer in self.body:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("name", LOOKS)
def test_only_who_reads_values_uses_a_weight(name: str) -> None:
    look, reads = LOOKS[name]
    model = Looks(look)
    uses = uses_of(model, lambda: model(torch.ones(4, 4)))
    order = ("body.0", "body.1", "head")
    used = Uses(order, early=frozenset({"head"}), functional=("head.weight",))
    assert uses == (used if reads else Uses(order))


def test_a_hook_that_reads_a_weight_reads_it_within_the_call() -> None:
    net = Net()
    net.head.register_forward_pre_hook(lambda head, args: (args[0] + head.weight.sum(),))
    assert uses_of(net, lambda: net(TOKENS)) == Uses(order=ORDER)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body[1](self.body[0](x)[:, :3])


def test_an_exception_leaves_no_hooks_and_what_was_seen() -> None:
    model = Breaks()
    before = hooks(model)
    recorder = Recorder(partition(model))
    with pytest.raises(RuntimeError, match="shapes"), recorder.watching():
        model(torch.ones(2, 4))
    assert hooks(model) == before
    assert recorder.uses(model).order == ("body.0", "body.1")
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_exception_that_is_caught_ends_the_call_it_left() -> None:
    """What is used afterwards is not used within that call."""
    model = Breaks()

    def run() -> None:
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.ones(2, 4))
        F.linear(torch.ones(2, 4), model.body[1].weight)

    assert uses_of(model, run).functional == ("body.1.weight",)


def zoo_uses(name: str) -> Uses:
    model, inputs = ZOO[name]()
    return uses_of(model, lambda: model(**inputs))


def test_opt_runs_its_last_norm_last_and_ties_its_head() -> None:
    decoder = "model.decoder."
    layers = tuple(f"{decoder}layers.{index}" for index in range(3))
    assert zoo_uses("opt") == Uses(
        order=(f"{decoder}embed_tokens", f"{decoder}embed_positions", *layers, f"{decoder}final_layer_norm"),
        users={f"{decoder}embed_tokens.weight": ("lm_head",)},
    )
    model, _ = ZOO["opt"]()
    assert partition(model)[2].name == f"{decoder}final_layer_norm"  # in module order it comes before the layers


def test_t5_has_one_embedding_for_encoder_decoder_and_head() -> None:
    uses = zoo_uses("t5")
    assert uses.users["shared.weight"][-1] == "lm_head"
    assert uses.order[0] == "shared"
    assert uses.order.index("encoder.final_layer_norm") < uses.order.index("decoder.block.0")
    assert (uses.early, uses.skipped, uses.functional) == (frozenset(), frozenset(), ())


def test_albert_runs_one_layer_again_and_again() -> None:
    uses = zoo_uses("albert")
    assert uses.repeats == {"albert.encoder.albert_layer_groups.0": 3}
    embeddings = "albert.embeddings.word_embeddings.weight"
    assert uses.users == {embeddings: ("predictions.decoder",), "predictions.bias": ("predictions.decoder",)}
    assert (uses.early, uses.skipped, uses.functional) == (frozenset(), frozenset(), ())


def test_deberta_uses_its_relative_positions_without_calling_them() -> None:
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    config = DebertaV2Config(**_bert_like(**relative, norm_rel_ebd="layer_norm", share_att_key=True))
    model = DebertaV2ForMaskedLM(config).eval()
    uses = uses_of(model, lambda: model(**text_inputs()))
    assert uses.early == {"deberta.encoder.rel_embeddings"}
    assert uses.functional == ("deberta.encoder.rel_embeddings.weight",)
    assert uses.order.index("deberta.encoder.LayerNorm") < uses.order.index("deberta.encoder.layer.0")
    assert (uses.skipped, uses.repeats) == (frozenset(), {})


# An engine that knows.


def attach(model: nn.Module, uses: Uses | None) -> Engine:
    method = Full(FullSettings(min_numel=0, accumulate="device"))
    return Engine(model, adamw(model), method, lanes_of("inline"), DTypes(), uses=uses)


def served_before_the_first_forward(model: nn.Module, uses: Uses | None) -> list[str]:
    """Units in the order in which their weights would come up."""
    engine = attach(model, uses)
    flights = sorted(engine.arrivals.flights, key=lambda flight: flight.order)
    units = [engine.units[engine.arrivals.flights.index(flight)].name for flight in flights]
    engine.detach()
    return units


def test_units_are_served_in_the_order_of_an_earlier_run_from_the_first_step_on() -> None:
    model, inputs = ZOO["opt"]()
    engine = attach(model, None)
    with engine.micro_batch():
        model(**inputs)
    engine.detach()
    known = engine.arrivals.uses
    fresh = ZOO["opt"]()[0]
    assert served_before_the_first_forward(fresh, None) == [unit.name for unit in partition(fresh)]
    assert served_before_the_first_forward(fresh, known) == list(known.order)
    assert known.order != tuple(unit.name for unit in partition(fresh))


@pytest.mark.parametrize("told", [False, True])
def test_the_first_step_serves_in_the_order_that_was_told(told: bool) -> None:
    """The priorities of the first step's copies, whose order backward decides and the forward has shown."""
    model, inputs = ZOO["opt"]()
    known = uses_of(model, lambda: model(**inputs))
    engine = attach(model, known if told else None)
    places = {name: place for place, name in enumerate(known.order, 1)}
    engine.lanes.ledger.start_trace()
    with engine.micro_batch():
        loss = first_tensor(model(**inputs))
        seen = [(unit.name, engine.arrivals.flights[unit.index].order) for unit in engine.units]
    engine.stepping = True
    loss.backward()
    engine.step()
    engine.flush()
    spans = engine.lanes.ledger.stop_trace()
    engine.detach()
    assert {span.order for span in spans if span.kind == "weights"} == set(places.values())
    assert (dict(seen) == places) is told


def test_what_an_earlier_run_says_of_other_units_is_ignored_and_new_ones_are_learned() -> None:
    net = Net()
    engine = attach(net, Uses(order=("norm", "elsewhere", "embed"), early=frozenset({"elsewhere", "head"})))
    orders = {unit.name: engine.arrivals.flights[unit.index].order for unit in engine.units}
    assert orders == {"norm": 1, "embed": 3, "head": 0, **dict.fromkeys(BLOCKS, 0)}
    with engine.micro_batch():
        net(TOKENS)
    assert engine.arrivals.uses.order == ORDER
    assert [engine.arrivals.flights[unit.index].order for unit in engine.units] == [1, 2, 3, 4, 5, 6]
    engine.detach()


@pytest.mark.parametrize("functional_head", [False, True])
def test_knowing_changes_no_bit(functional_head: bool) -> None:
    net = Net(functional_head=functional_head)
    known = uses_of(net, lambda: net(TOKENS))
    expected = train(net, None)
    with thread_lanes(seed=5) as lanes:
        run = train(net, lanes, after_attach=lambda engine: engine.arrivals._learn(known))
    assert_same(run, expected)
    assert known.early == ({"head"} if functional_head else set())


def test_what_is_used_early_is_waited_for_when_the_first_forward_begins() -> None:
    net = Net(functional_head=True)
    known = uses_of(net, lambda: net(TOKENS))
    engine = attach(net, known)
    landed: list[str] = []
    for unit in engine.units:
        engine.arrivals.flights[unit.index].launch(partial(landed.append, unit.name))
    with engine.micro_batch():
        assert landed == ["head"]
    engine.detach()
