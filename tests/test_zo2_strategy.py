"""`zo2_offload` on families of models and in generation, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_offload import FullOffloadStrategy, OffloadPrecision, ZO2OffloadStrategy
from lightning_offload.errors import NonFiniteError, OffloadError
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.text import TINY_PATH, CausalLM
from tests.helpers import every
from tests.lit import lsp, trainer
from tests.zo2 import ZLit, zfit, zo2
from tests.zoo import ZOO, first_tensor


class Family(L.LightningModule):
    """A model of the zoo on its own example, over and over."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network, self.inputs = ZOO[name]()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = first_tensor(self.network(**self.inputs)).float().square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", first_tensor(self.network(**self.inputs)).float().square().mean(), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(6))  # type: ignore[arg-type]

    val_dataloader = train_dataloader


@pytest.mark.parametrize("name", every(2, ZOO))
@pytest.mark.filterwarnings("ignore:.*no repeated blocks", "ignore:Detected call of")
def test_families_train_evaluate_save_and_resume(name: str, tmp_path: Path) -> None:
    whole, first, rest = Family(name), Family(name), Family(name)
    before = {key: value.clone() for key, value in whole.named_parameters()}
    run = zfit(whole, zo2(), max_epochs=2, limit_val_batches=1)
    assert isinstance(run.strategy.engine, ZerothEngine)
    assert run.strategy.engine.streaming.streamed
    for key, parameter in whole.named_parameters():
        assert not torch.equal(before[key], parameter), key
    (streamed,) = trainer(zo2(), limit_val_batches=1).validate(whole, verbose=False)
    assert streamed == trainer(limit_val_batches=1).validate(whole, verbose=False)[0]
    zfit(first, zo2(), max_epochs=1, limit_val_batches=1).save_checkpoint(tmp_path / "a.ckpt")
    zfit(rest, zo2(seed=None), max_epochs=2, limit_val_batches=1, ckpt_path=tmp_path / "a.ckpt")
    assert first.losses + rest.losses[1:] == whole.losses  # but for the rehearsal
    for key, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[key]), key


# Generation


class Talks(CausalLM):
    """Generates in the middle of training and as a prediction."""

    use_cache = True

    def __init__(self) -> None:
        super().__init__(path=TINY_PATH, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-4))
        self.said: list[Tensor] = []

    def talk(self) -> Tensor:
        prompt = torch.tensor([[3, 14, 15, 92], [6, 53, 58, 97]])
        made: Tensor = self.network.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=self.use_cache)
        return made

    def on_train_batch_end(self, *_: Any) -> None:
        self.said.append(self.talk())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.talk()


class Silent(Talks):
    on_train_batch_end = CausalLM.on_train_batch_end


@pytest.mark.parametrize("use_cache", [False, True])
def test_generation_between_steps_and_as_prediction_is_that_of_plain_weights(use_cache: bool) -> None:
    ids = torch.randint(0, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
    batches = DataLoader([{"input_ids": ids, "labels": ids}] * 3, batch_size=None)
    module, silent = Talks(), Silent()
    module.use_cache = silent.use_cache = use_cache
    zfit_on = [trainer(zo2(min_numel=4096), max_steps=3, max_epochs=1) for _ in range(2)]
    for run, talker in zip(zfit_on, (module, silent), strict=True):
        run.fit(talker, batches)
    for (name, one), other in zip(module.named_parameters(), silent.parameters(), strict=True):
        assert torch.equal(one, other), name  # talking disturbs nothing
    plain = Talks()
    plain.use_cache = use_cache
    plain.load_state_dict(module.state_dict())
    plain.eval()
    with torch.no_grad():
        wanted = plain.talk()
    assert torch.equal(module.said[-1], wanted)
    (predicted,) = trainer(zo2(min_numel=4096)).predict(module, DataLoader([0]))
    assert torch.equal(predicted, wanted)
    assert wanted.shape == (2, 10)


# What is refused


class Bad(ZLit):
    result: Any = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        return self.result


class Iterates(ZLit):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        raise AssertionError


@pytest.mark.parametrize("result", [None, 3.0, {"logits": torch.zeros(())}], ids=str)
def test_a_step_without_a_loss(result: Any) -> None:
    module = Bad()
    module.result = result
    with pytest.raises(OffloadError, match=f"`training_step` returned {type(result).__name__}; .* needs the loss"):
        zfit(module, zo2())


def test_a_loss_of_several_numbers() -> None:
    module = Bad()
    module.result = torch.zeros(2)
    with pytest.raises(OffloadError, match=r"a tensor of one element; got Tensor of shape \(2,\)"):
        zfit(module, zo2())


def test_a_step_that_iterates_by_itself() -> None:
    with pytest.raises(MisconfigurationException, match=r"`Iterates.training_step` takes `dataloader_iter`.*`batch`"):
        zfit(Iterates(), zo2())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: torch.optim.AdamW(m.parameters()), r"`AdamW` cannot be used with method `zo2`.*torch.optim.SGD"),
        (lambda m: torch.optim.SGD(m.parameters(), momentum=0.9), r"`SGD\(momentum=...\)`.*leave `momentum` out"),
    ],
)
def test_optimizers_with_moments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zfit(ZLit(make_optimizer=make), zo2())


def test_losses_that_never_are_numbers() -> None:
    module = Bad()
    module.result = torch.tensor(float("nan"))
    with pytest.raises(NonFiniteError, match="3 steps in a row had a loss that is not finite"):
        zfit(module, zo2(max_skips=2))


def test_precisions_and_dtypes() -> None:
    scaled = Precision()
    scaled.precision = "16-mixed"  # on the CPU a Trainer takes bf16 in its place
    with pytest.raises(ValueError, match=r"precision='16-mixed'\)` is not supported. `precision` must be one of"):
        zo2(precision_plugin=scaled)
    for strategy in (FullOffloadStrategy(), lsp()):
        with pytest.raises(ValueError, match=r"precision='16-true'\)` is not supported: gradients in float16"):
            zfit(ZLit(), strategy, precision="16-true")
    for asked, noise, message in (
        ({"moments": torch.float32}, "philox", r"moments=torch.float32\)` .* `zo2`, which has no optimizer state"),
        ({"master": torch.bfloat16}, "philox", r"master=torch.bfloat16\)` .* `zo2`, whose masters are float32"),
        ({"master": torch.float32}, "mezo", r"master=torch.float32\)` .* with noise='mezo'"),
        ({"wire": torch.float16}, "mezo", r"wire=torch.float16\)` .* with noise='mezo'"),
        ({"rounding": "stochastic"}, "mezo", r"rounding='stochastic'\)` .* with noise='mezo'"),
    ):
        with pytest.raises(ValueError, match=message):
            zfit(ZLit(), ZO2OffloadStrategy(noise=noise, precision_plugin=OffloadPrecision("32-true", **asked)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 0}, "`directions`"),
        ({"directions": 2**16}, "`directions` must be an integer <= 65535"),
        ({"seed": 2**63}, "`seed` must be an integer >= 0 and < 2"),
        ({"eps": 0.0}, "`eps`"),
        ({"eps": -1e-3}, "`eps`"),
        ({"slots": 2}, "`slots`"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZO2OffloadStrategy(**settings)


def test_streams_that_disagree_say_where() -> None:
    class Drops(ZLit):
        """A layer is left out at random, in every forward anew."""

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if len(self.losses) % 2:
                loss = loss + self.net.blocks[0](torch.zeros(1, 19)).sum()
            return loss

    module = Drops()
    with pytest.raises(OffloadError, match=r"net\.blocks\.0"):
        zfit(module, zo2())
    assert all(not part._forward_pre_hooks for part in module.modules())
    assert isinstance(module.net.blocks, nn.ModuleList)


def test_a_log_warns_of_hooks_that_may_write_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_offload import zeroth_behaviour
    from tests.test_zo2_trainer import WritesWeights

    said: list[str] = []
    monkeypatch.setattr(zeroth_behaviour, "rank_zero_warn", said.append)
    zfit(ZLit(), zo2(log_file=tmp_path / "a.log"), max_epochs=1)
    assert not said
    zfit(ZLit(), zo2(log_file=tmp_path / "b.log"), max_epochs=1, callbacks=[WritesWeights()])
    assert "`WritesWeights.on_train_epoch_end` may write weights, of which `log_file` will know nothing" in said[0]
