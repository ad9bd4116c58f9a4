"""What is predicted is what a real run on the CPU does: bytes per lane, arenas, FLOPs, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_offload.memory.arena import HostMemory, HostReport
from lightning_offload.memory.lanes import InlineLanes
from lightning_offload.memory.ledger import Ledger
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.full import Full, FullSettings
from lightning_offload.methods.meter import Meter
from lightning_offload.methods.method import Method
from lightning_offload.planning import plan
from lightning_offload.planning.scenario import Dry, Scenario
from lightning_offload.precision import OffloadPrecision
from tests.helpers import every, pairwise, product, row_id
from tests.lit import Lit, Manual, offload
from tests.planning.machines import cpu
from tests.zoo import ZOO

STEPS = 3


@dataclass
class Real:
    """What a run has done."""

    ledger: Ledger
    report: HostReport
    flops: int = 0


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


def run_for_real(
    module: nn.Module,
    batch: Any,
    method: Method,
    precision: str,
    micro_batches: int = 1,
    clip: Clip | None = None,
) -> Real:
    """STEPS steps of the engine, everything inline."""
    dtypes = DTypes.of(precision, method.rounding)
    if dtypes.compute is not None:
        module.to(dtypes.compute)
    lanes = InlineLanes(HostMemory(pin=False))
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    engine = Engine(module, optimizer, method, lanes, dtypes, expects_clip=clip is not None)
    meter = Meter()
    plugin = OffloadPrecision(precision)  # type: ignore[arg-type]
    plugin.use_device(torch.device("cpu"))
    for _ in range(STEPS):
        for index in range(micro_batches):
            engine.stepping = index == micro_batches - 1
            with meter:
                with plugin.forward_context(), engine.micro_batch():
                    loss = loss_of(module(**batch))  # nothing else of the output is kept
                (loss / micro_batches).backward()
                del loss  # and the leaves of its graph, as Lightning does
        engine.step(clip)
    engine.flush()
    report = lanes.memory.report()
    engine.detach()
    return Real(lanes.ledger, report, meter.flops)


ROWS = pairwise(
    {
        "family": ["llama", "gpt2", "opt", "qwen3", "albert", "phi"],
        "precision": ["32-true", "bf16-true"],
        "micro_batches": [1, 2, 4],
        "accumulate": ["device", "host"],
        "clip": [None, Clip(1.0), Clip(0.1, "value")],
        "min_numel": [0, 4096],
        "skip_nonfinite": [True, False],
        "checkpointing": [False, True],
    }
)


@pytest.mark.parametrize("row", every(2, ROWS), ids=row_id)
def test_bytes_of_every_lane_arenas_and_flops(row: dict[str, Any]) -> None:
    module, batch = ZOO[row["family"]]()
    if row["checkpointing"] and module.supports_gradient_checkpointing:  # type: ignore[union-attr]
        module.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    settings = FullSettings(
        accumulate=row["accumulate"], min_numel=row["min_numel"], skip_nonfinite=row["skip_nonfinite"]
    )
    scenario = Scenario(
        module=module,
        batch=batch,
        machine=cpu(),
        settings=settings,
        precision=row["precision"],
        micro_batches=row["micro_batches"],
        clip=row["clip"],
        optimizer=torch.optim.AdamW(module.parameters(), fused=True),
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    dry = Dry(scenario)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "planning trained"

    real = run_for_real(module, batch, Full(settings), row["precision"], row["micro_batches"], row["clip"])
    predicted = {kind: (t.operations * STEPS, t.bytes * STEPS) for kind, t in dry.timing.kinds.items()}
    assert predicted == {kind: (total.operations, total.bytes) for kind, total in real.ledger.kinds.items()}
    assert ("h2d", "weights") in predicted or row["min_numel"]
    assert dry.run.lanes.memory.report() == real.report
    assert dry.run.flops * STEPS == real.flops
    assert real.flops > 0


class Recorded(Lit):
    """Keeps what the strategy did."""

    def on_train_end(self) -> None:
        engine = self.trainer.strategy.engine  # type: ignore[attr-defined]
        engine.flush()
        self.real = Real(engine.lanes.ledger, engine.lanes.memory.report())


class RecordedManual(Recorded, Manual):
    offload = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}


@pytest.mark.parametrize("kind", [Recorded, RecordedManual])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_the_trainer_moves_what_the_plan_says(kind: type[Recorded], precision: Any) -> None:
    module = kind()
    batch = next(iter(module.train_dataloader()))
    dry = Dry(
        Scenario(
            module=module,
            batch=batch,
            machine=cpu(),
            settings=FullSettings(min_numel=0),
            precision=precision,
            micro_batches=3,
            clip=Clip(0.5),
        )
    )
    flags: dict[str, Any] = {} if kind is RecordedManual else {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}
    L.Trainer(
        strategy=offload(),
        precision=precision,
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **flags,
    ).fit(module)
    moved = {kind: (t.operations * 2, t.bytes * 2) for kind, t in dry.timing.kinds.items()}
    done = {kind: (t.operations, t.bytes) for kind, t in module.real.ledger.kinds.items()}
    # the module's hook at the end of training may have written weights, so masters are made to follow
    assert moved == {kind: count for kind, count in done.items() if kind[1] != "adopt"}
    assert dry.run.lanes.memory.report() == module.real.report


def sized(family: str, precision: str) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    """Models in which activations, logits and weights all matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    wide = {"vocab_size": 2048, "max_position_embeddings": 256}
    configs: dict[str, dict[str, Any]] = {
        "llama": {
            **wide,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
        },
        "gpt2": {"vocab_size": 2048, "n_positions": 256, "n_embd": 192, "n_layer": 3, "n_head": 6},
        "opt": {**wide, "hidden_size": 192, "word_embed_proj_dim": 192, "ffn_dim": 768, "num_hidden_layers": 4},
    }
    config = AutoConfig.for_model(family, **configs[family])
    ids = torch.randint(3, 2048, (4, 96), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    dtype = DTypes.of(precision).compute or torch.float32  # made as it is: nothing is alive but what trains
    return lambda: AutoModelForCausalLM.from_config(config, dtype=dtype).train(), batch


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had handed out and not taken back, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("family", "precision", "checkpointing"),
    product(
        family=["llama", "gpt2", "opt"],
        precision=["32-true", "bf16-true", "bf16-mixed"],
        checkpointing=[False, True],
    ),
)
def test_the_peak_on_the_device_is_within_five_percent(family: str, precision: str, checkpointing: bool) -> None:
    make, batch = sized(family, precision)

    def made() -> nn.Module:
        module = make()
        if checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        return module

    predicted, measured = predicted_and_measured(made, batch, precision)
    assert predicted == pytest.approx(measured, rel=0.05)


def predicted_and_measured(
    made: Callable[[], nn.Module], batch: dict[str, Tensor], precision: str, method: Method | None = None
) -> tuple[int, int]:
    """Peak bytes on the device."""
    method = method or Full(FullSettings(accumulate="device"))
    asked = {"method": method.name, "settings": method.settings, "precision": precision}
    planned = plan(made(), batch, hardware=cpu(), gradient_clip_val=1.0, **asked)  # type: ignore[arg-type]
    held: list[nn.Module] = []

    def run() -> None:
        held.append(made())
        run_for_real(held[0], batch, method, precision, clip=Clip(1.0))

    return planned.device.bytes + planned.host.holds["casts"], allocated_peak(run)


class Encoder(nn.Module):
    """Of sequences of vectors: no tokens, no Hugging Face, and a loss of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 6, 512, dropout=0.0, batch_first=True, dtype=dtype)
        self.body, self.head = nn.TransformerEncoder(layer, 4), nn.Linear(192, 10, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(x).mean(1)).float(), y)


def lora(dtype: torch.dtype) -> nn.Module:
    peft = pytest.importorskip("peft")
    make, _ = sized("llama", "bf16-true" if dtype is torch.bfloat16 else "32-true")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    return peft.get_peft_model(make(), config, autocast_adapter_dtype=False).train()


def vectors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 128, 192, generator=generator).to(dtype)
    return {"x": inputs, "y": torch.randint(0, 10, (8,), generator=generator)}


@pytest.mark.parametrize("make", [Encoder, lora])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_so_it_is_of_a_plain_module_and_with_adapters(make: Callable[[torch.dtype], nn.Module], precision: str) -> None:
    dtype = DTypes.of(precision).compute or torch.float32
    batch = vectors(dtype) if make is Encoder else sized("llama", precision)[1]
    predicted, measured = predicted_and_measured(lambda: make(dtype), batch, precision)
    assert predicted == pytest.approx(measured, rel=0.05)
