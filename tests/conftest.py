"""Shared fixtures: seeds, devices, quiet trainers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

from lightning_offload.numerics import native
from lightning_offload.numerics.native import Kernels
from tests.command import given, inputs, refused, run, workplace  # noqa: F401  fixtures

torch.set_num_threads(1)  # before any fixture: the bits of a forward depend on it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CACHE = tempfile.TemporaryDirectory(prefix="rates-")
os.environ["XDG_CACHE_HOME"] = CACHE.name  # rates measured beside tests are no rates: the user's are kept apart

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny tensors: waking threads costs more than they save, most of all on a busy machine


@pytest.fixture
def kernels() -> Kernels:
    """Compiled, where a compiler is."""
    try:
        return native.load()[0]
    except native.NotBuiltError as error:
        pytest.skip(str(error))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data sets in {SHARED_DATA.name} beside the checkout")
    return SHARED_DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # not the folder of that name
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
