"""FP8 and FP4 as models are published in them, dequantized when read: a weight's codes, and its scales beside them.

`weight` is float8, or bytes with two FP4 codes. compressed-tensors, modelopt, fbgemm and transformers' own quantizer
differ in names, in the scales' layout and in what config.json says; the arithmetic is in `scaled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from llmq.checkpoint.source import Source
from llmq.errors import LlmqError
from llmq.formats.base import dtype_name, whole
from llmq.formats.compressed_tensors.inspect import scheme_of
from llmq.formats.dequantized import Coded, damaged
from llmq.formats.scaled import FP8, MX, NV, PAIRS, Tiles, scaled

CODES = FP8
PACKED = "weight_packed"
"""The codes of compressed-tensors' FP4; other tools call them `weight` too."""
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""The scales of a tensor `weight`; of a tensor of another name, these of which only the first word is another, or that
begin with it."""
SECOND = {"weight_scale_2": False, "weight_global_scale": True}
"""Names of the second scale of NVFP4 → whether the scales are divided by it, not multiplied."""
CACHE = ("q_scale", "k_scale", "v_scale", "kv_scale")
ACTIVATIONS = (
    *CACHE, "input_scale", "output_scale", "activation_scale", "act_scale", "qscale_act", "input_zero_point",
    "input_global_scale", "input_scale_ub",
)  # fmt: skip
"""Names of scales of activations, beside a weight, and of what is cached, there or in the module that its module is in.
Others may change what the weight means, as `pre_quant_scale` does."""
ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "MXFP4", "W4A8_MXFP4_FP8", "NVFP4", "W4A16_NVFP4",
    "W4A8_NVFP4_FP8",
)  # fmt: skip
MIXED = "MIXED_PRECISION"
MODELOPT_TILES = 128
PACKAGES = {"fp8": "accelerate", "modelopt": "accelerate", "fbgemm_fp8": "accelerate"}
STOCK_UNPACKS = not torch.cuda.is_available()
LAYOUTS = {
    8: ("float-quantized", "naive-quantized", "mxfp8-quantized", None),
    4: ("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
}
"""Bits → the layouts of compressed-tensors that are read."""
STRATEGIES = ("tensor", "channel", "block", "group", "tensor_group", None)


def dequantizes(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether the weights of a folder are FP8 or FP4 codes, and nothing but scales is needed to read them."""
    if method is not None and method.startswith("modelopt"):
        return _algorithms(section) <= {*ALGORITHMS} and bool(_algorithms(section))
    if method != "compressed-tensors":
        return method in ("fp8", "fbgemm_fp8")
    groups = section.get("config_groups")
    found = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    sparsity = section.get("sparsity_config") or {}
    return (
        bool(found)
        and not section.get("transform_config")
        and isinstance(sparsity, Mapping)
        and sparsity.get("format", "dense") == "dense"
        and all(_reads(group.get("weights"), group.get("format") or section.get("format")) for group in found)
    )


def _algorithms(section: Mapping[str, Any]) -> set[str]:
    """modelopt's names of how the weights are stored; '' for one that names none."""
    algorithm = str(section.get("quant_algo")).upper()
    if algorithm != MIXED:
        return {algorithm}
    layers = section.get("quantized_layers")
    found = layers.values() if isinstance(layers, Mapping) else ()
    return {str(layer.get("quant_algo")).upper() if isinstance(layer, Mapping) else "" for layer in found}


def _reads(weights: Any, layout: Any) -> bool:
    """Whether weights of a compressed-tensors group are read."""
    if not isinstance(weights, Mapping) or weights.get("type") != "float" or weights.get("symmetric") is False:
        return False
    bits = weights.get("num_bits")
    return isinstance(bits, int) and layout in LAYOUTS.get(bits, ()) and weights.get("strategy") in STRATEGIES


def read_by_stock(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether stock transformers is to read a folder; if it is in FP8 or FP4.

    It does not know modelopt. Without a GPU it does not read fbgemm's, and dequantizes its own FP8 as `coded` does, but
    fails on tiles that are cut short, or takes them in another size. Of compressed-tensors' experts it takes those of
    NVFP4 without their second scale, and fails on FP8 with a scale per tile.
    """
    if not dequantizes(method, section):
        return True
    if method == "compressed-tensors":
        weights = [group["weights"] for group in section["config_groups"].values() if isinstance(group, Mapping)]
        return all(w["num_bits"] == 8 and w.get("strategy") in ("tensor", "channel", None) for w in weights)
    if method == "fbgemm_fp8":
        from transformers.utils.import_utils import is_fbgemm_gpu_available

        return torch.cuda.is_available() and bool(is_fbgemm_gpu_available())
    return method == "fp8" and torch.cuda.is_available()


def rounds_inputs(method: str | None, section: Mapping[str, Any]) -> bool:
    """Whether stock transformers rounds the inputs of a folder's weights too, which weights that are read dense leave
    alone."""
    groups = section.get("config_groups") if method == "compressed-tensors" else None
    listed = groups.values() if isinstance(groups, Mapping) else ()
    return any(isinstance(group, Mapping) and group.get("input_activations") for group in listed)


def few_bits(section: Mapping[str, Any]) -> bool:
    """Whether some weights of a compressed-tensors folder have fewer than 8 bits."""
    groups = [group for group in section["config_groups"].values() if isinstance(group, Mapping)]
    return any((whole(group.get("weights") or {}, "num_bits") or 8) < 8 for group in groups)


def coded(source: Source, section: Mapping[str, Any], dtype: torch.dtype) -> list[Coded]:
    """Every weight that is stored in FP8 or FP4. Raises LlmqError if one has no scales, or scales that do not fit it,
    or config.json says otherwise."""
    names = set(source.names())
    modules: dict[str, list[str]] = {}
    for name in source.names():
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    pairs = (torch.int8,) if section.get("quant_method") == "fp8" else (torch.uint8,)
    bytewise = [name for name in source.names() if source.info(name).dtype in (*FP8, *pairs)]
    scales = {other for name in bytewise for other in _told(name, SCALE_NAMES)}
    return [
        _coded(source, section, dtype, name, names, modules)
        for name in bytewise
        if name not in scales and (source.info(name).dtype in FP8 or _is_fp4(source, name, names))
    ]


def _is_fp4(source: Source, name: str, names: set[str]) -> bool:
    """Whether bytes are pairs of FP4 codes."""
    named = name.rpartition(".")[2] in ("weight", PACKED) or any(other in names for other in _told(name, SCALE_NAMES))
    return named and len(source.info(name).shape) > 1


def _told(name: str, others: tuple[str, ...]) -> list[str]:
    """The names that tensors of these names have beside a weight."""
    module, _, last = name.rpartition(".")
    dot = module + "." if module else ""
    if last in ("weight", PACKED):
        return [dot + other for other in others]
    there = [other for other in others if other.startswith("weight_")]
    return [dot + other.replace("weight", last, 1) for other in there] + [f"{dot}{last}_{other}" for other in there]


def _activations(name: str, modules: Mapping[str, list[str]]) -> list[str]:
    """The tensors that say how a weight's inputs and outputs are rounded, and those of a cache in the module above."""
    module, _, last = name.rpartition(".")
    mine = set(ACTIVATIONS if last in ("weight", PACKED) else (f"{last}_{leaf}" for leaf in ACTIVATIONS))
    found = [other for other in modules[module] if other.rpartition(".")[2] in mine]
    above = modules.get(module.rpartition(".")[0], []) if module else []
    return found + [other for other in above if other.rpartition(".")[2] in CACHE]


def _coded(
    source: Source,
    section: Mapping[str, Any],
    dtype: torch.dtype,
    name: str,
    names: set[str],
    modules: Mapping[str, list[str]],
) -> Coded:
    module, _, last = name.rpartition(".")
    info = source.info(name)
    told = _told(name, SCALE_NAMES)
    scale = next((other for other in told if other in names), None)
    if scale is None:
        first = told[1 if last == PACKED else 0]
        raise damaged(source, name, f"is stored as {dtype_name(info.dtype)}, and its scales ({first}) are missing")
    scheme = scheme_of(source.folder, module, section)
    bits, stated = 4 if info.dtype in PAIRS else 8, whole(scheme, "num_bits")
    if stated not in (None, bits):
        raise damaged(source, name, f"has codes of {bits} bits, and config.json says {stated}")
    seconds = {other: divides for end, divides in SECOND.items() for other in _told(name, (end,))}
    second = next((other for other in seconds if other in names), None)
    nv = bits == 4 and source.info(scale).dtype == torch.float8_e4m3fn
    if nv and second is None:
        missing = next(other for other in seconds if other.endswith("global_scale") == (last == PACKED))
        raise damaged(source, name, f"is stored as NVFP4, and the scale of its scales ({missing}) is missing")
    tiles = _tiles(source, section, scheme, name, scale)
    found = scaled(
        source,
        name,
        scale,
        tiles,
        exponents=section.get("scale_fmt") == "ue8m0" or tiles == (1, MX),
        columns=section.get("quant_method") == "fbgemm_fp8",
        second=second if nv else None,
        divides=nv and seconds[str(second)],
    )
    weight = name.removesuffix("_packed") if last == PACKED else name
    if weight != name and weight in names:
        raise damaged(source, name, f"is stored beside {weight}, which is the same weight")
    parts = (name, scale, *([found.second] if found.second else []))
    dropped = tuple(other for other in _activations(name, modules) if other not in parts)
    return Coded(weight, found.shape, parts, partial(found.rows, dtype=dtype), dropped)


def _tiles(source: Source, section: Mapping[str, Any], scheme: Mapping[str, Any], name: str, scale: str) -> Tiles:
    """Rows and columns that share a scale, as config.json says, or the tool that wrote the folder has them."""
    four, kind = source.info(name).dtype in PAIRS, source.info(scale).dtype
    if four and section.get("quant_method") == "fp8":
        return 1, MX  # whatever the size of FP8's tiles
    strategy = scheme.get("strategy")
    group = whole(scheme, "group_size") if strategy in ("group", "tensor_group", None) else None
    stated = section.get("weight_block_size") or scheme.get("block_structure") or ([1, group] if group else None)
    if isinstance(stated, str):
        stated = stated.split("x")
    if strategy in ("tensor", "channel"):
        return None
    if stated is None and four:
        return 1, NV if kind == torch.float8_e4m3fn else MX
    if stated is None and "quant_algo" in section:
        if kind in (torch.uint8, torch.float8_e8m0fnu):
            return 1, MX
        if len(source.info(scale).shape) == 4:
            size = whole(section, "group_size") or MODELOPT_TILES
            return size, size
    if stated is None:
        return None
    sizes = [whole({"": size}, "") for size in stated] if isinstance(stated, list) else []
    if len(sizes) != 2 or not all(size and size > 0 for size in sizes):
        raise LlmqError(
            f"{source.folder / 'config.json'}: {stated!r} is no size of the tiles of {name}, which is two "
            "numbers ([128, 128]): download config.json again, or start from the unquantized model"
        )
    return int(sizes[0] or 0), int(sizes[1] or 0)
