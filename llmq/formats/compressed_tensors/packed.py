"""compressed-tensors `pack-quantized`: integer weights of 2–8 bits that transformers and vLLM read.

`spec` lists the tensors of a weight [out, in]. Written against compressed-tensors 0.19 and 0.20 (0.17 packed 3, 5, 6
and 7 bits differently).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.packing import pack_codes, pack_columns, packed_width, unpack_codes, unpack_columns
from llmq.grids.base import QuantizedWeight, check_range
from llmq.grids.scheme import Scheme

FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
SUFFIXES = (PACKED, SCALE, SHAPE, ZERO)


def spec(
    shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a weight [out, in]: suffix → (dtype, shape). Raises LlmqError if groups do not divide `in`."""
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
    """The inverse of `pack`. Raises LlmqError if tensors are missing or their shapes differ from `spec`."""
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


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`: every part must have whole words, and along the inputs whole groups."""
    rows, width = shape
    if not row_parallel:
        # Zero points are packed along the outputs.
        return rows % parts == 0 and (scheme.symmetric or rows // parts * scheme.bits % 32 == 0)
    part = width // parts
    return width % parts == 0 and part % (scheme.group_size or 1) == 0 and part * scheme.bits % 32 == 0
