"""A folder in few bits as the dense model that it stands for: each weight is what stock transformers computes with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmq.checkpoint.source import FolderSource
from llmq.formats.dequantized import CHUNK, Dequantized, open_source, pieces
from tests.architectures import tiny
from tests.llmq.formats import published
from tests.llmq.refusal import refused

WRITTEN: dict[str, Callable[[Path], Path]] = {
    "qwen3": published.fp8,
    "qwen3_moe": published.fp8,
    "deepseek_v3": published.fp8,
    "llama": lambda folder: published.fp8(folder, None),
    "gpt_oss": published.experts_in_mxfp4,
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_each_weight_is_what_stock_transformers_computes_with(tmp_path: Path, kind: str) -> None:
    if kind != "gpt_oss":
        published.need_stock()
    dense = FolderSource(tiny.make(kind, tmp_path / "dense"))
    source = open_source(WRITTEN[kind](tiny.make(kind, tmp_path / "few")))
    assert isinstance(source, Dequantized) and source.coded
    assert {n: (source.info(n).shape, torch.bfloat16) for n in source.names()} == {
        n: (dense.info(n).shape, source.info(n).dtype) for n in dense.names()
    }
    stock: Any = AutoModelForCausalLM
    model, told = stock.from_pretrained(source.folder, output_loading_info=True)
    assert not any(told.values())
    parameters = dict(model.named_parameters())
    compared = 0
    for name in source.names():
        value = source.read(name)
        assert value.nbytes == source.info(name).nbytes and value.dtype == source.info(name).dtype
        if name in parameters:
            assert torch.equal(value, parameters[name]), name
            compared += source.changes_tensor(name)
        elif name.endswith("gate_proj.weight"):
            owner, _, expert = name.removesuffix(".gate_proj.weight").rpartition(".")
            joined = torch.cat([value, source.read(name.replace("gate_proj", "up_proj"))])
            assert torch.equal(joined, parameters[f"{owner}.gate_up_proj"][int(expert)]), name
            compared += 2
        elif name.endswith("down_proj.weight"):
            owner, _, expert = name.removesuffix(".down_proj.weight").rpartition(".")
            assert torch.equal(value, parameters[f"{owner}.down_proj"][int(expert)]), name
            compared += 1
    assert compared == len(source.coded)


@pytest.mark.parametrize("beside", [False, True])
def test_modelopt_says_so_in_config_json_or_beside_it(tmp_path: Path, tiny_model: Path, beside: bool) -> None:
    source = open_source(published.modelopt(shutil.copytree(tiny_model, tmp_path / "m"), beside=beside))
    assert isinstance(source, Dequantized) and len(source.coded) == 21
    dense = FolderSource(tiny_model)
    assert sorted(source.names()) == sorted(dense.names())
    assert len(source.warnings) == 2 and "input_scale" in source.warnings[1]
    assert "hf_quant_config.json" not in source.aux_files()
    for name in source.coded:
        error = (source.read(name).float() - dense.read(name)).norm() / dense.read(name).norm()
        assert 0 < float(error) < 0.05


def test_the_rest_of_the_source(tmp_path: Path, tiny_model: Path) -> None:
    folder = published.fp8(shutil.copytree(tiny_model, tmp_path / "m"))
    source, base = open_source(folder), FolderSource(folder, quantized_ok=True)
    assert "quantization_config" in base.config and "quantization_config" not in source.config
    assert source.config == {k: v for k, v in base.config.items() if k != "quantization_config"}
    assert source.total_bytes == sum(source.read(name).nbytes for name in source.names()) > base.total_bytes
    assert source.aux_files() == base.aux_files()
    assert source.fingerprint() == open_source(folder).fingerprint() != base.fingerprint()
    assert len(source.warnings) == 1 and "(fp8)" in source.warnings[0] and "bfloat16" in source.warnings[0]
    with pytest.raises(IndexError, match="rows 60:65"):
        source.read_rows("model.layers.0.self_attn.q_proj.weight", 60, 65)
    with pytest.raises(KeyError):
        source.info("model.layers.0.self_attn.q_proj.weight_scale_inv")


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": None, "torch_dtype": "float32"}, torch.float32),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, torch.float16),
        ({"dtype": "float8_e4m3fn"}, torch.bfloat16),
        ({"dtype": None}, torch.bfloat16),
    ],
)
def test_the_dtype_is_that_of_the_configuration(
    tmp_path: Path, tiny_model: Path, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    folder = published.fp8(shutil.copytree(tiny_model, tmp_path / "m"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    source = open_source(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert source.read(name).dtype == source.info(name).dtype == dtype
    assert (source.fingerprint() == open_source(folder).fingerprint()) and str(dtype)[6:] in source.warnings[0]


def test_a_section_inside_is_found_and_left_out(tmp_path: Path, tiny_model: Path) -> None:
    folder = published.fp8(shutil.copytree(tiny_model, tmp_path / "m"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    inner = {"quantization_config": config.pop("quantization_config"), "hidden_size": 64}
    path.write_text(json.dumps(config | {"text_config": inner}))
    source = open_source(folder)
    assert isinstance(source, Dequantized) and source.config["text_config"] == {"hidden_size": 64}


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "modelopt", "quark"])
def test_other_quantized_folders_are_refused_as_before(tmp_path: Path, tiny_model: Path, method: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    published.rewrite(folder, {"quant_method": method}, lambda tensors: tensors)
    told = refused(lambda: FolderSource(folder), f"already quantized ({method})", "start from the unquantized model")
    assert refused(lambda: open_source(folder)) == told


def test_an_ordinary_folder_is_what_it_was(tiny_model: Path) -> None:
    source = open_source(tiny_model)
    assert type(source) is FolderSource and source.warnings == ()
    assert source.fingerprint() == FolderSource(tiny_model).fingerprint()


def test_pieces_cover_the_rows_once() -> None:
    for shape in ((7, 3), (5, CHUNK + 1), (9, CHUNK // 2), (4, 0), (0, 8)):
        found = [row for begin, end in pieces(shape, 0, shape[0]) for row in range(begin, end)]
        assert found == [*range(shape[0])]
        assert all((end - begin) * shape[1] <= max(CHUNK, shape[1]) for begin, end in pieces(shape, 0, shape[0]))
