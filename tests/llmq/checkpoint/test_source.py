"""Source: every fault a checkpoint can have, made on purpose; what it reads is what the safetensors package wrote."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmq.checkpoint.files import INDEX
from llmq.checkpoint.source import FolderSource, check_finite
from tests.llmq.checkpoint.made import CONFIG, DTYPES, one, sharded
from tests.llmq.refusal import refused


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
    assert source.trust_remote_code and "modeling_mine.py" in source.aux_files()
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
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    for name in ("tool_use.jinja", "rag.jinja", "notes.txt", ".hidden.jinja"):
        (templates / name).write_text("x")
    carried += ["additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"]
    found = FolderSource(folder).aux_files()
    assert list(found) == sorted(carried) and all(found[name] == folder / name for name in carried)


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
