"""Models that cannot be planned as they are: one line that says where and what to pass, and nothing is touched."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import import_utils

from lightning_offload.errors import OffloadError
from lightning_offload.memory.budget import GIB
from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.twin import TwinError
from lightning_offload.planning import Plan, plan
from tests.helpers import VOCAB
from tests.lit import Lit
from tests.planning.machines import cpu, gpu

HERE = "planning/test_refusals.py:"


class Plain(Lit):
    """What can be planned."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.net.loss(batch)


class Unique(Plain):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net.loss(batch) * torch.unique(batch).shape[0]


class Numpy(Plain):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net.loss(batch) * float(batch.numpy().sum())


class ShapeOfValues(Plain):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net.loss(batch.view(int(batch.max().item()) + 7, -1))


class Nothing(Plain):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net.loss(batch)


class NoLossInDict(Plain):
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {"los": self.net.loss(batch)}


class ManualByHand(Plain):
    automatic_optimization = False


class Breaks(Plain):
    """Only after it has drawn numbers and set what it should not."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.rand(3), random.random(), np.random.rand()
        self.net.embed.weight.data.zero_()
        self.net.eval()
        raise ZeroDivisionError("a bug of the user")


class LateLayers(L.LightningModule):
    def configure_model(self) -> None:
        self.net = nn.Linear(2, 2)


class LossInDict(Plain):
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.net.loss(batch), "note": "fine"}


class Lists(Plain):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net.loss(batch) * (1 + sum(1 for token in batch[0].tolist() if token > 3))


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(5))


def planned(module: nn.Module, **settings: Any) -> Plan:
    return plan(module, tokens(), **{"hardware": cpu(), **settings})


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (Unique, TwinError, ["Unique cannot be planned", HERE, "unique"]),
        (Numpy, TwinError, ["Numpy cannot be planned", HERE, "numpy"]),
        (ShapeOfValues, TwinError, ["ShapeOfValues cannot be planned", HERE, "shape '[8, -1]'"]),
        (Breaks, TwinError, ["Breaks cannot be planned", HERE, "a bug of the user"]),
        (Nothing, OffloadError, ["Nothing gave NoneType, no "]),
        (NoLossInDict, OffloadError, ["NoLossInDict gave dict, no "]),
        (ManualByHand, OffloadError, ["ManualByHand optimizes manually"]),
    ],
)
def test_a_step_that_cannot_be_planned_says_where_and_another_can(
    kind: type[Lit], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as said:
        planned(kind())
    message = str(said.value)
    assert "\n" not in message
    assert [word for word in [*words, "`step=`"] if word not in message] == []
    given = planned(kind(), step=lambda module, batch: module.net.loss(batch))
    assert given.device == planned(Plain()).device
    assert given.step_s == planned(Plain()).step_s


@pytest.mark.parametrize("kind", [LossInDict, Lists])
def test_a_step_that_only_looks_unusual_is_planned(kind: type[Lit]) -> None:
    assert planned(kind()).flops == planned(Plain()).flops > 0


def test_a_module_that_cannot_be_copied_is_named() -> None:
    module = Plain()
    module.lock = threading.Lock()
    with pytest.raises(TwinError, match=r"Plain cannot be planned.*cannot be copied.*_thread\.lock.*__deepcopy__"):
        planned(module)


def test_optimizers_that_need_the_trainer_are_passed() -> None:
    class Late(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1 / self.trainer.max_epochs)

    with pytest.raises(OffloadError, match=r"`configure_optimizers` of Late .*before the Trainer.*Pass `optimizer=`"):
        planned(Late())
    module = Late()
    assert planned(module, optimizer=torch.optim.SGD(module.parameters(), lr=1.0)).host.bytes > 0


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (Plain, {"method": "fulll"}, "`method` must be one of none, zero-offload, full, lsp, zo2, meft, got 'fulll'"),
        (Plain, {"hardware": "rtx9"}, "`hardware` must be a Machine or one of a100, auto, .*, got 'rtx9'"),
        (Plain, {"precision": "16"}, "`precision` must be one of 32-true, bf16-mixed, bf16-true, 16-true, got '16'"),
        (Plain, {"precision": "16-true"}, "`precision='16-true'` is for method 'zo2', got method='full'.*pass"),
        (Plain, {"method": "zo2", "settings": FullSettings()}, "`settings` must be ZO2Settings.* for method='zo2'"),
        (Plain, {"method": "zo2"}, "`AdamW` cannot be used with method `zo2`.*torch.optim.SGD"),
        (Plain, {"accumulate_grad_batches": 2.5}, "`accumulate_grad_batches` must be an integer >= 1, got 2.5"),
        (Plain, {"gradient_clip_val": -1.0}, "`gradient_clip_val` must be a number >= 0, or None, got -1.0"),
        (Plain, {"gradient_clip_algorithm": "nrom"}, "`gradient_clip_algorithm` must be 'norm' or 'value', got 'nrom'"),
        (Plain, {"gradient_clip_val": "a"}, "`gradient_clip_val` must be a number >= 0, or None, got 'a'"),
        (Plain, {"settings": {"pin_memory": False}}, "`settings` must be FullSettings.*, or None, got {'pin_memory'"),
        (Plain, {"method": "lsp", "settings": FullSettings()}, "`settings` must be LSPSettings.* for method='lsp'"),
        (Plain, {"optimizer": torch.optim.AdamW}, "`optimizer` must be a torch.optim.Optimizer, .*pass an instance"),
        (Plain, {"hardware": replace(cpu(), rates=None)}, "Machine without rates .'a cpu'.; pass hardware='auto'"),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            {},
            r"without a shape yet \(lazy\): 0.weight, 0.bias; run one",
        ),
        (LateLayers, {}, r"LateLayers. has no parameters.*`module.configure_model\(\)` first"),
        (lambda: Plain, {}, "`module` must be a torch.nn.Module"),
        (lambda: Plain().requires_grad_(False), {}, "no parameter with requires_grad=True: nothing to train"),
        (
            Plain,
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])},
            "`optimizer` has parameters that are not",
        ),
    ],
)
def test_what_cannot_be_asked_is_named(make: Callable[[], Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        planned(make(), **settings)


def test_the_caps_of_a_run_are_those_of_its_plan() -> None:
    free = planned(Plain(), hardware=gpu(), settings=FullSettings(min_numel=1))
    caps = FullSettings(min_numel=1, max_device_gib=0.51, max_host_gib=1e-5)
    small = planned(Plain(), hardware=gpu(), settings=caps)
    assert free.fits
    assert not small.device.fits
    assert not small.host.fits
    assert (small.device.limit_bytes, small.host.limit_bytes) == (int(0.51 * GIB), int(1e-5 * GIB))
    assert "no effect" not in str(small)


@pytest.mark.parametrize(("lockable_bytes", "says"), [(GIB, False), (8192, True)])
def test_copies_that_no_page_locked_memory_is_left_for_are_said(lockable_bytes: int, says: bool) -> None:
    machine = replace(gpu(), lockable_bytes=lockable_bytes)
    made = planned(Plain(), hardware=machine, settings=FullSettings(min_numel=1))
    assert made.fits
    assert ("not all that is copied is page-locked" in str(made)) == says


def test_a_device_cap_on_the_cpu_is_said_to_have_no_effect() -> None:
    capped = planned(Plain(), settings=FullSettings(max_device_gib=1.0))
    assert [note for note in capped.notes if "no effect" in note] == [
        "`max_device_gib=1` (`hardware.device_gib`) has no effect: the CPU is the device, and its memory is the host's "
        "(`max_host_gib`, `hardware.host_gib`)"
    ]
    assert replace(capped, notes=()).device == planned(Plain()).device


def test_methods_that_a_model_cannot_have_are_left_out_of_a_comparison() -> None:
    module = Plain()
    rmsprop = torch.optim.RMSprop(module.parameters())
    compared = planned(module, method="none", optimizer=rmsprop, compare=True)
    assert [other.method for other in compared.others] == ["zo2"]  # with SGD: it takes no other's optimizer
    said = [note for note in compared.notes if "cannot be compared" in note]
    assert [note.split(": ")[0] for note in said] == [
        f"{m} cannot be compared" for m in ("zero-offload", "full", "lsp", "meft")
    ]
    assert ["RMSprop" in note for note in said] == [True, True, True, False]
    assert "No feed-forward network was found" in said[-1]


@pytest.mark.parametrize("kind", [Plain, Unique, Breaks])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_neither_module_nor_process_is_touched_failing_or_not(kind: type[Lit], precision: Any) -> None:
    module = kind().train()
    module.net.norm.eval()
    module.net.head.weight.grad = torch.ones_like(module.net.head.weight)
    module.net.register_forward_pre_hook(lambda *_: None)

    def seen() -> dict[str, Any]:
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), m.training) for m in module.modules()]
        return {
            "hooks, modes": hooks,
            "ids": [id(p) for p in module.parameters()],
            "gradient hooks": [p._post_accumulate_grad_hooks for p in module.parameters()],
            "gradients": [p.grad is None for p in module.parameters()],
            "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
            "dtype": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
            "transformers": import_utils.is_fake_tensor,
            "losses": list(module.losses),
            "threads": torch.get_num_threads(),
        }

    before, weights = seen(), {name: value.clone() for name, value in module.state_dict().items()}
    if kind is Plain:
        planned(module, precision=precision)
    else:
        with pytest.raises(TwinError):
            planned(module, precision=precision)
    assert seen() == before
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert torch.equal(module.net.head.weight.grad, torch.ones_like(module.net.head.weight))
