"""Codes of 8 or 4 bits and their scales, made numbers: one scale for the weight, for each row, or for each tile of it.

Tiles at the edges may be cut short. Scales are floats, or exponents of two in a byte; all may share a second scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from llmq.checkpoint.source import Source, check_finite
from llmq.formats.base import dtype_name
from llmq.formats.dequantized import damaged, pieces

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PAIRS = (torch.uint8, torch.int8)
"""Bytes with two FP4 codes along the inputs, the low four bits first."""
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of the 16 codes of FP4."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)
MX, NV = 32, 16
"""Inputs that share a scale in MXFP4 and MXFP8, and in NVFP4."""
Tiles = tuple[int, int] | None
"""Rows and columns that share a scale; None if it is one for the weight or for each row."""


@dataclass(frozen=True)
class Scaled:
    """A weight's codes and scales by their names. second: a scale of the scales; divides: they are divided by it.

    view, sizes: the scales' shape with as many axes as the weight, and the numbers along each axis that share one.
    """

    source: Source
    codes: str
    scale: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    sizes: tuple[int, ...]
    second: str | None = None
    divides: bool = False

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start…stop−1 of the weight in `dtype`; products are taken in float32.

        Raises LlmqError if a scale is not finite, or is divided by zero.
        """
        value = torch.empty((stop - start, *self.shape[1:]), dtype=dtype)
        kind = self.source.info(self.codes).dtype
        # Looking codes up is four times as fast as torch's conversion of them on a CPU.
        numbers = torch.arange(256, dtype=torch.uint8).view(kind).float() if kind in FP8 else pairs_of_numbers()
        for begin, end in pieces(self.shape, start, stop):
            codes = self.source.read_rows(self.codes, begin, end).view(torch.uint8)
            found = numbers.index_select(0, codes.reshape(-1).int()).view(torch.float32)
            found = found.view(end - begin, *self.shape[1:])
            value[begin - start : end - start] = found.mul_(self._factors(begin, end))
        return value

    def _factors(self, begin: int, end: int) -> Tensor:
        """The factors of rows begin…end−1, float32, with one entry along an axis where all are the same."""
        view, sizes = self.view, self.sizes
        apart = view[0] > 1
        first, last = (begin // sizes[0], -(-end // sizes[0])) if apart else (0, 1)
        stored = self.source.read_rows(self.scale, first, last) if apart else self.source.read(self.scale)
        stored = stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored
        factors = stored.float().reshape(last - first, *view[1:])
        check_finite(factors, self.scale, self.source.info(self.scale).file)
        if self.second is not None:
            factors = self._with_second(factors, first, last)
        for axis in range(1, len(view)):
            if view[axis] > 1:
                factors = factors.repeat_interleave(sizes[axis], axis).narrow(axis, 0, self.shape[axis])
        return factors[torch.arange(begin, end) // sizes[0] - first] if apart else factors

    def _with_second(self, factors: Tensor, first: int, last: int) -> Tensor:
        """Factors of entries first…last−1 of the scales with the second scale, one for all or for each entry."""
        assert self.second is not None
        second = self.source.read(self.second).float().flatten()
        check_finite(second, self.second, self.source.info(self.second).file)
        if self.divides and not bool(second.all()):
            raise damaged(self.source, self.second, f"is 0, and the scales of {self.codes} are divided by it")
        second = (second if len(second) == 1 else second[first:last]).reshape(-1, *[1] * (factors.dim() - 1))
        return factors / second if self.divides else factors * second


def pairs_of_numbers() -> Tensor:
    """For each byte, both its FP4 numbers as one word: looking up words is much faster than looking up rows."""
    return torch.tensor([[VALUES[byte & 15], VALUES[byte >> 4]] for byte in range(256)]).view(torch.float64).flatten()


def scaled(
    source: Source,
    codes: str,
    scale: str,
    tiles: Tiles,
    *,
    exponents: bool = False,
    columns: bool = False,
    second: str | None = None,
    divides: bool = False,
) -> Scaled:
    """The weight of these tensors. exponents: bytes may be exponents of two; columns: the scales of a stack are one for
    each number of its last axis. Raises LlmqError if dtypes or shapes do not fit each other.
    """
    info, beside = source.info(codes), source.info(scale)
    four = info.dtype in PAIRS
    shape = (*info.shape[:-1], info.shape[-1] * 2) if four and info.shape else info.shape
    known = (torch.float8_e4m3fn,) if second is not None else (torch.float8_e8m0fnu,) if four else FLOATS
    if beside.dtype not in known and not (exponents and second is None and beside.dtype == torch.uint8):
        raise damaged(source, scale, f"is {dtype_name(beside.dtype)}, which is no dtype of scales of {codes}")
    fitting = _blocks(shape, beside.shape, tiles, columns)
    if fitting is None:
        size = f"tiles of {tiles[0]}x{tiles[1]}" if tiles else "one scale for the weight or each row"
        raise damaged(source, scale, f"is {[*beside.shape]} for a weight {[*shape]}, and config.json says {size}")
    if second is not None:
        found = source.info(second)
        if found.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise damaged(source, second, f"is {dtype_name(found.dtype)}, and a scale of scales is float32")
        if prod(found.shape) != 1 and not (len(shape) > 2 and prod(found.shape) == shape[0] == found.shape[0]):
            raise damaged(source, second, f"is {[*found.shape]}, and is to be one number for all scales of {codes}")
    return Scaled(source, codes, scale, shape, *fitting, second, divides)


def _blocks(
    shape: tuple[int, ...], scales: tuple[int, ...], tiles: Tiles, columns: bool
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """`view` and `sizes` of a Scaled of this shape [..., out, in]; None if the scales do not fit the weight."""
    if len(shape) < 2:
        return None
    *lead, out, width = shape
    ones, one = (1,) * len(lead), tuple(lead)
    if tiles is not None:
        down, along = -(-out // tiles[0]), -(-width // tiles[1])
        fits = scales in ((*one, down, along), (*one, down, 1, along, 1))
        return ((*one, down, along), (*ones, *tiles)) if fits else None
    if prod(scales) == 1:
        return (*ones, 1, 1), shape
    if columns and lead:
        return ((*one, 1, width), (*ones, out, 1)) if scales in ((*one, 1, width), (*one, width, 1)) else None
    if scales in ((*one, out), (*one, out, 1)):
        return (*one, out, 1), (*ones, 1, width)
    if lead and scales in (one, (*one, 1), (*one, 1, 1)):
        return (*one, 1, 1), (*ones, out, width)
    return None
