"""Modules without values train, evaluate and resume as those that were loaded whole."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from lightning_offload.errors import CheckpointError, HostMemoryError
from lightning_offload.materialising import find_weights
from lightning_offload.memory.promises import bring, parameters_on_meta
from tests.lit import fit, lsp, offload, trainer
from tests.meft_lit import meft
from tests.zo2 import sgd, zo2

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=41,
    tie_word_embeddings=True,
)
STRATEGIES = {"full": offload, "lsp": lsp, "zo2": zo2, "meft": meft}
METHODS = pytest.mark.parametrize("method", STRATEGIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in four files of bfloat16, whatever dtype it will be trained in."""
    torch.manual_seed(1)
    place = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(place, max_shard_size="20KB")
    assert len(list(place.glob("*.safetensors"))) > 3
    return place


class Late(L.LightningModule):
    """Makes its model in ``configure_model``: loaded, by ``init_module``, or under ``torch.device("meta")``."""

    def __init__(self, how: str, folder: Path, *, method: str = "full", weights: Any = "folder") -> None:
        super().__init__()
        self.how, self.folder, self.method = how, folder, method
        if how != "loaded" and weights is not None:
            self.offload_weights = folder if weights == "folder" else weights
        self.lm: Any = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.lm is not None:
            return
        if self.how == "loaded":
            self.lm = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).train()
            return
        with torch.device("meta") if self.how == "meta" else self.trainer.init_module(empty_init=True):
            self.lm = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
        assert all(parameter.is_meta for parameter in self.lm.parameters())

    def loss(self, batch: Tensor) -> Tensor:
        return self.lm(input_ids=batch, labels=batch).loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.method == "zo2":
            return sgd(self)
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, fused=True)

    def train_dataloader(self) -> Any:
        return torch.randint(0, 41, (3, 2, 8), generator=torch.Generator().manual_seed(5))

    val_dataloader = train_dataloader


def assert_same(one: Late, other: Late) -> None:
    """Losses, weights and every buffer, in the same dtypes; ties are ties."""
    assert one.losses == other.losses
    assert one.losses
    left, right = (dict([*m.named_parameters(remove_duplicate=False), *m.named_buffers()]) for m in (one, other))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name
    assert other.lm.lm_head.weight is other.lm.model.embed_tokens.weight


@METHODS
@pytest.mark.parametrize(("how", "precision"), [("meta", "32-true"), ("init", "bf16-true"), ("init", "bf16-mixed")])
def test_trains_as_if_it_had_been_loaded(method: str, how: str, precision: Any, folder: Path) -> None:
    loaded, late = (Late(kind, folder, method=method) for kind in ("loaded", how))
    for module in (loaded, late):
        fit(module, STRATEGIES[method](), max_epochs=1, precision=precision)
    assert_same(loaded, late)


@METHODS
def test_evaluates_without_a_fit(method: str, folder: Path) -> None:
    found = []
    for how in ("loaded", "meta", "init"):
        module = Late(how, folder, method=method)
        run = trainer(STRATEGIES[method](), limit_val_batches=3, precision="bf16-true")
        found.append(run.validate(module, verbose=False))
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert found[0] == found[1] == found[2]


@METHODS
def test_a_checkpoint_is_all_that_it_needs(method: str, folder: Path, tmp_path: Path) -> None:
    """It is restored before anything else is made for the module."""
    path = tmp_path / "last.ckpt"
    fit(Late("loaded", folder, method=method), STRATEGIES[method](), max_epochs=1).save_checkpoint(path)
    loaded, late = Late("loaded", folder, method=method), Late("init", folder, method=method, weights=None)
    fit(loaded, STRATEGIES[method](), ckpt_path=path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*meta")
        fit(late, STRATEGIES[method](), ckpt_path=path)
    assert_same(loaded, late)
    found = []
    for how, weights in (("loaded", None), ("init", None), ("meta", "nowhere")):  # the checkpoint comes first
        module = Late(how, folder, method=method, weights=weights)
        run = trainer(STRATEGIES[method](), limit_val_batches=3)
        found.append(run.validate(module, ckpt_path=path, verbose=False))
    assert found[0] == found[1] == found[2]


def test_adapters_come_from_the_checkpoint_and_what_they_are_beside_from_files(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapters.ckpt"
    run = fit(Late("loaded", folder), meft(adapter_only=True), max_epochs=1)
    run.save_checkpoint(path)
    loaded, late = (Late(how, folder) for how in ("loaded", "init"))
    for module in (loaded, late):
        fit(module, meft(adapter_only=True), ckpt_path=path)
    assert_same(loaded, late)


def test_what_no_engine_wants_is_brought_too(folder: Path) -> None:
    loaded, late = (Late(how, folder) for how in ("loaded", "meta"))
    for module in (loaded, late):
        with pytest.warns(UserWarning, match="nothing is offloaded"):
            fit(module, offload(min_numel=10**9), max_epochs=1)
    assert_same(loaded, late)


def test_made_before_the_trainer_knows_it(folder: Path) -> None:
    """A second fit on the same strategy goes on with what it finds."""
    loaded, late = Late("loaded", folder), Late("init", folder)
    for module in (loaded, late):
        run = trainer(offload())
        module._trainer = run
        module.configure_model()
        run.fit(module)
        run.fit_loop.max_epochs += 1
        run.fit(module)
    assert_same(loaded, late)


class Early(Late):
    """Has its model from the start, as most modules have."""

    def __init__(self, folder: Path) -> None:
        super().__init__("early", folder)
        self.lm = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)


def test_a_module_that_knows_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    """And its checkpoint is one like all others."""
    loaded = Late("loaded", folder)
    fit(loaded, offload(), max_epochs=1)
    run = trainer(offload(), max_epochs=1)
    with run.init_module(empty_init=True):
        module = Early(folder)
    run.fit(module)
    assert_same(loaded, module)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = Early.load_from_checkpoint(tmp_path / "last.ckpt", folder=folder)
    again.losses = module.losses
    assert_same(module, again)


# Names.


class Parts(L.LightningModule):
    """Given parts, without values but for those that are said to have them."""

    def __init__(self, *, weights: Any, **parts: nn.Module) -> None:
        super().__init__()
        self.offload_weights = weights
        for name, part in parts.items():
            self.add_module(name, part)


def on_meta(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("meta")


def layers(depth: int = 2, width: int = 3) -> nn.Module:
    made = nn.Sequential()
    made.add_module("body", nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))))
    made.add_module("head", nn.Linear(width, 5))
    return made


def saved(file: Path, module: nn.Module, beginning: str = "", **more: Tensor) -> Path:
    save_file({beginning + name: tensor.contiguous() for name, tensor in module.state_dict().items()} | more, file)
    return file


def found(module: L.LightningModule) -> dict[str, Tensor]:
    find_weights(module)
    for parameter in module.parameters():
        bring(parameter)
    return module.state_dict()


def fit_to(module: nn.Module, other: nn.Module) -> None:
    """One step of ``module``, by its own parameters."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(torch.ones(4, 3))[0].sum().backward()
    optimizer.step()


def same(state: dict[str, Tensor], module: nn.Module, beginning: str) -> bool:
    return all(torch.equal(state[beginning + name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("beginning", ["", "model.", "wrapped.lm."])
def test_a_prefix_on_either_side_is_found(beginning: str, tmp_path: Path) -> None:
    real = layers()
    module = Parts(weights=saved(tmp_path / "a.safetensors", real, beginning), net=on_meta(real))
    assert same(found(module), real, "net.")


def test_the_inner_model_of_a_file_of_the_whole_one(folder: Path, tmp_path: Path) -> None:
    """And the other way round: names of the file of a bare model are the ends of those of one with a head."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with parameters_on_meta():
        bare, headed = AutoModel.from_config(CONFIG), AutoModelForCausalLM.from_config(CONFIG)
    assert same(found(Parts(weights=folder, encoder=bare)), whole.model, "encoder.")
    whole.model.save_pretrained(tmp_path)
    assert same(found(Parts(weights=tmp_path, lm=headed)), whole, "lm.")


def test_each_part_from_a_place_of_its_own(tmp_path: Path) -> None:
    one, two, inner = layers(), layers(depth=3), layers(width=5)
    with_inner = on_meta(two)
    with_inner.add_module("inner", on_meta(inner))
    parts = {"a": one, "b": two, "b.inner": inner}
    places = {name: saved(tmp_path / f"{name}.safetensors", part) for name, part in parts.items()}
    state = found(Parts(weights=places, a=on_meta(one), b=with_inner))
    assert same(state, one, "a.")
    assert same(state, two, "b.")
    assert same(state, inner, "b.inner.")


def test_recurrent_layers(tmp_path: Path) -> None:
    """torch keeps weak references to their weights, and lists of them."""
    real, x = nn.LSTM(3, 3, num_layers=2), torch.ones(4, 3)
    module = Parts(weights=saved(tmp_path / "a.safetensors", real), net=on_meta(real))
    found(module)
    assert torch.equal(module.net(x)[0], real(x)[0])
    fit_to(module.net, real)
    assert not torch.equal(module.net(x)[0], real(x)[0])


def test_compiled_blocks_have_their_names(tmp_path: Path) -> None:
    real = layers()
    late = on_meta(real)
    late.body[1] = torch.compile(late.body[1], backend="eager")
    find_weights(Parts(weights=saved(tmp_path / "a.safetensors", real), net=late))
    weight = late.body[1]._orig_mod.weight
    bring(weight)
    assert torch.equal(weight, real.body[1].weight)


def test_what_has_values_keeps_them(tmp_path: Path) -> None:
    """A new head beside a pretrained body, though the file has another."""
    real, mixed = layers(), layers()
    mixed.body.to("meta")
    head = mixed.head.weight.clone()
    module = Parts(weights=saved(tmp_path / "a.safetensors", real), net=mixed)
    with pytest.warns(UserWarning, match=r"2 of the 6 tensors in .* are not read \(`head.bias`, `head.weight`\)"):
        state = found(module)
    assert torch.equal(state["net.head.weight"], head)
    assert same(state, real.body, "net.body.")


# Buffers.


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)


def test_buffers_of_the_file_are_read(tmp_path: Path) -> None:
    real = nn.BatchNorm1d(3)
    real.running_mean.fill_(2.0)
    real.num_batches_tracked.fill_(7)
    state = found(Parts(weights=saved(tmp_path / "a.safetensors", real), norm=on_meta(real)))
    assert same(state, real, "norm.")
    assert state["norm.num_batches_tracked"].dtype == torch.int64


def test_buffers_that_no_file_has(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", Buffered())
    with pytest.raises(MisconfigurationException, match=r"1 buffers on .*`net.angles`.*init_module\(empty_init"):
        find_weights(Parts(weights=file, net=on_meta(Buffered())))
    with parameters_on_meta():
        made = Buffered()
    found(Parts(weights=file, net=made))
    assert torch.equal(made.angles, torch.arange(4.0))


class Forgetful(Buffered):
    """Says that it can make them, and makes something else."""

    def _init_weights(self, module: nn.Module) -> None:
        self.tries = getattr(self, "tries", 0) + 1


def test_a_model_that_does_not_make_them_is_found_out(tmp_path: Path) -> None:
    late = on_meta(Forgetful())
    with pytest.raises(MisconfigurationException, match=r"`net.angles`"):
        find_weights(Parts(weights=saved(tmp_path / "a.safetensors", Buffered()), net=late))
    assert late.tries == 1
    assert late.angles.is_meta


# Refusals.


@METHODS
def test_without_weights_it_says_what_to_do(method: str, folder: Path) -> None:
    """And a run with weights follows on the same objects."""
    module, run = Late("meta", folder, method=method, weights=None), trainer(STRATEGIES[method](), max_epochs=1)
    wanted = (
        r"`Late` has 29 weights \(`lm.model.embed_tokens.weight`, .*, ...\) on the meta device.*Set `offload_weights`"
        r".*or pass `ckpt_path`; or make them outside of .*`module.to_empty\(device='cpu'\)`"
    )
    with pytest.raises(MisconfigurationException, match=wanted):
        run.fit(module)
    module.offload_weights = folder
    run.fit(module)
    assert len(module.losses) == (7 if method == "zo2" else 3)


def refusals() -> dict[str, tuple[Any, str]]:
    real = layers()
    less = {name: tensor for name, tensor in real.state_dict().items() if "head" not in name}
    other = real.state_dict() | {"head.bias": torch.zeros(6)}
    eighth = real.state_dict() | {"head.bias": torch.zeros(5, dtype=torch.int8)}
    return {
        "lacks": (less, r"lacks 2 weights \(`net.head.weight`, `net.head.bias`\) of the 6 weights of `Parts`"),
        "nothing": (
            {"x": torch.zeros(1)},
            r"lacks 6 weights .*it has `x`, and names were looked for with ''",
        ),
        "shape": (other, r"`net.head.bias` is \(5,\) in the model, and `head.bias` is \(6,\) in .*a.safetensors'"),
        "quantized": (eighth, r"`net.head.bias` is torch.float32 in the model, and `head.bias` is I8 in"),
    }


def test_a_run_that_fails_leaves_no_promise(folder: Path, tmp_path: Path) -> None:
    """Neither that of a checkpoint, nor that of files that turn out to be others'."""
    path = tmp_path / "last.ckpt"
    fit(Late("loaded", folder), offload(), max_epochs=1).save_checkpoint(path)
    loaded, late = Late("loaded", folder), Late("init", folder)
    run = trainer(offload(max_host_gib=1e-6))
    with pytest.raises(HostMemoryError):
        run.fit(late, ckpt_path=path)
    assert all(parameter.is_meta for parameter in late.parameters())
    for module in (loaded, late):
        fit(module, offload(), max_epochs=1)
    assert_same(loaded, late)


@pytest.mark.parametrize("case", refusals())
def test_files_of_something_else(case: str, tmp_path: Path) -> None:
    stored, message = refusals()[case]
    save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        find_weights(Parts(weights=tmp_path, net=on_meta(layers())))


def test_places_that_are_not_understood(tmp_path: Path) -> None:
    late = on_meta(layers())
    for given in (3, {"net": 4}):
        with pytest.raises(MisconfigurationException, match=r"`offload_weights` must be a folder .*; got "):
            find_weights(Parts(weights=given, net=late))
    file = saved(tmp_path / "a.safetensors", layers())
    with (
        pytest.warns(UserWarning, match=r"`offload_weights\['other'\]` has no effect"),
        pytest.raises(CheckpointError, match=r"says nothing of 6 weights \(`net.body.0.weight`.*: add their"),
    ):
        find_weights(Parts(weights={"other": file}, net=late))


def test_weights_that_nobody_reads_are_said_once(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", layers())
    with pytest.warns(UserWarning, match=r"offload_weights=.*has no effect: no weight of `Parts` is on"):
        find_weights(Parts(weights=file, net=layers()))


@pytest.mark.filterwarnings("error:.*has no effect", "ignore:.*overrides the `configure_model`")
@pytest.mark.parametrize("when", ["before", "configure_model"])
def test_copies_that_come_too_early_are_refused(when: str, folder: Path) -> None:
    module, run = Late("init", folder), trainer(offload(), callbacks=[EMAWeightAveraging()])
    if when == "before":
        module._trainer = run
        module.configure_model()
    with pytest.raises(NotImplementedError, match=r"A callback that copies `Late` to average .* or remove the"):
        run.fit(module)
    again = trainer(offload(), max_epochs=1)
    again.fit(module)
    again.fit_loop.max_epochs += 1
    again.fit(module)  # what was read once is not asked for again
