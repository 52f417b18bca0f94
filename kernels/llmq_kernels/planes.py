"""The layout "planes": what the Triton kernels read, on a GPU.

A row of the weight is cut into tiles of 32 words of 16 bits (3 bits: 96), and a tile into slices of 32 codes that are
neighbours along K: code j of word t is the tile's code j · 32 + t. Tiles hold 256, 512, 128 and 64 codes of 2, 3, 4 and
8 bits; the last one is filled up with codes whose inputs are never read. Reasons:

- A slice never crosses a group (groups are multiples of 32), and meets 32 neighbouring inputs.
- Two neighbouring words in a register give their codes j with one instruction, as a pair of 16-bit numbers that are
  neighbours along K, which is what tensor cores take (`triton/unpack.py`).
- A row is contiguous, so any thread can load 16 bytes of it, and neighbours in a warp the next 16.

3 bits: 16 codes in three words, five in each and one of the three top bits; so nothing is lost to alignment.

Scales and zero points are stored [groups, out]: programs read them for neighbouring rows of one group.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq_kernels import products, reference
from llmq_kernels.backend import triton_refusal
from llmq_kernels.checks import FLOATS, check, check_sizes

if TYPE_CHECKING:
    from llmq_kernels.triton.configs import Config

TILE = {2: 256, 3: 512, 4: 128, 8: 64}
SLAB = 1 << 24
WORKSPACE = 1 << 28
HALF = (torch.bfloat16, torch.float16)


def refusal(
    device: torch.device, dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int
) -> str | None:
    """Why the Triton kernels cannot serve such a weight, or None."""
    if dtype not in HALF:
        return f"inputs must be bfloat16 or float16, not {dtype}"
    if bits not in TILE:
        return f"codes must have 2, 3, 4 or 8 bits, not {bits}"
    if group_size < 1 or (group_size % 32 and group_size < in_features):
        return f"groups must be multiples of 32 or whole rows, not {group_size} of {in_features}"
    return triton_refusal(device)


def pack(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain form → int16 [out, words], scale [groups, out] and zero [groups, out], on the same device.

    Works on some rows at a time, so that it needs little more than what it returns.
    """
    out_features, tiles = words.shape[0], -(-in_features // TILE[bits])
    width = 96 if bits == 3 else 32
    packed = torch.empty(out_features, tiles * width, dtype=torch.int16, device=words.device)
    step = max(1, SLAB // (tiles * TILE[bits]))
    for start in range(0, out_features, step):
        part = slice(start, start + step)
        codes = reference.unpack_codes(words[part], bits, in_features).to(torch.int32) + (1 << (bits - 1))
        codes = torch.nn.functional.pad(codes, (0, tiles * TILE[bits] - in_features))
        packed[part] = interleave(codes.view(codes.shape[0], tiles, -1, 32), bits).view(codes.shape[0], -1)
    return packed, scale.t().contiguous(), None if zero is None else zero.t().contiguous()


def interleave(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes int32 [rows, tiles, slices, 32] → int16 words [rows, tiles, 1 or 3, 32]."""
    if bits == 3:
        fives = codes[:, :, :15].reshape(*codes.shape[:2], 3, 5, 32)
        top = torch.stack([codes[:, :, 15] >> bit & 1 for bit in range(3)], dim=2)
        whole = sum((fives[:, :, :, j] << (3 * j) for j in range(5)), start=top << 15)
    else:
        parts = (codes[:, :, j] << (bits * j) for j in range(16 // bits))
        whole = sum(parts, start=torch.zeros_like(codes[:, :, 0])).unsqueeze(2)
    # Two's complement by hand: what a conversion does with numbers out of range is not promised.
    return (((whole + 0x8000) & 0xFFFF) - 0x8000).to(torch.int16)


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
) -> Tensor:
    """x [M, in] → [M, out] in x's dtype, by the kernel that `configs.choose` names for M rows."""
    check_planes(packed, scale, zero, bits, out_features, in_features, group_size)
    for name, tensor in (("packed", packed), ("scale", scale), ("zero", zero)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, as pack returns it, not with strides {[*tensor.stride()]}")
    from llmq_kernels.triton import configs

    gpu = configs.gpu_of(x.device)
    if x.dtype not in HALF:
        return many_rows(x, packed, scale, zero, bias, bits, group_size)
    config = configs.choose(gpu, bits, x.shape[0], out_features, in_features, group_size)
    return run(x, packed, scale, zero, bias, bits, group_size, config, gpu.mode)


def run(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    config: Config,
    mode: str,
) -> Tensor:
    """x · Wᵀ + bias in one configuration. mode: as `configs.Gpu.mode`."""
    from llmq_kernels.triton import gemm, gemv, splitk

    kernels = {"gemv": gemv.launch, "splitk": splitk.launch, "gemm": gemm.launch}
    if config.family not in kernels:
        return many_rows(x, packed, scale, zero, bias, bits, group_size)
    with current(x.device):
        return kernels[config.family](x, packed, scale, zero, bias, bits, group_size, config, mode)


def many_rows(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """x · Wᵀ + bias by torch's own product with a dense copy of W, or of rows of it, of at most WORKSPACE bytes."""
    n, k = packed.shape[0], x.shape[1]
    dtype = products.product_dtype(x)
    step = max(1, WORKSPACE // (k * dtype.itemsize))
    if step >= n:
        return products.linear(x, dequantize(packed, scale, zero, bits, n, k, group_size, dtype), bias)
    y = x.new_empty(x.shape[0], n)
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        zeros = None if zero is None else zero[:, part]
        weight = dequantize(packed[part], scale[:, part], zeros, bits, part.stop - start, k, group_size, dtype)
        y[:, part] = products.linear(x, weight, None if bias is None else bias[part])
    return y


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [out, in], computed in float32 and rounded once to `dtype`."""
    check_planes(packed, scale, zero, bits, out_features, in_features, group_size)
    from llmq_kernels.triton import configs
    from llmq_kernels.triton.dequantize import launch

    y = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    with current(packed.device):
        return launch(packed, scale, zero, y, bits, group_size, configs.gpu_of(packed.device).mode)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the one a layer lies on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_planes(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
) -> None:
    """Raises TypeError or ValueError unless these are as `pack` returns them: kernels would read past their end."""
    check_sizes(bits, group_size)
    width = -(-in_features // TILE[bits]) * (96 if bits == 3 else 32)
    check("packed", packed, torch.int16, (out_features, width))
    check("scale", scale, FLOATS, (-(-in_features // group_size), out_features))
    if zero is not None:
        check("zero", zero, torch.int8, tuple(scale.shape))
