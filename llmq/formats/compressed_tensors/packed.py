"""compressed-tensors `pack-quantized`: integer weights of 2–8 bits that transformers and vLLM read.

The configuration here is that of all of compressed-tensors' formats; the bytes of the 8-bit ones are in `eight_bit`.

What is stored for a weight [out, in] is listed in `spec`. Written against compressed-tensors 0.19 and 0.20 (0.17 packed
3, 5, 6 and 7 bits differently). The reader's rules for `config`, tried and read in both:

- transformers (compressed_tensors.utils.match): a module takes the scheme of its exact name before a pattern before its
  class, and `ignore` beats all of them.
- vLLM (compressed_tensors/utils.py, find_matched_target): exact name, then class, and only then parts of a fused layer.
  So once the target "Linear" is there, it takes every fused layer whatever the names of its parts say.

Hence one scheme is written as the target "Linear", and several are all written by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.packing import pack_codes, pack_columns, packed_width, unpack_codes, unpack_columns
from llmq.grids.base import QuantizedWeight
from llmq.grids.ranges import check_range
from llmq.grids.scheme import Scheme

QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
VERSION = "0.19.0"
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
SUFFIXES = (PACKED, SCALE, SHAPE, ZERO)


def spec(
    shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a weight [out, in] becomes: suffix → (dtype, shape). Raises LlmqError when groups do not divide `in`."""
    rows, width = shape
    check_range("minmax", scheme, width)
    groups = scheme.groups(width)
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        PACKED: (torch.int32, (rows, packed_width(width, scheme.bits))),
        SCALE: (scale_dtype, (rows, groups)),
        SHAPE: (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        entries[ZERO] = (torch.int32, (packed_width(rows, scheme.bits), groups))
    return entries


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors to store, by suffix, as `spec` says."""
    tensors = {
        PACKED: pack_codes(q.codes, q.scheme.bits),
        SCALE: q.scale.contiguous(),
        SHAPE: torch.tensor(q.codes.shape, dtype=torch.int64),
    }
    if q.zero is not None:
        tensors[ZERO] = pack_columns(q.zero, q.scheme.bits)
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`. Raises LlmqError when tensors are missing or have shapes other than `spec`'s."""
    missing = [s for s in SUFFIXES if s not in tensors and (s != ZERO or not scheme.symmetric)]
    if missing:
        raise LlmqError(f"a {scheme} weight needs {', '.join(missing)}, not in the checkpoint")
    rows, width = (int(n) for n in tensors[SHAPE].tolist())
    for suffix, (_, shape) in spec((rows, width), scheme, tensors[SCALE].dtype).items():
        if tuple(tensors[suffix].shape) != shape:
            raise LlmqError(
                f"{suffix} of a {scheme} weight [{rows}, {width}] must be {[*shape]}, not {[*tensors[suffix].shape]}"
            )
    zero = None if scheme.symmetric else unpack_columns(tensors[ZERO], scheme.bits, rows)
    return QuantizedWeight(unpack_codes(tensors[PACKED], scheme.bits, width), tensors[SCALE], zero, scheme)


def format_of(scheme: Scheme) -> str:
    """The name that compressed-tensors has for the way a scheme is stored."""
    if scheme.grid == "fp8":
        return "float-quantized"
    return FORMAT if scheme.activations is None else "int-quantized"


def config(groups: Mapping[Scheme, Sequence[str]], ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    groups: the module names of each scheme; ignore: the names of linear modules left alone. Names as in the checkpoint,
    without '.weight'. Raises LlmqError when nothing is quantized.
    """
    schemes = sorted((s for s, names in groups.items() if names), key=lambda s: (-len(groups[s]), str(s)))
    if not schemes:
        raise LlmqError("nothing is quantized: there is no configuration to write")
    alone = len(schemes) == 1
    kinds = {format_of(scheme) for scheme in schemes}
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
                "format": format_of(scheme),
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
        "type": "float" if scheme.grid == "fp8" else scheme.grid,
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
