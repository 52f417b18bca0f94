"""Scales of keys and values: their names and shapes, and what stock transformers does with them.

Stock transformers with compressed-tensors rounds keys and values where it takes a module for attention (by parts of its
name), before the cache gets them; no memory is saved. It fails on models whose configuration has no number of heads
under the name that it knows. It makes a scale for each such module, and what the checkpoint lacks stays without a
value. So it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError, first_line
from llmq.grids.base import storable
from llmq.grids.cache import Cache

KEY, VALUE = "k_scale", "v_scale"


def scale_shape(cache: Cache, heads: int) -> tuple[int, ...]:
    """The shape of a stored scale."""
    return (heads, 1, 1) if cache.heads else (1,)


def stored(module: str, cache: Cache, keys: Tensor, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module: name → scale, never 0. keys, values: a scale for each head, or one, float32."""
    parts = {KEY: keys, VALUE: values}
    return {
        f"{module}.{name}": storable(scale, dtype).reshape(scale_shape(cache, scale.numel())).to("cpu", dtype)
        for name, scale in parts.items()
    }


def read_cache(section: Mapping[str, Any]) -> Cache | None:
    """How a folder's `quantization_config` says that keys and values are rounded; None if it does not, or by scales
    that it does not store, or in a way that llmq has no name for."""
    scheme = section.get("kv_cache_scheme")
    if not isinstance(scheme, Mapping) or scheme.get("dynamic") or not scheme.get("symmetric", True):
        return None
    grid = {"float": "fp8", "int": "int"}.get(str(scheme.get("type")))
    if grid is None or scheme.get("num_bits") != 8 or scheme.get("strategy") not in ("tensor", "attn_head"):
        return None
    return Cache(grid, scheme["strategy"] == "attn_head")


def rounded_by_stock(model: nn.Module, section: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The modules whose keys and values stock transformers rounds, by their paths, with the shape of the scale that it
    asks for. model: on the meta device. Raises LlmqError if it would not load the folder."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    if section.get("dequantize"):
        return {}
    twin = deepcopy(model)
    kept = {key: section[key] for key in ("quant_method", "format", "quantization_status", "kv_cache_scheme")}
    config = QuantizationConfig.model_validate({"config_groups": {}, "ignore": [], **kept})
    try:
        apply_quantization_config(twin, config)
    except Exception as problem:  # whatever it is, loading fails with it
        raise LlmqError(
            f"stock transformers would not load a {type(model).__name__} with a rounded cache ({first_line(problem)})"
        ) from problem
    found = {name: getattr(module, KEY, None) for name, module in twin.named_modules()}
    return {name: tuple(scale.shape) for name, scale in found.items() if isinstance(scale, Tensor)}
