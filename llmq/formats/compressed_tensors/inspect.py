"""compressed-tensors weights, and other tools' FP8 and FP4 weights in the same layout, as `llmq inspect` shows them.

Bits and shapes follow from the tensors, and must be those of the configuration. modelopt and quark write FP4 codes as
`weight`, compressed-tensors as `weight_packed`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import SMALL, Row, Unclear, check_named, dtype_name, inputs_per_scale, outputs_beside, whole

COMPANIONS = {
    "weight_packed": (
        "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
        "input_scale", "input_zero_point", "input_global_scale",
    ),
    "weight": (
        "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_g_idx", "weight_shape",
        "input_scale", "input_zero_point", "pre_quant_scale",
    ),
}  # fmt: skip
"""Suffixes of the other tensors that belong to a weight, besides its codes."""
SCALES = ("weight_scale", "weight_scale_inv")
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
"""How scales that are powers of two are stored."""
MX, NV = 32, 16
"""Codes that share a scale in MXFP4, and in NVFP4."""


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a quantized weight, from the headers of the tensors that store it.

    Raises Unclear if these are in no known layout, or contradict the configuration.
    """
    nbytes = sum(part.nbytes for part in parts.values())
    packed = "weight_packed" in parts
    codes = parts["weight_packed" if packed else "weight"]
    scale = parts.get("weight_scale") or parts["weight_scale_inv"]
    name, dtype, scheme = f"{module}.weight", dtype_name(codes.dtype), scheme_of(source.folder, module, config)
    if not packed and codes.dtype in PLAIN:
        return Row(name, codes.shape, "plain", None, None, None, None, nbytes, dtype)
    if len(codes.shape) < 2:
        raise Unclear(f"{dtype} {[*codes.shape]}")
    if codes.dtype == torch.uint8 or (codes.dtype == torch.int8 and method == "fp8"):
        bits = 6 if packed and whole(scheme, "num_bits") == 6 else 4
        shape, kind = _few_bits(codes, scale, scheme, bits), "float"
    elif packed:
        kind = str(scheme.get("type") or "int")
        shape, bits = _words(source, module, parts, scheme)
    elif codes.dtype == torch.int8 or codes.dtype.is_floating_point:
        kind = "float" if codes.dtype.is_floating_point else "int"
        shape, bits = codes.shape, whole(scheme, "num_bits") or 8
        if str(scheme.get("type") or kind) != kind or bits > 8 or (kind == "float" and bits != 8):
            raise Unclear(f"config.json says {scheme.get('type', kind)} of {bits} bits, it is {dtype}")
    else:
        raise Unclear(f"weight is {dtype}")
    if bits == 4 and method == "fp8":
        config = {}  # the tiles that it has are those of FP8
    group = _group(shape, scale.shape, scheme, config)
    # Floating point grids have no zero point; if the scheme does not say, look for a stored zero point.
    symmetric = bool(scheme.get("symmetric", "weight_zero_point" not in parts)) if kind == "int" else True
    return Row(name, shape, kind, bits, group, symmetric, None, nbytes, dtype)


def _few_bits(codes: TensorInfo, scale: TensorInfo, scheme: Mapping[str, Any], bits: int) -> tuple[int, ...]:
    """The shape of a weight with two FP4 codes in a byte, or four of FP6 in three: MXFP4, NVFP4 or MXFP6, as its scales
    say."""
    shape = (*codes.shape[:-1], codes.shape[-1] * 8 // bits)
    shared = NV if scale.dtype == torch.float8_e4m3fn and bits == 4 else MX if scale.dtype in EXPONENTS else 0
    if not shared or scale.shape != (*shape[:-1], -(-shape[-1] // shared)):
        known = "neither MXFP4 nor NVFP4" if bits == 4 else "not MXFP6"
        raise Unclear(f"FP{bits} codes with {dtype_name(scale.dtype)} scales {[*scale.shape]} are {known}")
    if whole(scheme, "num_bits") not in (None, bits) or scheme.get("type") not in (None, "float"):
        raise Unclear(f"config.json says {scheme.get('type')} of {scheme.get('num_bits')} bits, its tensors are FP4")
    return shape


def _words(
    source: Source, module: str, parts: Mapping[str, TensorInfo], scheme: Mapping[str, Any]
) -> tuple[tuple[int, ...], int]:
    """Shape and bits of a weight of integers packed in 32-bit words."""
    codes, stated, stored = parts["weight_packed"], whole(scheme, "num_bits"), parts.get("weight_shape")
    if codes.dtype != torch.int32:
        raise Unclear(f"weight_packed is {dtype_name(codes.dtype)}")
    *rows, words = codes.shape
    if stored is None or stored.nbytes >= SMALL:
        if stated is None:
            raise Unclear("neither its shape nor its bits are stated")
        beside = outputs_beside(source, module, {"weight_packed": -2, "weight": -2})
        check_named(words * 32 // stated, stated, source.config, beside)
        return (*rows, words * 32 // stated), stated
    shape = tuple(int(size) for size in source.read(stored.name).flatten().tolist())
    # Earlier versions let no code cross a word, so that 3 bits have 10 codes in each.
    fitting = (
        {b for b in range(1, 9) if words in (-(-shape[-1] * b // 32), -(-shape[-1] // (32 // b)))} if shape else ()
    )
    if list(shape[:-1]) != rows or not fitting or (stated is not None and stated not in fitting):
        raise Unclear(f"words {[*codes.shape]} for a weight {[*shape]}, and config.json says {stated} bits")
    if stated is None and len(fitting) > 1:
        raise Unclear(f"config.json does not say its bits, its tensors are for {sorted(fitting)}")
    return shape, stated or min(fitting)


def _group(
    shape: tuple[int, ...], scales: tuple[int, ...], scheme: Mapping[str, Any], config: Mapping[str, Any]
) -> int:
    """Inputs that share a scale; 0 for one scale per channel or for the whole weight. Blocks have rows as well."""
    down, along = _block(scheme.get("block_structure") or config.get("weight_block_size"))
    stated = whole(scheme, "group_size") or along
    stated = -1 if scheme.get("strategy") in ("channel", "tensor") else stated
    lead = shape[:-2]
    if len(scales) == len(shape) + 2 and scales[-1] == scales[-3] == 1:  # modelopt's tiles
        scales = (*lead, scales[-4], scales[-2])
    wide = {shape[:-1], (*shape[:-1], 1), *([lead, (*lead, 1), (*lead, 1, 1)] if lead else [])}
    if math.prod(scales) == 1 or scales in wide:
        return inputs_per_scale(shape[-1], 1, stated)
    if len(scales) != len(shape) or scales[:-2] != lead:
        raise Unclear(f"a weight {[*shape]} with scales {[*scales]}")
    if scales[-2] != shape[-2]:
        inputs_per_scale(shape[-2], scales[-2], down)
    return inputs_per_scale(shape[-1], scales[-1], stated)


def _block(stated: Any) -> tuple[int | None, int | None]:
    """Rows and columns of the blocks that share a scale, as the configuration gives them: [128, 128] or '128x128'."""
    sizes = stated.split("x") if isinstance(stated, str) else stated
    if not isinstance(sizes, list) or len(sizes) != 2:
        return None, None
    return whole({"": sizes[0]}, ""), whole({"": sizes[1]}, "")


def _matches(folder: Path, pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise LlmqError(
            f"{folder / 'config.json'}: the target 're:{pattern}' is no regular expression: {error}: download "
            "config.json again, or start from the unquantized model"
        ) from error


def scheme_of(folder: Path, module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `weights` entry of the config group that a module belongs to: by name or pattern, else the class-wide one.

    folder: for the error. Raises LlmqError if a pattern is no regular expression.
    """
    groups = config.get("config_groups")
    wide: Mapping[str, Any] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            continue
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else ():
            pattern = str(target).removeprefix("re:")
            if target == module or (pattern != target and _matches(folder, pattern, module)):
                return group["weights"]  # type: ignore[no-any-return]
            if pattern == target and "." not in target:
                wide = wide or group["weights"]
    return wide
