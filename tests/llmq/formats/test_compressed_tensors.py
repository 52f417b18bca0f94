"""compressed-tensors as a format: each scheme to the file that stores it, and who reads a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from llmq.formats import compressed_tensors as ct
from llmq.formats.compressed_tensors import eight_bit, microscaled, packed
from llmq.grids.scheme import Activations, Scheme
from tests.llmq.grids.peers import known_to_compressed_tensors

PACKED = [Scheme(4, 32), Scheme(3, 32, False), Scheme(8, None)]
EIGHT = [Scheme(8, None, activations=Activations()), Scheme(8, None, grid="fp8")]


SMALL = [Scheme(4, 16, grid="nvfp4"), Scheme(6, 32, grid="mxfp6")]


@pytest.mark.parametrize(("schemes", "layout"), [(PACKED, packed), (EIGHT, eight_bit), (SMALL, microscaled)])
def test_each_scheme_is_stored_by_its_layout(schemes: list[Scheme], layout: ct._Layout) -> None:
    for scheme in schemes:
        assert ct.spec((32, 64), scheme, torch.float16) == layout.spec((32, 64), scheme, torch.float16)
        for parts in (2, 3, 4):
            for rows in (False, True):
                assert ct.splits((32, 64), scheme, parts, rows) == layout.splits((32, 64), scheme, parts, rows)


def test_stacks_of_experts_in_other_floats_are_refused() -> None:
    """But those of 4 bits, which are looked up as codebooks are."""
    for scheme in (SMALL[1], Scheme(8, 128, grid="fp8-block")):
        assert "use --grid int" in str(ct.refuse_stacks(scheme))
    assert ct.refuse_stacks(SMALL[0]) is None


def test_the_title_names_each_layout_once() -> None:
    assert ct.title(PACKED) == "compressed-tensors pack-quantized"
    assert ct.title([*PACKED, *EIGHT]) == "compressed-tensors float-quantized, int-quantized, pack-quantized"


@pytest.mark.parametrize(
    ("schemes", "code", "words"),
    [
        ([Scheme(4, 32), Scheme(8, None)], "transformers", "on a GPU or CPU"),
        ([Scheme(4, 32, False)], "transformers", "unpacks its asymmetric weights while loading"),
        ([Scheme(4, 16, grid="nvfp4"), Scheme(8, None)], "transformers", "in bfloat16 only"),
        ([Scheme(4, 32, False), Scheme(8, None)], None, "fails on asymmetric weights if the folder has several"),
    ],
)
def test_what_stock_transformers_does(schemes: list[Scheme], code: str | None, words: str) -> None:
    (stock,) = ct.loaders(schemes)
    assert stock.code == code and stock.warn is (code is None) and words in stock.sentence


GOLDEN = {
    "nvfp4": Scheme(4, 16, grid="nvfp4", activations=Activations(dynamic=False)),
    "mxfp4": Scheme(4, 32, grid="mxfp4", activations=Activations()),
    "mxfp4_fp8": Scheme(4, 32, grid="mxfp4", activations=Activations(grid="fp8")),
    "mxfp6": Scheme(6, 32, grid="mxfp6", activations=Activations()),
    "mxfp8": Scheme(8, 32, grid="mxfp8", activations=Activations()),
    "fp8_block": Scheme(8, 128, grid="fp8-block", activations=Activations()),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_llm_compressor_wrote(name: str) -> None:
    """Its weights are read as compressed-tensors decompresses them, and packed as the same bytes.

    But for the divisor of an input's scales, which is a power of two here.
    """
    folder, scheme = Path(__file__).parent / "compressed_tensors" / "golden" / name, GOLDEN[name]
    known_to_compressed_tensors(scheme)
    section = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
    theirs = QuantizationConfig.model_validate(section).config_groups["group_0"]
    mine = QuantizationConfig.model_validate(ct.config({scheme: ["a"]}, [], torch.bfloat16)).config_groups["group_0"]
    for got, want in ((mine.weights, theirs.weights), (mine.input_activations, theirs.input_activations)):
        for key in ("num_bits", "type", "strategy", "dynamic", "group_size", "block_structure", "scale_dtype"):
            assert getattr(got, key) == getattr(want, key), key
    assert mine.format == theirs.format
    stored = load_file(folder / "model.safetensors")
    for module in sorted({key.rpartition(".")[0] for key in stored}):
        tensors = {key.rpartition(".")[2]: value for key, value in stored.items() if key.rpartition(".")[0] == module}
        q = ct.unpack(tensors, scheme)
        dense = BaseCompressor.get_value_from_registry(theirs.format).decompress(dict(tensors), theirs)["weight"]
        assert torch.equal(q.dequantize(dense.dtype), dense)
        again = ct.pack(q)
        assert again.keys() == tensors.keys()
        for suffix, tensor in tensors.items():
            if suffix == "input_global_scale":
                assert 0.5 < float(again[suffix] / tensor) <= 1
            else:
                assert torch.equal(again[suffix].view(torch.uint8), tensor.view(torch.uint8)), suffix
