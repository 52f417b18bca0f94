"""Folders whose layout is not known, or contradicts itself: `inspect` gives their bytes, and no other number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llmq.formats.test_inspection_layouts import (
    F8,
    GPTQ,
    IN,
    OUT,
    Tensors,
    bf16,
    compressed,
    f32,
    folder,
    gptq,
    group_of,
    i8,
    i32,
    mlx,
    ones,
    quantization,
    u8,
)  # fmt: skip

NOT_UNDERSTOOD: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "hqq": (
        {"a.up.W_q": u8(OUT // 2, IN), "a.up.scale": ones(OUT * IN // 64, 1), "a.up.zero": ones(OUT * IN // 64, 1)},
        quantization("hqq", quant_config={"weight_quant_params": {"nbits": 4, "group_size": 64}}),
        "W_q is uint8",
    ),
    "hqq with its codes seen as floats": (
        {"a.up.W_q": ones(OUT // 2, IN // 2), "a.up.scale": ones(OUT * IN // 64, 1)},
        quantization("hqq"),
        "W_q is float16",
    ),
    "vectors in AQLM's names, with scales of another layout": (
        {
            "a.up.codes": torch.zeros(OUT, IN // 8, 1, dtype=torch.int16),
            "a.up.codebooks": ones(1, 65536, 1, 8),
            "a.up.scales": ones(OUT, 1),
        },
        quantization("aqlm", in_group_size=8, nbits_per_codebook=16, num_codebooks=1),
        "int16 [256, 64, 1] with codebooks [1, 65536, 1, 8] and scales [256, 1]",
    ),
    "torchao": (
        {"a.up._weight_qdata": i8(OUT, IN), "a.up._weight_scale": ones(OUT, dtype=bf16)},
        quantization("torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig"}}),
        "_weight_qdata is int8",
    ),
    "eetq, which stores its codes transposed": (
        {"a.up.weight": i8(IN, OUT), "a.up.weight_scales": ones(OUT)},
        quantization("eetq"),
        "with weight_scales",
    ),
    "quanto": (
        {"a.up.weight._data": u8(OUT // 2, IN), "a.up.weight._scale": ones(OUT, 1)},
        quantization("quanto", weights="int4"),
        "_data is uint8",
    ),
    "bitnet": (
        {"a.up.weight": u8(OUT // 4, IN), "a.up.weight_scale": ones(1, dtype=bf16)},
        quantization("bitnet"),
        "neither MXFP4 nor NVFP4",
    ),
    "modelopt's int4": (
        {"a.up.weight": u8(OUT // 2, IN), "a.up.weight_scale": ones(OUT, IN // 128), "a.up.pre_quant_scale": ones(IN)},
        quantization("modelopt", quant_algo="W4A16_AWQ", group_size=128),
        "neither MXFP4 nor NVFP4",
    ),
    "quark's int4": (
        {"a.up.weight": i32(IN, OUT // 8), "a.up.weight_scale": ones(IN // 128, OUT)},
        quantization("quark", export={"pack_method": "reorder"}),
        "weight is int32",
    ),
    "marlin": (
        {"a.up.B": i32(IN // 16, OUT * 2), "a.up.s": ones(IN // 128, OUT)},
        quantization("gptq", **GPTQ, checkpoint_format="marlin"),
        "B is int32",
    ),
    "awq's gemv": (
        {"a.up.qweight": i32(OUT, IN // 8), "a.up.qzeros": i32(OUT, 1), "a.up.scales": ones(OUT, 8)},
        quantization("awq", bits=4, group_size=64, version="gemv", zero_point=True),
        "stored as 'gemv'",
    ),
    "fp8 whose scales are gone": ({"a.up.weight": ones(OUT, IN, dtype=F8)}, {}, "weight is float8_e4m3fn [256, 512]"),
    "packed with its config gone": (
        {"a.up.codes": u8(OUT, IN // 2), "a.up.scale_of_codes": ones(OUT, 1)}, {}, "with scale_of_codes"
    ),
    "nf4 whose state is gone": (
        {"a.up.weight": u8(OUT * IN // 2, 1), "a.up.weight.absmax": ones(OUT * IN // 64, dtype=f32)},
        quantization("bitsandbytes", load_in_4bit=True),
        "without the state",
    ),
    "gptq of 8 bits in a config that says 4": (
        gptq("a.up", 8, 128), quantization("gptq", **GPTQ), "config.json says 4 bits, its tensors are for 8"
    ),
    "gptq in groups of 64 in a config that says 128": (
        gptq("a.up", 4, 64), quantization("gptq", **GPTQ), "8 scales for 512 inputs, but config.json says groups of 128"
    ),
    "gptq that its config excludes": (
        gptq("a.up", 4, 128), quantization("gptq", **GPTQ, dynamic={"-:a": {}}), "it is not quantized ('-:a')"
    ),
    "gptq of 8 bits that nothing but the model's sizes tells from 4": (
        gptq("a.up", 8, 128, order=False, zeros=False),
        quantization("gptq", **GPTQ | {"group_size": 256}),
        "4 bits would make 1024 inputs, 8 bits 512 as the model has",
    ),
    "mlx without the entry of a module": (
        mlx("a.up", 8, 64), {"quantization": {"group_size": 64, "bits": 4}}, "are not 4 bits in groups of 64"
    ),
    "mlx of 8 bits that could be 4 in larger groups": (
        mlx("a.up", 8, 64), {"quantization": {"group_size": 128, "bits": 4}}, "4 bits would make 1024 inputs"
    ),
    "mlx without a config": (mlx("a.up", 4, 64), {}, "config.json says None bits"),
    "mlx that its config excludes": (
        mlx("a.up", 4, 64), {"quantization": {"group_size": 64, "bits": 4, "a.up": False}}, "has False for it"
    ),
    "compressed-tensors of 8 bits in a config that says 4": (
        compressed("a.up", 8, 128),
        quantization("compressed-tensors", config_groups={"0": group_of(["Linear"], num_bits=4)}),
        "and config.json says 4 bits",
    ),
    "the same without its stored shape": (
        compressed("a.up", 8, 128, shape=False),
        quantization("compressed-tensors", config_groups={"0": group_of(["Linear"], num_bits=4, group_size=256)}),
        "4 bits would make 1024 inputs",
    ),
    "marlin's sparse compressed-tensors": (
        {"a.up.weight_packed": i32(IN // 32, OUT * 2), "a.up.scale_packed": ones(4, OUT), "a.up.meta":
         torch.zeros(IN, OUT // 16, dtype=torch.int16)},
        quantization("compressed-tensors", format="marlin-24"),
        "with scale_packed",
    ),
    "a config of odd types": (
        gptq("a.up", 4, 128), quantization("gptq", bits=[4], group_size=None), ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_what_is_not_understood_has_its_bytes_only(tmp_path: Path, case: str) -> None:
    tensors, config, why = NOT_UNDERSTOOD[case]
    found = folder(tmp_path, tensors, config)
    if not why:  # the tensors alone are enough
        assert [(row.bits, row.group, row.shape) for row in found.quantized] == [(4, 128, (OUT, IN))]
        return
    (row,) = found.unknown
    assert row.name.startswith("a.up") and why in row.why
    assert (row.shape, row.kind, row.bits, row.group, row.size) == ((), "unknown", None, None, 0)
    assert row.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert not found.quantized and found.bits_per_weight is None and found.bits_per_quantized_weight is None


def test_buffers_of_an_unquantized_model_are_what_they_are(tmp_path: Path) -> None:
    mask = {"h.attn.bias": u8(1, 1, 8, 8), "h.attn.masked_bias": ones(), "h.ids": torch.arange(8), "h.up": ones(4, 4)}
    found = folder(tmp_path, mask, {})
    assert not found.unknown and not found.quantized
    assert {row.name: row.dtype for row in found.rows}["h.attn.bias"] == "uint8"


def test_an_unquantized_weight_with_scales_is_plain(tmp_path: Path) -> None:
    tensors = {"a.up.weight": ones(OUT, IN, dtype=bf16), "a.up.weight_scale": ones(OUT, 1, dtype=bf16)}
    config = quantization("compressed-tensors", format="dense", config_groups={"0": group_of(["Linear"], num_bits=4)})
    row = folder(tmp_path, tensors, config).rows[0]
    assert (row.kind, row.bits, row.shape, row.dtype) == ("plain", None, (OUT, IN), "bfloat16")
