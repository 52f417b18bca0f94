"""The reference of bytes that select vectors in plain torch; each faster backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels import products


def vectors_dequantize(packed: Tensor, table: Tensor, scale: Tensor, n: int) -> Tensor:
    """The weight of bytes that select vectors, float32 [out, n]: W[r, g·size + i] = scale[g, r] · Σₘ table[m, packed[m,
    g, i // k, r], i mod k], where a group has size = n / groups inputs and a vector k.

    packed: uint8 [books, groups, ceil(size/k), out]; table: float32 [books, 256, k]; scale: float [groups, out].
    """
    books, groups, _, out = packed.shape
    chosen = [table[book][packed[book].to(torch.int64)] for book in range(books)]
    # [groups, vectors, out, k] → [out, groups, vectors · k], without what the last vector has too many.
    found = torch.stack(chosen).sum(0).permute(2, 0, 1, 3).flatten(2)[..., : n // groups]
    return (found * scale.to(torch.float32).t().unsqueeze(-1)).reshape(out, n)


def vectors_linear(x: Tensor, packed: Tensor, table: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias for a weight of bytes that select vectors. x: float [..., in]; else as in `vectors_dequantize`."""
    return products.linear(x, vectors_dequantize(packed, table, scale, x.shape[-1]), bias)
