"""What lsp leaves behind: state that resumes bit for bit, nothing lost at a boundary, a module as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_offload.errors import CheckpointError
from lightning_offload.memory.checked import CheckedLanes
from lightning_offload.methods.base import Clip, DTypes
from lightning_offload.methods.engine import Engine
from lightning_offload.methods.lsp import LSP
from tests.helpers import VOCAB, Net, adamw, lanes_of, product
from tests.methods.test_full import snapshot
from tests.methods.test_lsp import CLIPS, NARROW
from tests.projected import projected_names, settings_of


def stop(gradient: Tensor) -> None:
    raise KeyboardInterrupt


class Trial:
    """A net under an engine, one micro-batch at a time: the data depends on the number of the micro-batch alone."""

    def __init__(self, *, kind: str = "inline", clip: Clip | None = None, dtypes: DTypes | None = None, **changes: Any):
        self.net, self.clip, self.micro, self.micro_batches = Net(depth=2), clip, 0, 2
        self.optimizer = adamw(self.net)
        self.lanes = lanes_of(kind)
        method = LSP(settings_of(**{"refit_every": 2, **changes}))
        self.engine = Engine(
            self.net, self.optimizer, method, self.lanes, dtypes or DTypes(), expects_clip=clip is not None
        )

    def one(self, fail: str = "") -> None:
        """``fail``: the parameter whose gradient is followed by an exception."""
        tokens = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(self.micro))
        last = self.micro % self.micro_batches == self.micro_batches - 1
        with self.engine.micro_batch():
            loss = self.net.loss(tokens)
        self.engine.stepping = last
        failing = [self.net.get_parameter(fail).register_hook(stop)] if fail else []
        try:
            loss.backward()
        finally:
            for handle in failing:
                handle.remove()
        self.micro += 1
        if last:
            self.engine.step(self.clip)

    def until(self, micro: int) -> Trial:
        while self.micro < micro:
            self.one()
        return self

    def saved(self) -> dict[str, Any]:
        saved = {
            "weights": self.net.state_dict(),
            "optimizer": self.engine.optimizer_state(),
            "extras": self.engine.extras(),
            "micro": self.micro,
        }
        return copy.deepcopy(saved)

    def resumed(self, saved: dict[str, Any]) -> Trial:
        self.net.load_state_dict(saved["weights"])
        self.engine.load_optimizer_state(saved["optimizer"])
        self.engine.load_extras(saved["extras"])
        self.micro = saved["micro"]
        return self


def flat(saved: Any, path: str = "") -> dict[str, Any]:
    if isinstance(saved, dict):
        return {k: v for key, value in saved.items() for k, v in flat(value, f"{path}/{key}").items()}
    return {path: saved}


def assert_equal(one: Any, other: Any) -> None:
    left, right = flat(one), flat(other)
    assert left.keys() == right.keys()
    for path, value in left.items():
        same = torch.equal(value, right[path]) if isinstance(value, Tensor) else value == right[path]
        assert same, path


WAYS: list[dict[str, Any]] = [
    {"projector": "learned"},
    {"projector": "pca", "accumulate": "host"},
    {"projector": "block", "moments": "reset", "dtypes": NARROW},
    {"projector": "learned", "share": "type", "clip": CLIPS["norm"], "dtypes": NARROW, "accumulate": "host"},
    {"projector": "pca", "skip_nonfinite": False, "min_numel": 60},
    {"projector": "learned", "others": "frozen", "scale": "none", "moments": "paper"},
    {"projector": "learned", "form": "activations"},
    {"projector": "pca", "form": "activations", "accumulate": "host", "share": "type"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_resumes_bit_for_bit_at_every_micro_batch(way: dict[str, Any]) -> None:
    """Also within an accumulation window, before and after refits."""
    whole = Trial(**way)
    states = []
    for _ in range(11):
        states.append(whole.saved())
        whole.one()
    states.append(whole.saved())
    owned = states[-1]["extras"]["state"]
    assert max(state["draws"] for state in owned.values()) >= 2
    assert set(owned) == set(projected_names(Net(depth=2)))
    for start in (0, 1, 2, 3, 6, 7, 9):
        other = Trial(**way).resumed(states[start])
        assert_equal(other.saved(), states[start])
        assert_equal(other.until(11).saved(), states[-1])


@pytest.mark.parametrize("kind", ["inline", "checked", "shuffled"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_nothing_is_lost_at_a_boundary(kind: str, way: dict[str, Any]) -> None:
    """Saved, evaluated, flushed or adopted after every micro-batch: the run is the same."""
    plain = Trial(**way).until(11).saved()

    def evaluate(trial: Trial) -> None:
        trial.net.eval()
        trial.engine.publish()
        with torch.no_grad():
            trial.net.loss(torch.zeros(1, 4, dtype=torch.long))
        trial.net.train()

    boundaries: list[Callable[[Trial], object]] = [
        Trial.saved,
        evaluate,
        lambda trial: trial.engine.flush(),
        lambda trial: trial.engine.adopt(),
    ]
    disturbed = Trial(kind=kind, **way)
    checking = disturbed.lanes.checking() if isinstance(disturbed.lanes, CheckedLanes) else None
    if checking is not None:
        checking.__enter__()
    for micro in range(11):
        disturbed.one()
        boundaries[(micro // 2 + micro) % 4](disturbed)
    assert_equal(disturbed.saved(), plain)
    if checking is not None:
        checking.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("kind", "at", "projector", "form"),
    product(
        kind=["inline", "checked", "shuffled"],
        at=list(range(4, 11)),
        projector=["learned", "block"],
        form=["gradient", "activations"],
    ),
)
def test_an_exception_in_backward_leaves_no_trace(kind: str, at: int, projector: str, form: str) -> None:
    """In a refit step too: projectors that were replaced before it go back, and the next run of the step draws again.

    What an early step has already changed stays; so every unit waits for the end of backward here (clipping).
    """
    way: dict[str, Any] = {"projector": projector, "clip": CLIPS["norm"], "refit_every": 2, "form": form}
    plain, hurt = Trial(**way), Trial(kind=kind, **way)
    plain.micro_batches = hurt.micro_batches = 1
    plain.until(at)
    hurt.until(at)
    with pytest.raises(KeyboardInterrupt):
        hurt.one(fail="blocks.0.norm.weight")
    hurt.engine.drop()
    hurt.optimizer.zero_grad()
    assert_equal(hurt.saved(), plain.saved())
    assert_equal(hurt.until(12).saved(), plain.until(12).saved())


@pytest.mark.parametrize("projector", ["pca", "learned", "block"])
@pytest.mark.parametrize("share", ["matrix", "type"])
def test_a_dropped_step_without_clipping_changes_no_weight_twice(projector: str, share: str) -> None:
    """Layer by layer the units that had stepped have stepped; the others have not, and training goes on.

    No projector has changed, for no moment has followed it.
    """
    trial = Trial(projector=projector, refit_every=1, share=share)
    trial.micro_batches = 1
    trial.until(4)
    before = trial.saved()
    with pytest.raises(KeyboardInterrupt):
        trial.one(fail="blocks.1.norm.weight")
    trial.engine.drop()
    trial.optimizer.zero_grad()
    after = trial.saved()
    for name in projected_names(trial.net):
        counts = [int(saved["extras"]["state"][name]["step"]) for saved in (before, after)]
        stepped = counts[1] - counts[0]
        assert stepped == int(name.startswith("blocks.1")), name
        assert torch.equal(before["weights"][name], after["weights"][name]) == (not stepped), name
        pairs = [saved["extras"]["state"][name] for saved in (before, after)]
        for side in ("left", "right"):
            assert torch.equal(pairs[0][side]["values"], pairs[1][side]["values"]), name
    trial.until(8)
    assert all(p.isfinite().all() for p in trial.net.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 6}, r"`blocks\.0\.up\.weight` to dim=9 with nnz=3, this run to dim=6 with nnz=3"),
        ({"nnz": 9}, r"to dim=9 with nnz=3, this run to dim=9 with nnz=9"),
    ],
)
def test_a_checkpoint_of_other_projectors_is_refused(changes: dict[str, Any], message: str) -> None:
    saved = Trial().until(2).saved()
    with pytest.raises(CheckpointError, match=message):
        Trial(**changes).resumed(saved)


@pytest.mark.parametrize(
    ("before", "now"),
    [("learned", "pca"), ("pca", "learned"), ("block", "pca"), ("pca", "block"), ("block", "learned")],
)
def test_a_checkpoint_of_another_kind_of_projectors_is_refused(before: str, now: str) -> None:
    """Two of them are laid out alike, and a refit between the others would not fit."""
    saved = Trial(projector=before).until(2).saved()
    message = rf"`blocks\.0\.up\.weight` with projector='{before}', this run has projector='{now}'"
    with pytest.raises(CheckpointError, match=message):
        Trial(projector=now).resumed(saved)


def test_a_checkpoint_without_a_projected_weight_is_refused() -> None:
    saved = Trial().until(2).saved()
    del saved["extras"]["state"]["blocks.1.down.weight"]
    with pytest.raises(CheckpointError, match=r"no projectors for `blocks\.1\.down\.weight`"):
        Trial().resumed(saved)


@pytest.mark.parametrize("form", ["gradient", "activations"])
@pytest.mark.parametrize("others", ["adamw", "frozen"])
@pytest.mark.parametrize("steps", [0, 3])
def test_detach_leaves_the_module_as_it_was(form: str, others: str, steps: int) -> None:
    module = Net(tied=True)
    module.norm.bias.requires_grad_(False)
    for p in module.parameters():
        p._post_accumulate_grad_hooks  # noqa: B018  # made on first access
    kinds = [type(part) for part in module.modules()]
    before, wants = snapshot(module), [p.requires_grad for p in module.parameters()]
    engine = Engine(module, adamw(module), LSP(settings_of(form=form, others=others)), lanes_of("inline"), DTypes())
    assert snapshot(module)[0] != before[0]
    if others == "frozen":
        assert {n for n, p in module.named_parameters() if p.requires_grad} == set(projected_names(module))
    for _ in range(steps):
        with engine.micro_batch():
            loss = module.loss(torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1)))
        engine.stepping = True
        loss.backward()
        del loss
        engine.step()
    engine.detach()
    engine.detach()
    assert snapshot(module) == before
    assert [p.requires_grad for p in module.parameters()] == wants
    assert [type(part) for part in module.modules()] == kinds
    assert all(p.grad is None or p.requires_grad for p in module.parameters())
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None  # nothing that is left refers to it
    module.loss(torch.zeros(1, 4, dtype=torch.long)).backward()
    assert module.blocks[0].up.weight.grad is not None


def test_a_failed_attach_leaves_nothing_behind() -> None:
    module = Net()
    before, wants = snapshot(module), [p.requires_grad for p in module.parameters()]
    settings = settings_of(others="frozen")
    with pytest.raises(ValueError, match="cannot project `Adam`"):
        Engine(module, torch.optim.Adam(module.parameters()), LSP(settings), lanes_of("inline"), DTypes())
    assert snapshot(module)[0] == before[0]
    assert [p.requires_grad for p in module.parameters()] == wants


def test_extras_refer_to_no_weights() -> None:
    """A checkpoint holds projectors and moments of d x d, and of full size only what the common path has."""
    state = Trial(projector="block").until(4).saved()["extras"]["state"]
    for name, held in state.items():
        shapes = {tuple(value.shape) for value in flat(held).values() if isinstance(value, Tensor)}
        m, n = Net().get_parameter(name).shape
        assert shapes == {(m, 3), (3, m), (n, 3), (3, n), (), (9, 9)} - (
            {(3, m), (3, n)} if held["left"]["order"] is None else set()
        )


def test_weights_of_the_common_path_are_adopted_and_projected_ones_simply_stay() -> None:
    trial = Trial().until(4)
    with torch.no_grad():
        trial.engine.flush()
        trial.net.blocks[0].up.weight[0, 0] = 5.0
        trial.net.head.weight[0, 0] = 7.0
    trial.engine.adopt()
    trial.until(6).engine.flush()
    assert 4 < float(trial.net.blocks[0].up.weight[0, 0]) < 6
    assert 6 < float(trial.net.head.weight[0, 0]) < 8
