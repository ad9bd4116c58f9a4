"""Hashes of weights: the same however many threads, and another for every bit."""

from __future__ import annotations

import hashlib

import pytest
import torch

from lightning_offload.memory import hashing


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_every_bit_counts(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(hashing, "PIECE_BYTES", 64)
    data = torch.arange(size).to(torch.uint8)
    found = {hashing.digest(data)}
    for at in {0, size // 2, size - 1}:
        other = data.clone()
        other[at] ^= 1
        found.add(hashing.digest(other))
    assert len(found) == 1 + len({0, size // 2, size - 1})
    assert hashing.digest(data) in found


def test_pieces_count_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PIECE_BYTES", 2)

    def of(data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=16).digest()

    data = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)
    assert hashing.digest(data) == of(of(b"\1\2") + of(b"\3\4") + of(b"\5"))
