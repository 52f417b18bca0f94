"""Weights in float8_e4m3fn with one scale per output channel: w ≈ code · scale.

The format: Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433, table 1: sign, 4 bits of
exponent, 3 of mantissa, largest 448, no infinity. `minmax` scales a channel's largest magnitude to 448. On a
floating-point grid a scale that is too large loses little, so `mse` gains less than on integers: it searches between
min-max and twice min-max for the scale with the least error, and is never worse (3 % less error on normal weights).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import Rounding, check_range, storable
from llmq.grids.scheme import Scheme
from llmq.grids.table import find

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
CHUNK = 1 << 18
# Candidate multiples of min-max: one octave, after which the mantissas repeat. Half the step gains 0.5 % more.
STEPS = tuple(2.0 ** (step / 8) for step in range(1, 8))


class Float8(Rounding):
    """See `Rounding`: rounding is torch's conversion to float8."""

    code_dtype = DTYPE

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`: 253, as 0 and −0 are the same point."""
        return _levels(device)

    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """See `Rounding.nearest`: values beyond ±448 are clipped. There are no zero points."""
        return scaled.clamp_(-LARGEST, LARGEST).to(DTYPE).to(torch.float32)

    def encode(self, points: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.encode`."""
        return points.to(DTYPE)

    def decode(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """See `Rounding.decode`."""
        return codes

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Rounding.find_scale`."""
        check_range(method, scheme, weight.shape[1])
        return find_float8_scale(weight, method, scale_dtype, importance), None

    def round_input(self, scaled: Tensor) -> Tensor:
        """See `Rounding.round_input`."""
        return scaled.clamp(-LARGEST, LARGEST).to(DTYPE).to(scaled.dtype)


@cache
def _levels(device: torch.device) -> Tensor:
    every = torch.arange(256, dtype=torch.uint8, device=device).view(DTYPE).to(torch.float32)
    return torch.unique(every[torch.isfinite(every)])  # type: ignore[no-any-return]


def find_float8_scale(
    weight: Tensor,
    method: str = "minmax",
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: Tensor | None = None,
) -> Tensor:
    """The scale of every output channel, in its stored dtype.

    weight: any float [out, in]; method: 'minmax', 'mse', or 'weighted' by the importance, float [in] or [out,
    in]. Returns [out, 1] in scale_dtype, positive, normal and finite; 1 for a channel of zeros. Temporaries stay below
    a few MiB for any matrix, unless a single row is larger. Raises LlmqError if the weight is not finite, or the
    importance is missing.
    """
    if method not in find("fp8").ranges:
        raise LlmqError(f"range of an fp8 weight must be one of {', '.join(find('fp8').ranges)}, not {method!r}")
    if method == "weighted" and importance is None:
        raise LlmqError("range 'weighted' needs the importance of every input; use 'mse' without it")
    by = None
    if method == "weighted" and importance is not None:
        by = importance.to(torch.float32).expand_as(weight)
    rows, width = weight.shape
    step = max(1, CHUNK // width)
    top = torch.empty(rows, 1, dtype=torch.float32, device=weight.device)
    for start in range(0, rows, step):
        top[start : start + step] = weight[start : start + step].abs().amax(1, keepdim=True).to(torch.float32)
    if not bool(torch.isfinite(top).all()):
        raise LlmqError("the weight holds values that are not finite")
    scale = storable(top / LARGEST, scale_dtype)
    if method != "minmax":
        candidates = [scale] + [storable(top * (factor / LARGEST), scale_dtype) for factor in STEPS]
        errors = torch.stack([_errors(weight, candidate, top, by) for candidate in candidates])
        scale = torch.stack(candidates).gather(0, errors.argmin(0, keepdim=True))[0]
    return torch.where(top > 0, scale, 1.0).to(scale_dtype)


def round_to_float8(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest code of every element; elements beyond ±448 are clipped.

    weight: any float [out, in]; scale: any float [out, 1]. Returns float8_e4m3fn [out, in].
    """
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=DTYPE, device=weight.device)
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = weight[start : start + step].to(torch.float32) / scale[start : start + step].to(torch.float32)
        codes[start : start + step] = part.clamp_(-LARGEST, LARGEST).to(DTYPE)
    return codes


def _errors(weight: Tensor, scale: Tensor, top: Tensor, by: Tensor | None) -> Tensor:
    """Σ (w − ŵ)² of every channel, weighted by the importance [out, in] if given; in units of the channel's largest
    magnitude, so that it does not underflow: float32 [out, 1].
    """
    rows, width = weight.shape
    errors = torch.empty_like(scale)
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        wanted = weight[part].to(torch.float32)
        found = round_to_float8(wanted, scale[part]).to(torch.float32).mul_(scale[part])
        found.sub_(wanted).div_(top[part].clamp_min(1e-38)).square_()
        errors[part] = (found if by is None else found.mul_(by[part])).sum(1, keepdim=True)
    return errors
