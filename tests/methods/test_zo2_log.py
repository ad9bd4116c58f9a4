"""The log of a zo2 run: read back whatever a crash leaves of it, and the run goes on to the same bits."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_offload.errors import CheckpointError, OffloadError
from lightning_offload.methods.base import DTypes
from lightning_offload.methods.engine import METHOD, OWN, SETTINGS
from lightning_offload.methods.steplog import Entry, Header, LogFile, hash_weights, pack_entry, pack_header, read_log
from lightning_offload.methods.zeroth import BASE, ENTRIES, SEEDS, SKIPS, STEPS, SUMS, ZerothEngine
from lightning_offload.methods.zo2 import ZO2Settings
from lightning_offload.numerics.noise import Draw
from lightning_offload.numerics.zeroth import Update, update_
from tests.helpers import Net
from tests.zeroth import by_type, make_engine, token_batches

LENGTH = 12
DIRECTIONS = 2
ROUNDED = DTypes(rounding="stochastic")


def net() -> Net:
    return Net(depth=3, tied=True, frozen=True).bfloat16()


def loss_of(module: Net, step: int, batch: Tensor) -> Tensor:
    return module.loss(batch) * (math.nan if step == 5 else 1)


def go_on(module: Net, engine: ZerothEngine, file: LogFile, steps: range) -> None:
    batches = token_batches(LENGTH)
    for step in steps:
        before = len(engine.log)
        for group, lr in zip(engine.optimizer.param_groups, (1e-3, 3e-3), strict=True):
            group["lr"] = lr * 0.9**step
        engine.micro_batch(lambda batch, step=step: loss_of(module, step, batch), [batches[step]])  # type: ignore[misc]
        engine.step()
        file.append(engine.log[before:])
    engine.detach()
    file.close()


def started(path: Path) -> tuple[Net, ZerothEngine]:
    """The run that is not killed."""
    module = net()
    engine = make_engine(module, by_type(module), dtypes=ROUNDED, directions=DIRECTIONS)
    go_on(module, engine, LogFile(path, engine.header(), []), range(LENGTH))
    return module, engine


def rebuilt(header: Header, entries: list[Entry]) -> Net:
    """By hand: what anyone can do with a base and a log."""
    module = net()
    assert hash_weights(module.parameters()) == header.base
    groups = {name: at for at, names in enumerate(header.groups) for name in names}
    for place, (name, p) in enumerate(module.named_parameters()):
        if name in groups:
            at = groups[name]
            updates = [
                Update(Draw(e.seed, e.step, place, e.direction), e.coefficient, e.lr[at], e.weight_decay[at])
                for e in entries
            ]
            update_(p.data, updates, header.distribution, header.rounding)  # type: ignore[arg-type]
    return module


def resumed(header: Header, entries: list[Entry]) -> tuple[Net, ZerothEngine]:
    module = rebuilt(header, entries)
    engine = make_engine(module, by_type(module), dtypes=ROUNDED, directions=DIRECTIONS)
    own = {
        STEPS: entries[-1].step if entries else 0,
        ENTRIES: [(e.step, e.direction, e.seed, e.coefficient, e.lr, e.weight_decay) for e in entries],
        SUMS: [],
        SKIPS: (0, 0),
        SEEDS: (None, None),
        BASE: header.base,
    }
    engine.load_extras({METHOD: "zo2", SETTINGS: engine.method.decisive(), OWN: own})
    return module, engine


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_run_killed_at_any_byte_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    module, engine = started(tmp_path / "run.zo2")
    data = (tmp_path / "run.zo2").read_bytes()
    header, entries, whole = read_log(data, "run")
    assert (entries, whole) == (engine.log, len(data))
    assert [entry.step for entry in entries] == [s for s in range(1, LENGTH + 1) if s != 6 for _ in range(DIRECTIONS)]
    assert_same(rebuilt(header, entries), module)
    first = len(pack_header(header))
    record = len(pack_entry(entries[0]))
    random.seed(0)
    cuts = [first, len(data), *random.sample(range(first, len(data)), 200)]
    by_length: dict[int, int] = {}
    for cut in cuts:
        read, left, end = read_log(data[:cut], "run")
        assert read == header
        assert left == entries[: (cut - first) // (record * DIRECTIONS) * DIRECTIONS]
        assert end == first + len(left) * record
        by_length[len(left)] = cut
    assert len(by_length) == LENGTH  # every boundary: eleven steps and none
    for length, cut in by_length.items():
        path = tmp_path / "killed.zo2"
        path.write_bytes(data[:cut])
        again, other = resumed(header, entries[:length])
        go_on(again, other, LogFile(path, other.header(), other.log), range(other._steps, LENGTH))
        assert_same(again, module)
        assert other.log == engine.log
        assert path.read_bytes() == data


HEADER = Header(
    base="b",
    noise="philox",
    distribution="popcount",
    eps=1e-3,
    directions=1,
    rounding="nearest",
    groups=(("a", "b"), ("c",)),
    stored={"a": "torch.float32", "b": "torch.float32", "c": "torch.bfloat16"},
    shapes={"a": (2, 3), "b": (), "c": (4,)},
)
ROWS = [Entry(step, 0, 2**63 - 1, 0.1 * step, (1e-6, 0.3), (0.0, 0.1)) for step in range(1, 6)]


def written(header: Header = HEADER, rows: list[Entry] = ROWS) -> bytes:
    return pack_header(header) + b"".join(map(pack_entry, rows))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-300, -1e300, 0.1, math.pi])
def test_numbers_come_back_to_the_last_bit(value: float) -> None:
    row = Entry(2**32 - 1, 2**16 - 1, 2**64 - 1, value, (value, 1.0), (value, 0.0))
    header, (read,), _ = read_log(written(rows=[row]), "log")
    assert (header, read) == (HEADER, row)
    assert math.copysign(1, read.coefficient) == math.copysign(1, value)


def test_the_largest_settings_fit_into_an_entry() -> None:
    settings = ZO2Settings(seed=2**63 - 1, directions=2**16 - 1)
    assert settings.seed is not None
    row = Entry(1, settings.directions - 1, settings.seed, 0.5, (1e-6, 1e-6), (0.0, 0.0))
    assert read_log(written(rows=[row]), "log")[1] == [row]


def test_an_entry_takes_few_bytes() -> None:
    one_group = Entry(1, 0, 3, 0.5, (1e-6,), (0.0,))
    assert len(pack_entry(one_group)) == 42


@pytest.mark.parametrize("directions", [1, 2])
def test_cut_at_every_byte(directions: int) -> None:
    header = Header(**{**vars(HEADER), "directions": directions})
    data = written(header)
    first, record = len(pack_header(header)), len(pack_entry(ROWS[0]))
    for cut in range(len(data) + 1):
        if cut < first:
            with pytest.raises(CheckpointError, match=r"log has a damaged header|log is no log of a zo2 run"):
                read_log(data[:cut], "log")
            continue
        _, entries, whole = read_log(data[:cut], "log")
        steps = (cut - first) // (record * directions)
        assert entries == ROWS[: steps * directions]
        assert whole == first + steps * directions * record


@pytest.mark.parametrize(("entry", "count"), [(0, 1), (2, 1), (3, 1), (0, 2), (1, 3)])
def test_damage_in_the_middle_is_named(entry: int, count: int) -> None:
    data = bytearray(written())
    first, record = len(pack_header(HEADER)), len(pack_entry(ROWS[0]))
    for other in range(count):
        data[first + (entry + other) * record + 7] ^= 1
    at = first + entry * record
    with pytest.raises(CheckpointError, match=rf"log is damaged at byte {at}, entry {entry + 1}: {entry} entries befo"):
        read_log(bytes(data), "log")
    assert read_log(bytes(data[:at]), "log")[1] == ROWS[:entry]  # the way out that the message names


@pytest.mark.parametrize("byte", range(len(pack_entry(ROWS[0]))))
def test_a_damaged_end_is_left_out(byte: int) -> None:
    data = bytearray(written())
    data[byte - len(pack_entry(ROWS[0]))] ^= 0x10
    assert read_log(bytes(data), "log")[1] == ROWS[:-1]


def test_every_bit_of_the_header_counts() -> None:
    data = pack_header(HEADER)
    for at in range(len(data)):
        for bit in range(8):
            with pytest.raises(CheckpointError):
                read_log(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] + pack_entry(ROWS[0]), "log")


def test_a_file_goes_on_from_the_step_that_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = LogFile(path, HEADER, ROWS[:2])
    file.append(ROWS[2:4])
    file.close()
    file = LogFile(path, HEADER, ROWS[:3])  # a checkpoint that is older than the file
    file.append(ROWS[3:])
    file.close()
    assert path.read_bytes() == written()


@pytest.mark.parametrize(
    "header",
    [{"base": "another"}, {"eps": 2e-3}, {"directions": 2}, {"noise": "mezo"}],
    ids=lambda change: next(iter(change)),
)
def test_the_file_of_another_run_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    path = tmp_path / "log"
    LogFile(path, HEADER, ROWS).close()
    with pytest.raises(CheckpointError, match="is the log of another run"):
        LogFile(path, Header(**{**vars(HEADER), **header}), [])
    with pytest.raises(CheckpointError, match="is the log of another run"):
        LogFile(path, HEADER, [*ROWS[:2], ROWS[4]])
    assert path.read_bytes() == written()


def test_the_hash_is_of_every_bit_shape_and_dtype() -> None:
    weights = [torch.arange(6.0).reshape(2, 3), torch.zeros(0), torch.tensor(1.0)]
    others = [
        [weights[0].reshape(3, 2), *weights[1:]],
        [weights[0].bfloat16(), *weights[1:]],
        [weights[0], weights[1], torch.tensor(1.0 + 2**-23)],
        [weights[0], weights[2], weights[1]],
        [-weights[0] * -1 + torch.tensor([-0.0]), weights[1], -weights[2]],
    ]
    assert hash_weights(weights) == hash_weights([weights[0].T.contiguous().T, *weights[1:]])
    hashes = [hash_weights(tensors) for tensors in (weights, *others)]
    assert len(set(hashes)) == len(hashes)


def test_the_header_is_asked_for_before_the_first_step() -> None:
    module = net()
    engine = make_engine(module, by_type(module), dtypes=ROUNDED)
    engine.micro_batch(module.loss, token_batches(1))
    engine.step()
    with pytest.raises(OffloadError, match=r"were not hashed then.*pass `log_file` from a run's first step on"):
        engine.header()
    engine.detach()


def test_the_header_after_weights_were_loaded_is_of_those() -> None:
    module, other = net(), Net(depth=3, tied=True).bfloat16()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    engine = make_engine(module, by_type(module), dtypes=ROUNDED)
    first = engine.header()
    engine.micro_batch(module.loss, token_batches(1))
    engine.step()
    module.load_state_dict(other.state_dict())
    assert engine.header().base == hash_weights(other.parameters()) != first.base
    assert engine.log == []
    engine.detach()
