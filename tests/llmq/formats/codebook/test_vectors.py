"""Vectors in llmq's own folder: every code survives; experts, one by one or from a stack, are read as any weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmq
from llmq.errors import LlmqError
from llmq.export.dense import export_dense
from llmq.formats import codebook
from llmq.formats.codebook.vectors import VECTORS, VectorsLayer
from llmq.formats.dequantized import open_source
from llmq.formats.inspection import inspect_folder
from llmq.grids.nearest import round_to_nearest
from llmq.grids.scheme import Scheme
from llmq.grids.vq import VQWeight
from llmq.inference.layer import QuantLinear
from llmq.inference.stack import StackedLinear
from tests.llmq import mixtures

IDS = torch.arange(10, 34).view(2, 12)
ONE_BIT = Scheme(1, 8, grid="vq", packing="llmq")


@given(
    rows=st.integers(1, 5), groups=st.integers(1, 4), kind=st.sampled_from([(1, 8), (2, 8), (2, 4), (4, 16), (3, 8)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_what_is_packed_is_read_back(
    rows: int, groups: int, kind: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    scheme, (bits, size), made = Scheme(*kind, grid="vq", packing="llmq"), kind, torch.Generator().manual_seed(seed)
    count, width = bits * size // 8, groups * size
    codes = torch.randint(256, (rows, groups, count), dtype=torch.uint8, generator=made)
    books, scale = (torch.randn(*shape, generator=made).to(dtype) for shape in ((count, 256, size), (rows,)))
    q = VQWeight(codes, books, scale, scheme)
    tensors = codebook.pack(q)
    for suffix, (wanted, shape) in codebook.spec((rows, width), scheme, dtype).items():
        assert tensors[suffix].dtype == wanted and tuple(tensors[suffix].shape) == shape
    back = codebook.unpack(tensors, scheme)
    assert isinstance(back, VQWeight) and torch.equal(back.codes, codes)
    assert torch.equal(back.dequantize(torch.float32), q.dequantize(torch.float32))
    plain = VectorsLayer((rows, width), count, size).read(tensors)
    vectors = sum(plain.table[m][plain.packed[m, 0].long()] for m in range(count))
    assert isinstance(vectors, torch.Tensor)
    wanted_values = vectors.transpose(0, 1).flatten(1) * plain.scale.float().T
    torch.testing.assert_close(wanted_values, q.dequantize(torch.float32), rtol=1e-6, atol=1e-6)


def test_every_entry_survives() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64, 1)
    books = torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(0))
    back = codebook.unpack(codebook.pack(VQWeight(codes, books, torch.ones(4), ONE_BIT)), ONE_BIT)
    assert torch.equal(back.dequantize(torch.float32).view(256, 8), books[0])


def test_vectors_that_are_not_finite_are_refused() -> None:
    for bad in (torch.inf, -torch.inf, torch.nan):
        value = torch.randn(4, 16)
        value[1, 3] = bad
        with pytest.raises(LlmqError, match="not finite"):
            round_to_nearest(value, ONE_BIT, torch.bfloat16)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LlmqError, match="group size 8 does not divide the 12 inputs"):
        codebook.spec((4, 12), ONE_BIT, torch.bfloat16)
    q = round_to_nearest(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), ONE_BIT, torch.bfloat16)
    tensors = codebook.pack(q)
    with pytest.raises(LlmqError, match="weight_vectors, not in the checkpoint"):
        codebook.unpack({k: v for k, v in tensors.items() if k != VECTORS}, ONE_BIT)
    with pytest.raises(LlmqError, match=r"weight_vectors of a 1-bit vq g8.* \[4, 16\] must be uint8 \[4, 2, 1\]"):
        codebook.unpack(tensors | {VECTORS: tensors[VECTORS][:, :1]}, ONE_BIT)


def test_experts_one_by_one(tmp_path: Path) -> None:
    """AQLM's folder does not hold them; llmq's own does, beside another grid, and stock refuses it."""
    source = mixtures.write("qwen3_moe", tmp_path / "source", num_hidden_layers=1, num_experts=2)
    plain = llmq.Recipe(methods=("rtn",), scheme=Scheme(1, 8, grid="vq"))
    with pytest.raises(LlmqError, match=r"experts\.0\.gate_proj: .*AQLM.* use --packing llmq.* or --keep experts"):
        llmq.quantize(str(source), tmp_path / "out", plain, ids=IDS)
    others = (("*self_attn*", Scheme(4, None, grid="kmeans")),)
    recipe = llmq.Recipe(methods=("rtn",), scheme=ONE_BIT, overrides=others)
    llmq.quantize(str(source), tmp_path / "out", recipe, ids=IDS)
    out = tmp_path / "out"
    with pytest.raises(Exception, match="llmq-codebook"):
        AutoModelForCausalLM.from_pretrained(out)
    packed = llmq.load(out, device_map="cpu", dtype="float32")
    kinds = {type(module).__name__ for module in packed.modules() if isinstance(module, QuantLinear)}
    assert kinds == {"LevelsLinear"} and sum(isinstance(m, StackedLinear) for m in packed.modules()) == 3
    export_dense(str(out), tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(mixtures.logits(packed), mixtures.logits(stock), rtol=1e-3, atol=1e-4)
    found = inspect_folder(out)
    assert not found.unknown and {(r.kind, r.bits, r.group) for r in found.quantized} == {
        ("vq", 1, 8), ("codebook", 4, 0)
    }  # fmt: skip
    _damage(out)


def _damage(out: Path) -> None:
    """What contradicts config.json is refused wherever the folder is read."""
    written = (out / "config.json").read_text()
    (out / "config.json").write_text(written.replace('"group_size": 8', '"group_size": 16'))
    with pytest.raises(LlmqError, match="weight_vectors does not fit: it has groups of 8"):
        open_source(out)
    with pytest.raises(LlmqError, match="weight_"):
        llmq.load(out, device_map="cpu")
    (out / "config.json").write_text(written)
    file = next(iter(out.glob("model-*")))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(VECTORS))
    tensors[name] = tensors[name][:, :1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LlmqError, match=rf"{name} does not fit: vectors \["):
        open_source(out)
    assert any("vectors [" in row.why for row in inspect_folder(out).unknown)


def test_experts_of_a_stack(tmp_path: Path) -> None:
    """They are stored one by one, in a folder that is marked twice; a run ended before its last commit resumes."""
    one = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "moe_layers": [0], "no_rope_layers": [1]}
    source = mixtures.write("llama4_text", tmp_path / "source", num_local_experts=2, **one)
    recipe = llmq.Recipe(methods=("vq",), scheme=ONE_BIT, loader="llmq", options={"rounds": 0})

    def quantize(folder: Path) -> object:
        return llmq.quantize(str(source), folder, recipe, ids=IDS)

    whole, copies = mixtures.before_each_commit(quantize, tmp_path)
    report = llmq.quantize(str(source), copies[-1], recipe, ids=IDS)
    assert mixtures.written(copies[-1]) == whole
    out = tmp_path / "whole"
    assert json.loads(whole["config.json"])["quantization_config"]["format"] == "llmq-llmq-codebook"
    with pytest.raises(Exception, match="llmq-codebook"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(LlmqError, match="no other tool reads"):
        export_dense(str(out), tmp_path / "dense")
    dense, told = mixtures.load(source)
    mixtures.put_quantized(dense.state_dict(), report, mixtures.stored(out))
    packed = llmq.load(out, device_map="cpu", dtype="float32")
    assert not told and any(isinstance(module, StackedLinear) for module in packed.modules())
    torch.testing.assert_close(mixtures.logits(packed), mixtures.logits(dense), rtol=1e-3, atol=1e-4)
