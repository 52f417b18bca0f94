"""Models published in FP8 and MXFP4, quantized to 4 bits as they are: the result is that of their dequantized twins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq import Recipe, Scheme
from llmq.formats.dequantized import open_source
from llmq.grids.scheme import Activations
from llmq.report.report import Report
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.formats import published
from tests.llmq.refusal import refused

IDS = tiny.tokens(4, 32)


def twin(folder: Path, out: Path) -> Path:
    """The dense model that a folder stands for, as its makers would have written it."""
    source = open_source(folder)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(source.config))
    save_file({name: source.read(name) for name in source.names()}, out / "model.safetensors", {"format": "pt"})
    return out


def both(folder: Path, tmp_path: Path, recipe: Recipe) -> Report:
    """Quantizes a folder and its twin; checks that the same tensors are written, and returns the folder's report."""
    report = llmq.quantize(str(folder), tmp_path / "out", recipe, ids=IDS)
    other = llmq.quantize(str(twin(folder, tmp_path / "twin")), tmp_path / "twin-out", recipe, ids=IDS)
    written, expected = mixtures.stored(tmp_path / "out"), mixtures.stored(tmp_path / "twin-out")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "twin-out")]
    assert configs[0] == configs[1]
    assert [row.error for row in report.quantized] == [row.error for row in other.quantized]
    assert "dequantized" in report.warnings[0] and not any("dequantized" in told for told in other.warnings)
    return report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "write", "method"),
    [
        ("qwen3", published.fp8, "gptq"),
        ("qwen3_moe", published.fp8, "gptq"),
        ("deepseek_v3", published.fp8, "rtn"),
        # Tiles cut short: nothing of 64 or 128 is divisible by 24 or 40.
        ("qwen3", lambda folder: published.fp8(folder, (24, 40)), "rtn"),
        ("llama", published.modelopt, "gptq"),
        ("llama", published.modelopt_nvfp4, "rtn"),
        ("qwen3_moe", published.in_layout("nvfp4-pack-quantized"), "rtn"),
        ("qwen3", published.in_layout("mxfp4-pack-quantized"), "rtn"),
        ("qwen3_moe", published.in_layout("mxfp8-quantized"), "rtn"),
        ("deepseek_v4", published.experts_in_fp4, "gptq"),
    ],
)
def test_stock_transformers_loads_the_result(
    tmp_path: Path, kind: str, write: Callable[[Path], Path], method: str
) -> None:
    """By gptq where blocks or experts differ; else rtn, which writes other bytes, too, where a value is misread."""
    folder = write(tiny.make(kind, tmp_path / "few"))
    report = both(folder, tmp_path, Recipe(methods=(method,), scheme=mixtures.W4))
    assert report.quantized and max(row.error or 0 for row in report.quantized) < 0.2
    model, told = mixtures.load(tmp_path / "out")
    assert not told
    reference, _ = mixtures.load(tmp_path / "twin-out")
    assert torch.equal(mixtures.logits(model), mixtures.logits(reference))
    dense = mixtures.logits(mixtures.load(tmp_path / "twin")[0])
    assert 0 < float((mixtures.logits(model) - dense).norm() / dense.norm()) < 0.5


@pytest.mark.slow
def test_stacks_in_mxfp4_for_llmq_alone(tmp_path: Path) -> None:
    folder = published.experts_in_mxfp4(tiny.make("gpt_oss", tmp_path / "few"))
    report = both(folder, tmp_path, Recipe(methods=("gptq",), scheme=mixtures.W4, loader="llmq"))
    assert any(row.expert is not None for row in report.quantized)
    found = [llmq.load(tmp_path / name, device_map="cpu", dtype="float32") for name in ("out", "twin-out")]
    assert torch.equal(mixtures.logits(found[0]), mixtures.logits(found[1]))


@pytest.mark.slow
@pytest.mark.parametrize("static", [None, Activations(dynamic=False)])
def test_what_llmq_wrote_in_fp8(tmp_path: Path, static: Activations | None) -> None:
    """Static scales of inputs are left out."""
    fp8 = Recipe(methods=("rtn",), scheme=Scheme(8, None, grid="fp8", activations=static))
    llmq.quantize(str(tiny.make("qwen3", tmp_path / "m")), tmp_path / "few", fp8, ids=IDS)
    assert any("input_scale" in name for name in mixtures.stored(tmp_path / "few")) == (static is not None)
    report = both(tmp_path / "few", tmp_path, Recipe(methods=("rtn",), scheme=mixtures.W4))
    assert any("input_scale" in told for told in report.warnings) == (static is not None)
    assert not any("input_scale" in name for name in mixtures.stored(tmp_path / "out"))
    _, told = mixtures.load(tmp_path / "out")
    assert not told


def test_what_is_left_alone_is_written_dequantized(tmp_path: Path) -> None:
    folder = published.fp8(tiny.make("qwen3", tmp_path / "few"))
    recipe = Recipe(methods=("rtn",), scheme=mixtures.W4, keep=("down_proj",))
    llmq.quantize(str(folder), tmp_path / "out", recipe)
    source, written = open_source(folder), mixtures.stored(tmp_path / "out")
    kept = [name for name in source.names() if "down_proj" in name]
    assert len(kept) == tiny.LAYERS
    assert all(torch.equal(written[name], source.read(name)) for name in kept)
    assert not any("scale_inv" in name for name in written)
    _, told = mixtures.load(tmp_path / "out")
    assert not told


def test_a_killed_run_does_not_resume_on_the_dense_twin(tmp_path: Path) -> None:
    folder = published.fp8(tiny.make("qwen3", tmp_path / "few"))
    recipe = Recipe(methods=("rtn",), scheme=mixtures.W4)
    llmq.quantize(str(folder), tmp_path / "out", recipe)
    dense = str(twin(folder, tmp_path / "twin"))
    refused(lambda: llmq.quantize(dense, tmp_path / "out", recipe), str(tmp_path / "out"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], section: bool = True) -> str:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if not section:
        del config["quantization_config"]
    path.write_text(json.dumps(config))
    return str(folder)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.fp8(tiny.make("qwen3", tmp_path_factory.mktemp("published") / "m"))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{UP}_scale_inv"), (UP, "scales", "missing")),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(2, 4)}), (f"{UP}_scale_inv", "[2, 4]", "16x16")),
        (lambda t: t[f"{UP}_scale_inv"][1, 1].fill_(torch.nan), (f"{UP}_scale_inv", "nan")),
        (lambda t: t[UP].view(torch.uint8)[3, 4].fill_(0x7F), (UP, "nan at [3, 4]")),
        (lambda t: t.update({UP: t[UP].to(torch.bfloat16)}), (UP, f"{UP}_scale_inv", "beside it")),
    ],
)
def test_damaged_folders_are_refused(
    tmp_path: Path, small: Path, edit: Callable[[dict[str, torch.Tensor]], Any], words: tuple[str, ...]
) -> None:
    model = change(shutil.copytree(small, tmp_path / "m"), edit)
    recipe = Recipe(methods=("rtn",), scheme=mixtures.W4)
    refused(lambda: llmq.quantize(model, tmp_path / "out", recipe), model, *words)


def test_without_its_section_the_folder_is_refused(tmp_path: Path, small: Path) -> None:
    """Nothing says how large a tile is: an export that lost the section from config.json."""
    model = change(shutil.copytree(small, tmp_path / "m"), lambda tensors: None, section=False)
    recipe = Recipe(methods=("rtn",), scheme=mixtures.W4)
    refused(lambda: llmq.plan(model, recipe), model, "float8_e4m3fn", "take the config.json")
