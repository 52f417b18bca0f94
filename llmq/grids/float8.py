"""Weights in float8_e4m3fn with one scale per output channel: w ≈ code · scale.

The format: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433, table 1: sign, 4 bits of
exponent, 3 of mantissa, largest 448, no infinity. `minmax` puts a channel's largest magnitude at 448. A floating grid
loses little to a scale that is too large, so `mse` gains less than on integers: it finds where the mantissa's steps
suit a channel best, between min-max and twice it, and is never worse (3 % less error on normal weights).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import LlmqError

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
RANGES = ("minmax", "mse")
CHUNK = 1 << 18
# Multiples of min-max that are tried: one octave, beyond which the mantissas repeat. Half the step gains 0.5 % more.
STEPS = tuple(2.0 ** (step / 8) for step in range(1, 8))


def find_float8_scale(weight: Tensor, method: str = "minmax", scale_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The scale of every output channel, as it is stored.

    weight: any float [out, in]; method: 'minmax' or 'mse'. Returns
    [out, 1] in scale_dtype, positive, normal and finite; 1 for a channel of zeros. Temporaries stay below a few MiB
    whatever the matrix, unless one row is longer than that. Raises LlmqError when the method is unknown or the weight
    is not finite.
    """
    if method not in RANGES:
        raise LlmqError(f"range of an 8-bit float weight must be one of {', '.join(RANGES)}, not {method!r}")
    rows, width = weight.shape
    step = max(1, CHUNK // width)
    top = torch.empty(rows, 1, dtype=torch.float32, device=weight.device)
    for start in range(0, rows, step):
        top[start : start + step] = weight[start : start + step].abs().amax(1, keepdim=True).to(torch.float32)
    if not bool(torch.isfinite(top).all()):
        raise LlmqError("the weight holds values that are not finite")
    scale = _stored(top / LARGEST, scale_dtype)
    if method == "mse":
        candidates = [scale] + [_stored(top * (factor / LARGEST), scale_dtype) for factor in STEPS]
        errors = torch.stack([_errors(weight, candidate, top) for candidate in candidates])
        scale = torch.stack(candidates).gather(0, errors.argmin(0, keepdim=True))[0]
    return torch.where(top > 0, scale, 1.0).to(scale_dtype)


def round_to_float8(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest code of every weight, those beyond ±448 clipped.

    weight: any float [out, in]; scale: any float [out, 1]. Returns float8_e4m3fn [out, in].
    """
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=DTYPE, device=weight.device)
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = weight[start : start + step].to(torch.float32) / scale[start : start + step].to(torch.float32)
        codes[start : start + step] = part.clamp_(-LARGEST, LARGEST).to(DTYPE)
    return codes


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it comes back from disk: rounded to its dtype, finite, normal; float32."""
    info = torch.finfo(dtype)
    return scale.clamp(info.tiny, info.max).to(dtype).to(torch.float32)


def _errors(weight: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    """Σ (w − ŵ)² of every channel, in units of its largest magnitude so that none vanishes: float32 [out, 1]."""
    rows, width = weight.shape
    errors = torch.empty_like(scale)
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        wanted = weight[part].to(torch.float32)
        found = round_to_float8(wanted, scale[part]).to(torch.float32).mul_(scale[part])
        errors[part] = found.sub_(wanted).div_(top[part].clamp_min(1e-38)).square_().sum(1, keepdim=True)
    return errors
