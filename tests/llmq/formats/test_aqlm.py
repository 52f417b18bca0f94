"""AQLM's folders: what is written is read back by llmq and, where aqlm is installed, by stock transformers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import llmq
from llmq import formats
from llmq.errors import LlmqError
from llmq.formats import aqlm, dequantized
from llmq.formats.inspection import inspect_folder
from llmq.grids.scheme import Scheme
from llmq.grids.vq import VQWeight, books_of
from llmq.inference.linear import VectorsLinear
from llmq.inference.pretrained import load_model

TWO = Scheme(2, 8, grid="vq")


def weight(scheme: Scheme, rows: int = 6, width: int = 32, seed: int = 0) -> VQWeight:
    count, entries, size = books_of(scheme)
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, entries, (rows, width // size, count), generator=draw).to(torch.uint8)
    books = (torch.randn(count, entries, size, generator=draw) * 0.1).bfloat16()
    return VQWeight(codes, books, (torch.rand(rows, generator=draw) + 0.5).bfloat16(), scheme)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([(1, 8), (2, 8), (2, 4), (3, 8), (2, 16)]), st.integers(1, 9), st.integers(1, 3))
def test_what_is_packed_is_unpacked(sizes: tuple[int, int], rows: int, blocks: int) -> None:
    scheme = Scheme(*sizes, grid="vq")
    q = weight(scheme, rows, blocks * 16)
    stored = aqlm.pack(q)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == aqlm.spec(
        (rows, blocks * 16), scheme, torch.bfloat16
    )
    again = aqlm.unpack(stored, scheme)
    assert torch.equal(again.codes, q.codes) and torch.equal(
        again.dequantize(torch.float32), q.dequantize(torch.float32)
    )


def test_refusals() -> None:
    stored = aqlm.pack(weight(TWO))
    with pytest.raises(LlmqError, match="needs scales, not in the checkpoint"):
        aqlm.unpack({name: stored[name] for name in ("codes", "codebooks")}, TWO)
    with pytest.raises(LlmqError, match="codes of a 2-bit vq g8 weight"):
        aqlm.unpack(stored | {"codes": stored["codes"].int()}, TWO)
    with pytest.raises(LlmqError, match="does not divide"):
        aqlm.spec((4, 12), TWO, torch.float16)
    with pytest.raises(LlmqError, match="nothing is quantized"):
        aqlm.config({}, [], torch.float32)
    with pytest.raises(LlmqError, match="would also skip a.up if up is not quantized"):
        aqlm.config({TWO: ["a.up"]}, ["up"], torch.float32)
    assert aqlm.splits((6, 32), TWO, 2, True) and not aqlm.splits((6, 32), TWO, 4, False)


def folder(path: Path, tensors: dict[str, Tensor], section: dict[str, object]) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    told = {"model_type": "llama", "dtype": "float32", "quantization_config": {"quant_method": "aqlm"} | section}
    (path / "config.json").write_text(json.dumps(told))
    return path


def test_folders_of_others_are_read_too(tmp_path: Path) -> None:
    """Tiles of two rows, codes of 16 bits that wrap around: as aqlm's own code unpacks and scales them."""
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 1 << 16, (3, 4, 2), generator=draw)
    books, scales = torch.randn(2, 1 << 16, 2, 4, generator=draw), torch.rand(3, 1, 1, 1, generator=draw)
    tensors = {"a.codes": codes.to(torch.int16), "a.codebooks": books, "a.scales": scales}
    source = dequantized.open_source(folder(tmp_path / "m", tensors, {"in_group_size": 4}))
    want = torch.empty(6, 16)
    for i in range(3):
        for j in range(4):
            tile = sum(books[m, codes[i, j, m]] for m in range(2)) * scales[i, 0, 0, 0]
            want[2 * i : 2 * i + 2, 4 * j : 4 * j + 4] = tile
    assert torch.allclose(source.read("a.weight"), want)
    assert torch.equal(source.read_rows("a.weight", 1, 4), source.read("a.weight")[1:4])
    (row,) = inspect_folder(tmp_path / "m").rows
    assert (row.name, row.shape, row.kind, row.bits, row.group) == ("a.weight", (6, 16), "vq", 4, 4)
    assert row.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    with pytest.raises(LlmqError, match="has in_group_size 4, and config.json says 8"):
        dequantized.open_source(folder(tmp_path / "n", tensors, {"in_group_size": 8}))
    with pytest.raises(LlmqError, match="and no scales"):
        dequantized.open_source(folder(tmp_path / "o", {k: tensors[k] for k in ("a.codes", "a.codebooks")}, {}))


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
torch.save(model(torch.arange(12)[None]).logits, sys.argv[2])
"""


def tiny(path: Path) -> Path:
    """A model of one block in AQLM's layout, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.2, dtype="float32", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model, tensors, names = LlamaForCausalLM(config), {}, []
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if tensor.dim() == 2 and "layers" in name:
            names.append(stem)
            q = weight(TWO, *tensor.shape, seed=len(names))
            tensors |= {f"{stem}.{end}": part.contiguous() for end, part in aqlm.pack(q).items()}
        else:
            tensors[name] = tensor.clone()
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    section = aqlm.config({TWO: names}, ["lm_head"], torch.float32)
    (path / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": section}))
    return path


def test_llmq_load_runs_it_packed(tmp_path: Path) -> None:
    made = tiny(tmp_path / "m")
    model, dense = llmq.load(made, device_map="cpu"), load_model(made, dense=True)
    layer = model.model.layers[0].self_attn.q_proj
    want = aqlm.unpack(aqlm.pack(weight(TWO, 32, 32, seed=1)), TWO).dequantize(torch.float32)
    assert isinstance(layer, VectorsLinear) and torch.equal(layer.dense(), want)
    assert torch.equal(dense.model.layers[0].self_attn.q_proj.weight, want)
    held = sum(part.nbytes for name, part in layer.named_buffers() if name != "bias")
    assert held == aqlm.loaded_bytes((32, 32), TWO, torch.bfloat16)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    if importlib.util.find_spec("aqlm") is None:
        pytest.skip("stock transformers was not tried: the package aqlm is not installed")
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", STOCK, str(made), str(out)], check=True, capture_output=True)
    assert torch.allclose(logits, torch.load(out), atol=1e-4)


def test_what_the_kernels_do_not_run_is_read_dense() -> None:
    plain = {"in_group_size": 8, "num_codebooks": 1, "nbits_per_codebook": 8}
    assert aqlm.runs_packed(plain) and aqlm.runs_packed({"nbits_per_codebook": 8})
    for odd in ({"nbits_per_codebook": 16}, {"out_group_size": 2}, {"in_group_size": None}, {"num_codebooks": 0}):
        assert not aqlm.runs_packed(plain | odd)
        assert not formats.packed_for_kernels("aqlm", plain | odd)
    assert not aqlm.runs_packed({}), "16 bits are usual"


def test_a_folder_that_contradicts_its_config_is_refused(tmp_path: Path) -> None:
    made = tiny(tmp_path / "m")
    said = json.loads((made / "config.json").read_text())
    said["quantization_config"]["num_codebooks"] = 1
    (made / "config.json").write_text(json.dumps(said))
    with pytest.raises(LlmqError, match=r"codes .*must be|must be .*codes|num_codebooks"):
        llmq.load(made, device_map="cpu")
