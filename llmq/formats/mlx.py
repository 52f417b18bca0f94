"""MLX folders (mlx-lm): `llmq export` writes them, `llmq inspect` describes them.

`weight` uint32 [out, in·bits/32] is a dense little-endian bit stream along the inputs. Mode "affine": `scales` and
`biases` [out, in/g] in the model's dtype. Modes "mxfp4", "mxfp8" and "nvfp4": `scales` uint8 [out, in/g], no biases.
Bits and groups are told apart by config.json only: `quantization: {group_size, bits, mode}`, with an entry of its own
for each module that differs, or false for one that is left alone. As mlx-lm 0.32 writes them.

A weight is w = code · scale + bias, with codes from 0 on: a scale and a zero point of ours, whose bias is
−(zero + 2^(bits−1)) · scale. That of a symmetric weight is exact in any dtype, since the factor is a power of two;
others have up to four bits more than the scale and are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import Row, Unclear, check_named, dtype_name, outputs_beside, whole
from llmq.formats.packing import pack_codes, packed_width, unpack_codes
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.scheme import Scheme
from llmq.grids.table import find

FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Modes whose codes are floating point numbers: bits and group size, which their tensors' shapes bear out."""
AFFINE = (4, 64)
"""What an entry of affine codes means by what it leaves out."""
GROUPS = (32, 64, 128)
WIDTHS = (2, 3, 4, 5, 6, 8)


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a quantized weight, from the headers of the tensors that store it.

    Raises Unclear if bits, group size and shapes do not fit together, or config.json does not say them.
    """
    weight, scales, biases = parts["weight"], parts["scales"], parts.get("biases")
    own = config.get(module, True)
    if weight.dtype != torch.uint32 or len(weight.shape) < 2 or not (own is True or isinstance(own, Mapping)):
        raise Unclear(f"{dtype_name(weight.dtype)} with scales, and config.json has {own!r} for it")
    # A module's own entry is whole: what it leaves out, its mode too, is mlx's default, not the folder's.
    told = config if own is True else own
    mode = str(told.get("mode") or "affine")
    usual = FLOATS.get(mode, (None, None) if own is True else AFFINE)
    bits, group = (whole(told, key) or usual[at] for at, key in enumerate(("bits", "group_size")))
    if not bits or not group or mode not in ("affine", *FLOATS) or (mode in FLOATS and (bits, group) != usual):
        raise Unclear(f"config.json says {bits} bits in groups of {group}, mode {mode!r}")
    inputs = scales.shape[-1] * group
    if (*scales.shape[:-1], inputs * bits) != (*weight.shape[:-1], weight.shape[-1] * 32):
        raise Unclear(f"{[*weight.shape]} with scales {[*scales.shape]} are not {bits} bits in groups of {group}")
    if mode == "affine" and (biases is None or biases.shape != scales.shape):
        raise Unclear("its scales have no biases")
    if (mode in FLOATS) != (scales.dtype == torch.uint8):
        raise Unclear(f"mode {mode!r} with {dtype_name(scales.dtype)} scales")
    if mode == "affine":
        # A scale has so many bits of codes: 8 bits in groups of 32 and 4 bits in groups of 64 are the same tensors.
        others = [other for other in WIDTHS if bits * group in [other * size for size in GROUPS]]
        check_named(inputs, bits, source.config, outputs_beside(source, module, {"weight": -2}), others)
    shape, nbytes = (*weight.shape[:-1], inputs), sum(part.nbytes for part in parts.values())
    kind = "float" if mode in FLOATS else "int"
    return Row(f"{module}.weight", shape, kind, bits, group, mode in FLOATS, None, nbytes, dtype_name(weight.dtype))


def settings(weight: QuantizedWeight) -> dict[str, Any]:
    """The entry of config.json for a weight. Raises LlmqError, without its name, if MLX has none for it."""
    width, scales = weight.codes.shape[1], weight.scale.shape[1]
    group = width // scales
    if weight.scheme.rules.layout:
        if weight.scheme.grid != "mxfp4":
            raise LlmqError(f"MLX does not hold {weight.scheme} as it is: quantize with --grid int or mxfp4")
        return {"group_size": group, "bits": 4, "mode": "mxfp4"}
    sizes = [size for size in GROUPS if group % size == 0]
    if not sizes:
        raise LlmqError(
            f"MLX has groups of {', '.join(map(str, GROUPS))}, and {group} is a multiple of none: quantize with "
            "--group-size 128, 64 or 32, or --keep the weight"
        )
    # MLX has no 7 bits: they are 8 whose highest is not used.
    return {"group_size": sizes[-1], "bits": 8 if weight.scheme.bits == 7 else weight.scheme.bits, "mode": "affine"}


def pack(weight: QuantizedWeight, told: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a weight, as `settings` says, by suffix; scales and biases in the dtype of its own scales."""
    bits, scale = told["bits"], weight.scale
    if told["mode"] != "affine":
        stored = (torch.frexp(scale.to(torch.float32))[1] + 126).clamp(0, 254).to(torch.uint8)
        words = pack_codes(weight.codes.to(torch.int8) - 8, 4)
        return {"weight": words.view(torch.uint32), "scales": stored}
    zero = torch.zeros_like(scale, dtype=torch.float32) if weight.zero is None else weight.zero.to(torch.float32)
    bias = -(zero + (1 << (bits - 1))) * scale.to(torch.float32)
    repeats = weight.codes.shape[1] // scale.shape[1] // told["group_size"]
    codes = rounding_of(weight.scheme.rules).decode(weight.codes, weight.scheme).to(torch.int8)
    return {
        "weight": pack_codes(codes, bits).view(torch.uint32),
        "scales": scale.repeat_interleave(repeats, dim=1).contiguous(),
        "biases": bias.to(scale.dtype).repeat_interleave(repeats, dim=1).contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> Tensor:
    """The weight that tensors stand for, float32 [out, in]."""
    bits, group, scales = told["bits"], told["group_size"], tensors["scales"]
    width = scales.shape[1] * group
    assert tensors["weight"].shape[1] == packed_width(width, bits)
    codes = unpack_codes(tensors["weight"].view(torch.int32), bits, width).to(torch.int16)
    if told["mode"] != "affine":
        levels = rounding_of(find("mxfp4")).decode((codes + 8).to(torch.uint8), Scheme(4, 32, grid="mxfp4"))
        made: Tensor = levels * torch.exp2(scales.to(torch.float32) - 127).repeat_interleave(group, dim=1)
        return made
    # In float64, where only the last step rounds.
    stored = (codes + (1 << (bits - 1))).to(torch.float64)
    scale, bias = (tensors[name].to(torch.float64).repeat_interleave(group, dim=1) for name in ("scales", "biases"))
    dense: Tensor = stored * scale + bias
    return dense.to(torch.float32)


COMPANIONS = {"weight": ("scales", "biases")}
SCALES = ("scales",)
