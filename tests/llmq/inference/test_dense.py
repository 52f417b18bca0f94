"""FP8 folders as dense models: the values of the dequantized weights, also where stock transformers gives others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmq.formats.dequantized import Dequantized, open_source
from llmq.inference import dense
from llmq.inference.dense import dense_source, load_dense
from llmq.inference.pretrained import check_readable, load_model
from tests.architectures import tiny
from tests.llmq import mixtures
from tests.llmq.formats import published
from tests.llmq.refusal import refused


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("beside", [False, True])
def test_modelopt_is_read_where_stock_transformers_knows_nothing_of_it(
    tmp_path: Path, tiny_model: Path, dtype: str, beside: bool
) -> None:
    folder = published.modelopt(shutil.copytree(tiny_model, tmp_path / "m"), beside=beside)
    source = open_source(folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    model = load_model(folder, dtype=dtype)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    values = dict(model.named_parameters())
    assert values.keys() == set(source.names())
    for name, value in values.items():
        assert value.dtype == kind and torch.equal(value, source.read(name).to(kind)), name
    assert model.generation_config.max_new_tokens == 7 and not model.training


def test_tiles_that_are_cut_short_are_read_where_stock_transformers_fails(tmp_path: Path) -> None:
    published.need_stock()
    folder = published.fp8(tiny.make("qwen3_moe", tmp_path / "m"), (24, 40))
    source = open_source(folder)
    with pytest.raises(Exception, match="not divisible|conversion|convert"):
        mixtures.load(folder)
    model = load_model(folder)
    experts = "model.layers.0.mlp.experts"
    stack = dict(model.named_parameters())[f"{experts}.down_proj"]
    for expert in range(stack.shape[0]):
        assert torch.equal(stack[expert], source.read(f"{experts}.{expert}.down_proj.weight").float())


def test_where_tiles_are_whole_the_model_is_that_of_stock_transformers(tmp_path: Path) -> None:
    published.need_stock()
    folder = published.fp8(tiny.make("deepseek_v3", tmp_path / "m"))
    kind: Any = AutoModelForCausalLM
    stock = kind.from_pretrained(folder, dtype="auto").eval()
    source = dense_source(folder)
    assert isinstance(source, Dequantized)
    model, told = load_dense(source, "auto", "cpu")
    assert not any(told.values())
    assert torch.equal(mixtures.logits(model.eval()), mixtures.logits(stock))


def test_what_is_left_to_stock_transformers(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dense_source(tiny_model) is None and dense_source(tmp_path) is None
    assert dense_source(published.experts_in_mxfp4(tiny.make("gpt_oss", tmp_path / "x"))) is None
    folder = published.fp8(shutil.copytree(tiny_model, tmp_path / "m"))
    assert dense_source(folder) is not None
    # A GPU runs the codes as they are.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dense_source(folder) is None


def test_a_missing_tensor_and_damaged_scales_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = published.modelopt(shutil.copytree(tiny_model, tmp_path / "m"))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[f"{name}_scale"]
    save_file(tensors, file, {"format": "pt"})
    refused(lambda: load_model(folder), str(folder), name, "are missing")
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    refused(lambda: load_model(folder), str(folder), f"such as {name}")


def test_other_algorithms_of_modelopt_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = published.modelopt(shutil.copytree(tiny_model, tmp_path / "m"))
    assert check_readable(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_algo"] = "NVFP4_AWQ"
    path.write_text(json.dumps(config))
    refused(lambda: check_readable(folder), "'modelopt'", "random weights")


def test_a_tensor_is_read_when_it_is_placed(tmp_path: Path, tiny_model: Path) -> None:
    source = open_source(published.modelopt(shutil.copytree(tiny_model, tmp_path / "m")))
    name = next(iter(source.names()))
    assert torch.equal(dense.Unread(source, name)[...], source.read(name))


def test_parts_that_stay_on_disk(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With device_map='auto' and too little memory, or as the map says."""
    from transformers.integrations import accelerate

    folder = published.modelopt(shutil.copytree(tiny_model, tmp_path / "m"))
    expected = mixtures.logits(load_model(folder, dtype="auto"))
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = load_model(folder, dtype="auto", device=places | {"lm_head": "cpu"})
    assert torch.equal(mixtures.logits(model), expected)
    for name in ("get_max_memory", "get_balanced_memory"):
        monkeypatch.setattr(accelerate, name, lambda *_, **__: {"cpu": 250_000})
    model = load_model(folder, dtype="auto", device="auto")
    assert "disk" in model.hf_device_map.values() and torch.equal(mixtures.logits(model), expected)


@pytest.mark.parametrize("device", ["nonsense", {"model": "nonsense"}])
def test_a_device_that_there_is_not(tmp_path: Path, tiny_model: Path, device: Any) -> None:
    folder = published.modelopt(shutil.copytree(tiny_model, tmp_path / "m"))
    refused(lambda: load_model(folder, device=device), str(folder), "cannot be loaded")


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("layout", [*published.LAYOUTS, "modelopt NVFP4"])
def test_fp4_and_groups_are_read_where_stock_transformers_fails_on_experts(
    tmp_path: Path, kind: str, layout: str
) -> None:
    """Or loses the second scale."""
    write = published.modelopt_nvfp4 if layout == "modelopt NVFP4" else published.in_layout(layout)
    folder = write(tiny.make(kind, tmp_path / "m"))
    source = open_source(folder)
    assert isinstance(source, Dequantized) and len(source.coded) == (28 if kind == "qwen3" else 64)
    model = load_model(folder, dtype="auto")
    dense = mixtures.load(tiny.make(kind, tmp_path / "dense"))[0]
    error = (mixtures.logits(model).float() - mixtures.logits(dense)).norm() / mixtures.logits(dense).norm()
    assert 0 < float(error) < 0.5
    values = dict(model.named_parameters())
    assert all(torch.equal(values[name], source.read(name)) for name in source.coded if name in values)


def test_experts_in_fp4_are_those_of_stock_transformers(tmp_path: Path) -> None:
    published.need_stock()
    folder = published.experts_in_fp4(tiny.make("deepseek_v4", tmp_path / "m"))
    source = open_source(folder)
    assert isinstance(source, Dequantized)
    assert {source.base.info(weight.parts[0]).dtype for weight in source.coded.values()} == {torch.int8, published.E4M3}
    kind: Any = AutoModelForCausalLM
    stock, told = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(told.values())
    ours = load_model(folder, dtype="auto")
    for (name, one), (other, two) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other and torch.equal(one, two), name
    assert torch.equal(mixtures.logits(ours), mixtures.logits(stock.eval()))


def test_fbgemm_is_read_where_stock_transformers_wants_a_gpu(tmp_path: Path, tiny_model: Path) -> None:
    def change(tensors: published.Weights) -> published.Weights:
        for name in [name for name in tensors if published.linear(name)]:
            codes, scale = published.by_row(tensors[name], torch.float32)
            tensors |= {name: codes, f"{name}_scale": scale}
        return tensors

    section = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    folder = published.rewrite(shutil.copytree(tiny_model, tmp_path / "m"), section, change)
    with pytest.raises(ImportError, match="(?i)gpu"):
        mixtures.load(folder)
    source = open_source(folder)
    assert isinstance(source, Dequantized) and len(source.coded) == 21
    assert all(
        torch.equal(value, source.read(name)) for name, value in load_model(folder, dtype="auto").named_parameters()
    )
