"""compressed-tensors `int-quantized` and `float-quantized`: 8-bit weights for 8-bit activations (W8A8, FP8).

`spec` lists the tensors of a weight [out, in]: the codes are not packed; `config` has the configuration. Written
against compressed-tensors 0.20; tried with stock transformers 5.23 on the CPU, which rounds the activations of every
product (see llmq.grids.activations):

- Dynamic activations store nothing. Static ones store `input_scale` [1]. Scales must be in the model's dtype: loading
  converts them to it, so float32 scales would be rounded.
- vLLM supports int8 activations with dynamic per-token or static per-tensor scales, float8 with either; weight scales
  per channel work with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import QuantizedWeight, rounding_of
from llmq.grids.scheme import Scheme

WEIGHT, SCALE, INPUT_SCALE = "weight", "weight_scale", "input_scale"
SUFFIXES = (WEIGHT, SCALE, INPUT_SCALE)


def spec(
    shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that store a weight [out, in]: suffix → (dtype, shape)."""
    rows, width = shape
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        WEIGHT: (rounding_of(scheme.rules).code_dtype, (rows, width)),
        SCALE: (scale_dtype, (rows, 1)),
    }
    if _static(scheme):
        entries[INPUT_SCALE] = (scale_dtype, (1,))
    return entries


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors to store, by suffix, as `spec` says.

    q: codes int8 or float8_e4m3fn [out, in], scale [out, 1], and for static activations the input's scale, which is
    stored in the scale's dtype. Raises LlmqError if that is missing.
    """
    tensors = {WEIGHT: q.codes.contiguous(), SCALE: q.scale.contiguous()}
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
    return QuantizedWeight(codes, scale, None, scheme, input_scale=tensors.get(INPUT_SCALE))


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`: always, as codes are not packed and each output channel has its own scale."""
    return shape[1 if row_parallel else 0] % parts == 0


def _static(scheme: Scheme) -> bool:
    return scheme.activations is not None and not scheme.activations.dynamic
