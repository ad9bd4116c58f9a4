"""Advice: applied, it makes the plan fit; where there is none, nothing that is known would."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.memory.budget import Machine
from lightning_offload.methods.lsp import LSPSettings
from lightning_offload.planning import Plan, plan
from lightning_offload.planning.advice import EXPANDABLE, advise
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.text import CausalLM, batch_by_shape
from tests.helpers import mostly_slow
from tests.planning.machines import cpu, gpu

VOCAB, LENGTH, SAMPLES = 1024, 64, 8
SHAPE = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}


class Stack(nn.Module):
    """No transformer: nothing to recompute, no chunks, and batch norm, which takes several samples."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(96, 96), nn.BatchNorm1d(96) if norm else nn.Identity()) for _ in range(4))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


def causal_lm(**model: Any) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(config=SHAPE, **model)


@dataclass(frozen=True)
class Asked:
    """What a user has written, as far as advice changes it."""

    machine: Machine
    model: dict[str, Any] = field(default_factory=dict)
    samples: int = SAMPLES
    micro_batches: int = 1
    method: str = "full"
    precision: Any = "32-true"
    accumulate: Any = "auto"
    dim: float = 0.5
    make: Callable[..., nn.Module] = causal_lm

    @property
    def scenario(self) -> Scenario:
        return Scenario(
            module=self.make(**self.model),
            batch=batch_by_shape(self.samples, LENGTH, VOCAB)
            if self.make is causal_lm
            else torch.zeros(self.samples, 96),
            machine=self.machine,
            method=self.method,
            settings=LSPSettings(accumulate=self.accumulate, dim=self.dim, seed=0),
            precision=self.precision,
            micro_batches=self.micro_batches,
        )

    @property
    def plan(self) -> Plan:
        """Without advice."""
        return Dry(self.scenario).plan()

    def following(self, overrides: Sequence[str]) -> Asked:
        """As the command line does it."""
        asked = self
        for override in " ".join(overrides).split():
            key, value = override.split("=")
            if key.startswith("model."):
                asked = replace(asked, model={**asked.model, key.removeprefix("model."): json.loads(value)})
            else:
                name = {"data.batch_size": "samples", "trainer.accumulate_grad_batches": "micro_batches"}.get(key)
                kept = int(value) if name else float(value) if key.endswith(".dim") else value
                asked = replace(asked, **{name or key.removeprefix("trainer.strategy."): kept})
        return asked


def everything(asked: Asked) -> Iterator[list[str]]:
    """Each change that is known, alone; then all that go together."""
    batches = [
        f"data.batch_size={size} trainer.accumulate_grad_batches={asked.micro_batches * asked.samples // size}"
        for size in range(1, asked.samples)
        if asked.samples % size == 0
    ]
    model = ["model.gradient_checkpointing=true", "model.loss_chunk_tokens=128"] if asked.make is causal_lm else []
    changes = [*model, "precision=bf16-true", "method=full", "method=lsp", *batches]
    if asked.method == "lsp":
        changes.append(f"trainer.strategy.dim={asked.dim / 2}")
    yield from (
        [change] for change in [*changes, "trainer.strategy.accumulate=host", "trainer.strategy.accumulate=device"]
    )
    if asked.precision != "bf16-true":  # which without masters would lose small updates
        yield ["method=none"]
    for where in ("host", "device"):
        for method in (["method=full"], ["method=lsp", f"trainer.strategy.dim={asked.dim / 2}"]):
            yield [*model, "precision=bf16-true", *method, *batches[:1], f"trainer.strategy.accumulate={where}"]


def capped(machine: Machine, made: Plan, share: float, place: str) -> Machine:
    """As much as ``share`` of what the plan takes there, beside the context."""
    if machine.device_type == "cpu":
        return machine.capped(host_bytes=int(share * made.host.bytes))
    context = machine.context_bytes
    if place == "device":
        return machine.capped(device_bytes=context + int(share * (made.device.bytes - context)))
    return machine.capped(host_bytes=int(share * made.host.bytes))


CASES = [
    (Asked(gpu()), "device"),
    (Asked(gpu(), precision="bf16-true", model={"gradient_checkpointing": True}), "device"),
    (Asked(gpu(), method="none", precision="bf16-mixed"), "device"),
    (Asked(gpu(), micro_batches=2, accumulate="device"), "device"),
    (Asked(gpu(), micro_batches=2, accumulate="host", samples=4), "host"),
    (Asked(gpu(), precision="bf16-true", samples=1), "host"),
    (Asked(cpu(), micro_batches=3, samples=2), "host"),
    (Asked(gpu(), make=Stack, samples=256), "device"),
    (Asked(gpu(), method="lsp", precision="bf16-true"), "host"),
]
IDS = [f"{asked.method}-{asked.precision}-{asked.machine.device_type}-{at}" for at, (asked, _) in enumerate(CASES)]


@pytest.mark.parametrize(
    ("case", "share"),
    mostly_slow(itertools.product(CASES, [0.6, 0.9]), lambda at, row: at % 4 in (0, 3)),
    ids=[f"{case}-{share}" for case in IDS for share in (0.6, 0.9)],
)
def test_advice_fits_and_without_it_nothing_does(case: tuple[Asked, str], share: float) -> None:
    asked, place = case
    asked = replace(asked, machine=capped(asked.machine, asked.plan, share, place))
    made = asked.plan
    assert not made.fits
    given = advise(asked.scenario, made)
    for advice in given:
        after = asked.following(advice.overrides).plan
        assert after.fits, advice.overrides
        assert after.device.bytes == made.device.bytes - advice.device_bytes_saved
        assert after.host.bytes == made.host.bytes - advice.host_bytes_saved
        assert after.step_s == advice.step_s
        if len(advice.overrides) > 1:
            for at in range(len(advice.overrides)):
                fewer = [*advice.overrides[:at], *advice.overrides[at + 1 :]]
                assert not asked.following(fewer).plan.fits, f"{advice.overrides[at]} was not needed"
    if not given:
        assert [tried for tried in everything(asked) if asked.following(tried).plan.fits] == []


def advised(asked: Asked, share: float, place: str) -> list[tuple[str, ...]]:
    """Overrides of each advice."""
    asked = replace(asked, machine=capped(asked.machine, asked.plan, share, place))
    return [advice.overrides for advice in advise(asked.scenario, asked.plan)]


def test_what_changes_least_comes_first() -> None:
    chunks, batches = "model.loss_chunk_tokens=128", "data.batch_size=4 trainer.accumulate_grad_batches=2"
    assert advised(CASES[0][0], 0.9, "device") == [(chunks,), (batches,)]
    assert advised(CASES[4][0], 0.9, "host") == [
        ("trainer.strategy.accumulate=device",),
        ("method=lsp",),
        ("method=none",),
    ]


def test_the_allocators_other_way_comes_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes nothing of the run; the environment says it, so a plan in that environment needs no advice."""
    wide = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}

    def make(**_: Any) -> nn.Module:
        with torch.device("meta"):
            return CausalLM(config={**SHAPE, **wide})

    made = Asked(gpu(), make=make).scenario
    scenario = replace(made, batch=batch_by_shape(2 * SAMPLES, LENGTH, VOCAB))
    plan = Dry(scenario).plan()
    assert plan.device_expandable is not None
    between = (plan.device_expandable.bytes + plan.device.bytes) // 2
    small = replace(scenario, machine=scenario.machine.capped(device_bytes=between))
    advice = advise(small, Dry(small).plan())
    assert advice[0].overrides == (EXPANDABLE,)
    assert advice[0].device_bytes_saved == plan.device.bytes - plan.device_expandable.bytes > 0
    monkeypatch.setenv(*EXPANDABLE.split("="))
    assert Dry(small).plan().fits


def test_several_together_where_one_is_not_enough() -> None:
    asked = Asked(gpu(), accumulate="host")
    small = ["precision=bf16-true", "data.batch_size=1 trainer.accumulate_grad_batches=8"]
    asked = replace(asked, machine=gpu().capped(device_bytes=asked.following(small).plan.device.bytes))
    (advice,) = advise(asked.scenario, asked.plan)
    assert set(advice.overrides) == set(small)
    assert asked.following(advice.overrides).plan.fits


def test_nothing_is_tried_where_the_weights_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(gpu(), precision="bf16-true")
    asked = replace(asked, machine=gpu().capped(device_bytes=2**16))
    scenario, made = asked.scenario, asked.plan
    monkeypatch.setattr(Dry, "__init__", None)  # a trial would raise
    assert advise(scenario, made) == ()


def norm_stack() -> nn.Module:
    """Batch norm refuses a single sample."""
    return Stack(norm=True)


def batches(samples: int, sizes: Sequence[int]) -> list[str]:
    return [f"data.batch_size={size} trainer.accumulate_grad_batches={round(samples / size)}" for size in sizes]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("make", "machine"), [(Stack, cpu()), (norm_stack, cpu()), (norm_stack, gpu())])
def test_the_largest_batch_that_fits_is_found_in_few_trials(
    make: Callable[..., nn.Module], machine: Machine, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "host" if machine.device_type == "cpu" else "device"
    asked = Asked(machine, make=make, samples=40_000, precision="bf16-true")
    asked = replace(asked, machine=capped(machine, asked.plan, share, place))
    scenario, made = asked.scenario, asked.plan
    trials: list[int] = []
    with monkeypatch.context() as patch:
        init = Dry.__init__
        patch.setattr(Dry, "__init__", lambda dry, of: trials.append(of.batch_size) or init(dry, of))
        advised = [override for advice in advise(scenario, made) for override in advice.overrides]
    (advice,) = (override for override in advised if override != EXPANDABLE)
    fits = {size: asked.following(batches(40_000, [size])).plan.fits for size in neighbours(advice)}
    assert list(fits.values()) == [True, False], fits
    assert len(trials) <= 5, trials


def neighbours(override: str) -> tuple[int, int]:
    """The size of a micro-batch and the next larger one that divides 40,000."""
    size = int(override.removeprefix("data.batch_size=").split()[0])
    return size, next(larger for larger in range(size + 1, 40_001) if 40_000 % larger == 0)


def test_a_batch_that_the_model_does_not_take_is_not_advised() -> None:
    """Neither alone nor with another change, both of which are needed."""
    asked = Asked(cpu(), make=norm_stack, samples=60, method="none")
    small = asked.following(["precision=bf16-true", *batches(60, [2])]).plan
    asked = replace(asked, machine=cpu().capped(host_bytes=small.host.bytes))
    (advice,) = advise(asked.scenario, asked.plan)
    precision, batch = sorted(advice.overrides, reverse=True)
    assert precision == "precision=bf16-true"
    assert batch.startswith("data.batch_size=")
    assert asked.following(advice.overrides).plan.fits
    asked = Asked(cpu(), make=norm_stack, samples=2, method="none")
    asked = replace(asked, machine=capped(cpu(), asked.plan, 0.99, "host"))
    assert [advice.overrides for advice in advise(asked.scenario, asked.plan)] == [("precision=bf16-true",)]


def test_of_a_prime_batch_a_size_near_its_half_and_what_a_step_then_has() -> None:
    asked = Asked(cpu(), make=Stack, samples=10_007, precision="bf16-true")
    asked = replace(asked, machine=capped(cpu(), asked.plan, 0.8, "host"))
    (advice,) = advise(asked.scenario, asked.plan)
    assert advice.overrides == ("data.batch_size=5004 trainer.accumulate_grad_batches=2",)
    assert "10008 samples per step instead of 10007" in advice.changes[0]
    assert asked.following(advice.overrides).plan.fits


def test_an_optimizer_that_cannot_be_offloaded_gets_other_advice() -> None:
    module, batch = Stack(), torch.zeros(40_000, 96)
    optimizer = torch.optim.RMSprop(module.parameters())
    with pytest.raises(ValueError, match="RMSprop"):
        plan(module, batch, hardware=gpu(), optimizer=optimizer)
    whole = plan(module, batch, method="none", hardware=gpu(), optimizer=optimizer)
    small = capped(gpu(), whole, 0.9, "device")
    advised = [a.overrides for a in plan(module, batch, method="none", hardware=small, optimizer=optimizer).advice]
    assert tuple(batches(40_000, [20_000])) in advised
    assert ("method=full",) not in advised
