"""compressed-tensors' microscaling floats: nvfp4-, mxfp4- and mxfp6-pack-quantized, and mxfp8-quantized.

`spec` lists the tensors of a weight [out, in]. Codes of 4 and 6 bits are a dense little-endian bit stream in
`weight_packed`, those of 8 are `weight`. Scales are powers of two, stored as exponents + 127, or, in NVFP4, e4m3, which
are divided by `weight_global_scale`. Rounded inputs store nothing, or, in NVFP4, the divisor of their scales,
`input_global_scale`. Written against compressed-tensors 0.20, whose own compressors pack the same bytes
(a test); tried with stock transformers 5.23, which loads 4 and 6 bits in bfloat16 only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.packing import pack_codes, unpack_codes
from llmq.formats.plain import CodebookWeight, Entry
from llmq.grids.base import QuantizedWeight, check_range, rounding_of
from llmq.grids.nvfp4 import divisor_of
from llmq.grids.scheme import Scheme
from llmq.grids.table import GRIDS

PACKED, WEIGHT, SCALE, GLOBAL = "weight_packed", "weight", "weight_scale", "weight_global_scale"
INPUT_GLOBAL = "input_global_scale"
DIVIDED = ("nvfp4-pack-quantized",)
"""The layouts with a scale of scales."""
FOURS = (*DIVIDED, "mxfp4-pack-quantized")
"""Those with codes of 4 bits, which look up e2m1's numbers: what stands for a stack of experts stays packed in them."""
FORMATS = (*FOURS, "mxfp6-pack-quantized", "mxfp8-quantized")
BIAS, MOST = 127, 254


def spec(
    shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a weight [out, in]: suffix → (dtype, shape). Raises LlmqError if groups do not divide `in`."""
    rows, width = shape
    check_range("minmax", scheme, width)
    codes, scales = rounding_of(scheme.rules).code_dtype, (rows, scheme.groups(width))
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = (
        {WEIGHT: (codes, (rows, width))}
        if codes.is_floating_point
        else {PACKED: (torch.uint8, (rows, width * scheme.bits // 8))}
    )
    if divided(scheme):
        entries |= {SCALE: (torch.float8_e4m3fn, scales), GLOBAL: (torch.float32, (1,))}
        return entries | ({INPUT_GLOBAL: (torch.float32, (1,))} if scheme.activations else {})
    return entries | {SCALE: (torch.uint8, scales)}


def divided(scheme: Scheme) -> bool:
    """Whether a scheme has a scale of scales."""
    return scheme.rules.layout in DIVIDED


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors to store, by suffix, as `spec` says. Raises LlmqError for a weight without the scale of its scales
    or of its input's, or with a scale that cannot be stored."""
    scheme, half = q.scheme, 1 << (q.scheme.bits - 1)
    if q.codes.dtype.is_floating_point:
        tensors = {WEIGHT: q.codes.contiguous()}
    else:
        # What is packed has an offset of its own.
        tensors = {PACKED: pack_codes(q.codes.to(torch.int8) - half, scheme.bits).view(torch.uint8)}
    scale = q.scale.to(torch.float32)
    if divided(scheme):
        if not isinstance(q.stored_scale, Tensor):
            raise LlmqError(f"a {scheme} weight needs the scale of its scales: return it by `Rounding.finish`")
        stored = (scale * q.stored_scale).to(torch.float8_e4m3fn)
        exact = torch.equal(stored.to(torch.float32) / q.stored_scale, scale)
        tensors |= {SCALE: stored.contiguous(), GLOBAL: q.stored_scale.to(torch.float32).reshape(1)}
        if scheme.activations:
            if q.input_scale is None:
                raise LlmqError(f"a {scheme} weight needs the scale of its input")
            tensors |= {INPUT_GLOBAL: divisor_of(q.input_scale.reshape(1))}
    else:
        stored = (torch.frexp(scale)[1] - 1 + BIAS).clamp(0, MOST).to(torch.uint8)
        exact = torch.equal(_powers(stored), scale)
        tensors |= {SCALE: stored.contiguous()}
    if not exact:
        raise LlmqError(f"a {scheme} weight has scales that cannot be stored: round them by `Rounding.storable`")
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`. Raises LlmqError if tensors are missing or their dtypes or shapes differ from `spec`."""
    floating = rounding_of(scheme.rules).code_dtype.is_floating_point
    first = WEIGHT if floating else PACKED
    shared = (GLOBAL, *((INPUT_GLOBAL,) if scheme.activations else ())) if divided(scheme) else ()
    missing = [s for s in (first, SCALE, *shared) if s not in tensors]
    if missing:
        raise LlmqError(f"a {scheme} weight needs {', '.join(missing)}, not in the checkpoint")
    stored = tensors[first]
    rows, width = stored.shape[0], stored.shape[1] if floating else stored.shape[1] * 8 // scheme.bits
    for suffix, (dtype, shape) in spec((rows, width), scheme, torch.float32).items():
        found = tensors[suffix]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise LlmqError(
                f"{suffix} of a {scheme} weight must be {dtype} {[*shape]}, not {found.dtype} {[*found.shape]}"
            )
    codes = stored
    if not floating:
        signed = unpack_codes(stored.contiguous().view(torch.int32), scheme.bits, width)
        codes = (signed.to(torch.int16) + (1 << (scheme.bits - 1))).to(torch.uint8)
    if divided(scheme):
        scale = tensors[SCALE].to(torch.float32) / tensors[GLOBAL]
        inputs = None if scheme.activations is None else tensors[INPUT_GLOBAL].reciprocal()
        return QuantizedWeight(codes, scale, None, scheme, input_scale=inputs, stored_scale=tensors[GLOBAL])
    return QuantizedWeight(codes, _powers(tensors[SCALE]), None, scheme)


def splits(shape: Sequence[int], scheme: Scheme, parts: int, row_parallel: bool) -> bool:
    """See `Format.splits`: along the inputs, every part must have whole groups, which are whole bytes, of
    rounded inputs too."""
    size = shape[1 if row_parallel else 0]
    return size % parts == 0 and (not row_parallel or size // parts % (scheme.step or 1) == 0)


def _powers(exponents: Tensor) -> Tensor:
    """The powers of two of stored exponents, float32."""
    return torch.exp2(exponents.to(torch.float32) - BIAS)


@dataclass(frozen=True)
class FourBitLayer:
    """The stored tensors of a weight with codes of 4 bits; see `plain.Layer`. group: of inputs that share a scale;
    divided: whether scales are e4m3 and divided by one number, else they are exponents."""

    shape: tuple[int, int]
    group: int
    divided: bool

    @property
    def entries(self) -> Mapping[str, Entry]:
        rows, width = self.shape
        scales = (rows, width // self.group)
        entries = {PACKED: Entry((torch.uint8,), (rows, width // 2))}
        if not self.divided:
            return entries | {SCALE: Entry((torch.uint8,), scales)}
        return entries | {SCALE: Entry((torch.float8_e4m3fn,), scales), GLOBAL: Entry((torch.float32,), (1,))}

    def read(self, tensors: Mapping[str, Tensor]) -> CodebookWeight:
        """Raises LlmqError for a scale that is not a number."""
        stored, packed = tensors[SCALE], tensors[PACKED]
        scale = stored.to(torch.float32) / tensors[GLOBAL] if self.divided else _powers(stored)
        if not bool(torch.isfinite(scale).all()) or (not self.divided and bool((stored > MOST).any())):
            raise LlmqError(f"{SCALE} has values that are not finite")
        rounding, codes = rounding_of(GRIDS["mxfp4"]), torch.arange(16, dtype=torch.uint8, device=packed.device)
        table = rounding.decode(codes, Scheme(4, 32, grid="mxfp4")).to(torch.float32)
        # The first code of a byte is in its low half here, and in the high one there.
        turned = (packed << 4 | packed >> 4).view(-1)
        return CodebookWeight(turned, scale.view(-1), table, None, None, 0.0, *self.shape, self.group)
