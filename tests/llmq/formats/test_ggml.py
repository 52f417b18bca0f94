"""llmq's own folder of llama.cpp's blocks: written, read dense, exported without any change, refused where damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llmq
from llmq.errors import LlmqError
from llmq.export.dense import export_dense
from llmq.export.folder import QuantizedFolder
from llmq.export.gguf import export_gguf
from llmq.export.rewrite import rewrite
from llmq.formats import ggml
from llmq.formats.dequantized import open_source
from llmq.formats.gguf import blocks, file
from llmq.formats.inspection import inspect_folder
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme, changed_scheme
from llmq.recipe.recipe import Calibration, Recipe
from tests.architectures import tiny
from tests.conftest import write_tiny_model
from tests.llmq.export import fake_converter

IDS = torch.arange(24).view(2, 12)
STEM = "model.layers.1.mlp.down_proj"


def named(grid: str) -> Scheme:
    return changed_scheme({"grid": grid}, Scheme(), grid)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose down_proj has 96 inputs, which 256 does not divide."""
    return write_tiny_model(
        tmp_path_factory.mktemp("source"), layers=2, dtype="bfloat16", hidden_size=256, intermediate_size=96
    )


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    overrides = (("layers.1.mlp.gate_proj", named("q6_k")), ("layers.1.mlp.up_proj", named("q6_k")))
    llmq.quantize(str(source), folder, Recipe(("rtn",), named("q2_k"), overrides=overrides))
    return folder


@pytest.mark.parametrize("grid", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q5_0", "q8_0"])
def test_what_is_packed_is_read_back(grid: str) -> None:
    scheme, value = named(grid), torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    value[0, :32] = 0
    q = round_to_nearest(value, scheme, torch.bfloat16)
    tensors = ggml.pack(q)
    ((suffix, (dtype, shape)),) = ggml.spec((3, 256), scheme, torch.bfloat16).items()
    assert tensors.keys() == {suffix} and tensors[suffix].dtype == dtype and tuple(tensors[suffix].shape) == shape
    back = ggml.unpack(tensors, scheme)
    assert torch.equal(back.codes, q.codes)  # type: ignore[attr-defined]
    assert torch.equal(back.dequantize(torch.float32), q.dequantize(torch.float32))


def test_a_folder(source: Path, out: Path) -> None:
    with pytest.raises(Exception, match=ggml.FORMAT):
        AutoModelForCausalLM.from_pretrained(out)
    dense = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    folder = QuantizedFolder(out)
    for name in folder.weights:
        weight = folder.weight(name).dequantize(torch.float32)
        assert folder.shape(name) == tuple(weight.shape)
        dense.get_parameter(name).data = weight.to(torch.bfloat16).float()
    model = llmq.load(out, device_map="cpu", dtype="float32")
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    opened = open_source(out)
    assert torch.equal(opened.read(f"{STEM}.weight"), dense.get_parameter(f"{STEM}.weight").to(torch.bfloat16))
    assert torch.equal(opened.read_rows(f"{STEM}.weight", 3, 9), opened.read(f"{STEM}.weight")[3:9])

    found = inspect_folder(out)
    kinds = {row.name.removesuffix(".weight"): row.kind for row in found.rows if row.bits is not None}
    assert not found.unknown and len(kinds) == 14
    assert kinds[STEM] == "Q4_0" and kinds["model.layers.1.mlp.up_proj"] == "Q6_K"
    assert kinds["model.layers.0.mlp.up_proj"] == "Q2_K"
    warnings = json.loads((out / "report.json").read_text())["warnings"]
    told = [warning for warning in warnings if "blocks of 256 inputs do not divide" in warning]
    assert len(told) == 1 and "down_proj" in told[0] and told[0].endswith("rounded as q4_0")
    assert any("llmq export FOLDER --to gguf" in warning for warning in warnings)


def test_it_is_exported_without_any_change(out: Path, tmp_path: Path) -> None:
    shutil.copy(fake_converter.__file__, tmp_path / "convert_hf_to_gguf.py")
    done = export_gguf(out, tmp_path / "m.gguf", llama_cpp=tmp_path)
    rows = {row.name: row for row in done.rows if row.bits is not None}
    assert {row.kind for row in rows.values()} == {"Q2_K", "Q4_0", "Q6_K"}
    assert all(row.worst == 0 for row in rows.values())
    folder, contents = QuantizedFolder(out), file.read(tmp_path / "m.gguf")
    held = next(held for held in contents.tensors if held.name.endswith("layers.0.mlp.ffn_up.weight"))
    names = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    wanted = torch.cat([folder.weight(name).dequantize(torch.float32) for name in names])
    assert torch.equal(blocks.unpack("Q2_K", contents.read(held)), wanted)
    with pytest.raises(LlmqError, match="q2_k g16, which only GGUF has"):
        rewrite(out, tmp_path / "mlx", "mlx")


def test_other_widths_are_kept_or_refused_as_asked(source: Path, tmp_path: Path) -> None:
    llmq.quantize(str(source), tmp_path / "kept", Recipe(("rtn",), named("q4_k"), ragged="keep"))
    assert f"{STEM}.weight" in QuantizedFolder(tmp_path / "kept").others
    text = Calibration("demo", 1, 32)
    with pytest.raises(LlmqError, match="no format stores all"):
        override = (("*.up_proj", Scheme(4, 32)), ("*.gate_proj", Scheme(4, 32)))
        llmq.plan(str(source), Recipe(("rtn",), named("q4_k"), overrides=override, calibration=text))


def test_a_damaged_folder_is_refused(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    section = config["quantization_config"]
    for group in section["config_groups"].values():
        group["targets"] = [name for name in group["targets"] if name != STEM]
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmqError, match=r"down_proj\.weight_blocks is stored as blocks, and config\.json does not say"):
        llmq.load(tmp_path / "bad", device_map="cpu")
    with pytest.raises(LlmqError, match="type that config.json does not say"):
        QuantizedFolder(tmp_path / "bad")
    assert [row.why for row in inspect_folder(tmp_path / "bad").unknown] == [
        "blocks whose type config.json does not say"
    ]
    shutil.copy(out / "config.json", tmp_path / "bad" / "config.json")
    name = f"{STEM}.{ggml.BLOCKS}"
    path = next(path for path in (tmp_path / "bad").glob("*.safetensors") if name in load_file(path))
    stored = load_file(path)
    save_file(stored | {name: stored[name][:, 1:].contiguous()}, path, {"format": "pt"})
    with pytest.raises(LlmqError, match="does not fit: blocks uint8"):
        open_source(tmp_path / "bad")
    section["config_groups"]["group_0"]["weights"]["grid"] = "nf4"
    with pytest.raises(LlmqError, match="weights are 'nf4', which this llmq does not know"):
        ggml.schemes_of(section)


def test_what_cannot_be_stored_is_refused() -> None:
    scheme = named("q4_k")
    with pytest.raises(LlmqError, match="blocks of 256 inputs do not divide the 96"):
        ggml.spec((4, 96), scheme, torch.bfloat16)
    with pytest.raises(LlmqError, match="needs weight_blocks"):
        ggml.unpack({}, scheme)
    with pytest.raises(LlmqError, match=r"rows of blocks of 144 bytes, not uint8 \[1, 143\]"):
        ggml.unpack({ggml.BLOCKS: torch.zeros(1, 143, dtype=torch.uint8)}, scheme)
    with pytest.raises(LlmqError, match="return it by"):
        ggml.pack(QuantizedWeight(torch.zeros(1, 256, dtype=torch.int8), torch.ones(1, 8), None, scheme))
    assert ggml.splits((512, 512), scheme, 2, True) and not ggml.splits((512, 512), scheme, 4, True)
    assert ggml.splits((512, 512), scheme, 4, False)
    with pytest.raises(LlmqError, match="nothing is quantized"):
        ggml.config({}, [], torch.bfloat16)


def test_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    source = tiny.make("qwen3_moe", tmp_path / "source")
    recipe = llmq.Recipe(methods=("rtn",), scheme=Scheme(4, 32, grid="q4_0"))
    report = llmq.quantize(str(source), tmp_path / "out", recipe, ids=tiny.tokens(4, 32, seed=2))
    assert any(".experts." in row.name for row in report.quantized)
    export_dense(str(tmp_path / "out"), tmp_path / "dense")
    models = [
        llmq.load(tmp_path / "out", dtype="float32", device_map="cpu"),
        *(AutoModelForCausalLM.from_pretrained(folder, dtype="float32") for folder in (tmp_path / "dense", source)),
    ]
    with torch.no_grad():
        found, wanted, before = (model(tiny.tokens()).logits for model in models)
    assert torch.equal(found, wanted) and 1e-3 < float((found - before).norm() / before.norm()) < 1
