from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_offload.errors import CheckpointError
from lightning_offload.memory.shards import INDEX, WHOLE, Shards


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 3), float(at)) for at, name in enumerate(names)}


def indexed(folder: Path) -> None:
    save_file(tensors("a"), folder / "one.safetensors")
    save_file(tensors("b", "c"), folder / "two.safetensors")
    names = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def test_a_folder_with_an_index(tmp_path: Path) -> None:
    indexed(tmp_path)
    save_file(tensors("a"), tmp_path / "of_another.safetensors")  # not in the index
    shards = Shards(tmp_path)
    assert set(shards.tensors) == {"a", "b", "c"}
    assert shards.tensors["c"].shape == (2, 3)
    assert shards.tensors["c"].is_floating
    assert torch.equal(shards.read("c"), torch.ones(2, 3))


def test_one_file_is_taken_before_others(tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / WHOLE)
    save_file(tensors("a"), tmp_path / "consolidated.safetensors")
    assert set(Shards(tmp_path).tensors) == set(Shards(tmp_path / "consolidated.safetensors").tensors) == {"a"}


def test_several_files_without_an_index(tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / "1.safetensors")
    save_file(tensors("b"), tmp_path / "2.safetensors")
    assert set(Shards(tmp_path).tensors) == {"a", "b"}
    save_file(tensors("b"), tmp_path / "3.safetensors")
    with pytest.raises(CheckpointError, match=r"`b` is both in .*2.safetensors' and in .*3.safetensors': give the one"):
        Shards(tmp_path)


def test_refuses_a_place_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file or folder 'org/model'.*`huggingface_hub.snapshot_download`"):
        Shards(Path("org/model"))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors .*\(it has pytorch_model.bin\)"):
        Shards(tmp_path)


def test_refuses_what_is_missing_or_damaged(tmp_path: Path) -> None:
    indexed(tmp_path)
    whole = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match=r"two.safetensors' is damaged or no safetensors file, copy it again"):
        Shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=re.escape("lacks 1 of the 2 files that its " + INDEX)):
        Shards(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match=r"index.json' is damaged, copy it again"):
        Shards(tmp_path)
