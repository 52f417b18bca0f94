"""MLX folders (mlx-lm), which `llmq inspect` describes; llmq neither reads nor writes them.

`weight` uint32 [out, in·bits/32] is a dense little-endian bit stream along the inputs. Mode "affine": `scales` and
`biases` [out, in/g] in the model's dtype. Modes "mxfp4", "mxfp8" and "nvfp4": `scales` uint8 [out, in/g], no biases.
Bits and groups are told apart by config.json only: `quantization: {group_size, bits, mode}`, with an entry of its own
for each module that differs, or false for one that is left alone. As mlx-lm 0.32 writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.formats.base import Row, Unclear, check_named, dtype_name, outputs_beside, whole

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


COMPANIONS = {"weight": ("scales", "biases")}
SCALES = ("scales",)
