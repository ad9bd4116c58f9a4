"""The fake twin takes the path of the real run, answers for values, and leaves the original and the process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_offload.methods import dryrun, twin
from lightning_offload.methods.meter import Meter
from lightning_offload.methods.twin import Twin, TwinError, TwinMeter, pretending
from lightning_offload.methods.zo2 import ZO2Settings
from lightning_offload.planning import plan
from lightning_offload.planning.scenario import Dry, Scenario
from tests.planning.machines import cpu, gpu
from tests.zoo import ZOO


def hugging_face(family: str, attention: str = "sdpa", **more: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model(family, **size, **heads, **more)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train(), batch


def flops_of(module: nn.Module, batch: dict[str, Tensor]) -> tuple[int, int]:
    """FLOPs and peak bytes (beyond what was there) of a real forward and backward."""
    with Meter() as meter:
        module(**batch).loss.backward()
    return meter.flops, meter.peak.bytes


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_masks_are_those_of_a_real_run(family: str) -> None:
    """transformers would see that a mask is fake, build it whole, and copy keys and values to every head."""
    module, batch = hugging_face(family)
    assert Dry(Scenario(module, batch, cpu())).run.flops == flops_of(module, batch)[0]


def test_without_the_pretence_the_plan_would_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = hugging_face("llama")
    honest = Dry(Scenario(module, batch, cpu())).run.meter
    monkeypatch.setattr(dryrun, "pretending", twin.nullcontext)
    naive = Dry(Scenario(module, batch, cpu())).run.meter
    assert naive.peak.bytes > honest.peak.bytes
    assert not naive.reads
    assert honest.reads


def test_where_a_run_waits_for_the_device_is_named() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = (x > 0).nonzero()
            if (x == x).all() and x.max().item() == 1.0:
                return self.net(x).mean() + 0.0 * rows.sum()
            raise AssertionError("not the answer of a full mask")

    reads = Dry(Scenario(Waits(), torch.randn(2, 4), cpu())).run.meter.reads
    assert [read.what for read in reads] == ["nonzero", "local_scalar_dense", "local_scalar_dense"]
    assert all("test_twin.py:" in read.where for read in reads)
    assert [read.answer for read in reads] == ["(8, 2)", "True", "1.0"]


def test_mixture_of_experts_is_planned_in_bf16() -> None:
    module, batch = hugging_face("mixtral", num_local_experts=4, num_experts_per_tok=2)
    dry = Dry(Scenario(module, batch, gpu(), precision="bf16-true"))
    tokens, experts_per_token = 24, 2
    expert = 2 * 3 * 32 * 64 * tokens * experts_per_token  # three matrices, two FLOPs a weight
    layers, passes = 2, 3
    assert dry.run.flops > layers * passes * expert


def test_weights_are_shared_as_in_the_original_and_typed_as_they_compute() -> None:
    module, _ = ZOO["qwen3"]()
    made = Twin(module, torch.bfloat16)
    assert list(made.names.values()) == [name for name, _ in module.named_parameters()]
    assert made.module.lm_head.weight is made.module.model.embed_tokens.weight  # type: ignore[union-attr]
    assert {p.dtype for p in made.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert made.module.model.rotary_emb.inv_freq.dtype == torch.float32  # type: ignore[union-attr]


def test_the_optimizer_is_the_same_over_other_parameters_and_without_state() -> None:
    module = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW([{"params": [module.weight], "lr": 0.1}, {"params": [module.bias]}], lr=0.2)
    module(torch.randn(1, 4)).sum().backward()
    optimizer.step()
    made = Twin(module)
    copy = made.optimizer(optimizer)
    assert type(copy) is torch.optim.AdamW
    assert not copy.state
    assert [group["lr"] for group in copy.param_groups] == [0.1, 0.2]
    assert [made.names[id(p)] for group in copy.param_groups for p in group["params"]] == ["weight", "bias"]
    assert len(optimizer.state) == 2


def test_logging_and_metrics_are_muted() -> None:
    class Logs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.mean = nn.Linear(4, 1), MeanMetric()
            self.seen: list[str] = []

        def log(self, name: str, value: Any) -> None:
            self.seen.append(name)

        def log_dict(self, values: dict[str, Any]) -> None:
            self.seen += values

        def forward(self, x: Tensor) -> Tensor:
            loss = self.net(x).mean()
            self.log("loss", float(self.mean(loss)))
            self.log_dict({"again": self.mean.compute()})
            return loss

    module = Logs()
    plan(module, torch.randn(2, 4), hardware=cpu())
    assert module.seen == []
    assert float(module.mean.weight) == 0


@contextmanager
def unchanged_process() -> Iterator[None]:
    from transformers.utils import import_utils

    before = torch.get_rng_state(), torch.get_default_dtype(), import_utils.is_fake_tensor, torch.is_grad_enabled()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    after = torch.get_default_dtype(), import_utils.is_fake_tensor, torch.is_grad_enabled()
    assert after == before[1:]
    assert type(torch.empty(1)) is Tensor


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_as_before(precision: Any, fails: bool) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if fails:
                raise ZeroDivisionError("on purpose")
            return F.dropout(self.net(x) + torch.randn(4).to(x), 0.5).mean()

    module, batch = Draws(), torch.randn(2, 4)
    with unchanged_process():
        if fails:
            with pytest.raises(TwinError, match=r"Draws cannot be planned.*test_twin.py:\d+: on purpose.*`step=`"):
                plan(module, batch, hardware=cpu(), precision=precision)
        else:
            assert plan(module, batch, hardware=cpu(), precision=precision).fits


def test_values_are_answered_only_for_tensors() -> None:
    with pretending(), Twin(nn.Linear(1, 1)).mode, TwinMeter() as meter:
        assert torch.ones(3, dtype=torch.int64).sum().item() == 1
        assert torch.equal(torch.zeros(2), torch.zeros(2))
        assert torch.ones(2, 3).masked_select(torch.ones(3, dtype=torch.bool)).shape == (6,)
    assert len(meter.reads) == 3


class Asks(nn.Module):
    """A step that decides by values."""

    def __init__(self, ask: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.ask = nn.Linear(4, 4), ask

    def forward(self, x: Tensor) -> Tensor:
        return self.ask(self.net, x)


def nothing_wrong(net: nn.Module, x: Tensor) -> Tensor:
    loss = net(x).square().mean()
    if torch.isnan(loss) or torch.isinf(loss) or torch.isnan(x).any() or (x > 1e9).any():
        raise FloatingPointError("the loss is not finite")
    if not torch.isfinite(loss) or not torch.isfinite(x).all():
        raise FloatingPointError("not finite")
    return loss


def test_nothing_is_wrong_with_values_that_nobody_has() -> None:
    assert plan(Asks(nothing_wrong), torch.randn(2, 4), hardware=cpu()).fits


@pytest.mark.parametrize("assign", [False, True])
def test_a_mask_selects_at_most_everything(assign: bool) -> None:
    def masked(net: nn.Module, x: Tensor) -> Tensor:
        out = net(x)
        rows = x[:, 0] > 0
        if assign:
            out = out.clone()
            out[rows] = 0.0
            return out.mean()
        return out[rows].mean()

    dry = Dry(Scenario(Asks(masked), torch.randn(6, 4), cpu()))
    assert dry.run.flops == 3 * 2 * 6 * 4 * 4 - 2 * 6 * 4 * 4  # forward, and the weight's gradient
    assert dry.timing.step_s > 0


def test_a_size_that_is_a_value_is_said_on_a_cpu_too() -> None:
    def cut(net: nn.Module, x: Tensor) -> Tensor:
        length = int((x[:, 0] > 0).sum().item())
        return net(x[:length]).mean()

    (note,) = [note for note in plan(Asks(cut), torch.randn(6, 4), hardware=cpu()).notes if "taken as" in note]
    assert "taken as 1; pass `step=` if sizes depend on it" in note
    assert "test_twin.py:" in note


def described(tensor: Tensor, among: tuple[Any, ...]) -> tuple[Any, ...]:
    shares = [t.untyped_storage()._cdata == tensor.untyped_storage()._cdata for t in among if isinstance(t, Tensor)]
    layout = tensor.shape, tensor.stride(), tensor.storage_offset(), shares
    return type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.grad_fn, *layout


def test_shapes_asked_in_cpp_are_those_of_the_fake_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    run = TwinMeter._run

    def both(self: TwinMeter, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = run(self, func, args, kwargs)
        if func in twin._IN_CPP:
            seen.add(func)
            assert described(made, args) == described(func(*args, **kwargs), args), func
        return made

    monkeypatch.setattr(TwinMeter, "_run", both)
    for family in ("llama", "mistral", "phi"):
        module, batch = hugging_face(family)
        Dry(Scenario(module, batch, cpu(), precision="bf16-mixed", checkpointing=True))
    Dry(Scenario(module, batch, cpu(), method="zo2", settings=ZO2Settings(min_numel=0)))
    assert seen == twin._IN_CPP
