"""Source: every fault a checkpoint can have, made on purpose; what it reads is what the safetensors package wrote."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmq.checkpoint.files import INDEX
from llmq.checkpoint.source import FolderSource, check_finite
from llmq.checkpoint.tensors import encode, read_header, read_tensor
from llmq.errors import LlmqError
from tests.llmq.refusal import refused

CONFIG = {"model_type": "anything", "hidden_size": 8}
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def one(folder: Path, tensors: dict[str, torch.Tensor] | None = None, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint of a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(
        tensors or {"a.weight": torch.arange(24.0).reshape(6, 4), "b": torch.ones(3)}, folder / "model.safetensors"
    )
    return folder


def sharded(folder: Path) -> Path:
    """A checkpoint of two shards and an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    parts = {"model-00001-of-00002.safetensors": ["x", "y"], "model-00002-of-00002.safetensors": ["z"]}
    for shard, names in parts.items():
        save_file({name: torch.full((4, 4), float(ord(name))) for name in names}, folder / shard)
    where = {name: shard for shard, names in parts.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


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


def test_rows(tmp_path: Path) -> None:
    source = FolderSource(one(tmp_path / "m"))
    assert torch.equal(source.read_rows("a.weight", 2, 5), source.read("a.weight")[2:5])
    assert source.read_rows("a.weight", 2, 2).shape == (0, 4)
    with pytest.raises(IndexError):
        source.read_rows("a.weight", 4, 7)


def test_sharded_and_single(tmp_path: Path) -> None:
    source = FolderSource(sharded(tmp_path / "s"))
    assert source.names() == ["x", "y", "z"] and "z" in source and "w" not in source
    assert source.total_bytes == 3 * 64
    assert float(source.read("z")[0, 0]) == ord("z")
    other = one(tmp_path / "o")
    (other / "model.safetensors").rename(other / "weights.safetensors")
    assert FolderSource(other).names() == ["a.weight", "b"]
    shutil.copy(other / "weights.safetensors", other / "more.safetensors")
    refused(lambda: FolderSource(other), "2 safetensors files", INDEX)


def test_a_tensor_the_index_forgot_is_kept_and_a_double_is_the_index_s(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "s")
    first, second = sorted(folder.glob("*.safetensors"))
    save_file({"z": torch.zeros(2), "x": torch.ones(9)}, second)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["y"]
    (folder / INDEX).write_text(json.dumps(index))
    source = FolderSource(folder)
    assert set(source.names()) == {"x", "y", "z"} and source.info("x").file == first


def test_shards_in_a_subfolder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "s")
    (folder / "sub").mkdir()
    for shard in folder.glob("*.safetensors"):
        shard.rename(folder / "sub" / shard.name)
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: f"sub/{shard}" for name, shard in where.items()}}))
    assert FolderSource(folder).names() == ["x", "y", "z"]


def test_not_a_model_folder(tmp_path: Path) -> None:
    refused(lambda: FolderSource(tmp_path / "no"), "no", "does not exist")
    refused(lambda: FolderSource(tmp_path), "not a model folder", "config.json")
    (tmp_path / "file").write_text("")
    refused(lambda: FolderSource(tmp_path / "file"), "is a file")
    (tmp_path / "config.json").write_text("{not json")
    refused(lambda: FolderSource(tmp_path), "config.json", "not valid JSON")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(lambda: FolderSource(tmp_path), "config.json", "not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(lambda: FolderSource(tmp_path), "config.json", "not a JSON object")
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: FolderSource(tmp_path), "no weights", INDEX)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.pth"]
)
def test_pickles_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(lambda: FolderSource(tmp_path), name, "convert", "save_pretrained")


def test_index_faults(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "s")
    index = folder / INDEX
    good = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"ghost": "model-00002-of-00002.safetensors"}}))
    refused(lambda: FolderSource(folder), "ghost", "model-00002-of-00002", INDEX)
    for outside in ("../x.safetensors", "/etc/x.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {"x": outside}}))
        refused(lambda: FolderSource(folder), "tensor x", INDEX)
    for bad in ("{}", '{"weight_map": {}}', '{"weight_map": []}', "nope", "[" * 100_000):
        index.write_text(bad)
        refused(lambda: FolderSource(folder), INDEX)
    index.write_text(json.dumps(good))
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(lambda: FolderSource(folder), "model-00002-of-00002.safetensors", "missing", "download")


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


def test_already_quantized(tmp_path: Path) -> None:
    section = {"quantization_config": {"quant_method": "gptq"}}
    folder = one(tmp_path / "m", config=CONFIG | section)
    refused(lambda: FolderSource(folder), "already quantized", "gptq")
    assert FolderSource(folder, quantized_ok=True).names()
    refused(
        lambda: FolderSource(one(tmp_path / "n", config=CONFIG | {"text_config": section})), "already quantized", "gptq"
    )
    refused(
        lambda: FolderSource(one(tmp_path / "o", config=CONFIG | {"compression_config": {"a": 1}})), "already quantized"
    )


def test_remote_code(tmp_path: Path) -> None:
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    folder = one(tmp_path / "m", config=CONFIG | remote)
    (folder / "modeling_mine.py").write_text("")
    refused(lambda: FolderSource(folder), "--trust-remote-code", "'anything'")
    source = FolderSource(folder, trust_remote_code=True)
    assert source.trust_remote_code and "modeling_mine.py" in [path.name for path in source.aux_files()]
    assert FolderSource(one(tmp_path / "known", config=remote | {"model_type": "gpt2"})).names()


def test_aux_files(tmp_path: Path) -> None:
    folder = one(tmp_path / "m")
    carried = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "special_tokens_map.json"]
    carried += ["preprocessor_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "LICENSE.md"]
    left = ["README.md", ".gitattributes", "pytorch_model.bin", "x.pkl", "other.index.json", "a.onnx", "b.safetensors"]
    left += ["helper.py", "optimizer.pt", "quantize_config.json"]
    for name in [*carried, *left]:
        (folder / name).write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.json").write_text("x")
    assert [path.name for path in FolderSource(folder).aux_files()] == sorted(carried)


def test_fingerprint_tells_apart(tmp_path: Path) -> None:
    folder = one(tmp_path / "m", {"w": torch.randn(400, 400)})
    same = shutil.copytree(folder, tmp_path / "copy")
    first = FolderSource(folder).fingerprint()
    assert FolderSource(same).fingerprint() == first
    path = same / "model.safetensors"
    whole = path.read_bytes()
    for place in (-1, len(whole) - 640_000):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert FolderSource(same).fingerprint() != first
    path.write_bytes(whole)
    (same / "config.json").write_text("{}")
    assert FolderSource(same).fingerprint() != first
    assert FolderSource(sharded(tmp_path / "s")).fingerprint() != first
    tiny = one(tmp_path / "tiny", {"w": torch.zeros(0)})
    assert len(FolderSource(tiny).fingerprint()) == 64


def test_cut_while_running(tmp_path: Path) -> None:
    source = FolderSource(one(tmp_path / "m"))
    path = tmp_path / "m" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    refused(lambda: [source.read(name) for name in source.names()], "became shorter", "model.safetensors")
    path.unlink()
    refused(lambda: source.read("b"), "cannot read b", "model.safetensors")
    refused(source.fingerprint, "model.safetensors")


def test_unreadable_by_permission() -> None:
    folder = one(Path(tempfile.mkdtemp(dir="/tmp")) / "m")
    folder.parent.chmod(0o755)
    root = os.geteuid() == 0  # who may read anything, so becomes nobody for a moment
    try:
        for path, said in (
            (folder / "model.safetensors", "model.safetensors"),
            (folder / "config.json", "config.json"),
        ):
            path.chmod(0)
            if root:
                os.seteuid(65534)
            refused(lambda: FolderSource(folder), "cannot read", said, "Permission denied")
            if root:
                os.seteuid(0)
        folder.chmod(0)
        if root:
            os.seteuid(65534)
        refused(lambda: FolderSource(folder), "cannot read", "config.json", "Permission denied")
    finally:
        if root:
            os.seteuid(0)
        for path in (folder.parent, folder):
            path.chmod(0o755)
        shutil.rmtree(folder.parent)


def test_unreadable(tmp_path: Path) -> None:
    folder = one(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/proc/self/mem")  # opens, and fails to read with EIO
    refused(lambda: FolderSource(folder), "model.safetensors")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(lambda: FolderSource(folder), "cannot read", "config.json")


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (3, 5), (6, 8)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_check_finite(dtype: torch.dtype, place: tuple[int, int], value: float) -> None:
    tensor = torch.randn(7, 9).clamp(-4, 4).to(dtype)
    check_finite(tensor, "w")
    tensor[place] = value
    if dtype == torch.float8_e4m3fn:
        tensor[place] = float("nan")  # it has no infinity
    refused(lambda: check_finite(tensor, "layer.w", Path("/f.safetensors")), "layer.w", "/f.safetensors", str([*place]))


def test_check_finite_lets_extremes_integers_and_nothing_pass() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        check_finite(torch.tensor([limits.max, limits.min, 0.0], dtype=dtype), "w")
    check_finite(torch.tensor([2**31 - 1], dtype=torch.int32), "w")
    check_finite(torch.zeros(0, 4), "w")
    refused(lambda: check_finite(torch.tensor(float("nan")), "scalar"), "scalar")
    refused(lambda: check_finite(torch.full((4, 3), float("inf")).T, "view"), "view", "[0, 0]")
