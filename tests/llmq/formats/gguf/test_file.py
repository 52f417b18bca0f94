"""The container of GGUF files, against bytes written by hand, and the package gguf where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmq.errors import LlmqError
from llmq.formats.gguf import file
from llmq.formats.gguf.file import New, encode, most_common
from llmq.formats.gguf.types import TYPES
from tests.llmq.export.fake_converter import Stored, gguf_bytes

NUMBERS = np.arange(12, dtype="<f4")
TENSORS: dict[str, Stored] = {"a.weight": (0, (3, 4), NUMBERS.tobytes()), "b": (1, (2,), np.ones(2, "<f2").tobytes())}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(TENSORS))
    return tmp_path / "a.gguf"


def test_read(path: Path) -> None:
    found = file.read(path)
    assert file.is_gguf(path) and not file.is_gguf(path.with_name("none"))
    names = ["general.architecture", "general.file_type", "general.alignment", "tokens", "scores", "nested", "yes"]
    assert [*found.entries] == names and found.alignment == 64
    assert found.entries["general.architecture"] == "made" and found.entries["tokens"] == 2 and found.entries["yes"]
    a, b = found.tensors
    assert (a.name, a.shape, a.kind.name, a.nbytes, a.rows) == ("a.weight", (3, 4), "F32", 48, 3)
    assert found.read(a).tolist() == NUMBERS.reshape(3, 4).tolist() and found.read(a, 1, 2).tolist() == [[4, 5, 6, 7]]
    assert found.read(b).tolist() == [[1, 1]] and b.begin % 64 == 0


def test_write_with_other_tensors(path: Path) -> None:
    old, blocks = file.read(path), torch.arange(2 * 18, dtype=torch.uint8).view(2, 18)
    new = [New("a.weight", (2, 32), TYPES["Q4_0"]), New("c", (3,), TYPES["F32"])]
    assert most_common(new) == 2 and most_common(new[1:]) is None
    data = [[blocks[:1], blocks[1:]], [torch.tensor([1.0, 2.0, 3.0])]]
    other = path.with_name("b.gguf")
    other.write_bytes(b"".join(encode(old, new, most_common(new), data)))
    found = file.read(other)
    assert found.entries == old.entries | {"general.file_type": 2}
    a, c = found.tensors
    assert torch.equal(found.read(a), blocks) and found.read(c).tolist() == [[1, 2, 3]]
    assert other.stat().st_size % 64 == 0 and a.begin % 64 == c.begin % 64 == 0


def test_the_package_reads_what_is_written(path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed; bytes are tested above")
    old = file.read(path)
    path.write_bytes(b"".join(encode(old, [New("c", (2, 3), TYPES["F32"])], 0, [[torch.arange(6.0)]])))
    (tensor,) = gguf.GGUFReader(path).tensors
    assert tensor.name == "c" and tensor.data.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for size in (10, 60, 200):
        path.write_bytes(whole[:size])
        with pytest.raises(LlmqError, match="is no whole GGUF file; make or download it again"):
            file.read(path)
    path.write_bytes(whole[:-64])
    with pytest.raises(LlmqError, match="is truncated: b is not whole"):
        file.read(path)
    path.write_bytes(gguf_bytes(TENSORS, version=1))
    with pytest.raises(LlmqError, match="is no GGUF file of version 2 or 3"):
        file.read(path)
    path.write_bytes(gguf_bytes({"a": (99, (4,), b"")}))
    with pytest.raises(LlmqError, match="a has type 99, which llmq does not know"):
        file.read(path)
    path.write_bytes(gguf_bytes({"a": (2, (3, 40), b"")}))
    with pytest.raises(LlmqError, match=r"a \[3, 40\] is not made of blocks of Q4_0"):
        file.read(path)
    with pytest.raises(LlmqError, match="cannot read .*none: No such file"):
        file.read(path.with_name("none"))


def test_a_file_that_changes_while_it_is_read(path: Path) -> None:
    found = file.read(path)
    path.write_bytes(path.read_bytes()[: found.tensors[0].begin + 8])
    with pytest.raises(LlmqError, match="is truncated: a.weight is not whole"):
        found.read(found.tensors[0])
    path.unlink()
    with pytest.raises(LlmqError, match="cannot read a.weight"):
        found.read(found.tensors[0])
