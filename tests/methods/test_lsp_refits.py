"""When projectors are replaced, when moments follow, and sums that come in several pieces."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_offload.errors import OffloadError
from lightning_offload.methods import projections, refits
from lightning_offload.methods.base import Clip
from lightning_offload.methods.engine import Engine
from tests.helpers import VOCAB, WIDTH, Net, Run, lanes_of, train
from tests.methods.test_lsp import close, gentle
from tests.projected import (
    assert_projected,
    carried,
    dense,
    dense_train,
    lsp,
    projected_names,
    relative_bias,
    settings_of,
)

NEVER = float("inf")


def draws(run: Run) -> dict[str, int]:
    assert run.engine is not None
    return {name: home.projections.pair.draws for name, home in run.engine.own._home.items()}


@pytest.mark.parametrize("projector", ["learned", "pca", "block"])
def test_threshold_0_always_refits_and_an_infinite_one_never(projector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = projections.bias
    monkeypatch.setattr(projections, "bias", lambda *args: asked.append(1) or plain(*args))
    changes = {"projector": projector, "refit_every": 3}
    always = train(Net(), lanes_of("inline"), steps=13, method=lsp(**changes))
    assert min(draws(always).values()) >= 4
    assert not asked  # nobody needs to know
    kept = train(Net(), lanes_of("inline"), steps=13, method=lsp(**changes, bias_threshold=NEVER))
    assert set(draws(kept).values()) == {1}
    never = train(
        Net(), lanes_of("inline"), steps=13, method=lsp(**{**changes, "refit_every": NEVER, "bias_threshold": 0.5})
    )
    looked = len(asked)
    assert set(draws(never).values()) == {1}
    assert never.engine.lanes.ledger.moved("d2h", "projectors") == 0
    assert looked == len(asked)


def test_principal_directions_draw_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    plain = projections.draw_block
    monkeypatch.setattr(projections, "draw_block", lambda *args, **rest: drawn.append(1) or plain(*args, **rest))
    run = train(Net(), lanes_of("inline"), steps=13, method=lsp(projector="pca", refit_every=3))
    assert len(drawn) == 2 * len(projected_names(Net()))  # place holders of both sides
    assert min(draws(run).values()) >= 4


def test_each_matrix_is_judged_by_its_own_bias() -> None:
    """A threshold between the biases of two matrices: one is replaced, one stays, as the dense bias says."""
    settings = settings_of(projector="block", refit_every=1, bias_threshold=1.9)
    biases: dict[tuple[int, str], float] = {}
    seen: dict[tuple[int, str], int] = {}
    kept: list[Engine] = []

    def note(module: Any, step: int) -> None:
        for name, home in kept[0].own._home.items():
            p, q = dense(home.pair.left), dense(home.pair.right)
            biases[step, name] = relative_bias(p, q, module.get_parameter(name).grad)
            seen[step, name] = home.projections.pair.draws

    run = train(
        Net(),
        lanes_of("inline"),
        steps=8,
        method=lsp(**vars(settings)),
        late=True,
        spoil=note,
        after_attach=kept.append,
    )
    edges = sorted(biases.values())
    threshold = (edges[len(edges) // 2] + edges[len(edges) // 2 - 1]) / 2
    assert edges[0] < threshold < edges[-1]
    biases.clear()
    kept.clear()
    run = train(
        Net(),
        lanes_of("inline"),
        steps=8,
        method=lsp(**{**vars(settings), "bias_threshold": threshold}),
        late=True,
        spoil=note,
        after_attach=kept.append,
    )
    final = draws(run)
    decisions = set()
    for (step, name), found in biases.items():
        after = seen.get((step + 1, name), final[name])
        replaced = after - seen[step, name]
        assert replaced == int(step > 0 and found > threshold), (step, name, found)
        decisions.add(replaced)
    assert decisions == {0, 1}


@pytest.mark.parametrize("share", ["matrix", "type"])
@pytest.mark.parametrize("every", [3, 4, 7])
def test_units_take_turns(share: str, every: int) -> None:
    """With as many steps between refits as units, no step replaces the projectors of more than one."""
    history: list[dict[str, int]] = []
    kept: list[Engine] = []

    def note(module: Any, step: int) -> None:
        history.append({name: home.projections.pair.draws for name, home in kept[0].own._home.items()})

    steps = 1 + 5 * every
    train(
        Net(),
        lanes_of("inline"),
        steps=steps,
        method=lsp(refit_every=every, share=share),
        spoil=note,
        after_attach=kept.append,
    )
    history.append({name: home.projections.pair.draws for name, home in kept[0].own._home.items()})
    replaced = [{n for n in after if after[n] != before[n]} for before, after in itertools.pairwise(history)]
    assert not any(replaced[: every - 1])  # noted after backward, in which a refit happens
    of_step = [{name.split(".")[1 if share == "matrix" else 2] for name in names} for names in replaced]
    assert max(len(units) for units in of_step) == 1
    assert set().union(*of_step) == ({"0", "1", "2"} if share == "matrix" else {"up", "down"})
    for name in history[0]:
        at = [step for step, names in enumerate(replaced) if name in names]
        assert {later - earlier for earlier, later in itertools.pairwise(at)} == {every}, name


@pytest.mark.parametrize(
    ("projector", "rule"),
    [("learned", "transfer"), ("pca", "transfer"), ("learned", "paper"), ("pca", "paper"), ("block", "paper")],
)
def test_moments_follow_by_the_dense_formula(rule: str, projector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    plain = refits.Refits._transfer

    def transfer(self: Any, home: Any, on_host: Any) -> None:
        m, v = (home.states[name].view(9, 9).double() for name in ("exp_avg", "exp_avg_sq"))
        old, new = on_host.both
        assert torch.equal(new.left.values, home.projections.pair.left.values)
        assert not torch.equal(new.left.values, old.left.values)
        expected = carried(m, v, dense(new.left).T @ dense(old.left), dense(old.right).T @ dense(new.right), rule)
        plain(self, home, on_host)
        for name, wanted in zip(("exp_avg", "exp_avg_sq"), expected, strict=True):
            torch.testing.assert_close(home.states[name].view(9, 9).double(), wanted, rtol=1e-4, atol=1e-7)
        assert home.states["exp_avg_sq"].min() >= 0
        checked.append(home.trained.name)

    monkeypatch.setattr(refits.Refits, "_transfer", transfer)
    train(Net(), lanes_of("inline"), steps=8, method=lsp(projector=projector, moments=rule))
    assert set(checked) == set(projected_names(Net()))


@pytest.mark.parametrize("anew", [{"moments": "reset"}, {"projector": "block"}])
def test_moments_and_their_count_start_anew(anew: dict[str, Any]) -> None:
    """Where asked for, and by default in a subspace that is random."""
    run = train(Net(), lanes_of("inline"), steps=5, method=lsp(**anew, refit_every=4))
    assert run.engine.lanes.ledger.moved("d2h", "projectors") == 0
    counts = {name: int(extra["step"]) for name, extra in run.engine.own.extras().items()}
    of_unit = [{counts[f"blocks.{unit}.{part}.weight"] for part in ("up", "down")} for unit in range(3)]
    assert of_unit == [{0}, {5}, {5}]  # replaced in step 5, whose own step came before


def gradient_without_use(net: nn.Module, step: int) -> None:
    for p in net.parameters():
        p.grad = torch.ones(p.shape) if p.grad is None else p.grad


class FirstUnused(Net):
    """Every other forward leaves out the first block, whose delta then waits while others are replaced."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(tokens)
        for block in self.blocks[self.calls % 2 :]:
            x = block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("kind", ["inline", "checked", "shuffled"])
@pytest.mark.parametrize("share", ["matrix", "type"])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_a_delta_that_no_forward_has_asked_for_is_not_lost(
    kind: str, share: str, by_hand: bool, skip_nonfinite: bool
) -> None:
    """Its unit gets a gradient by hand, or its projectors are replaced by another's, before it is used again."""
    method = {"share": share, "projector": "block", "refit_every": 1, "skip_nonfinite": skip_nonfinite}
    common = {"steps": 7, "make_optimizer": gentle}
    spoil = gradient_without_use if by_hand else None
    ours = train(FirstUnused(depth=5), lanes_of(kind), method=lsp(**method), late=by_hand, spoil=spoil, **common)
    expected, _ = dense_train(FirstUnused(depth=5), settings_of(**method), spoil=spoil, **common)
    close(ours, expected)


# Sums that come in several pieces.


class Batched(Net):
    """One batch of as many sequences as ``train`` would give in micro-batches."""

    def __init__(self, sequences: int) -> None:
        super().__init__()
        self.sequences, self.given = sequences, list[Tensor]()

    def loss(self, tokens: Tensor) -> Tensor:
        self.given.append(tokens)
        if len(self.given) < self.sequences:
            return self.norm.weight.sum() * 0.0
        whole, self.given = torch.cat(self.given), []
        return super().loss(whole) * self.sequences  # ``train`` divides


@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("clip", [None, Clip(0.05), Clip(0.01, "value")])
def test_micro_batches_are_one_batch(accumulate: str, clip: Clip | None) -> None:
    common = {"steps": 4, "micro_batches": 3, "clip": clip, "make_optimizer": gentle}
    # host accumulation refits on the last micro-batch alone, so its projectors are not those of the whole batch
    changes = {"projector": "learned" if accumulate == "device" else "block"}
    pieces = train(Net(), lanes_of("checked"), method=lsp(accumulate=accumulate, **changes), **common)
    whole = train(Batched(3), lanes_of("inline"), method=lsp(**changes), **common)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(pieces.weights[name], weight, rtol=0, atol=2e-6)
    assert_projected(pieces, Net(), steps=4)


class TwiceFired(nn.Module):
    """One weight in three reentrant checkpoints: its gradient arrives three times in one backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.head = nn.Linear(WIDTH, VOCAB)

    def uses(self) -> int:
        return 3

    def loss(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(self.uses()):
            x = checkpoint(self.blocks[0], x, use_reentrant=True)
        return nn.functional.cross_entropy(self.head(self.blocks[1](x)).view(-1, VOCAB), tokens.view(-1))


@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("kind", ["inline", "checked", "shuffled"])
@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_a_gradient_that_arrives_several_times_adds_up(kind: str, accumulate: str, skip_nonfinite: bool) -> None:
    """To round-off: S is linear. Refits are left out, which would see a part of the first step's gradient."""
    changes = {"accumulate": accumulate, "skip_nonfinite": skip_nonfinite, "projector": "block", "refit_every": NEVER}
    common = {"clip": Clip(0.1), "micro_batches": 2, "make_optimizer": gentle}
    expected, _ = dense_train(TwiceFired(), settings_of(**changes), **common)
    ours = train(TwiceFired(), lanes_of(kind), method=lsp(**changes), **common)
    close(ours, expected)
    assert_projected(ours, TwiceFired(), steps=5)


def test_several_backwards_in_a_step_add_up() -> None:
    class Halves(Net):
        def loss(self, tokens: Tensor) -> Tensor:
            if torch.is_grad_enabled() and self.calls % 2 == 0:
                self.half(tokens).backward()
            return self.half(tokens)

        def half(self, tokens: Tensor) -> Tensor:
            return super().loss(tokens) / 2

    def stepping(engine: Engine) -> None:
        """Both backwards find that the step follows."""
        engine.stepping = True
        plain = engine.step

        def step(clip: Clip | None = None) -> None:
            plain(clip)
            engine.stepping = True

        engine.step = step  # type: ignore[method-assign]

    changes = {"projector": "block", "refit_every": NEVER}
    expected = train(Net(), lanes_of("inline"), method=lsp(**changes), make_optimizer=gentle, clip=Clip(9.0))
    ours = train(
        Halves(),
        lanes_of("checked"),
        method=lsp(**changes),
        make_optimizer=gentle,
        clip=Clip(9.0),
        after_attach=stepping,
    )
    for name, weight in expected.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("accumulate", ["device", "host"])
@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_a_second_gradient_after_an_early_step_is_refused(skip_nonfinite: bool, accumulate: str) -> None:
    class Late(TwiceFired):
        calls = 0

        def uses(self) -> int:
            Late.calls += 1
            return 1 if Late.calls < 3 else 3

    with pytest.raises(OffloadError, match=r"`blocks\.0\.(weight|bias)` received a second gradient"):
        train(Late(), lanes_of("inline"), method=lsp(skip_nonfinite=skip_nonfinite, accumulate=accumulate))


@pytest.mark.parametrize("clip", [Clip(0.05), Clip(0.01, "value")])
def test_clipping_that_nobody_expected_is_refused(clip: Clip) -> None:
    """Units have stepped by then."""

    def surprise(engine: Engine) -> None:
        plain = engine.step
        engine.step = lambda _=None: plain(clip)  # type: ignore[method-assign]

    with pytest.raises(OffloadError, match=r"to be clipped.*`expects_clip=True`"):
        train(Net(), lanes_of("inline"), method=lsp(), after_attach=surprise)


def test_one_norm_over_all_sums_and_all_other_gradients() -> None:
    norms: list[Tensor] = []
    kept: list[Engine] = []

    def note(module: Any, step: int) -> None:
        home = kept[0].own._home
        others = [p.grad for n, p in module.named_parameters() if n not in home]
        sums = [
            dense(home[n].pair.left).T @ module.get_parameter(n).grad.double() @ dense(home[n].pair.right) for n in home
        ]
        norms.append(torch.stack([g.double().norm() for g in (*others, *sums)]).norm())

    for min_numel in (0, 60):
        method = lsp(projector="block", refit_every=NEVER, min_numel=min_numel)
        run = train(
            Net(), lanes_of("inline"), clip=Clip(0.05), method=method, late=True, spoil=note, after_attach=kept.append
        )
        for report, norm in zip(run.reports, norms, strict=False):
            assert report.grad_norm == pytest.approx(float(norm), rel=1e-5)
            assert report.clip_coefficient == pytest.approx(0.05 / float(norm), rel=1e-4)
        norms.clear()
        kept.clear()
