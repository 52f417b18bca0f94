"""The reference of 4-bit codes of codebooks on a GPU in plain torch; each faster backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels import products


def codebook_linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias for codes of codebooks: W[r, i] = codebook[r, code[r, i]] · scale[r, i // group].

    x: float [..., in]; codes: uint8 [out, in] of 0 … 15; scale: float [out, groups], groups of ceil(in/groups) inputs;
    codebook: float32 [1, 16], or [out, 16] with one for each row. Returns [..., out] in x's dtype.
    """
    entries = codebook.to(torch.float32).expand(codes.shape[0], 16).gather(1, codes.to(torch.int64))
    group = -(-codes.shape[1] // scale.shape[1])
    weight = entries * scale.to(torch.float32).repeat_interleave(group, 1)[:, : codes.shape[1]]
    return products.linear(x, weight, bias)
