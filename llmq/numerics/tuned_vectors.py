"""Vectors of weights whose codebooks and scales are trained while their codes stay (AQLM, Egiazarian et al. 2024,
arXiv:2401.06118, §3.4).

Of a weight sᵢ Σₘ Cₘ[code(i, j, m)] (`grids.vq`), with its gradient G, an entry of a codebook gets Σ sᵢ G[i, j] over all
its uses, and a scale Σⱼ G[i, j] · Σₘ Cₘ[…]. Both are trained by Adam: a codebook in units of its root mean square, a
scale in units of its start. Values are those that can be stored; gradients ignore that rounding (straight-through).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.grids.base import storable
from llmq.grids.vq import READ, VQWeight
from llmq.numerics.straight_through import Adam


class TunedVectors:
    """A weight of vectors while its codebooks and scales are trained; q: the start, kept exactly."""

    def __init__(self, q: VQWeight) -> None:
        self.q = q
        self.books, self.scale = q.codebooks.float(), q.scale.float()
        mean = self.books.square().mean((1, 2), keepdim=True).sqrt()
        self.unit = mean.clamp_min(torch.finfo(torch.float32).tiny)
        self.moments = tuple(Adam(part) for part in (self.books, self.scale))

    def value(self, out: Tensor) -> None:
        """Write the dequantized weight to `out` [out, in], rounded once to its dtype."""
        out.copy_(self.quantized().dequantize(out.dtype))

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """One step of Adam against ∂L/∂ŵ [out, in], any float: codebooks by `rate`, scales by `scale_rate`."""
        books, scale = self.gradients(gradient)
        self.books.sub_(self.moments[0].step(books.mul_(self.unit)).mul_(self.unit), alpha=rate)
        start = self.q.scale.float()
        self.scale.sub_(self.moments[1].step(scale.mul_(start)).mul_(start), alpha=scale_rate)
        self.scale.clamp_(min=start * 0.1, max=start * 10)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """∂L/∂ of codebooks [M, entries, size] and scales [out], float32, from ∂L/∂ŵ [out, in]."""
        now = self.quantized()
        count, _, size = self.books.shape
        books, scale = torch.zeros_like(self.books), torch.empty_like(self.scale)
        plain = replace(now, scale=torch.ones_like(now.scale))
        step = max(1, READ // gradient.shape[1])
        for start in range(0, len(gradient), step):
            part = slice(start, start + step)
            mine = gradient[part].float()
            codes = self.q.codes[part]
            scale[part] = (replace(plain, codes=codes, scale=plain.scale[part]).dequantize(torch.float32) * mine).sum(1)
            vectors = (mine * now.scale[part, None].float()).view(-1, size)
            entries = codes.reshape(-1, count).int()
            for number, book in enumerate(books):
                book.index_add_(0, entries[:, number], vectors)
        return books, scale

    def quantized(self) -> VQWeight:
        """The current weight, as it can be stored."""
        kind = self.q.scale.dtype
        return replace(self.q, codebooks=self.books.to(kind), scale=storable(self.scale, kind).to(kind))
