"""The reference of NF4 and FP4 in plain torch; each faster backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels import products


def nf4_absmax(
    absmax: Tensor, nested_absmax: Tensor | None, nested_codebook: Tensor | None, offset: float = 0.0
) -> Tensor:
    """The magnitude of each block, float32 [blocks].

    absmax: float32 [blocks], or uint8 [blocks] with nested_absmax float32 [ceil(blocks/256)] and nested_codebook
    float32 [256]: QLoRA's double quantization (Dettmers et al. 2023, section 3), where 256 magnitudes share a scale:
    nested_codebook[absmax] · nested_absmax + offset.
    """
    if nested_absmax is None or nested_codebook is None:
        return absmax.to(torch.float32)
    share = nested_absmax.repeat_interleave(256)[: absmax.numel()]
    return nested_codebook[absmax.to(torch.int64)] * share + offset


def nf4_dequantize(
    packed: Tensor, absmax: Tensor, codebook: Tensor, out_features: int, in_features: int, block_size: int
) -> Tensor:
    """The weight [out, in] of 4-bit codes into a codebook, float32.

    packed: uint8 [ceil(out·in/2)], the first of two codes in the high half, along the flattened weight; absmax: float32
    [blocks], one for each block_size values (`nf4_absmax`); codebook: float32 [16]. Layout: bitsandbytes 0.50.
    """
    size = out_features * in_features
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)[:size]
    scale = absmax.repeat_interleave(block_size)[:size]
    return (codebook[codes.to(torch.int64)] * scale).view(out_features, in_features)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: float,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    """x · Wᵀ + bias for a codebook weight. x: float [..., in]; the other arguments as in `nf4_dequantize`."""
    absmax = nf4_absmax(absmax, nested_absmax, nested_codebook, offset)
    return products.linear(x, nf4_dequantize(packed, absmax, codebook, out_features, x.shape[-1], block_size), bias)
