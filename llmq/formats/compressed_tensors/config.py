"""compressed-tensors' `quantization_config`, for all of its layouts.

How readers match modules to schemes (found in the code of both and tried):

- transformers (compressed_tensors.utils.match): a module's exact name has priority over a pattern, and a pattern over
  its class; `ignore` has priority over all.
- vLLM (compressed_tensors/utils.py, find_matched_target): exact name, then the parts of a fused layer, then class; in
  earlier versions class came before parts, so that a target "Linear" matched every fused layer, whatever its parts had.

Hence a single scheme is written as the target "Linear", and several schemes are all written by module name. So is a
single one beside towers (`with_targets`): vLLM has names for some towers' layers that no entry of `ignore` matches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from llmq.errors import LlmqError
from llmq.formats.base import Groups, dtype_name
from llmq.formats.compressed_tensors.microscaled import DIVIDED, FORMATS, divided
from llmq.formats.compressed_tensors.packed import FORMAT
from llmq.grids.cache import Cache
from llmq.grids.scheme import Scheme
from llmq.grids.table import find

QUANT_METHOD = "compressed-tensors"
INTEGERS = "int-quantized"
VERSION = "0.19.0"
SCALES = {layout: torch.float8_e4m3fn if layout in DIVIDED else torch.uint8 for layout in FORMATS}
"""The dtypes of stored scales, where they are not the model's."""


def layout_of(scheme: Scheme) -> str:
    """compressed-tensors' name for the layout of a scheme."""
    if scheme.rules.layout:
        return scheme.rules.layout
    # compressed-tensors takes int8 codes for integers beside any rounded inputs, vLLM these for packed ones.
    return FORMAT if scheme.activations is None or scheme.activations.grid else INTEGERS


def config_of(groups: Groups, ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    groups: the module names of each scheme; ignore: the names of unquantized linear modules. Names as in the
    checkpoint, without '.weight'. Raises LlmqError if nothing is quantized.
    """
    # The order given is kept: transformers takes the first scheme that has names for the scheme of all experts.
    schemes = [s for s, names in groups.items() if names]
    if not schemes:
        raise LlmqError("nothing is quantized: there is no configuration to write")
    alone = len(schemes) == 1
    kinds = {layout_of(scheme) for scheme in schemes}
    # Stock transformers 5.23 fails on packed zero points unless "dequantize" is set; with several schemes, that option
    # would decode all of them as the first one.
    dense = {"dequantize": True} if alone and not schemes[0].symmetric else {}
    return dense | {
        "quant_method": QUANT_METHOD,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if alone else sorted(groups[scheme]),
                "format": layout_of(scheme),
                "weights": _weights(scheme),
                "input_activations": _inputs(scheme),
                "output_activations": None,
            }
            for index, scheme in enumerate(schemes)
        },
        "ignore": sorted(set(ignore)),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def with_cache(section: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """A `quantization_config` that says how keys and values are rounded; their scales are k_scale and v_scale beside
    the weights of the module that keeps them."""
    return dict(section) | {
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "int" if cache.integers else "float",
            "symmetric": True,
            "strategy": "attn_head" if cache.heads else "tensor",
            "group_size": None,
            "actorder": None,
            "dynamic": False,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
    }


def loads_dense(schemes: Collection[Scheme]) -> bool:
    """Whether stock transformers can unpack the weights while it loads them: with one scheme for all, which rounds no
    inputs."""
    return len(schemes) == 1 and all(scheme.activations is None for scheme in schemes)


def dense(section: Mapping[str, Any]) -> dict[str, Any]:
    """A `quantization_config` with which stock transformers unpacks the weights while it loads them."""
    return dict(section) | {"dequantize": True}


def with_targets(section: Mapping[str, Any], names: Iterable[str], classes: bool = True) -> dict[str, Any]:
    """A `quantization_config` in which modules are targets by name, where one group has the class as its target.

    classes: whether the class stays a target beside them: vLLM counts an output embedding as no `Linear`. Without it,
    the names must be those of all quantized modules.
    """
    groups = section["config_groups"]
    if len(groups) > 1:
        return dict(section)
    (name, group), *_ = groups.items()
    targets = [*(group["targets"] if classes else ()), *sorted(set(names))]
    return dict(section) | {"config_groups": {name: group | {"targets": targets}}}


def _weights(scheme: Scheme) -> dict[str, Any]:
    """The weights' scheme, as compressed-tensors' QuantizationArgs."""
    # Only the layouts of grids other than the integers have names of their own.
    small, rows = SCALES.get(scheme.rules.layout), scheme.rules.rows
    strategy = "channel" if scheme.group_size is None else "group" if rows == 1 else "block"
    return ({} if small is None else {"scale_dtype": f"torch.{dtype_name(small)}"}) | {
        "num_bits": scheme.bits,
        "type": "float" if scheme.rules.layout else "int",
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if divided(scheme) else strategy,
        "group_size": scheme.group_size if rows == 1 else None,
        "actorder": None,
        "dynamic": False,
        "block_structure": None if rows == 1 else [rows, scheme.group_size],
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    """The rounding of a weight's input, as QuantizationArgs."""
    inputs = scheme.inputs
    if scheme.activations is None or inputs is None:
        return None
    dynamic = scheme.activations.dynamic
    rules = find(inputs.grid or scheme.grid)
    same = Scheme(rules.bits[0], rules.group_sizes[0], grid=inputs.grid) if inputs.grid else scheme
    if inputs.group_size is None:
        return _weights(same) | {
            "strategy": "token" if dynamic else "tensor",
            "dynamic": dynamic,
            "observer": None if dynamic else "minmax",
        }
    # A static scale is that of the groups' scales, which are found as the model runs.
    return _weights(same) | {
        "strategy": "group" if dynamic else "tensor_group",
        "group_size": inputs.group_size,
        "block_structure": None,
        "dynamic": True if dynamic else "local",
        "observer": None if dynamic else "static_minmax",
    }
