"""What `inspect` says of other tools' folders, laid out by hand with true shapes: what is so, or nothing but bytes.

Each folder has a weight of 256 × 512, as its config.json says, or names what is in it. Expected values are those that
the tensors were made for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmq.formats.base import Row
from llmq.formats.inspection import Inspection, inspect_folder

OUT, IN = 256, 512
MODEL = {"model_type": "tiny", "hidden_size": IN, "intermediate_size": OUT, "vocab_size": 2048, "num_hidden_layers": 2}
f16, bf16, f32, F8, E8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu
Tensors = dict[str, Tensor]


def i32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def u32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint32)


def u8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def i8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def ones(*shape: int, dtype: torch.dtype = f16) -> Tensor:
    return torch.ones(shape, dtype=f32).to(dtype)


def gptq(name: str, bits: int, group: int, order: bool = True, zeros: bool = True) -> Tensors:
    made = {"qweight": i32(IN * bits // 32, OUT), "scales": ones(IN // group, OUT)}
    made |= {"qzeros": i32(IN // group, OUT * bits // 32)} if zeros else {}
    made |= {"g_idx": i32(IN)} if order else {}
    return {f"{name}.{part}": tensor for part, tensor in made.items()}


def awq(name: str, bits: int, group: int) -> Tensors:
    words, groups = OUT * bits // 32, IN // group
    return {
        f"{name}.qweight": i32(IN, words),
        f"{name}.qzeros": i32(groups, words),
        f"{name}.scales": ones(groups, OUT),
    }


def mlx(name: str, bits: int, group: int) -> Tensors:
    scales = ones(OUT, IN // group, dtype=bf16)
    return {f"{name}.weight": u32(OUT, IN * bits // 32), f"{name}.scales": scales, f"{name}.biases": scales.clone()}


def compressed(name: str, bits: int, group: int, shape: bool = True) -> Tensors:
    made = {f"{name}.weight_packed": i32(OUT, IN * bits // 32), f"{name}.weight_scale": ones(OUT, IN // group)}
    return made | ({f"{name}.weight_shape": torch.tensor([OUT, IN])} if shape else {})


def folder(path: Path, tensors: Tensors, config: dict[str, Any], files: dict[str, Any] | None = None) -> Inspection:
    """A folder with these tensors, and a norm that is left alone; files: JSON files beside its config.json."""
    path.mkdir(exist_ok=True)
    save_file({**tensors, "norm.weight": torch.ones(IN, dtype=bf16)}, path / "model.safetensors")
    for name, content in ({"config.json": MODEL | config} | (files or {})).items():
        (path / name).write_text(json.dumps(content))
    found = inspect_folder(path)
    # Every byte is told of once, whatever is understood of it.
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values()) + 2 * IN
    assert [row for row in found.rows if row.name == "norm.weight"] == [
        Row("norm.weight", (IN,), "plain", None, None, None, None, 2 * IN, "bfloat16")
    ]
    return found


def quantization(method: str, **given: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **given}}


def group_of(targets: list[str], **weights: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": weights}


Scheme = tuple[str, int, int, bool]
"""Kind, bits, group size, whether it is symmetric."""
GPTQ = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
EIGHT: dict[str, Any] = {"bits": 8, "group_size": 64}
UNDERSTOOD: dict[str, tuple[Tensors, dict[str, Any], dict[str, Any], dict[str, Scheme]]] = {
    "gptq, a module of its own": (
        gptq("a.up", 4, 128) | gptq("a.down", 8, 64),
        quantization("gptq", **GPTQ, dynamic={"+:.*down": EIGHT}),
        {},
        {"a.up": ("int", 4, 128, True), "a.down": ("int", 8, 64, True)},
    ),
    "gptq, one left alone, without a g_idx": (
        gptq("a.up", 8, 64, order=False) | {"a.down.weight": ones(OUT, IN)},
        quantization("gptq", **GPTQ, dynamic={"-:.*down": {}, r".*\.up": EIGHT | {"sym": False}}),
        {},
        {"a.up": ("int", 8, 64, False)},
    ),
    "gptq of 8 bits with the words of 4 bits twice as wide": (
        gptq("a.up", 8, 128),
        quantization("gptq", **GPTQ | {"bits": 8}),
        {},
        {"a.up": ("int", 8, 128, True)},
    ),
    "gptq of 3 bits": (
        gptq("a.up", 3, 32),
        quantization("gptq", **GPTQ | {"bits": 3, "group_size": 32}),
        {},
        {"a.up": ("int", 3, 32, True)},
    ),
    "auto-round, names and patterns": (
        gptq("a.up", 4, 128, order=False) | gptq("a.down", 8, 64, order=False) | gptq("b.up", 2, 32, order=False),
        quantization(
            "auto-round", **GPTQ, packing_format="auto_round:auto_gptq", extra_config={"a.down": EIGHT, "b.*": {
                "bits": 2, "group_size": 32}},
        ),
        {},
        {"a.up": ("int", 4, 128, True), "a.down": ("int", 8, 64, True), "b.up": ("int", 2, 32, True)},
    ),
    "auto-round in AWQ's layout": (
        awq("a.up", 4, 128) | awq("a.down", 8, 64),
        quantization(
            "auto-round", **GPTQ | {"sym": False}, packing_format="auto_round:auto_awq", extra_config={"a.down": EIGHT}
        ),
        {},
        {"a.up": ("int", 4, 128, False), "a.down": ("int", 8, 64, False)},
    ),
    "AutoGPTQ's old folder": (
        gptq("a.up", 4, 128), {}, {"quantize_config.json": GPTQ}, {"a.up": ("int", 4, 128, True)}
    ),
    "AutoAWQ's old folder": (
        awq("a.up", 4, 64),
        {},
        {"quant_config.json": {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}},
        {"a.up": ("int", 4, 64, False)},
    ),
    "mlx": (
        mlx("a.up", 4, 64) | mlx("a.down", 8, 32) | mlx("a.gate", 3, 128),
        {"quantization": {
            "group_size": 64, "bits": 4, "mode": "affine", "a.down": {"group_size": 32, "bits": 8},
            "a.gate": {"group_size": 128, "bits": 3, "mode": "affine"},
        }},
        {},
        {"a.up": ("int", 4, 64, False), "a.down": ("int", 8, 32, False), "a.gate": ("int", 3, 128, False)},
    ),
    "mlx, floating point modes": (
        {
            **{"a.up.weight": u32(OUT, IN // 8), "a.up.scales": u8(OUT, IN // 32)},
            **{"a.down.weight": u32(OUT, IN // 8), "a.down.scales": u8(OUT, IN // 16)},
            **{"a.gate.weight": u32(OUT, IN // 4), "a.gate.scales": u8(OUT, IN // 32)},
        },
        {"quantization_config": {
            "group_size": 32, "bits": 4, "mode": "mxfp4", "a.down": {"mode": "nvfp4"},
            "a.gate": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        }, "quantization": {"group_size": 32}},
        {},
        {"a.up": ("float", 4, 32, True), "a.down": ("float", 4, 16, True), "a.gate": ("float", 8, 32, True)},
    ),
    "compressed-tensors, a scheme for each group": (
        compressed("a.up", 4, 128)
        | {"a.down.weight": i8(OUT, IN), "a.down.weight_scale": ones(OUT, 1)}
        | {"a.gate.weight_packed": u8(OUT, IN // 2), "a.gate.weight_scale": ones(OUT, IN // 16, dtype=F8)}
        | {"a.gate.weight_global_scale": ones(1, dtype=f32)}
        | {"b.up.weight_packed": u8(OUT, IN // 2), "b.up.weight_scale": u8(OUT, IN // 32)}
        | {"b.down.weight": ones(OUT, IN, dtype=F8), "b.down.weight_scale": ones(1, dtype=f32)},
        quantization("compressed-tensors", config_groups={
            "0": group_of(["Linear"], num_bits=4, type="int", symmetric=True, strategy="group", group_size=128),
            "1": group_of(["a.down"], num_bits=8, type="int", symmetric=True, strategy="channel"),
            "2": group_of(["re:.*gate$"], num_bits=4, type="float", strategy="tensor_group", group_size=16),
            "3": group_of(["b.up"], num_bits=4, type="float", strategy="group", group_size=32),
            "4": group_of(["b.down"], num_bits=8, type="float", strategy="tensor"),
        }),
        {},
        {
            **{"a.up": ("int", 4, 128, True), "a.down": ("int", 8, 0, True), "a.gate": ("float", 4, 16, True)},
            **{"b.up": ("float", 4, 32, True), "b.down": ("float", 8, 0, True)},
        },
    ),
    "compressed-tensors whose words have room for 10 codes of 3 bits": (
        {"a.up.weight_packed": i32(OUT, -(-IN // 10)), "a.up.weight_scale": ones(OUT, 1),
         "a.up.weight_shape": torch.tensor([OUT, IN])},
        quantization("compressed-tensors", config_groups={"0": group_of(["Linear"], num_bits=3, type="int")}),
        {},
        {"a.up": ("int", 3, 0, True)},
    ),
    "fp8 in blocks that do not divide the weight": (
        {"a.up.weight": ones(300, 300, dtype=F8), "a.up.weight_scale_inv": ones(3, 3, dtype=f32)},
        quantization("fp8", weight_block_size=[128, 128]) | {"hidden_size": 300},
        {},
        {"a.up": ("float", 8, 128, True)},
    ),
    "fp8 of a stack of experts": (
        {"a.up.weight": ones(4, OUT, IN, dtype=F8), "a.up.weight_scale": ones(4, 1, 1, dtype=f32)},
        quantization("fbgemm_fp8"),
        {},
        {"a.up": ("float", 8, 0, True)},
    ),
    "mxfp8": (
        {"a.up.weight": ones(OUT, IN, dtype=F8), "a.up.weight_scale": u8(OUT, IN // 32)},
        quantization("modelopt", quant_algo="MXFP8"),
        {},
        {"a.up": ("float", 8, 32, True)},
    ),
    "modelopt's nvfp4, beside its fp8": (
        {
            **{"a.up.weight": u8(OUT, IN // 2), "a.up.weight_scale": ones(OUT, IN // 16, dtype=F8)},
            **{"a.up.weight_scale_2": ones(dtype=f32), "a.up.input_scale": ones(dtype=f32)},
            **{"a.down.weight": ones(OUT, IN, dtype=F8), "a.down.weight_scale": ones(dtype=f32)},
        },
        {},
        {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {
            "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}},
        {"a.up": ("float", 4, 16, True), "a.down": ("float", 8, 0, True)},
    ),
    "modelopt's tiles, with ones between the axes of their scales": (
        {"a.up.weight": ones(OUT, IN, dtype=F8), "a.up.weight_scale": ones(OUT // 16, 1, IN // 16, 1, dtype=f32)},
        quantization("modelopt", quant_algo="FP8_PB_WO"),
        {},
        {"a.up": ("float", 8, 16, True)},
    ),
    "fp4 in int8 beside fp8 in tiles": (
        {
            "a.up.weight": i8(OUT, IN // 2),
            "a.up.weight_scale_inv": torch.zeros(OUT, IN // 32, dtype=torch.uint8).view(E8),
            **{"a.down.weight": ones(OUT, IN, dtype=F8), "a.down.weight_scale_inv": ones(OUT // 16, IN // 16)},
        },
        quantization("fp8", weight_block_size=[16, 16], expert_dtype="fp4"),
        {},
        {"a.up": ("float", 4, 32, True), "a.down": ("float", 8, 16, True)},
    ),
    "quark's mxfp4": (
        {"a.up.weight": u8(OUT, IN // 2), "a.up.weight_scale": torch.zeros(OUT, IN // 32, dtype=torch.uint8).view(E8)},
        quantization("quark", global_quant_config={"weight": {"dtype": "fp4", "group_size": 32}}),
        {},
        {"a.up": ("float", 4, 32, True)},
    ),
    "bitsandbytes of 8 bits": (
        {"a.up.weight": i8(OUT, IN), "a.up.SCB": ones(OUT, dtype=f32), "a.up.weight_format": u8()},
        quantization("bitsandbytes", load_in_8bit=True),
        {},
        {"a.up": ("int", 8, 0, True)},
    ),
    "quantized only in the text part of a config": (
        gptq("a.up", 8, 64, order=False),
        {"text_config": quantization("gptq", **GPTQ | EIGHT)},
        {},
        {"a.up": ("int", 8, 64, True)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_what_is_told_is_so(tmp_path: Path, case: str) -> None:
    tensors, config, files, expected = UNDERSTOOD[case]
    found = folder(tmp_path, tensors, config, files)
    told = {row.name.removesuffix(".weight"): (row.kind, row.bits, row.group, row.symmetric) for row in found.quantized}
    assert told == expected and not found.unknown
    shapes = {row.shape for row in found.quantized}
    assert shapes == {(300, 300)} if "300" in str(config) else shapes <= {(OUT, IN), (4, OUT, IN)}
    for row in found.quantized:
        mine = sum(t.nbytes for name, t in tensors.items() if name.startswith(row.name.removesuffix("weight")))
        assert row.nbytes == mine
    assert found.bits_per_weight == pytest.approx(8 * found.nbytes / sum(row.size for row in found.rows))


def test_experts_in_mxfp4_have_their_true_bits(tmp_path: Path) -> None:
    """4 bits and an exponent for 32 of them are 4.25 bits; the bytes alone would look like 8.015 and more."""
    experts = "a.mlp.experts"
    tensors = {
        f"{experts}.gate_up_proj_blocks": u8(4, 2 * OUT, IN // 32, 16),
        f"{experts}.gate_up_proj_scales": u8(4, 2 * OUT, IN // 32),
        f"{experts}.gate_up_proj_bias": ones(4, 2 * OUT, dtype=bf16),
        f"{experts}.down_proj_blocks": u8(4, IN, OUT // 32, 16),
        f"{experts}.down_proj_scales": u8(4, IN, OUT // 32),
    }
    found = folder(tmp_path, tensors, quantization("mxfp4", modules_to_not_convert=["model.layers.*.self_attn"]))
    assert {row.name: (row.shape, row.kind, row.bits, row.group) for row in found.quantized} == {
        f"{experts}.gate_up_proj": ((4, 2 * OUT, IN), "float", 4, 32),
        f"{experts}.down_proj": ((4, IN, OUT), "float", 4, 32),
    }
    assert found.bits_per_quantized_weight == 4.25 and not found.unknown
