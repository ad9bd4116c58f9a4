"""Every section of ``lightning-offload bench`` runs; what it measures is not tested."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning_offload.conf import schema

from lightning_offload.bench import (
    SECTIONS,
    BenchSettings,
    QualitySettings,
    RecallSettings,
    Report,
    Row,
    Table,
    ZerothSettings,
    arms,
    host,
    prediction,
    quality_runs,
    run_bench,
    sections,
    simulated,
    simulated_meft,
)
from lightning_offload.bench.arms import ARMS, METHODS, NATIVE, Arm, state_bytes
from lightning_offload.bench.bounds import BYTES_FUSED, Counts, full_bound_s, zo2_bound_s
from lightning_offload.bench.measure import CannotRun, Spread, ratio, round_robin
from lightning_offload.bench.training import Workload, compare, take_turn
from lightning_offload.memory.budget import Machine
from lightning_offload.memory.rates import Rates
from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.lsp import LSPSettings
from lightning_offload.planning import plan
from lightning_offload.text import CausalLM, batch_by_shape
from tests.zoo import VOCAB

TINY = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
QUICK = BenchSettings(
    numel=1,
    rounds=2,
    training_rounds=1,
    steps=1,
    models=["llama_1b3"],
    batch=1,
    length=8,
    sections=["host"],
    quality=QualitySettings(arms=["adamw"], steps=1, batch=1, length=16, seeds=1, jobs=1),
    zeroth=ZerothSettings(arms=["rademacher"], forwards=16, seeds=1),
    recall=RecallSettings(arms=["meft 256"], steps=1, batch=1, seeds=1),
)
WORK = Workload(title="tiny", config=TINY, batch=1, length=8, device="cpu", precision="32-true")
RATES = Rates(
    fp32_tflops=10,
    bf16_tflops=100,
    device_gb_per_s=1000,
    h2d_gb_per_s=20,
    d2h_gb_per_s=10,
    duplex=0.8,
    pageable_gb_per_s=5,
    host_gb_per_s=50,
    op_us=5,
)
ALL_MACHINES = simulated.machines()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The models and texts of all sections, that small; one machine to plan for, and none to measure."""
    monkeypatch.chdir(tmp_path)
    noise = torch.randint(VOCAB, (quality_runs.CALIBRATION + 2, 16))
    monkeypatch.setattr(quality_runs, "read_text", lambda length, gsm8k: quality_runs.Text(noise, noise, noise))
    monkeypatch.setattr(sections, "SMALL", TINY)
    monkeypatch.setattr(sections, "shape", lambda name: TINY)
    monkeypatch.setattr(host, "_shapes", lambda numel: [torch.Size((16, 16))] * 6)
    monkeypatch.setattr(simulated, "machines", lambda: {"laptop_4gb": ALL_MACHINES["laptop_4gb"]})
    job = simulated.Job("laptop_4gb", TINY, 1, 8, LSPSettings(nnz=4, min_numel=0), {simulated.SERIAL: 4.0})
    monkeypatch.setattr(simulated, "PAPER", {"a job": job})
    monkeypatch.setattr(prediction, "POINTS", (("tiny", 2, "32-true"), ("tiny", 1, "bf16-true")))
    monkeypatch.setattr(sections, "ARMS", (NATIVE, METHODS[0]))  # the others are measured below
    monkeypatch.setattr(sections, "beside_meft", partial(simulated_meft.beside_meft, widths=[1024]))
    monkeypatch.setattr(Rates, "measured", lambda device, host_threads: RATES)
    sections._rates.cache_clear()
    yield
    sections._rates.cache_clear()


def _run(settings: BenchSettings, folder: Path | None = None) -> tuple[Report, list[str]]:
    said: list[str] = []
    return run_bench(settings, folder, said.append), said


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs_on_the_cpu_and_yields_finite_positive_numbers(name: str) -> None:
    report, said = _run(replace(QUICK, sections=[name]))
    assert {table.section for table in report.tables} == {name}
    for table in report.tables:
        assert table.rows
        assert table.markdown() in said
        assert all(math.isfinite(value) and value >= 0 for row in table.rows for value in row.values.values())
        timed = [row for row in table.rows if row.samples_s]
        assert len(timed) == (len(table.rows) if name in ("host", "overhead", "noise", "training") else 0)
        assert all(second > 0 for row in timed for second in row.samples_s)


@pytest.mark.usefixtures("tiny")
def test_a_report_is_written_and_read_back(tmp_path: Path) -> None:
    report, _ = _run(replace(QUICK, sections=["rates", "host"]), tmp_path / "new")
    again = Report.from_json((tmp_path / "new" / "bench.json").read_text())
    assert again.markdown() == report.markdown() == (tmp_path / "new" / "bench.md").read_text()
    assert again.to_json() == report.to_json()
    assert again.environment["torch"] == torch.__version__
    assert again.settings["numel"] == 1


@pytest.mark.usefixtures("tiny")
def test_what_this_machine_cannot_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {name: sections.Section(lambda settings: [], section.why_not) for name, section in SECTIONS.items()}
    monkeypatch.setattr(sections, "SECTIONS", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report, _ = _run(replace(QUICK, sections=None))
    assert [table.section for table in report.tables] == [
        "training",
        "prediction",
        "quality",
        "zeroth",
        "recall",
        "sizes",
    ]
    assert all("sections=[" in left_out.markdown() for left_out in report.tables)
    assert all("no CUDA device" in left_out.markdown() for left_out in report.tables[:2])


def test_arms_run_in_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    def arm(name: str) -> int:
        calls.append(name)
        return len(calls)

    results, failed = round_robin({name: lambda name=name: arm(name) for name in "abc"}, rounds=2)
    assert calls == list("abcabcabc")
    assert results == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}
    assert not failed


def test_an_arm_that_cannot_run_is_asked_once() -> None:
    calls: list[str] = []

    def refuse() -> int:
        calls.append("asked")
        raise CannotRun("not here")

    results, failed = round_robin({"works": lambda: 1, "refuses": refuse}, rounds=3)
    assert (results, failed, calls) == ({"works": [1, 1, 1]}, {"refuses": "not here"}, ["asked"])


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio([2.0, 8.0, 6.0], [1.0, 4.0, 3.0]) == {"ratio": 2.0, "ratio_low": 2.0, "ratio_high": 2.0}
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_table_has_a_row_per_arm() -> None:
    made = Table("s", "what", (Row("a", {"ratio": 1.5, "ratio_low": 1.0, "ratio_high": 2.0}), Row("b", {"ms": 120.4})))
    assert made.markdown().splitlines() == [
        "| what | ratio (middle half) | ms |",
        "|---|--:|--:|",
        "| a | 1.500 (1.000..2.000) |  |",
        "| b |  | 120 |",
    ]


def test_machines_are_those_that_conf_describes_with_rates() -> None:
    assert {"laptop_4gb", "rtx4090"} <= ALL_MACHINES.keys()
    assert not {"auto", "cpu"} & ALL_MACHINES.keys()


@pytest.mark.usefixtures("tiny")
def test_a_simulated_step_never_beats_its_bound_nor_loses_to_the_serial_schedule() -> None:
    (table,) = SECTIONS["simulated"].measure(QUICK)
    assert [row.arm for row in table.rows] == ["laptop_4gb: full", "laptop_4gb: lsp"]
    full, lsp = (row.values for row in table.rows)
    assert 0 < full["bound_s"] <= full["step_s"] <= full["zero_offload_s"]
    assert 0 < lsp["bound_s"] <= lsp["step_s"]


@pytest.mark.usefixtures("tiny")
def test_schedules_stand_beside_published_seconds_fastest_where_least_waits() -> None:
    table, _ = SECTIONS["published"].measure(QUICK)
    values = {row.arm: row.values for row in table.rows}
    serial, full, lsp = (values[method] for method in (simulated.SERIAL, simulated.FULL, simulated.SUBSPACE))
    layer_wise = next(row for arm, row in values.items() if arm.startswith("full, layer"))
    assert serial["published_s"] == 4.0
    assert layer_wise["step_s"] <= full["step_s"] <= serial["step_s"]
    assert all(row["fused_casts_s"] <= row["step_s"] for row in (serial, full, layer_wise))
    assert lsp["step_s"] < values["lsp, ZeRO-Offload's schedule"]["step_s"]
    assert values["lsp, others frozen"]["step_s"] < lsp["step_s"]


@pytest.mark.usefixtures("tiny")
def test_arithmetic_of_lsp_is_that_of_sparse_products() -> None:
    """r nonzeros a row on each side; from activations two of them by all tokens, and one product of d x tokens x d."""
    _, table = SECTIONS["published"].measure(QUICK)
    tokens, d, r = 8, 32, 4
    for row, (count, m, n) in zip(table.rows, [(8, 64, 64), (4, 96, 64), (2, 64, 96)], strict=False):
        assert row.arm == f"{count} of {m} x {n}, d={d}"
        assert row.values["weight_gradient_tflop"] * 1e12 == pytest.approx(count * 2 * tokens * m * n)
        larger, smaller = max(m, n), min(m, n)
        assert row.values["compress_tflop"] * 1e12 == pytest.approx(count * 2 * r * (larger * smaller + smaller * d))
        direct = 2 * tokens * r * (m + n) + 2 * tokens * d * d
        assert row.values["activations_tflop"] * 1e12 == pytest.approx(count * direct)
    assert table.rows[-1].values["compress_tflop"] == sum(row.values["compress_tflop"] for row in table.rows[:-1])


def test_rows_of_meft_cross_the_link_less_than_published() -> None:
    """`targets.md`, "meft traffic"; per layer, so that two of LLaMA-7B's say it."""
    config = {**TINY, "hidden_size": 4096, "num_attention_heads": 32}
    *_, table = simulated_meft.beside_meft(config, [(ALL_MACHINES["rtx3090"], simulated_meft.ONE)], [6144])
    moved = {row.arm: row.values["both_p"] for row in table.rows}
    union, numbers = 1591 / 6144, 4 / (2 * 2 * 4096)
    up, refresh = union * (1 / 2 + numbers), 1 / 2 / 32
    expected = up + union + refresh + 1 / (2 * 2 * 4096)  # gradients of keys and values, a flag per row
    assert moved["meft, placement=keys"] == pytest.approx(expected, rel=1e-5)
    assert moved["meft, placement=keys"] <= 0.41
    assert moved["meft, placement=host"] == pytest.approx(moved["the paper"], abs=0.005)  # which it is as published


def test_every_method_is_measured_beside_native_with_its_lanes() -> None:
    rows, notes = compare(WORK, [NATIVE, *METHODS], rounds=2, steps=2, rates=RATES)
    assert [row.arm for row in rows] == [NATIVE.name, *(method.name for method in METHODS)]
    assert all(len(row.samples_s) == 2 and row.values["tokens_per_s"] > 0 for row in rows)
    lanes = {"d2h_busy_percent", "h2d_busy_percent", "percent_of_bound", "ratio"}
    for method, row in zip(METHODS, rows[1:], strict=True):
        assert lanes - (set() if method.bound_s else {"percent_of_bound"}) <= row.values.keys()
    assert all("host_busy_percent" in row.values for row in rows[1:3])
    assert rows[0].values["state_gib"] < rows[1].values["state_gib"]  # masters and wires beside the moments
    assert notes == tuple(f"{method.name}: {method.note}" for method in METHODS if method.note)


@pytest.mark.parametrize("peer", arms.PEERS, ids=lambda arm: arm.name)
def test_a_peer_is_measured_or_said_to_be_missing(peer: Arm) -> None:
    rows, notes = compare(WORK, [NATIVE, peer], rounds=1, steps=1, rates=None)
    assert [row.arm for row in rows[1:]] == ([] if peer.why_not() else [peer.name])
    assert notes == (f"{peer.name}: {peer.why_not() or peer.note}",)


def test_peers_that_are_not_installed_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for peer, package in zip(arms.PEERS, ("torchao", "galore-torch", "peft"), strict=True):
        assert peer.why_not() == f"not installed (pip install {package})"


@pytest.mark.skipif(not find_spec("peft"), reason="needs peft")
def test_lora_trains_its_adapters_alone() -> None:
    module = CausalLM(config=TINY, init="random")
    next(arm for arm in arms.PEERS if "LoRA" in arm.name).prepare(module)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * TINY["num_hidden_layers"]  # type: ignore[operator]


@pytest.mark.parametrize("weight", [torch.zeros(12, 4), torch.zeros(4, 12)], ids=["tall", "wide"])
def test_a_drawn_projector_has_the_shape_that_galore_takes(weight: torch.Tensor) -> None:
    projector = arms._drawn_projector(weight, 3)
    low_rank = weight @ projector.t() if len(weight) == 12 else projector.t() @ weight
    assert sorted(low_rank.shape) == [3, 12]
    basis = projector if projector.shape[0] == 3 else projector.t()
    assert torch.allclose(basis @ basis.t(), torch.eye(3), atol=1e-5)


def test_an_optimizer_that_lightning_cannot_drive_steps_all_the_same() -> None:
    steps: list[bool] = []

    class Foreign(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            steps.append(any(p.grad is not None for group in self.param_groups for p in group["params"]))
            super().step()

    arm = Arm(
        name="foreign", optimizer=lambda module: Foreign(module.parameters(), lr=0.1), steps_itself=True, clips=False
    )
    turn = take_turn(replace(WORK, clip=1.0), arm, steps=2)
    assert steps == [True] * 4
    assert turn.step_s > 0


def test_what_does_not_fit_is_said_and_given_back() -> None:
    made: list[weakref.ref[CausalLM]] = []

    def too_much(module: CausalLM) -> None:
        made.append(weakref.ref(module))
        raise torch.OutOfMemoryError("all of it")

    with pytest.raises(CannotRun, match="does not fit on the device") as refusal:
        take_turn(WORK, Arm(name="big", prepare=too_much), steps=1)
    assert made[0]() is None
    assert refusal.value.__context__ is None


def test_optimizer_state_is_counted_with_projectors() -> None:
    state = {"exp_avg": torch.zeros(6), "step": 3, "projector": SimpleNamespace(ortho_matrix=torch.zeros(4))}
    assert state_bytes(SimpleNamespace(state={"w": state})) == 4 * 10
    assert state_bytes(SimpleNamespace()) == 0


def test_flops_are_those_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    network = CausalLM(config=TINY, init="random").network
    tokens = torch.randint(VOCAB, (2, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = network(input_ids=tokens).logits.sum()
        forward = counter.get_total_flops()
        loss.backward()
    counts = Counts.of(network, batch=2, length=16, recompute=False)
    hidden, layers = 64, 2
    after = 2 * 2 * hidden * layers * 16 * (16 - 1)  # of the tokens after, which the math kernel computes and masks
    assert counts.forward_flops + after == forward
    assert counts.backward_flops + 2 * after == counter.get_total_flops() - forward
    assert counts.parameters == sum(p.numel() for p in network.parameters())


def test_experts_count_as_far_as_a_token_takes_them() -> None:
    mixtral = {**TINY, "model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}
    flops = []
    for taken in (1, 2):
        with torch.device("meta"):
            network = CausalLM(config={**mixtral, "num_experts_per_tok": taken}, init="random").network
        flops.append(Counts.of(network, batch=1, length=4, recompute=True).forward_flops)
    assert flops[1] - flops[0] == 4 * 2 * (3 * 64 * 96) * 2


@pytest.mark.parametrize(
    ("counts", "bound_s"),
    [
        (Counts(1e14, 3e14, 10**9), 3.0 + 1.0),  # the host's 0.56 s hide under the forward
        (Counts(1e13, 3e13, 10**9), 0.3 + 0.56),  # they do not
        (Counts(1e11, 3e11, 10**9, wire_bytes=4), 0.03 + 0.56),
        (Counts(0, 0, 10**9, wire_bytes=40), 4.0),  # the link down is all
    ],
)
def test_the_bound_of_full_is_the_longest_way_through_its_lanes(counts: Counts, bound_s: float) -> None:
    assert full_bound_s(counts, RATES) == pytest.approx(bound_s)


@pytest.mark.parametrize(
    ("counts", "bound_s"),
    [
        (Counts(1e14, 0, 10**9, projected=10**9), 2.0),  # two forwards
        (Counts(1e12, 0, 10**9, projected=10**9), 0.1 + 0.1 / 0.8),  # 0.1 s up, 0.2 s down
        (Counts(1e12, 0, 10**9, projected=10**9, wire_bytes=4), 2 * (0.1 + 0.1 / 0.8)),
    ],
)
def test_the_bound_of_zo2_is_the_link_both_ways_or_the_forwards(counts: Counts, bound_s: float) -> None:
    assert zo2_bound_s(counts, RATES) == pytest.approx(bound_s)


@pytest.mark.parametrize(
    "slow", [{"fp32_tflops": 1e-3}, {"host_gb_per_s": 1e-3}, {"h2d_gb_per_s": 1e-4}, {"d2h_gb_per_s": 1e-4}]
)
def test_the_bound_of_full_is_that_of_a_plan_but_for_what_it_does_not_count(slow: dict[str, float]) -> None:
    fast = {"device_gb_per_s": 1e9, "h2d_gb_per_s": 1e6, "d2h_gb_per_s": 1e6, "host_gb_per_s": 1e6, "op_us": 1e-9}
    rates = replace(RATES, **{**fast, "fp32_tflops": 1e-2, **slow})  # elementwise operations and launches take no time
    machine = Machine.described(
        name="a gpu", device_type="cuda", device_gib=24, host_gib=64, cores=8, rates=replace(rates, duplex=1.0)
    )
    with torch.device("meta"):
        model = CausalLM(config=TINY, init="random")
    counts = Counts.of(model.network, batch=2, length=16, recompute=False, wire_bytes=4)
    planned = plan(model, batch_by_shape(2, 16, VOCAB), hardware=machine, settings=FullSettings(min_numel=1))
    assert planned.lanes["host"].bytes == BYTES_FUSED * counts.parameters
    after = planned.flops - counts.forward_flops - counts.backward_flops  # attention to the tokens after, masked
    whole = replace(
        counts, forward_flops=counts.forward_flops + after / 3, backward_flops=counts.backward_flops + 2 * after / 3
    )
    assert 0 < after < 0.04 * planned.flops
    assert planned.bound_s == pytest.approx(full_bound_s(whole, rates), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sections": ["hots"]},
            r"no section 'hots'; there are rates, host, overhead, simulated, noise, published, .*, recall",
        ),
        ({"models": ["opt_3b"]}, r"no model 'opt_3b'; there are gpt2, .*opt_175b.*qwen3_8b"),
        ({"rounds": 0}, r"rounds=0: give at least 1"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        BenchSettings(**settings)
    assert "\n" not in str(error.value)


def test_conf_shows_every_setting_with_its_default() -> None:
    content = yaml.safe_load((Path(schema.__file__).parent / "bench.yaml").read_text())
    shown = {name: value for name, value in content.items() if name not in ("defaults", "hydra", "output")}
    defaults = asdict(BenchSettings())
    assert shown == {**defaults, "models": list(defaults["models"])}
    assert all(name in content["hydra"]["help"]["template"] for name in (*defaults, *SECTIONS))


def test_each_arm_has_a_name_of_its_own() -> None:
    assert len({arm.name for arm in ARMS}) == len(ARMS) == 1 + sum(map(len, (arms.METHODS, arms.IN_MEMORY, arms.PEERS)))
