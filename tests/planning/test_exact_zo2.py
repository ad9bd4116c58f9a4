"""What is predicted of zo2 is what a real run on the CPU does, step after step once its pipeline is full."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_offload.memory.arena import HostMemory, HostReport
from lightning_offload.memory.lanes import InlineLanes
from lightning_offload.memory.ledger import Total
from lightning_offload.methods.meter import Meter
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from lightning_offload.parts import parts_of
from lightning_offload.planning import Plan, plan
from lightning_offload.planning.methods import ZEROTH
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.precision import OffloadPrecision
from tests.helpers import every, mostly_slow, pairwise, row_id
from tests.planning.machines import cpu, gpu
from tests.planning.test_exact import loss_of, sized
from tests.zoo import ZOO

Kinds = dict[tuple[str, str], tuple[int, int]]


class Real:
    """The engine on a module, everything inline."""

    def __init__(self, module: nn.Module, batch: Any, settings: ZO2Settings, plugin: OffloadPrecision) -> None:
        self.method, self.plugin = ZO2(settings), plugin
        dtypes = plugin.dtypes(self.method)
        self.module, self.parts = module.eval(), parts_of(batch, settings.micro_batches)
        if dtypes.compute is not None:
            module.to(dtypes.compute)
        self.lanes = InlineLanes(HostMemory(pin=False))
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
        self.engine = ZerothEngine(module, optimizer, self.method, self.lanes, dtypes)
        self.plugin.use_device(torch.device("cpu"))

    def step(self, micro_batches: int = 1) -> None:
        for _ in range(micro_batches):
            with self.plugin.forward_context():
                self.engine.micro_batch(lambda part: loss_of(self.module(**part)), self.parts)
        self.engine.step()

    def kinds(self) -> Kinds:
        return counted(self.lanes.ledger.kinds)

    def report(self) -> HostReport:
        return self.lanes.memory.report()


def counted(kinds: dict[tuple[str, str], Total]) -> Kinds:
    return {kind: (total.operations, total.bytes) for kind, total in kinds.items()}


ROWS = pairwise(
    {
        "family": ["llama", "gpt2", "opt", "qwen3", "albert", "phi"],
        "precision": ["32-true", "bf16-true", "16-true", "bf16-mixed"],
        "asked": [{}, {"wire": "float16"}, {"master": "float32"}, {"rounding": "nearest"}],
        "accumulates": [1, 3],
        "micro_batches": [1, 2],
        "directions": [1, 2],
        "slots": [3, 4],
        "min_numel": [0, 4096],
        "resident": ["auto", 1e-4, 10.0],
        "write_back_every": [1, 3],
        "distribution": ["popcount", "rademacher"],
    }
)


@pytest.mark.parametrize("row", every(3, ROWS), ids=row_id)
def test_bytes_of_every_lane_arenas_and_flops(row: dict[str, Any]) -> None:
    module, batch = ZOO[row["family"]]()
    names = ("micro_batches", "directions", "slots", "min_numel", "resident", "write_back_every", "distribution")
    settings = ZO2Settings(seed=0, **{name: row[name] for name in names})
    accumulates, period = row["accumulates"], row["write_back_every"]
    plugin = OffloadPrecision(row["precision"], **row["asked"])
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    dry = Dry(
        Scenario(
            module,
            batch,
            cpu(),
            method=ZEROTH,
            settings=settings,
            precision=row["precision"],
            plugin=plugin,
            micro_batches=accumulates,
            optimizer=optimizer,
        )
    )
    predicted = dry.timing.kinds
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "planning trained"

    real = Real(module, batch, settings, plugin)
    for _ in range(2 * period):
        real.step(accumulates)
    full = real.kinds()
    for _ in range(period):
        with Meter() as meter:
            real.step(accumulates)
    done = {
        kind: ((operations - full[kind][0]) // period, (moved - full[kind][1]) // period)
        for kind, (operations, moved) in real.kinds().items()
        if operations > full[kind][0]
    }
    assert counted(dict(predicted)) == done
    assert dry.run.lanes.memory.report() == real.report()
    assert dry.run.flops == meter.flops > 0


@pytest.mark.parametrize(
    ("precision", "family"),
    mostly_slow(
        itertools.product(["32-true", "bf16-true", "16-true", "bf16-mixed"], ["llama", "gpt2", "opt"]),
        lambda at, row: at % 4 == 0 or row == ("bf16-mixed", "llama"),
    ),
)
def test_the_peak_on_the_device_is_within_five_percent(family: str, precision: str) -> None:
    predicted, measured = predicted_and_measured(*sized(family, precision), precision)
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {"directions": 2},
        {"micro_batches": 4},
        {"slots": 5, "prefetch": 3},
        {"resident": 1.0, "distribution": "gaussian"},
        {"distribution": "rademacher"},
    ],
    ids=row_id,
)
def test_so_it_is_with_other_settings(settings: dict[str, Any]) -> None:
    predicted, measured = predicted_and_measured(*sized("llama", "bf16-true"), "bf16-true", **settings)
    assert predicted == pytest.approx(measured, rel=0.05)


def predicted_and_measured(
    make: Callable[[], nn.Module], batch: dict[str, Tensor], precision: Any, **changed: Any
) -> tuple[int, int]:
    """Peak bytes on the device in steps; of all streams, whose threads torch's memory profiler would not see."""
    settings = ZO2Settings(seed=0, **changed)
    planned = plan(make(), batch, method="zo2", settings=settings, precision=precision, hardware=cpu())
    real = Real(make(), batch, settings, OffloadPrecision(precision))
    held = [*real.module.buffers(), *tree_leaves(real.parts)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    with Meter() as meter:
        for _ in range(3):
            real.step()
    return planned.device.bytes, real.engine.device_bytes + sum(storages.values()) + meter.peak.bytes


@pytest.mark.parametrize(("duplex", "slower"), [(1.0, 1.0), (0.8, 1.25)])
def test_a_step_on_a_slow_link_takes_what_the_link_takes(duplex: float, slower: float) -> None:
    """All weights up and down; where the directions slow each other, by that."""
    make, batch = sized("opt", "16-true")
    machine = gpu(h2d_gb_per_s=0.1, d2h_gb_per_s=0.1, duplex=duplex)
    planned = plan(make(), batch, method="zo2", precision="16-true", hardware=machine)
    blocks = sum(p.numel() for name, p in make().named_parameters() if "layers" in name)
    link_s = 2 * blocks / 1e8
    assert planned.lanes["h2d"].bytes == planned.lanes["d2h"].bytes == 2 * blocks
    assert planned.bound_s == pytest.approx(slower * link_s)
    assert planned.bound_s <= planned.step_s < 1.1 * planned.bound_s
    assert planned.bottleneck.startswith("the link ")


def test_with_all_weights_on_the_device_nothing_is_waited_for() -> None:
    make, batch = sized("opt", "16-true")
    settings = ZO2Settings(resident=10.0)
    machine = gpu(h2d_gb_per_s=0.1, d2h_gb_per_s=0.1)
    planned = plan(make(), batch, method="zo2", precision="16-true", hardware=machine, settings=settings)
    assert set(planned.lanes) == {"compute"}
    assert planned.step_s == pytest.approx(planned.bound_s)
    assert planned.host.bytes == 0


def on_a_gpu(rows: int = 4, settings: dict[str, Any] | None = None, **rates: float) -> Plan:
    """Of a model with 3.56 MB of weights in its blocks; operations take what their FLOPs and bytes take."""
    make, batch = sized("opt", "16-true")
    batch = {name: x[:1].expand(rows, -1) for name, x in batch.items()}
    asked, machine = ZO2Settings(**(settings or {})), gpu(**{"op_us": 0.01, **rates})
    return plan(make(), batch, method="zo2", precision="16-true", hardware=machine, settings=asked)


def tips_of(planned: Plan) -> list[str]:
    begin = ("the device computes", "weights that stay", "precision.wire")
    return [note for note in planned.notes if note.startswith(begin)]


def test_what_a_slow_link_is_called_and_how_many_tokens_hide_it() -> None:
    link: dict[str, Any] = {"h2d_gb_per_s": 4.0, "d2h_gb_per_s": 5.0, "settings": {"slots": 4}}
    said = re.fullmatch(
        r"the link up, 0\.890 ms for 3\.56 MB; compute would hide it from about ([\d,]+) tokens",
        on_a_gpu(**link).bottleneck,
    )
    assert said is not None
    rows = int(said[1].replace(",", "")) / 96
    assert on_a_gpu(int(0.9 * rows), **link).bottleneck.startswith("the link up")
    assert on_a_gpu(int(1.5 * rows), **link).bottleneck == "the device's compute (100 % of the step)"


def test_what_is_said_of_a_link_as_fast_as_compute_and_what_helps() -> None:
    link = {"h2d_gb_per_s": 2.0, "d2h_gb_per_s": 2.0, "op_us": 5.0}
    assert re.fullmatch(r"each unit's weights in turn, .* ms in all: pass more slots", on_a_gpu(**link).bottleneck)
    assert on_a_gpu(settings={"slots": 4}, **link).bottleneck.startswith("the device's compute")


def test_memory_that_is_not_page_locked_is_copied_by_the_host() -> None:
    slow = on_a_gpu(settings={"pin_memory": False}, pageable_gb_per_s=0.1).bottleneck
    assert slow.startswith("the host's worker, which copies what is not page-locked, 71.2 ms for 7.12 MB; ")


def test_a_device_that_waits_gets_more_to_do() -> None:
    link = {"h2d_gb_per_s": 2.0, "d2h_gb_per_s": 2.0}
    one = on_a_gpu(settings={"slots": 4}, **link)
    more, stay = tips_of(one)
    said = re.fullmatch(
        r"the device computes 8 % of a step: more tokens per step are free, or directions=(\d+); with micro_batches "
        "the parts of a larger batch share a visit of the weights, and its memory",
        more,
    )
    assert said is not None
    assert stay == "weights that stay do not cross the link: resident=0.1 keeps all of what does"
    many = on_a_gpu(settings={"slots": 4, "directions": int(said[1])}, **link)
    assert many.step_s == pytest.approx(one.step_s)
    assert "directions" not in tips_of(on_a_gpu(settings={"noise": "mezo"}, **link))[0]
    followed = on_a_gpu(settings={"resident": 0.1}, **link)
    assert set(followed.lanes) == {"compute"}
    assert tips_of(followed) == []
    assert tips_of(on_a_gpu(settings={"slots": 5}, **link))[1] == stay  # they cross it on their way down alone
    assert len(tips_of(on_a_gpu(settings={"slots": 5, "resident": ["model.decoder.layers.0"]}, **link))) == 1


def test_what_is_free_on_the_device_keeps_a_share_of_the_weights() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    width = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_attention_heads": 32}
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(num_hidden_layers=24, **width))
    ids = torch.zeros(1, 64, dtype=torch.long)

    def planned(resident: Any = "auto") -> Plan:
        settings, machine = ZO2Settings(resident=resident), gpu(device_gib=2.5)
        batch = {"input_ids": ids, "labels": ids}
        return plan(model, batch, method="zo2", precision="16-true", hardware=machine, settings=settings)

    for before in (planned(), planned(0.4)):
        said = re.search(r"resident=([\d.]+) keeps (\d+) % of what does", "\n".join(tips_of(before)))
        assert said is not None
        after = planned(float(said[1]))
        assert after.fits
        assert after.device.bytes > 0.9 * after.device.limit_bytes
        kept = 1 - after.lanes["h2d"].bytes / before.lanes["h2d"].bytes
        assert kept == pytest.approx(int(said[2]) / 100, abs=0.06)  # whole blocks, and one decimal of GiB


@pytest.mark.parametrize("settings", [{}, {"noise": "mezo"}])
def test_a_narrower_wire_is_advised_where_one_is_possible(settings: dict[str, Any]) -> None:
    def planned(name: Any, **asked: str) -> Plan:
        make, batch = sized("opt", name)
        machine, precision = gpu(h2d_gb_per_s=2, d2h_gb_per_s=2), OffloadPrecision(name, **asked)
        return plan(
            make(), batch, method="zo2", precision=precision, hardware=machine, settings=ZO2Settings(**settings)
        )

    wire = "precision.wire=float16 halves what crosses the link, and host memory"
    for name, advised in {"32-true": not settings, "bf16-mixed": not settings, "bf16-true": False}.items():
        before = planned(name)
        assert (wire in tips_of(before)) == advised
        if advised:
            after = planned(name, wire="float16")
            assert wire not in tips_of(after)
            assert 2 * after.lanes["h2d"].bytes == before.lanes["h2d"].bytes > 0


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_a_dry_run_leaves_the_process_as_it_was(precision: str) -> None:
    """Streams take turns, so that what one of them sets for the process would outlive it."""
    module, batch = ZOO["llama"]()
    settings = ZO2Settings(seed=0, min_numel=0)
    scenario = Scenario(module, batch, cpu(), method=ZEROTH, settings=settings, precision=precision)
    assert Dry(scenario).parameters > 0
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu")
