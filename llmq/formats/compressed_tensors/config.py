"""compressed-tensors' `quantization_config`, for all of its layouts.

How readers match modules to schemes (found in the code of both and tried):

- transformers (compressed_tensors.utils.match): a module's exact name has priority over a pattern, and a pattern over
  its class; `ignore` has priority over all.
- vLLM (compressed_tensors/utils.py, find_matched_target): exact name, then the parts of a fused layer, then class; in
  earlier versions class came before parts, so that a target "Linear" matched every fused layer, whatever its parts had.

Hence a single scheme is written as the target "Linear", and several schemes are all written by module name. So is a
single one beside towers (`with_targets`): vLLM's own names for a tower's layers are often none that `ignore` could
have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from llmq.errors import LlmqError
from llmq.formats.base import Groups
from llmq.formats.compressed_tensors.packed import FORMAT
from llmq.grids.base import rounding_of
from llmq.grids.scheme import Scheme

QUANT_METHOD = "compressed-tensors"
INTEGERS = "int-quantized"
VERSION = "0.19.0"


def layout_of(scheme: Scheme) -> str:
    """compressed-tensors' name for the layout of a scheme."""
    if rounding_of(scheme.rules).code_dtype.is_floating_point:
        return "float-quantized"
    return FORMAT if scheme.activations is None else INTEGERS


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
    """The rounding of a weight's input, as QuantizationArgs."""
    if scheme.activations is None:
        return None
    dynamic = scheme.activations.dynamic
    return _weights(scheme) | {
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
        "observer": None if dynamic else "minmax",
    }
