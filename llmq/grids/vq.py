"""Vectors of weights as sums of codebook entries: from 1 bit per weight (one of 256 entries for 8 weights) up.

AQLM (Egiazarian et al. 2024, arXiv:2401.06118, §3): a group of `group_size` weights of a row is the row's scale times
the sum of one entry of each of bits · group_size / 8 codebooks, which the whole matrix shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.base import Quantized, QuantizedWeight, Rounding, check_range, storable
from llmq.grids.clusters import SAMPLED, assign, cluster
from llmq.grids.scheme import Scheme
from llmq.grids.vector_search import search, total

BEAM = 8
READ = 1 << 21
"""Elements processed at a time for dequantization."""


@dataclass(frozen=True, eq=False)
class VQWeight:
    """A weight [out, in]: w ≈ scale of the row · Σₘ codebooks[m, codes[row, group, m]].

    codes: uint8 [out, groups, M]; codebooks: [M, 256, size]; scale: [out], both in the dtype in which they are stored;
    notes: fallbacks used, for the report.
    """

    codes: Tensor
    codebooks: Tensor
    scale: Tensor
    scheme: Scheme
    notes: tuple[str, ...] = ()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in], computed in float32 and rounded once to `dtype`."""
        rows, groups, _ = self.codes.shape
        books = self.codebooks.float()
        weight = torch.empty(rows, groups * books.shape[2], dtype=dtype, device=self.codes.device)
        step = max(1, READ // weight.shape[1])
        for start in range(0, rows, step):
            codes = self.codes[start : start + step].flatten(0, 1).int()
            value = total(books, codes).view(-1, weight.shape[1])
            weight[start : start + step] = value.mul_(self.scale[start : start + step, None].float())
        return weight


class VQ(Rounding):
    """See `Rounding`: single weights have no points, so all that asks for them is refused; `round` is all there is."""

    apart = False

    def round(
        self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, method: str, importance: Tensor | None
    ) -> VQWeight:
        """The weight with codebooks from k-means, and for each group the sum of least error, weighted by importance.

        method: 'mse', or 'weighted' by `importance`, float [in].
        """
        check_range(method, scheme, weight.shape[1])
        if method == "weighted" and importance is None:
            raise LlmqError("range 'weighted' needs the importance of every input; use 'mse' without it")
        if method == "mse" or importance is None:
            importance = torch.ones(weight.shape[1], device=weight.device)
        scale = row_scale(weight, scale_dtype)
        books = first_books(weight, scale, importance, scheme, scale_dtype)
        roots = importance.float().clamp_min(torch.finfo(torch.float32).tiny).sqrt().view(-1, 1, books.shape[2])
        codes = torch.empty(*_codes_shape(weight, scheme), dtype=torch.uint8, device=weight.device)
        groups = (weight.float() / scale.float()[:, None]).reshape(len(weight), -1, books.shape[2])
        for group, root in enumerate(roots):
            codes[:, group] = search(groups[:, group] * root, books.float() * root, BEAM).to(torch.uint8)
        return VQWeight(codes, books, scale, scheme)

    def reopen(self, weight: Quantized) -> QuantizedWeight:
        """Refused: see the class."""
        self._refuse(weight.scheme)

    def levels(self, scheme: Scheme, device: torch.device) -> Tensor:
        """Refused: see the class."""
        self._refuse(scheme)

    def nearest(self, scaled: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
        """Refused: see the class."""
        self._refuse(scheme)

    def encode(self, points: Tensor, scheme: Scheme) -> Tensor:
        """Refused: see the class."""
        self._refuse(scheme)

    def decode(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """Refused: see the class."""
        self._refuse(scheme)

    def find_scale(
        self, weight: Tensor, scheme: Scheme, method: str, importance: Tensor | None, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Refused: see the class."""
        self._refuse(scheme)

    def _refuse(self, scheme: Scheme) -> NoReturn:
        raise LlmqError(f"{scheme} rounds vectors of weights together: use --method vq or rtn, without others")


def books_of(scheme: Scheme) -> tuple[int, int, int]:
    """The shape of a scheme's codebooks: how many, entries, weights of a vector."""
    size, code = scheme.group_size, scheme.rules.vector_code
    assert size is not None
    return scheme.bits * size // code, 1 << code, size


def row_scale(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The root of the mean square of each row [out] of a weight, in the dtype of scales; 1 for a row of zeros.

    Raises LlmqError if a value is not finite.
    """
    top = weight.abs().amax(1, keepdim=True).float()
    if not bool(torch.isfinite(top).all()):
        raise LlmqError("the weight holds values that are not finite")
    mean = (weight / top.clamp_min(torch.finfo(torch.float32).tiny)).float().square().mean(1).sqrt()
    return torch.where(top[:, 0] > 0, storable(mean * top[:, 0], dtype), 1.0).to(dtype)


def first_books(weight: Tensor, scale: Tensor, importance: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Codebooks by k-means of the groups of a weight [out, in], each of what those before leave of them.

    scale: [out]; importance: float [in], of each input. Returns [M, 256, size] in `dtype`.
    """
    count, entries, size = books_of(scheme)
    step = -(-weight.numel() // (size * SAMPLED))
    rows = scale[::step, None].float()
    vectors = (weight[::step].float() / rows).reshape(-1, size)
    share = importance.float() / importance.float().amax().clamp_min(torch.finfo(torch.float32).tiny)
    weights = ((rows / rows.amax()).square() * share).view(-1, size)
    books = torch.empty(count, entries, size, dtype=dtype, device=weight.device)
    for book in books:
        book.copy_(cluster(vectors, weights, entries))
        vectors = vectors - book.float()[assign(vectors, weights, book.float())[0]]
    return books


def _codes_shape(weight: Tensor, scheme: Scheme) -> tuple[int, int, int]:
    count, _, size = books_of(scheme)
    return weight.shape[0], weight.shape[1] // size, count
