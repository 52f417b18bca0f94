"""llmq's own folder: every code survives, stock transformers refuses it, llmq.load computes with the stored levels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmq
from llmq.errors import LlmqError
from llmq.formats import codebook
from llmq.formats.dequantized import open_source
from llmq.formats.inspection import inspect_folder
from llmq.grids.base import QuantizedWeight
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.inference.pretrained import load_model

IDS = torch.arange(24).view(2, 12)


def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    recipe = llmq.Recipe(
        methods=("rtn",),
        scheme=Scheme(3, None, grid="kmeans"),
        overrides=(("*down_proj", Scheme(4, None, grid="kmeans")),),
    )
    llmq.quantize(str(tmp_path / "source"), tmp_path / "out", recipe)
    return tmp_path / "out"


def stored_in(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


@given(rows=st.integers(1, 9), width=st.integers(1, 70), bits=st.sampled_from([2, 3, 4]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_what_is_packed_is_read_back(rows: int, width: int, bits: int, seed: int) -> None:
    scheme = Scheme(bits, None, grid="kmeans")
    value = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    q = round_to_nearest(value, scheme, torch.bfloat16)
    assert isinstance(q, QuantizedWeight) and q.levels is not None
    tensors = codebook.pack(q)
    for suffix, (dtype, shape) in codebook.spec((rows, width), scheme, torch.bfloat16).items():
        assert tensors[suffix].dtype == dtype and tuple(tensors[suffix].shape) == shape
    back = codebook.unpack(tensors, scheme)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(torch.float32), q.dequantize(torch.float32))
    plain = codebook.CodebookLayer((rows, width), bits).read(tensors)
    packed, levels = plain.packed()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :width]
    assert torch.equal(levels.gather(1, codes.long()), q.dequantize(torch.float32))


def test_a_folder(tmp_path: Path) -> None:
    out = folder(tmp_path)
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(Exception, match="llmq-codebook"):
            kind.from_pretrained(out)
    tensors = stored_in(out)
    stem = "model.layers.1.mlp.down_proj"
    assert {f"{stem}.{suffix}" for suffix in codebook.SUFFIXES} <= tensors.keys()

    model = llmq.load(out, device_map="cpu", dtype="float32")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    for name, module in dense.named_modules():
        if f"{name}.weight_codes" in tensors:
            stored = {suffix: tensors[f"{name}.{suffix}"] for suffix in codebook.SUFFIXES}
            scheme = Scheme(4 if name.endswith("down_proj") else 3, None, grid="kmeans")
            module.weight.data = codebook.unpack(stored, scheme).dequantize(torch.float32)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)

    plain = load_model(out)  # as `llmq eval` opens it
    torch.testing.assert_close(plain(IDS).logits, dense(IDS).logits, rtol=1e-2, atol=1e-3)
    source = open_source(out)
    assert torch.equal(source.read(f"{stem}.weight"), dense.get_submodule(stem).weight.to(torch.bfloat16))
    assert torch.equal(source.read_rows(f"{stem}.weight", 3, 9), source.read(f"{stem}.weight")[3:9])

    rows = {row.name: row for row in inspect_folder(out).rows if row.bits is not None}
    assert len(rows) == 14 and not inspect_folder(out).unknown
    assert {(row.kind, row.bits) for row in rows.values()} == {("codebook", 3), ("codebook", 4)}

    text = json.loads((out / "report.json").read_text())
    assert any("only llmq reads it" in warning for warning in text["warnings"])


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    out = folder(tmp_path)
    tensors = stored_in(out)
    name = "model.layers.0.self_attn.q_proj.weight_levels"
    file = next(file for file in out.glob("*.safetensors") if name in load_file(file))
    save_file({k: v for k, v in load_file(file).items() if k != name}, file, {"format": "pt"})
    with pytest.raises(LlmqError, match=r"q_proj\.weight_levels is missing"):
        llmq.load(out, device_map="cpu")
    scheme = Scheme(3, None, grid="kmeans")
    parts = {suffix: tensors[f"model.layers.0.mlp.up_proj.{suffix}"] for suffix in codebook.SUFFIXES}
    with pytest.raises(LlmqError, match="weight_levels of a"):
        codebook.unpack(parts | {codebook.LEVELS: parts[codebook.LEVELS][:, :4]}, scheme)
    with pytest.raises(LlmqError, match="not in the checkpoint"):
        codebook.unpack({}, scheme)
