"""compressed-tensors `int-quantized` and `float-quantized`: 8-bit weights for 8-bit activations (W8A8, FP8).

There is a scale for each output channel, or for each block of channels and inputs.

`spec` lists the tensors of a weight [out, in]: the codes are not packed; `config` has the configuration. Written
against compressed-tensors 0.20; tried with stock transformers 5.23 on the CPU, which rounds the activations of every
product (see llmq.grids.activations):

- Dynamic activations store nothing. Static ones store `input_scale` [1]. Scales must be in the model's dtype: loading
  converts them to it, so float32 scales would be rounded.
- Blocks at the end may have fewer channels; the inputs must be whole blocks.
- vLLM supports int8 activations with dynamic per-token or static per-tensor scales, float8 with either; weight scales
  per channel work with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, check_range, rounding_of
from llmq.grids.float8_block import spread
from llmq.grids.scheme import Scheme

WEIGHT, SCALE, INPUT_SCALE = "weight", "weight_scale", "input_scale"
SUFFIXES = (WEIGHT, SCALE, INPUT_SCALE)


def spec(
    shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a weight [out, in]: suffix → (dtype, shape). Raises LlmqError if groups do not divide `in`."""
    rows, width = shape
    check_range("minmax", scheme, width)
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        WEIGHT: (rounding_of(scheme.rules).code_dtype, (rows, width)),
        SCALE: (scale_dtype, (-(-rows // scheme.rules.rows), scheme.groups(width))),
    }
    if _static(scheme):
        entries[INPUT_SCALE] = (scale_dtype, (1,))
    return entries


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors to store, by suffix, as `spec` says.

    q: codes int8 or float8_e4m3fn [out, in], scale [out, groups], and for static activations the input's scale, which
    is stored in the scale's dtype. Raises LlmqError if that is missing, or if channels of a block differ in scale.
    """
    rows = q.scheme.rules.rows
    stored = q.scale[::rows].contiguous()
    if rows > 1 and not torch.equal(spread(stored, len(q.scale), q.scheme), q.scale):
        raise LlmqError(f"a {q.scheme} weight has scales that differ within a block: settle them by `rounded_on`")
    tensors = {WEIGHT: q.codes.contiguous(), SCALE: stored}
    if _static(q.scheme):
        if q.input_scale is None:
            raise LlmqError(f"a {q.scheme} weight with static activations needs the scale of its input")
        tensors[INPUT_SCALE] = q.input_scale.reshape(1).to(q.scale.dtype)
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`. Raises LlmqError if tensors are missing or their dtypes or shapes differ from `spec`."""
    missing = [s for s in SUFFIXES if s not in tensors and (s != INPUT_SCALE or _static(scheme))]
    if missing:
        raise LlmqError(f"a {scheme} weight needs {', '.join(missing)}, not in the checkpoint")
    codes, scale = tensors[WEIGHT], tensors[SCALE]
    for suffix, (dtype, shape) in spec(codes.shape, scheme, scale.dtype).items():
        found = tensors[suffix]
        if tuple(found.shape) != shape or (suffix == WEIGHT and found.dtype != dtype):
            raise LlmqError(
                f"{suffix} of a {scheme} weight must be {dtype} {[*shape]}, not {found.dtype} {[*found.shape]}"
            )
    if scheme.rules.rows == 1:
        return QuantizedWeight(codes, scale, None, scheme, input_scale=tensors.get(INPUT_SCALE))
    return QuantizedWeight(codes, spread(scale, len(codes), scheme), None, scheme, stored_scale=scale)


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`: codes are not packed, so that every part must only have whole blocks."""
    size = shape[1 if row_parallel else 0]
    return size % parts == 0 and size // parts % ((scheme.group_size or 1) if row_parallel else scheme.rules.rows) == 0


def _static(scheme: Scheme) -> bool:
    return scheme.activations is not None and not scheme.activations.dynamic
