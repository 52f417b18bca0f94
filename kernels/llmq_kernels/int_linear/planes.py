"""The layout "planes", for the Triton kernels on a GPU.

A row of the weight is cut into tiles of 32 words of 16 bits (3 bits: 96), and a tile into slices of 32 consecutive
codes along K: code j of word t is the tile's code j · 32 + t. Tiles hold 256, 512, 128 and 64 codes of 2, 3, 4 and 8
bits; the last tile is padded with codes whose inputs are never read. Reasons:

- A slice never crosses a group (groups are multiples of 32), and multiplies 32 consecutive inputs.
- Two neighbouring words in a register give their codes j with one instruction, as a pair of 16-bit numbers that are
  neighbours along K, as tensor cores need (`triton/unpack.py`).
- A row is contiguous, so any thread can load 16 bytes of it, and neighbours in a warp the next 16.

3 bits: 16 codes in three words, five in each and one of the three top bits; so no bits are wasted.

Scales and zero points are stored [groups, out]: a program reads those of neighbouring rows for one group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq_kernels import products
from llmq_kernels.backend import triton_refusal
from llmq_kernels.checks import FLOATS, check, check_sizes
from llmq_kernels.grouped_int_linear import by_expert
from llmq_kernels.grouped_int_linear import dense as grouped
from llmq_kernels.grouped_int_linear.route import Routing
from llmq_kernels.int_linear import reference
from llmq_kernels.weights import PackedInt

if TYPE_CHECKING:
    from llmq_kernels.triton.config import Config

# By bits: codes of a tile, and its words.
TILE = {2: 256, 3: 512, 4: 128, 8: 64}
WORDS = {2: 32, 3: 96, 4: 32, 8: 32}
SLAB = 1 << 24
WORKSPACE = 1 << 28
MULTIPLE = 8
"""Rows of a weight that is dequantized in parts: torch's grouped product takes addresses of whole 16 bytes."""
HALF = (torch.bfloat16, torch.float16)
# Above so many rows the weight is always dequantized.
MOST = 1024
log = logging.getLogger(__name__)


def refusal(
    device: torch.device, dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int
) -> str | None:
    """Why the Triton kernels do not support such a weight, or None."""
    return unsupported(dtype, bits, in_features, group_size) or triton_refusal(device)


def unsupported(dtype: torch.dtype, bits: int, in_features: int, group_size: int) -> str | None:
    """The same on any device."""
    if dtype not in HALF:
        return f"inputs must be bfloat16 or float16, not {dtype}"
    if bits not in TILE:
        return f"codes must have 2, 3, 4 or 8 bits, not {bits}"
    if group_size < 1 or (group_size % 32 and group_size < in_features):
        return f"groups must be multiples of 32 or whole rows, not {group_size} of {in_features}"
    return None


def pack(plain: PackedInt, dtype: torch.dtype) -> PackedInt:
    """The plain form → packed int16 [out, words], scale [groups, out] and zero [groups, out], on the same device.

    Processes some rows at a time, so that it needs little more memory than its result.
    """
    bits, width = plain.bits, plain.in_features
    tiles = -(-width // TILE[bits])
    packed = torch.empty(plain.out_features, tiles * WORDS[bits], dtype=torch.int16, device=plain.packed.device)
    for rows in products.row_slabs(plain.out_features, tiles * TILE[bits], SLAB):
        codes = reference.unpack_codes(plain.packed[rows], bits, width).to(torch.int32) + (1 << (bits - 1))
        codes = torch.nn.functional.pad(codes, (0, tiles * TILE[bits] - width))
        packed[rows] = interleave(codes.view(codes.shape[0], tiles, -1, 32), bits).view(codes.shape[0], -1)
    zero = None if plain.zero is None else plain.zero.t().contiguous()
    return replace(plain, packed=packed, scale=plain.scale.t().contiguous(), zero=zero)


def nbytes(dtype: torch.dtype, bits: int, out_features: int, in_features: int, group_size: int, zeros: bool) -> int:
    """See `Layout.nbytes`: whole tiles of words, and a scale and perhaps a zero point for each group."""
    words = -(-in_features // TILE[bits]) * WORDS[bits]
    return out_features * (2 * words + -(-in_features // group_size) * (dtype.itemsize + zeros))


def interleave(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes int32 [rows, tiles, slices, 32] → int16 words [rows, tiles, 1 or 3, 32]."""
    if bits == 3:
        fives = codes[:, :, :15].reshape(*codes.shape[:2], 3, 5, 32)
        top = torch.stack([codes[:, :, 15] >> bit & 1 for bit in range(3)], dim=2)
        whole = sum((fives[:, :, :, j] << (3 * j) for j in range(5)), start=top << 15)
    else:
        parts = (codes[:, :, j] << (bits * j) for j in range(16 // bits))
        whole = sum(parts, start=torch.zeros_like(codes[:, :, 0])).unsqueeze(2)
    # Two's complement by hand: conversion of out-of-range numbers is undefined.
    return (((whole + 0x8000) & 0xFFFF) - 0x8000).to(torch.int16)


def linear(x: Tensor, weight: PackedInt, bias: Tensor | None, routing: Routing | None = None) -> Tensor:
    """x [..., in], contiguous → [..., out] in x's dtype, by the kernel that `tables.choose` selects.

    routing: of rows x [S, in] among stacked experts; biases are then [E, out].
    """
    if x.dtype not in HALF:
        check_planes(weight)
        return dense(x, weight, bias, routing)
    packed, scale, zero = weight.packed, weight.scale, weight.zero
    m = x.numel() // weight.in_features if routing is None else routing.rows(x)
    if m == 0:
        return x.new_empty(*(x.shape[:-1] if routing is None else (0,)), weight.out_features)
    bucket = 1 << (m - 1).bit_length() if m <= MOST or routing is not None else 0
    kind = (
        x.device,
        x.dtype,
        bucket,
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.out_features,
        packed.shape,
        packed.dtype,
        scale.shape,
        scale.dtype,
        None if zero is None else (zero.shape, zero.dtype),
        None if bias is None else bias.dtype,
        None if weight.tables is None or weight.codebook is None else (weight.tables.shape, weight.codebook.shape),
        None if routing is None else routing.kind,
    )
    run = _PREPARED.get(kind)
    if run is None:
        check_planes(weight)
        run = _PREPARED[kind] = _prepare(x, weight, bucket, routing)
    if not (packed.is_contiguous() and scale.is_contiguous() and (zero is None or zero.is_contiguous())):
        check_contiguous(weight)
    return run(x, weight, bias, routing)


Run = Callable[[Tensor, PackedInt, Tensor | None, Routing | None], Tensor]
_PREPARED: dict[tuple[object, ...], Run] = {}


def direct(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a product with x, to which a bias is added, needs none of what a torch operator adds: gradients, tracing,
    modes, transforms.

    Dispatching an operator of eleven arguments takes longer than all else that a product does before its launch.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or type(x) is not Tensor
        or (x.requires_grad or (bias is not None and bias.requires_grad))
        and torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def forget() -> None:
    """Choose configurations anew from here on; for when tables have changed."""
    _PREPARED.clear()


def _prepare(x: Tensor, weight: PackedInt, bucket: int, routing: Routing | None) -> Run:
    """How to multiply so many rows by weights of that kind: `bucket` rows, a power of two, or 0 for more than MOST."""
    from llmq_kernels.triton import gpu, tables
    from llmq_kernels.triton.config import Kind

    found, entries = gpu.gpu_of(x.device), weight.codebook
    kind = Kind() if entries is None else Kind("rows" if entries.shape[-2] > 1 else "all")
    if routing is not None:
        kind = replace(kind, experts=len(weight.packed), pairs=routing.offs is None)
    sizes = weight.out_features, weight.in_features, weight.group_size
    zeros, rows = weight.zero is not None, bucket or 2 * MOST
    config = tables.choose(found, weight.bits, rows, *sizes, zeros, x.dtype, kind)
    if routing is not None and config.programs_k > 1:  # sums of experts are not parted
        config = replace(config, programs_k=1)
    return prepared(config, weight, found.backend)


def prepared(config: Config, weight: PackedInt, backend: str) -> Run:
    """The product with weights of one kind by a configuration, or, where that does not fit the GPU, by `dense`.

    backend: as `gpu.Gpu.backend`.
    """
    if config.family == "dense":
        return dense
    from llmq_kernels.int_linear import triton as integers

    product = integers.Product(config, weight.out_features, backend)
    fits: list[bool] = []

    def run(x: Tensor, weight: PackedInt, bias: Tensor | None, routing: Routing | None) -> Tensor:
        if fits:
            return product(x, weight, bias, routing) if fits[0] else dense(x, weight, bias, routing)
        try:
            y = product(x, weight, bias, routing)
        except integers.UNFIT as error:
            log.warning("%s does not fit %s: products with a dense copy instead (%s)", config, x.device, error)
            fits.append(False)
            return dense(x, weight, bias, routing)
        fits.append(True)
        return y

    return run


def run(
    x: Tensor, weight: PackedInt, bias: Tensor | None, config: Config, backend: str, routing: Routing | None = None
) -> Tensor:
    """x · Wᵀ + bias with a given configuration, once. Raises what Triton raises if it cannot run."""
    if config.family == "dense":
        return dense(x, weight, bias, routing)
    from llmq_kernels.int_linear import triton as integers

    return integers.Product(config, weight.out_features, backend)(x, weight, bias, routing)


def dense(x: Tensor, weight: PackedInt, bias: Tensor | None, routing: Routing | None = None) -> Tensor:
    """x [..., in] · Wᵀ + bias by torch's own product with a dense copy of W, or of rows of it in WORKSPACE bytes."""
    if routing is not None and grouped.usable(x, weight.in_features):
        dtype = products.product_dtype(x)
        return grouped.linear(x, lambda offs: _slabs(weight, dtype, offs), weight, bias, routing)
    if routing is not None:
        return by_expert.linear(x, weight, bias, routing, dense)
    rows = x.reshape(-1, weight.in_features)
    y = products.by_slabs(rows, _slabs(weight, products.product_dtype(x)), bias, weight.out_features)
    return y.view(*x.shape[:-1], weight.out_features)


def gradient(grad: Tensor, weight: PackedInt, routing: Routing) -> Tensor:
    """The gradient with respect to x of `linear` by stacked experts: grad [S, out] → [rows of x, in]."""
    if grouped.usable(grad, weight.in_features) and grouped.usable(grad, weight.out_features):
        dtype = products.product_dtype(grad)
        return grouped.gradient(grad, lambda offs: _slabs(weight, dtype, offs), weight, routing)
    return by_expert.gradient(grad, weight, routing, dequantize)


def _slabs(weight: PackedInt, dtype: torch.dtype, offs: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of the weight at a time, of stacked experts the same of all, and their values; offs: see `build`."""
    width = weight.in_features * (len(weight.packed) if weight.packed.dim() == 3 else 1)
    for rows in products.row_slabs(weight.out_features, width, WORKSPACE // dtype.itemsize, MULTIPLE):
        zero = None if weight.zero is None else weight.zero[..., rows]
        packed, scale = weight.packed[..., rows, :], weight.scale[..., rows]
        part = replace(weight, packed=packed, scale=scale, zero=zero, out_features=rows.stop - rows.start)
        if weight.codebook is not None:
            per_row = weight.codebook.shape[-2] > 1
            codebook = weight.codebook[..., rows, :] if per_row else weight.codebook
            part = replace(part, codebook=codebook, tables=None)
        yield rows, dequantize(part, dtype, offs)


def dequantize(weight: PackedInt, dtype: torch.dtype, offs: Tensor | None = None) -> Tensor:
    """The weight [out, in], computed in float32 and rounded once to `dtype`.

    Of stacked experts [E, out, in]; with offs int32 [E], where each expert's rows of an input end, the values of
    experts without rows are undefined.
    """
    check_planes(weight)
    from llmq_kernels.triton import gpu
    from llmq_kernels.triton.dequantize import build
    from llmq_kernels.triton.launch import launch

    packed = weight.packed
    y = torch.empty(*packed.shape[:-2], weight.out_features, weight.in_features, dtype=dtype, device=packed.device)
    launch(y.device, build(weight, y, gpu.gpu_of(y.device).backend, offs))
    return y


def check_planes(weight: PackedInt) -> None:
    """Raises TypeError or ValueError unless the tensors are as `pack` returns them, or stacked such; kernels would read
    past their end.

    They may be slices of rows of larger tensors.
    """
    bits, out_features, in_features = weight.bits, weight.out_features, weight.in_features
    check_sizes(bits, weight.group_size)
    stack = tuple(weight.packed.shape[:-2])[:1]
    check("packed", weight.packed, torch.int16, (*stack, out_features, -(-in_features // TILE[bits]) * WORDS[bits]))
    check("scale", weight.scale, FLOATS, (*stack, -(-in_features // weight.group_size), out_features))
    if weight.zero is not None:
        check("zero", weight.zero, torch.int8, tuple(weight.scale.shape))
    if weight.codebook is not None:
        rows = 1 if weight.codebook.shape[-2] == 1 else out_features
        check("codebook", weight.codebook, torch.float32, (*stack, rows, 16))
        if weight.tables is not None:
            check("tables", weight.tables, torch.int32, (*stack, len(HALF), 8, rows))


def check_contiguous(weight: PackedInt) -> None:
    """Raises TypeError or ValueError unless the tensors are as `pack` returns them, and contiguous."""
    check_planes(weight)
    for name, tensor in (("packed", weight.packed), ("scale", weight.scale), ("zero", weight.zero)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, as pack returns it, not with strides {[*tensor.stride()]}")
