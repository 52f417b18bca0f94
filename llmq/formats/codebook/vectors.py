"""Vectors of a row as sums of codebook entries: W = scale of the row · Σ over books of codebooks[book, byte].

`weight_vectors` uint8 [out, groups, books]; `weight_codebooks` [books, 256, group size] and `weight_scale` [out, 1] in
the model's dtype. AQLM's folder holds the same numbers for stock transformers; this one mixes them with other grids,
and has a mixture's experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.checkpoint.source import Source
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.formats.base import Spec, Unclear
from llmq.formats.codebook.learned import SCALE, SHAPE
from llmq.formats.plain import FLOATS, Entry, VectorsWeight
from llmq.grids.scheme import Scheme
from llmq.grids.vector_search import total
from llmq.grids.vq import VQWeight, books_of

VECTORS, BOOKS = "weight_vectors", "weight_codebooks"
ENTRIES, BITS = 256, 8
"""Of a codebook whose codes are bytes, and of such a code."""


def spec(shape: Sequence[int], scheme: Scheme, scale_dtype: torch.dtype) -> Spec:
    """See `Format.spec`."""
    rows, width = shape
    count, _, size = books_of(scheme)
    if width == 0 or width % size:
        raise LlmqError(f"group size {size} does not divide the {width} inputs of the weight")
    return {
        VECTORS: (torch.uint8, (rows, width // size, count)),
        BOOKS: (scale_dtype, (count, ENTRIES, size)),
        SCALE: (scale_dtype, (rows, 1)),
        SHAPE: (torch.int64, (2,)),
    }


def pack(q: VQWeight) -> dict[str, Tensor]:
    """See `Format.pack`."""
    shape = len(q.codes), q.codes.shape[1] * q.codebooks.shape[2]
    return {
        VECTORS: q.codes.contiguous(),
        BOOKS: q.codebooks.contiguous(),
        SCALE: q.scale.view(-1, 1),
        SHAPE: torch.tensor(shape, dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> VQWeight:
    """See `Format.unpack`; shapes are as `spec` says."""
    return VQWeight(tensors[VECTORS], tensors[BOOKS], tensors[SCALE].view(-1), scheme)


def splits(width: int, scheme: Scheme, parts: int) -> bool:
    """Whether each part of a row has whole vectors."""
    return width // parts % books_of(scheme)[2] == 0


def nbytes(rows: int, width: int, scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of a weight on llmq's kernels, where codebooks are float32; dtype: of scales."""
    return VectorsWeight.nbytes(rows, width, books_of(scheme), dtype)


@dataclass(frozen=True)
class VectorsLayer:
    """The stored tensors of one weight; see `plain.Layer`. count: codebooks; size: weights of a vector."""

    shape: tuple[int, int]
    count: int
    size: int

    @property
    def entries(self) -> Mapping[str, Entry]:
        rows, width = self.shape
        return {
            VECTORS: Entry((torch.uint8,), (rows, width // self.size, self.count)),
            BOOKS: Entry(FLOATS, (self.count, ENTRIES, self.size)),
            SCALE: Entry(FLOATS, (rows, 1)),
            SHAPE: Entry((torch.int64,), (2,)),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> VectorsWeight:
        said = tuple(int(n) for n in tensors[SHAPE].tolist())
        if said != self.shape:
            raise LlmqError(f"{SHAPE} says {[*said]}, the model needs {[*self.shape]}")
        packed = tensors[VECTORS].permute(2, 1, 0).unsqueeze(1).contiguous()
        return VectorsWeight(packed, tensors[BOOKS].to(torch.float32), tensors[SCALE].view(1, -1), self.shape[1])


@dataclass(frozen=True)
class Vectors:
    """A stored weight. codes, books, scale: the names of its tensors; group: weights of a vector; count: codebooks."""

    source: Source
    codes: str
    books: str
    scale: str
    shape: tuple[int, int]
    count: int
    group: int
    holds: str = ""

    @property
    def bits(self) -> int:
        """Of the codes of a vector, for each of its weights."""
        return self.count * BITS // self.group

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows, dequantized in float32 and rounded to `dtype`."""
        codes = self.source.read_rows(self.codes, start, stop).flatten(0, 1).int()
        value = total(self.source.read(self.books).float(), codes).view(-1, self.shape[1])
        return value.mul_(self.source.read_rows(self.scale, start, stop).float()).to(dtype)


def found(source: Source, parts: Mapping[str, TensorInfo], shape: tuple[int, int]) -> Vectors:
    """A stored weight. Raises Unclear if its tensors do not fit each other."""
    (rows, width), missing = shape, [suffix for suffix in (BOOKS, SCALE) if suffix not in parts]
    if missing:
        raise Unclear(f"{' and '.join(missing)} is missing")
    codes, books, scale = parts[VECTORS], parts[BOOKS], parts[SCALE]
    count, entries, size = books.shape if len(books.shape) == 3 else (0, 0, 0)
    whole = codes.dtype == torch.uint8 and books.dtype in FLOATS and scale.dtype in FLOATS and entries == ENTRIES
    whole = whole and size > 0 and count > 0 and count * BITS % size == 0 and width % size == 0
    if not whole or codes.shape != (rows, width // size, count) or scale.shape != (rows, 1):
        told = f"vectors {[*codes.shape]} with codebooks {[*books.shape]} and scales {[*scale.shape]}"
        raise Unclear(f"{told} for [{rows}, {width}]")
    return Vectors(source, codes.name, books.name, scale.name, shape, count, size)
