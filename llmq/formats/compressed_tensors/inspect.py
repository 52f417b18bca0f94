"""compressed-tensors weights, and other tools' FP8 weights in the same layout, as `llmq inspect` shows them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.formats.base import SMALL, Row, dtype_name

COMPANIONS = {
    "weight_packed": (
        "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
        "input_scale", "input_zero_point", "input_global_scale",
    ),
    "weight": (
        "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx", "weight_shape",
        "input_scale", "input_zero_point",
    ),
}  # fmt: skip
"""Suffixes of the other tensors that belong to a weight, besides its codes."""
SCALES = ("weight_scale", "weight_scale_inv")


def inspect(
    source: Source, module: str, parts: Mapping[str, TensorInfo], method: str | None, config: Mapping[str, Any]
) -> Row:
    """The description of a quantized weight, from the headers of the tensors that store it."""
    nbytes = sum(part.nbytes for part in parts.values())
    codes = parts.get("weight_packed") or parts["weight"]
    scale = parts.get("weight_scale") or parts["weight_scale_inv"]
    scheme = _scheme(module, config)
    kind = str(scheme.get("type") or ("float" if codes.dtype.is_floating_point else "int"))
    bits = int(scheme.get("num_bits") or (4 if codes is parts.get("weight_packed") else 8 * codes.dtype.itemsize))
    shape = codes.shape
    if codes is parts.get("weight_packed"):
        per_code = codes.dtype.itemsize * 8
        shape = (*codes.shape[:-1], codes.shape[-1] * per_code // bits)
        if "weight_shape" in parts and parts["weight_shape"].nbytes < SMALL:
            shape = tuple(int(size) for size in source.read(parts["weight_shape"].name).tolist())
    group = _group(shape, scale.shape, scheme)
    # Floating point grids have no zero point; if the scheme does not say, look for a stored zero point.
    symmetric = bool(scheme.get("symmetric", "weight_zero_point" not in parts)) if kind == "int" else True
    return Row(f"{module}.weight", shape, kind, bits, group, symmetric, None, nbytes, dtype_name(codes.dtype))


def _group(shape: tuple[int, ...], scales: tuple[int, ...], scheme: Mapping[str, Any]) -> int:
    """Inputs that share a scale; 0 for one scale per channel or for the whole weight."""
    stated = scheme.get("group_size")
    if isinstance(stated, int) and stated > 0:
        return stated
    if len(scales) != len(shape) or scales[-1] <= 1:
        return 0
    return math.ceil(shape[-1] / scales[-1])


def _scheme(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `weights` entry of the config group that a module belongs to: by name or pattern, else the class-wide one."""
    groups = config.get("config_groups")
    wide: Mapping[str, Any] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            continue
        for target in group.get("targets") or ():
            pattern = target.removeprefix("re:")
            if target == module or (pattern != target and re.match(pattern, module)):
                return group["weights"]  # type: ignore[no-any-return]
            if pattern == target and "." not in target:
                wide = wide or group["weights"]
    return wide
