"""A folder in NF4 as the dense model that it stands for: each weight is what stock transformers computes with."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.checkpoint.source import FolderSource
from llmq.formats.bitsandbytes.source import NF4Source, is_nf4, through_nf4
from tests.llmq.refusal import refused

bnb = pytest.importorskip("bitsandbytes")


def stock(double: bool = True, **options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, **options)


def quantized(folder: Path, base: Path, double: bool = True) -> Any:
    """The base in NF4, written by stock transformers; the model in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=stock(double), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("double", [False, True])
def test_each_weight_is_what_the_stock_model_computes_with(tmp_path: Path, tiny_model: Path, double: bool) -> None:
    model = quantized(tmp_path, tiny_model, double)
    source, dense = NF4Source(tmp_path), FolderSource(tiny_model)
    assert sorted(source.names()) == sorted(dense.names())
    for name in source.names():
        info, value = source.info(name), source.read(name)
        assert (
            value.dtype == info.dtype == torch.bfloat16 and tuple(value.shape) == info.shape == dense.info(name).shape
        )
        assert info.nbytes == value.nbytes
        module = model.get_submodule(name.rpartition(".")[0])
        four = isinstance(module, bnb.nn.Linear4bit)
        expected = module.weight
        if four:
            expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(value, expected.detach()) and source.changes_tensor(name) == four
    assert len(source.quantized) == 21
    assert (
        "quantization_config" not in source.config
        and "quantization_config" in FolderSource(tmp_path, quantized_ok=True).config
    )


def test_rows_are_those_of_the_dense_weight(tmp_path: Path, tiny_model: Path) -> None:
    quantized(tmp_path, tiny_model)
    source = NF4Source(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.read_rows(name, 3, 9), source.read(name)[3:9])


@pytest.mark.parametrize(
    ("section", "nf4"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, True),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, False),
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, False),
        ({"quant_method": "gptq"}, False),
        (None, False),
        ("nf4", False),
    ],
)
def test_what_is_nf4(section: Any, nf4: bool) -> None:
    assert is_nf4({"quantization_config": section}) is nf4
    assert not is_nf4({})


def test_folders_quantized_in_another_way_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(lambda: NF4Source(folder), str(folder), "not by bitsandbytes to NF4", "start from the unquantized model")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_through_nf4_is_what_bitsandbytes_makes_of_it_twice(double: bool, dtype: torch.dtype) -> None:
    """There and back is a projection up to the rounding of the magnitudes, in the weight's own dtype."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    once = through_nf4(weight, double)
    assert once.dtype == dtype and once.shape == weight.shape
    assert 0.05 < float((once - weight).double().norm() / weight.double().norm()) < 0.15
    assert float((through_nf4(once, double) - once).double().norm() / once.double().norm()) < (0.05 if double else 1e-2)
    blocks = weight.reshape(-1, 64).abs().amax(1).float()
    if not double:
        assert torch.allclose(once.reshape(-1, 64).abs().amax(1).float(), blocks, rtol=1e-2)


def test_double_quantization_is_another_rounding() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(through_nf4(weight, True), through_nf4(weight, False))


def test_without_bitsandbytes_the_package_is_named(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(tmp_path, tiny_model)
    source = NF4Source(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert source.read("model.norm.weight").shape == (64,)
    refused(
        lambda: source.read("model.layers.0.mlp.up_proj.weight"), "reading an NF4 model", "pip install bitsandbytes"
    )
    refused(lambda: through_nf4(torch.ones(2, 64), True), "pip install bitsandbytes")
