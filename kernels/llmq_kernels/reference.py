"""The reference of every operator in plain torch; each faster backend is tested against it.

Packed codes are the dense bit stream that compressed-tensors calls `pack-quantized`: element i of a row occupies bits
[i·bits, (i+1)·bits) of the row, counted from the least significant bit of its first 32-bit word, and holds
code + 2^(bits−1). Eight codes fill exactly `bits` bytes, so eight codes at a time are spread over the bytes of a 64-bit
integer.
Words are little-endian, as on every machine torch supports in practice.

A weight is always computed in float32 and rounded once to the product's dtype, which is the input's own except for
float16 on a CPU (`products`); torch's own matrix product accumulates in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels import products


def unpack_codes(words: Tensor, bits: int, n: int) -> Tensor:
    """The codes of a dense bit stream.

    words: int32 [rows, ceil(n·bits/32)]; bits: 1…8; n: codes per row. Returns int8 [rows, n], in
    [−2^(bits−1), 2^(bits−1) − 1]. Raises ValueError if the dtype or the number of words does not fit.
    """
    rows, width = words.shape
    needed = -(-n * bits // 32)
    if words.dtype != torch.int32 or width != needed:
        raise ValueError(f"{n} codes of {bits} bits need int32 [{rows}, {needed}], not {words.dtype} {[*words.shape]}")
    octets = -(-n // 8)
    stream = words.reshape(-1).view(torch.uint8).view(rows, width * 4)
    if octets * bits > width * 4:
        stream = torch.nn.functional.pad(stream, (0, octets * bits - width * 4))
    lanes = torch.zeros(rows, octets, 8, dtype=torch.uint8, device=words.device)
    lanes[:, :, :bits] = stream[:, : octets * bits].reshape(rows, octets, bits)
    spread = lanes.view(torch.int64)
    for lane in (32, 16, 8) if bits < 8 else ():
        used = bits * lane // 8
        low = lane_mask(used, 2 * lane)
        spread = (spread & low) | ((spread & (low << used)) << (lane - used))
    codes = spread.view(torch.uint8).view(rows, octets * 8)[:, :n].contiguous()
    codes -= 1 << (bits - 1)
    return codes.view(torch.int8)


def lane_mask(used: int, lane: int) -> int:
    """The lowest `used` bits of every `lane`-bit lane of a 64-bit integer."""
    return sum(((1 << used) - 1) << start for start in range(0, 64, lane))


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None, group_size: int | None = None) -> Tensor:
    """The dequantized weight: (code − zero) · scale, in groups along the last axis.

    codes: int8 [rows, n]; scale: any float [rows, groups]; zero: int8 [rows, groups] or None; group_size: codes per
    group, by default n / groups; if given, the last group may be shorter. Returns float32 [rows, n].
    """
    rows, n = codes.shape
    if group_size is not None and n % group_size:
        whole = scale.shape[1] * group_size
        return dequantize(torch.nn.functional.pad(codes, (0, whole - n)), scale, zero)[:, :n].contiguous()
    weight = codes.to(torch.float32).view(rows, scale.shape[1], -1)
    if zero is not None:
        weight -= zero.to(torch.float32).unsqueeze(-1)
    weight *= scale.to(torch.float32).unsqueeze(-1)
    return weight.view(rows, n)


def int_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """x · Wᵀ + bias for integer weights W [out, n] in a dense bit stream.

    x: float [..., n]; words: int32 [out, ceil(n·bits/32)]; scale: float [out, ceil(n/group_size)]; zero: int8 like
    scale, or None; bias: [out] or None. Returns [..., out] in x's dtype.
    """
    weight = dequantize(unpack_codes(words, bits, x.shape[-1]), scale, zero, group_size)
    return linear(x, weight, bias)


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
    return linear(x, nf4_dequantize(packed, absmax, codebook, out_features, x.shape[-1], block_size), bias)


def codebook_linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias for codes of codebooks: W[r, i] = codebook[r, code[r, i]] · scale[r, i // group].

    x: float [..., in]; codes: uint8 [out, in] of 0 … 15; scale: float [out, groups], groups of ceil(in/groups) inputs;
    codebook: float32 [1, 16], or [out, 16] with one for each row. Returns [..., out] in x's dtype.
    """
    entries = codebook.to(torch.float32).expand(codes.shape[0], 16).gather(1, codes.to(torch.int64))
    group = -(-codes.shape[1] // scale.shape[1])
    weight = entries * scale.to(torch.float32).repeat_interleave(group, 1)[:, : codes.shape[1]]
    return linear(x, weight, bias)


def levels_dequantize(packed: Tensor, levels: Tensor, n: int) -> Tensor:
    """The weight of codes with a codebook for each row: W[r, i] = levels[r, code[r, i]], float32 [out, n].

    packed: uint8 [out, ceil(n/2)], the first of two 4-bit codes in the low half; levels: float32 [out, 16].
    """
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :n]
    return levels.to(torch.float32).gather(1, codes.to(torch.int64))


def levels_linear(x: Tensor, packed: Tensor, levels: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias for a weight with a codebook for each row. x: float [..., in]; else as in `levels_dequantize`."""
    return linear(x, levels_dequantize(packed, levels, x.shape[-1]), bias)


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
    return linear(x, vectors_dequantize(packed, table, scale, x.shape[-1]), bias)


def round_input(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round an input to signed 8 bits as compressed-tensors 0.20 does, every step in x's own dtype.

    x: float [..., n]; input_scale: [1], or None for one scale per token: its largest magnitude / 127.5, and the dtype's
    epsilon for a token of zeros. Returns the levels, integers in [−128, 127] in x's dtype, with straight-through
    gradients, and the scale in x's dtype, [..., 1] or [1].
    """
    scale = steps(x, input_scale)
    exact = x / scale
    passed = exact.nan_to_num()  # overflow is clamped; inf − inf would be NaN
    return exact.detach().clamp(-128, 127).round() + (passed - passed.detach()), scale


def steps(x: Tensor, input_scale: Tensor | None) -> Tensor:
    """The scale of `round_input`, in x's dtype: [..., 1], one per token of x, or input_scale [1]."""
    if input_scale is not None:
        return input_scale.to(x.dtype)
    scale = x.detach().abs().amax(-1, keepdim=True) / 127.5
    return scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps)


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x · Wᵀ + bias with the input rounded to 8 bits too: integer products, scaled once at the end.

    x: float [..., n]; weight: int8 [out, n]; scale: float [out, 1]; input_scale: as in `round_input`; bias: [out] or
    None. Returns [..., out] in x's dtype, rounded once from float32.
    """
    levels, x_scale = round_input(x, input_scale)
    # Float64 sums integers exactly, as int32 does.
    exact = (levels.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.float32)
    y = exact * x_scale.to(torch.float32) * scale.to(torch.float32).view(-1)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with a float32 weight, as `products.linear` computes it."""
    return products.linear(x, weight, bias)
