"""The safetensors format: read and written as the package itself does, damaged files refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmq.checkpoint import tensors as module
from llmq.checkpoint.source import FolderSource
from llmq.checkpoint.tensors import DTYPES as NAMED
from llmq.checkpoint.tensors import encode, read_header, read_rows, read_tensor
from llmq.errors import LlmqError
from tests.llmq.checkpoint.made import DTYPES, one, sharded
from tests.llmq.refusal import refused


def with_header(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7), (2, 3, 4), (0, 4), (4, 0)], ids=str)
def test_reads_and_writes_as_safetensors_does(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    source = FolderSource(one(tmp_path / "m", {"odd": torch.ones(3, dtype=torch.uint8), "t": tensor}))
    info = source.info("t")
    assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, tensor.nbytes)
    read = source.read("t")
    assert read.dtype == dtype and read.shape == tensor.shape
    assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    ours = tmp_path / "ours.safetensors"
    size, pieces = encode({"odd": torch.ones(3, dtype=torch.uint8), "t": tensor})
    ours.write_bytes(b"".join(pieces))
    assert ours.stat().st_size == size
    theirs = load_file(ours)["t"]
    assert theirs.dtype == dtype and theirs.shape == tensor.shape
    assert torch.equal(theirs.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(st.text(max_size=12), st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)))
)
def test_encode_round_trips(tmp_path_factory: pytest.TempPathFactory, made: dict[str, Any]) -> None:
    made.pop("__metadata__", None)
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in made.items()}
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    path.write_bytes(b"".join(encode(tensors)[1]))
    infos = read_header(path)
    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert infos[name].begin % tensor.element_size() == 0
        assert torch.equal(read_tensor(infos[name]).double(), tensor.double())
    assert b"".join(encode(dict(reversed(tensors.items())))[1]) == path.read_bytes()
    load_file(path)


def test_encode_takes_views(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"".join(encode({"t": base.T, "column": base[:, 1]})[1]))
    assert torch.equal(load_file(path)["t"], base.T) and torch.equal(load_file(path)["column"], base[:, 1])
    refused(lambda: encode({"w": torch.zeros(2, dtype=torch.complex128)}), "w", "complex128")


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_truncated_anywhere(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "s"
    if not folder.exists():
        sharded(folder)
        shutil.copy(folder / "model-00002-of-00002.safetensors", tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    (folder / "model-00002-of-00002.safetensors").write_bytes(whole[:length])
    refused(lambda: FolderSource(folder), "model-00002-of-00002.safetensors", "truncated", "download")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_is_refused_or_read_in_bounds(tmp_path: Path, data: st.DataObject) -> None:
    path = one(tmp_path / "m") / "model.safetensors"
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        source = FolderSource(path.parent)
    except LlmqError as error:
        assert "model.safetensors" in str(error)
    else:
        assert all(source.read(name).nbytes == source.info(name).nbytes for name in source.names())


def test_header_faults(tmp_path: Path) -> None:
    path = one(tmp_path / "m") / "model.safetensors"

    def header(data: bytes = b"\0" * 8, **entries: object) -> None:
        with_header(path, entries, data)

    def f32(begin: object, end: object, *shape: object) -> dict[str, object]:
        return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}

    def expect(*words: str) -> None:
        refused(lambda: FolderSource(path.parent), "model.safetensors", *words)

    with_header(path, b"{broken")
    expect("not JSON")
    with_header(path, b"[]")
    expect("not a JSON object")
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"x" * 100)
    expect("truncated")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    expect("Git LFS", "git lfs pull")
    header(w=f32(0, 4, 1), v=f32(0, 4, 1))
    expect("overlaps")
    header(w=f32(0, 4, 1), v=f32(2, 6, 1))
    expect("tensor v", "overlaps")
    header(w=f32(4, 8, 1))
    expect("tensor w", "gap")
    header(w=f32(0, 4, 1))
    expect("4 bytes after")
    header(w=f32(0, 12, 3))
    expect("truncated")
    header(w=f32(0, 8, 3))
    expect("tensor w", "12 bytes", "8")
    header(w=f32(0, 8, 1 << 62, 1 << 62))
    expect("tensor w", "bytes")
    header(w=f32(8, 0, 2))
    expect("tensor w", "offsets")
    for begin, end in ((-8, 0), (0, "8"), (0, 8.0), (False, 8)):
        header(w=f32(begin, end, 2))
        expect("tensor w", "offsets")
    for shape in ([-2], ["2"], [True, 2], [2.0]):
        header(w=f32(0, 8, *shape))
        expect("tensor w", "shape")
    header(w={"dtype": "F4", "shape": [2], "data_offsets": [0, 8]})
    expect("tensor w", "'F4'", "BF16")
    header(w={"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]})
    expect("tensor w", "dtype")
    header(w={"shape": [2]})
    expect("tensor w", "data_offsets")
    header(w=5)
    expect("tensor w")


def test_cut_while_running(tmp_path: Path) -> None:
    source = FolderSource(one(tmp_path / "m"))
    path = tmp_path / "m" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    refused(lambda: [source.read(name) for name in source.names()], "became shorter", "model.safetensors")
    path.unlink()
    refused(lambda: source.read("b"), "cannot read b", "model.safetensors")
    refused(source.fingerprint, "model.safetensors")


@pytest.mark.parametrize("name", NAMED)
def test_every_dtype_is_called_as_safetensors_calls_it(tmp_path: Path, name: str) -> None:
    save_file({"t": torch.zeros(3, dtype=NAMED[name])}, tmp_path / "t")
    raw = (tmp_path / "t").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["t"]["dtype"] == name
    assert read_header(tmp_path / "t")["t"].dtype == NAMED[name]


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    whole = torch.randn(5, 3, 2)
    save_file({"odd": torch.ones(7, dtype=torch.uint8), "t": whole, "number": torch.tensor(1.0)}, tmp_path / "t")
    infos = read_header(tmp_path / "t")
    for start in range(6):
        for stop in range(start, 6):
            assert torch.equal(read_rows(infos["t"], start, stop), whole[start:stop])
    for start, stop in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(IndexError, match=r"of t, whose shape is \[5, 3, 2\]"):
            read_rows(infos["t"], start, stop)
    with pytest.raises(IndexError):
        read_rows(infos["number"], 0, 0)
    save_file({"none": torch.ones(0, 4)}, tmp_path / "none")
    assert read_rows(read_header(tmp_path / "none")["none"], 0, 0).shape == (0, 4)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    entries = {
        "first": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]},
        "second": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    with_header(tmp_path / "t", entries, b"\0\0\x80\x3f\x07\x08")
    infos = read_header(tmp_path / "t")
    assert [*infos] == ["second", "first"]
    assert read_tensor(infos["second"]).item() == 1.0 and read_tensor(infos["first"]).tolist() == [7, 8]


def test_pieces_are_small_and_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(100, dtype=torch.int16), "b": torch.arange(33, dtype=torch.uint8)}
    whole = b"".join(encode(tensors)[1])
    monkeypatch.setattr(module, "_PIECE", 64)
    size, pieces = encode(tensors)
    header, *parts = pieces
    assert [len(part) for part in parts] == [64, 64, 64, 8, 33]
    assert b"".join([header, *parts]) == whole and len(whole) == size
    (tmp_path / "t").write_bytes(whole)
    assert torch.equal(load_file(tmp_path / "t")["a"], tensors["a"])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    refused(lambda: read_header(tmp_path / "none"), f"cannot read {tmp_path / 'none'}", "No such file")
    with_header(tmp_path / "t", {"__metadata__": {"format": "pt"}})
    assert read_header(tmp_path / "t") == {}
