"""FP8 as models are published in it, dequantized when it is read: `weight` in float8, and its scales beside it.

One scale for the weight, for each row, or for each tile of the weight, whose size config.json gives; tiles at the edges
may be cut short. Scales are floats, or exponents of two in a byte. compressed-tensors, modelopt and transformers' own
quantizer differ only in names and in what config.json says.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.source import Source, check_finite
from llmq.errors import LlmqError
from llmq.formats.base import dtype_name, whole
from llmq.formats.compressed_tensors.inspect import scheme_of
from llmq.formats.dequantized import Coded, damaged, pieces

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""The scales of a tensor `weight`; of a tensor of another name, these of which only the first word is another."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)
CACHE = ("q_scale", "k_scale", "v_scale", "kv_scale")
ACTIVATIONS = (*CACHE, "input_scale", "output_scale", "activation_scale", "act_scale", "qscale_act", "input_zero_point")
"""Names of scales of activations, beside a weight, and of what is cached, there or in the module that its module is in.
Others may change what the weight means, as `pre_quant_scale` does."""
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
PACKAGES = {"fp8": "accelerate", "modelopt": "accelerate"}
STOCK_UNPACKS = not torch.cuda.is_available()
LAYOUTS = ("float-quantized", "naive-quantized", None)


def dequantizes(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether the weights of a folder are FP8 codes, and nothing but scales is needed to read them."""
    if method == "modelopt":
        return section.get("quant_algo") in ALGORITHMS
    if method != "compressed-tensors":
        return method == "fp8"
    groups = section.get("config_groups")
    found = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    weights = [group.get("weights") for group in found]
    sparsity = section.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping):
        return False
    return (
        bool(weights)
        and not section.get("transform_config")
        and sparsity.get("format", "dense") == "dense"
        and all(isinstance(w, Mapping) and w.get("type") == "float" and w.get("num_bits") == 8 for w in weights)
        and all(group.get("format", section.get("format")) in LAYOUTS for group in found)
    )


def read_by_stock(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether stock transformers is to read a folder; if it is in FP8.

    It does not know modelopt. Without a GPU it dequantizes FP8 as `coded` does, but fails on tiles that are cut short,
    or takes them in another size.
    """
    return not dequantizes(method, section) or not (
        method == "modelopt" or (method == "fp8" and not torch.cuda.is_available())
    )


def coded(source: Source, section: Mapping[str, Any], dtype: torch.dtype) -> list[Coded]:
    """Every weight that is stored in float8. Raises LlmqError if one has no scales, or scales that do not fit it."""
    names = set(source.names())
    modules: dict[str, list[str]] = {}
    for name in source.names():
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return [
        _coded(source, section, dtype, name, names, _activations(name, modules))
        for name in source.names()
        if source.info(name).dtype in CODES
    ]


def _activations(name: str, modules: Mapping[str, list[str]]) -> list[str]:
    """The tensors that say how a weight's inputs and outputs are rounded, and those of a cache in the module above."""
    module, _, last = name.rpartition(".")

    mine = set(ACTIVATIONS if last == "weight" else (f"{last}_{leaf}" for leaf in ACTIVATIONS))
    found = [other for other in modules[module] if other.rpartition(".")[2] in mine]
    above = modules.get(module.rpartition(".")[0], []) if module else []
    return found + [other for other in above if other.rpartition(".")[2] in CACHE]


def _coded(
    source: Source, section: Mapping[str, Any], dtype: torch.dtype, name: str, names: set[str], dropped: list[str]
) -> Coded:
    module, _, last = name.rpartition(".")
    dot = module + "." if module else ""
    told = [dot + other.replace("weight", last, 1) for other in SCALE_NAMES if last == "weight" or "weight_" in other]
    info = source.info(name)
    scale = next((other for other in told if other in names), None)
    if scale is None:
        raise damaged(source, name, f"is stored as {dtype_name(info.dtype)}, and its scales ({told[0]}) are missing")
    tiles = _tiles(source, section, module)
    scales = source.info(scale)
    if scales.dtype not in FLOATS and not (scales.dtype == torch.uint8 and section.get("scale_fmt") == "ue8m0"):
        raise damaged(source, scale, f"is {dtype_name(scales.dtype)}, which is no dtype of scales of {name}")
    blocks = _blocks(info.shape, scales.shape, tiles)
    if blocks is None:
        size = f"tiles of {tiles[0]}x{tiles[1]}" if tiles else "one scale for the weight or each row"
        raise damaged(source, scale, f"is {[*scales.shape]} for a weight {[*info.shape]}, and config.json says {size}")

    # Looking codes up is four times as fast as torch's conversion of them on a CPU.
    numbers = torch.arange(256, dtype=torch.uint8).view(info.dtype).float()

    def rows(start: int, stop: int) -> Tensor:
        value = torch.empty((stop - start, *info.shape[1:]), dtype=dtype)
        for begin, end in pieces(info.shape, start, stop):
            factors = _factors(source, scale, info.shape, blocks, begin, end)
            codes = source.read_rows(name, begin, end).view(torch.uint8)
            found = numbers.index_select(0, codes.reshape(-1).int()).view(codes.shape)
            value[begin - start : end - start] = found.mul_(factors)
        return value

    return Coded(name, info.shape, (name, scale), rows, tuple(other for other in dropped if other != scale))


def _tiles(source: Source, section: Mapping[str, Any], module: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale, as config.json says; None if it is one for the weight or for each row."""
    scheme = scheme_of(module, section)
    group = whole(scheme, "group_size") if scheme.get("strategy") in ("group", None) else None
    stated = section.get("weight_block_size") or scheme.get("block_structure") or ([1, group] if group else None)
    if isinstance(stated, str):
        stated = stated.split("x")
    if stated is None or scheme.get("strategy") in ("tensor", "channel"):
        return None
    sizes = [whole({"": size}, "") for size in stated] if isinstance(stated, list) else []
    if len(sizes) != 2 or not all(size and size > 0 for size in sizes):
        raise LlmqError(
            f"{source.folder / 'config.json'}: {stated!r} is no size of the tiles of {module}.weight, which is two "
            "numbers ([128, 128]): download config.json again, or start from the unquantized model"
        )
    return int(sizes[0] or 0), int(sizes[1] or 0)


def _blocks(
    shape: tuple[int, ...], scales: tuple[int, ...], tiles: tuple[int, int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The scales' shape with as many axes as the weight [..., out, in], and the numbers along each axis that share one.

    None if the scales do not fit the weight.
    """
    if len(shape) < 2:
        return None
    *lead, out, width = shape
    ones, one = (1,) * len(lead), tuple(lead)
    if tiles is not None:
        view = (*one, -(-out // tiles[0]), -(-width // tiles[1]))
        return (view, (*ones, *tiles)) if scales == view else None
    if prod(scales) == 1:
        return (*ones, 1, 1), shape
    if scales in ((*one, out), (*one, out, 1)):
        return (*one, out, 1), (*ones, 1, width)
    if lead and scales in (one, (*one, 1), (*one, 1, 1)):
        return (*one, 1, 1), (*ones, out, width)
    return None


def _factors(
    source: Source,
    scale: str,
    shape: tuple[int, ...],
    blocks: tuple[tuple[int, ...], tuple[int, ...]],
    begin: int,
    end: int,
) -> Tensor:
    """The factors of rows begin…end−1, float32, with one entry along an axis where all are the same.

    Raises LlmqError if a scale is not finite.
    """
    view, sizes = blocks
    apart = view[0] > 1
    first, last = (begin // sizes[0], -(-end // sizes[0])) if apart else (0, 1)
    stored = source.read_rows(scale, first, last) if apart else source.read(scale)
    stored = stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored
    factors = stored.float().reshape(last - first, *view[1:])
    check_finite(factors, scale, source.info(scale).file)
    for axis in range(1, len(view)):
        if view[axis] > 1:
            factors = factors.repeat_interleave(sizes[axis], axis).narrow(axis, 0, shape[axis])
    return factors[torch.arange(begin, end) // sizes[0] - first] if apart else factors
