"""compressed-tensors' `quantization_config`, for all of its layouts.

The reader's rules for it, tried and read in both:

- transformers (compressed_tensors.utils.match): a module takes the scheme of its exact name before a pattern before its
  class, and `ignore` beats all of them.
- vLLM (compressed_tensors/utils.py, find_matched_target): exact name, then class, and only then parts of a fused layer.
  So once the target "Linear" is there, it takes every fused layer whatever the names of its parts say.

Hence one scheme is written as the target "Linear", and several are all written by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmq.errors import LlmqError
from llmq.formats.base import Groups
from llmq.formats.compressed_tensors.packed import FORMAT
from llmq.grids.base import rounding_of
from llmq.grids.scheme import Scheme

QUANT_METHOD = "compressed-tensors"
VERSION = "0.19.0"


def layout_of(scheme: Scheme) -> str:
    """The name that compressed-tensors has for the way a scheme is stored."""
    if rounding_of(scheme.rules).code_dtype.is_floating_point:
        return "float-quantized"
    return FORMAT if scheme.activations is None else "int-quantized"


def config_of(groups: Groups, ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    groups: the module names of each scheme; ignore: the names of linear modules left alone. Names as in the checkpoint,
    without '.weight'. Raises LlmqError when nothing is quantized.
    """
    schemes = sorted((s for s, names in groups.items() if names), key=lambda s: (-len(groups[s]), str(s)))
    if not schemes:
        raise LlmqError("nothing is quantized: there is no configuration to write")
    alone = len(schemes) == 1
    kinds = {layout_of(scheme) for scheme in schemes}
    # Stock transformers 5.23 fails on packed zero points unless it is told to unpack them while loading; with several
    # schemes it would then decode all as the first.
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


def _weights(scheme: Scheme) -> dict[str, Any]:
    """The arguments that compressed-tensors calls QuantizationArgs."""
    return {
        "num_bits": scheme.bits,
        "type": "float" if rounding_of(scheme.rules).code_dtype.is_floating_point else "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "actorder": None,
        "dynamic": False,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    """How the input of a weight is rounded, as QuantizationArgs."""
    if scheme.activations is None:
        return None
    dynamic = scheme.activations.dynamic
    return _weights(scheme) | {
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
        "observer": None if dynamic else "minmax",
    }
