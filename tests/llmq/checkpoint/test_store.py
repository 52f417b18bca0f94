"""Bytes of files on this disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.checkpoint.store import LOCAL
from llmq.checkpoint.tensors import encode


def written(folder: Path, value: torch.Tensor) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(b"".join(encode({"w": value})[1]))
    return path


def test_bytes_end_where_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(10)))
    into = bytearray(6)
    assert (LOCAL.read(path, 2, memoryview(into)), bytes(into)) == (6, bytes(range(2, 8)))
    assert (LOCAL.read(path, 7, memoryview(into)), bytes(into[:3])) == (3, bytes(range(7, 10)))
    assert LOCAL.read(path, 50, memoryview(into)) == 0
    assert (LOCAL.size(path), LOCAL.size(tmp_path), LOCAL.size(tmp_path / "absent")) == (10, None, None)
    with pytest.raises(FileNotFoundError):
        LOCAL.read(tmp_path / "absent", 0, memoryview(into))


@pytest.mark.parametrize("place", [0, 999_999])
def test_the_first_and_last_values_are_in_the_proof(tmp_path: Path, place: int) -> None:
    value = torch.zeros(1_000_000, dtype=torch.uint8)
    proofs = [list(LOCAL.proof(written(tmp_path, value)))]
    proofs.append(list(LOCAL.proof(written(tmp_path, value))))
    value[place] = 1
    proofs.append(list(LOCAL.proof(written(tmp_path, value))))
    assert proofs[0] == proofs[1] != proofs[2]
