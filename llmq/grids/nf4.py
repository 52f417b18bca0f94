"""NF4: 4 bits whose 16 levels are quantiles of a normal distribution, optionally with quantized scales.

Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3: the flattened weight is cut into blocks (of 64), each divided
by its largest magnitude and rounded to the nearest level; double quantization subtracts the mean of these magnitudes
and stores them in 8 bits, in blocks of 256.

The result is bit for bit what bitsandbytes 0.50 stores when it quantizes on the CPU; tests compare the two. So the
details of its rounding are followed: a whole block is multiplied by the reciprocal of its magnitude, a last partial
block is divided by it; ties go to the lower level; the 8-bit codes come from a table of 65536 steps, so they are not
always the nearest. Both tables of levels are bitsandbytes' own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import Quantized, QuantizedWeight
from llmq.grids.codebook import Codebook
from llmq.grids.scheme import Scheme

CHUNK = 1 << 20
NESTED_BLOCK = 256
# The smallest magnitude that bitsandbytes divides by; a last partial block of zeros stores it.
SMALLEST = 1e-38
# The number of steps in [-1, 1] of the 8-bit codes' table.
STEPS = 65535


@dataclass(frozen=True, eq=False)
class Nested:
    """Double quantization: a block's magnitude is codebook[code] · absmax + offset.

    absmax: float32 [ceil(blocks/256)]; codebook: float32 [256], ascending; offset: the mean of the magnitudes; codes:
    uint8 [blocks], or None if they are kept elsewhere.
    """

    absmax: Tensor
    codebook: Tensor
    offset: float
    codes: Tensor | None = None

    def read(self, codes: Tensor) -> Tensor:
        """The magnitudes, float32 [blocks], of codes, uint8 [blocks]."""
        spread = self.absmax.repeat_interleave(NESTED_BLOCK)[: len(codes)]
        return self.codebook[codes.to(torch.int32)].mul_(spread).add_(self.offset)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight [out, in] of n values in NF4: w ≈ codebook[code] · magnitude of its block.

    packed: uint8 [ceil(n/2), 1], row-major, the first of two codes in the high four bits; absmax: the magnitudes,
    float32 [ceil(n/block)], or their codes, uint8, if `nested` is given; codebook: float32 [16], ascending; shape: of
    the weight; dtype: of the original and the dequantized weight; notes: fallbacks used, for the report.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: Scheme
    nested: Nested | None = None
    notes: tuple[str, ...] = ()

    def magnitudes(self) -> Tensor:
        """The magnitude of every block, float32 [ceil(n/block)]."""
        if self.nested is None:
            return self.absmax
        return self.nested.read(self.absmax)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in], computed in float32 and rounded once to `dtype`.

        Equal to bitsandbytes' dequantize_4bit bit for bit, except for two faults of its AVX-512 kernel: it uses the
        wrong magnitudes if 16 divides the inputs but the block size does not, and it flushes subnormal bfloat16 to 0.
        """
        block, n = group_of(self.scheme), self.shape[0] * self.shape[1]
        weight = torch.empty(n, dtype=dtype, device=self.packed.device)
        absmax, packed = self.magnitudes(), self.packed.view(-1)
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            pairs = packed[start // 2 : (stop + 1) // 2]
            codes = torch.stack((pairs >> 4, pairs & 15), 1).view(-1)[: stop - start]
            scale = absmax[start // block : -(-stop // block)].repeat_interleave(block)[: stop - start]
            weight[start:stop] = self.codebook[codes.to(torch.int32)].mul_(scale)
        return weight.view(self.shape)


class NF4(Codebook):
    """See `Rounding`: scales are float32 for any model dtype, and 'minmax' is bitsandbytes' own rounding."""

    apart = False
    scale_dtype = torch.float32

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """See `Rounding.levels`: bitsandbytes' own 16."""
        return tables(device)[0]

    def settle(self, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None, Nested | None]:
        """See `Rounding.settle`: with double quantization, the scales after quantization, and their codes."""
        if not scheme.double_quant:
            return scale, zero, None
        codes, nested = double_quantize(scale.flatten())
        return nested.read(codes).view_as(scale), zero, replace(nested, codes=codes)

    def round(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, method: str, importance: Tensor | None
    ) -> Quantized:
        """See `Rounding.round`."""
        if method == "minmax":
            return quantize_nf4(weight, scheme, scale_dtype)
        return super().round(weight, scheme, scale_dtype, method, importance)

    def finish(self, weight: QuantizedWeight, dtype: torch.dtype) -> NF4Weight:
        """See `Rounding.finish`. Raises LlmqError if the codes of double-quantized scales are missing."""
        scheme, nested = weight.scheme, weight.stored_scale
        if scheme.double_quant and not isinstance(nested, Nested):
            raise LlmqError("a double-quantized weight needs the codes of its scales: round it by `rounded_on`")
        codes = weight.codes.reshape(-1)
        packed = ((codes[::2] << 4) | codes[1::2]).view(-1, 1)
        absmax = weight.scale.flatten() if nested is None else nested.codes
        rows, width = weight.codes.shape
        codebook = tables(codes.device)[0]
        return NF4Weight(packed, absmax, codebook, (rows, width), dtype, scheme, nested, weight.notes)

    def reopen(self, weight: Quantized) -> QuantizedWeight:
        """See `Rounding.reopen`."""
        if not isinstance(weight, NF4Weight):
            return super().reopen(weight)
        rows, width = weight.shape
        packed = weight.packed.view(-1)
        codes = torch.stack((packed >> 4, packed & 15), 1).view(rows, width)
        scale = weight.magnitudes().view(rows, -1)
        nested = None if weight.nested is None else replace(weight.nested, codes=weight.absmax)
        return QuantizedWeight(codes, scale, None, weight.scheme, weight.notes, stored_scale=nested)


def group_of(scheme: Scheme) -> int:
    """The block size: an nf4 scheme always has a group size."""
    assert scheme.group_size is not None
    return scheme.group_size


def quantize_nf4(weight: Tensor, scheme: Scheme, dtype: torch.dtype | None = None) -> NF4Weight:
    """Quantize a weight to NF4 with bitsandbytes' own rounding.

    weight: any float [out, in]; scheme: grid 'nf4', its group size the block, its double_quant whether the magnitudes
    are quantized too; dtype: to which readers dequantize, by default the weight's own. Temporaries: some tens of MiB,
    and with double quantization several times the magnitudes (one float32 per block). Raises LlmqError if a value is
    not finite, the block size is invalid, bitsandbytes is not installed, or the magnitudes are too large to be
    quantized.

    The offset is torch's mean, as in bitsandbytes: from about 100 thousand blocks on, its last bit depends on the
    number of threads.
    """
    block, n = group_of(scheme), weight.numel()
    levels, _ = tables(weight.device)
    bounds = (levels[:-1] + levels[1:]) / 2
    flat = weight.reshape(-1)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // block), dtype=torch.float32, device=weight.device)
    for start in range(0, n, CHUNK):
        part = flat[start : start + CHUNK].to(torch.float32)
        first = start // block
        scaled = _scaled(part, absmax[first : first + -(-len(part) // block)], block)
        codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
        packed[start // 2 : (start + len(codes)) // 2] = (codes[::2] << 4) | codes[1::2]
    if not bool(torch.isfinite(absmax).all()):
        raise LlmqError("the weight holds values that are not finite")
    rows, width = weight.shape
    made = NF4Weight(packed.view(-1, 1), absmax, levels, (rows, width), dtype or weight.dtype, scheme)
    return _nest(made) if scheme.double_quant else made


def _scaled(part: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Consecutive values divided by their blocks' magnitudes, which are written to `absmax`. Returns float32 of even
    size.

    part: float32 [n], absmax: float32 [ceil(n/block)]. Clamped to [-1, 1], one 0 appended when n is odd.
    """
    whole = len(part) // block * block
    scaled = part.new_zeros(len(part) + len(part) % 2)
    if whole:
        blocks = part[:whole].view(-1, block)
        torch.amax(blocks.abs(), 1, out=absmax[: len(blocks)])
        inverse = 1.0 / absmax[: len(blocks)].clamp(min=SMALLEST)
        torch.mul(blocks, inverse.unsqueeze(1), out=scaled[:whole].view(-1, block))
    if whole < len(part):
        absmax[-1] = part[whole:].abs().amax().clamp_(min=SMALLEST)
        torch.div(part[whole:], absmax[-1], out=scaled[whole : len(part)])
    return scaled.clamp_(-1, 1)


def _nest(weight: NF4Weight) -> NF4Weight:
    """The weight with its magnitudes quantized to 8 bits."""
    codes, nested = double_quantize(weight.absmax)
    return replace(weight, absmax=codes, nested=nested)


def double_quantize(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Magnitudes, float32 [blocks], quantized to 8 bits: codes, uint8 [blocks], and their scales. Raises LlmqError."""
    offset = absmax.mean()
    if not bool(torch.isfinite(offset)):
        raise LlmqError("the weight is too large for double quantization: turn double_quant off")
    _, levels = tables(absmax.device)
    table = _lookup(levels)
    left = torch.zeros(-(-len(absmax) // NESTED_BLOCK) * NESTED_BLOCK, dtype=torch.float32, device=absmax.device)
    torch.sub(absmax, offset, out=left[: len(absmax)])
    blocks = left.view(-1, NESTED_BLOCK)
    most = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / most).unsqueeze(1)).clamp_(-1, 1)
    steps = scaled.add_(1.0).mul_(0.5).mul_(STEPS).add_(0.5)
    # The reciprocal of a subnormal magnitude is infinite: the resulting NaNs get step 0.
    codes = table[steps.nan_to_num_(0.0).to(torch.int32)]
    codes.masked_fill_((most == 0).unsqueeze(1), 0)
    return codes.view(-1)[: len(absmax)].clone(), Nested(most, levels, float(offset))


def _lookup(levels: Tensor) -> Tensor:
    """The code of every step of [-1, 1]: uint8 [65536]. levels: float32 [256], ascending."""
    step = torch.arange(STEPS + 1, dtype=torch.float32, device=levels.device)
    value = step.mul_(2).div_(STEPS).add_(-1)
    return torch.bucketize(value, (levels[:-1] + levels[1:]) * 0.5, out_int32=True).to(torch.uint8)


def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """bitsandbytes' levels, ascending: of NF4, float32 [16], and of the 8-bit magnitudes, float32 [256].

    Raises LlmqError if bitsandbytes is not installed.
    """
    return _tables(torch.device(device))


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    try:
        from bitsandbytes.functional import create_dynamic_map, get_4bit_type
    except ImportError as error:
        raise LlmqError("nf4 needs bitsandbytes: pip install 'bitsandbytes>=0.50'") from error
    return get_4bit_type("nf4", device="cpu").to(device), create_dynamic_map().to(device)
