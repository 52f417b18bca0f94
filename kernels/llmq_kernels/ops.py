"""The low-bit matrix products as torch operators: `torch.ops.llmq.int_linear`, `nf4_linear`, `int8_linear` ….

Importing this module registers them. Each has an implementation that chooses the backend by device and layout, a fake
one for torch.compile and CUDA graphs, and a gradient with respect to the input, as training adapters on a frozen
low-bit base needs. `reference` defines each operator, and every backend is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

import llmq_kernels.grouped_int_linear.operator
import llmq_kernels.tracing  # noqa: F401  (defines the operators)
from llmq_kernels import int8_cpu, layouts, levels_cpu, nf4_cpu, planes, reference, vectors_cpu
from llmq_kernels.backend import on_triton
from llmq_kernels.checks import FLOATS, check, check_device, check_input
from llmq_kernels.dense_bits import SLAB
from llmq_kernels.products import matmul, product_dtype, row_slabs
from llmq_kernels.weights import PackedCodebook, PackedInt, PackedInt8, PackedLevels, PackedVectors

Packed = TypeVar("Packed", PackedInt, PackedCodebook, PackedInt8, PackedLevels, PackedVectors)


def int_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """x · Wᵀ + bias for an integer weight W [out, in] as `layouts.pack` returns it.

    x: float32, bfloat16 or float16 [..., in]; bias: [out]. Returns [..., out] in x's dtype. Raises TypeError or
    ValueError if x, bias or the device does not fit the weight.
    """
    weight = PackedInt(packed, scale, zero, bits, out_features, in_features, group_size)
    if layout == "planes":
        return planes_linear(x, weight, bias)
    return _by_rows(x, weight, bias, layouts.layout(layout).linear)


def planes_linear(x: Tensor, weight: PackedInt, bias: Tensor | None) -> Tensor:
    """`int_linear` in the layout "planes", whose kernels need no reshaping of x [..., in]; no operator, no gradient."""
    check_input(x, weight.out_features, weight.in_features, bias)
    check_device(x, weight.packed, "the weight")
    check_device(x, weight.scale, "scale")
    return planes.linear(x.contiguous(), weight, bias)


def int_linear_grad(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """The gradient with respect to x of `int_linear`: grad [..., out] · W → [..., in]."""
    weight = PackedInt(packed, scale, zero, bits, out_features, in_features, group_size)
    return matmul(grad, layouts.layout(layout).dequantize(weight, product_dtype(grad)))


def codebook_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    tables: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
) -> Tensor:
    """x · Wᵀ + bias for a weight W [out, in] of 4-bit codes of codebooks as `codebooks.pack` returns it.

    On a GPU, or in Triton's interpreter. Returns [..., out] in x's dtype. Raises TypeError or ValueError if an argument
    does not fit.
    """
    weight = PackedInt(packed, scale, None, 4, out_features, in_features, group_size, codebook, tables)
    return planes_linear(x, weight, bias)


def codebook_linear_grad(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    tables: Tensor,
    out_features: int,
    in_features: int,
    group_size: int,
) -> Tensor:
    """The gradient with respect to x of `codebook_linear`: grad [..., out] · W → [..., in]."""
    weight = PackedInt(packed, scale, None, 4, out_features, in_features, group_size, codebook, tables)
    return matmul(grad, planes.dequantize(weight, product_dtype(grad)))


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
    in_features: int,
    block_size: int,
) -> Tensor:
    """x · Wᵀ + bias for a weight W [out, in] of 4-bit codes into a codebook; the tensors: `weights.PackedCodebook`.

    Returns [..., out] in x's dtype. Raises TypeError or ValueError if an argument does not fit.
    """
    nested = nested_absmax, nested_codebook, offset
    weight = PackedCodebook(packed, absmax, codebook, *nested, out_features, in_features, block_size)
    weight.check()
    return _by_rows(x, weight, bias, nf4_cpu.linear if x.device.type == "cpu" else _nf4_anywhere)


def nf4_linear_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: float,
    out_features: int,
    in_features: int,
    block_size: int,
) -> Tensor:
    """The gradient with respect to x of `nf4_linear`: grad [..., out] · W → [..., in]."""
    nested = nested_absmax, nested_codebook, offset
    weight = PackedCodebook(packed, absmax, codebook, *nested, out_features, in_features, block_size)
    dtype = product_dtype(grad)
    return matmul(grad, nf4_cpu.dequantize(weight, dtype))


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded to int8, per token or by input_scale [1]; int32 sums, scaled at the end.

    x: float [..., in]; weight: int8 [out, in]; scale: float [out, 1]. Returns [..., out] in x's dtype. Raises TypeError
    or ValueError if an argument does not fit.
    """
    check("weight", weight, torch.int8, tuple(weight.shape))
    check("scale", scale, FLOATS, (weight.shape[0], 1))
    if input_scale is not None:
        check("input_scale", input_scale, FLOATS, (1,))
    packed = PackedInt8(weight, scale, input_scale)
    if on_triton(x):
        from llmq_kernels.triton import int8

        return _by_rows(x, packed, bias, int8.linear)
    return _by_rows(x, packed, bias, int8_cpu.linear if x.device.type == "cpu" else _int8_anywhere)


def int8_linear_grad(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient with respect to x of `int8_linear`, as if x were not rounded: grad [..., out] · W → [..., in]."""
    out_features, in_features = weight.shape
    flat = grad.reshape(-1, out_features)
    total = grad.new_zeros(flat.shape[0], in_features, dtype=torch.float32)
    for rows in row_slabs(out_features, in_features, SLAB):
        total += matmul(flat[:, rows], weight[rows].to(torch.float32) * scale[rows].to(torch.float32))
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


def levels_linear(
    x: Tensor, packed: Tensor, levels: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """x · Wᵀ + bias for a weight W [out, in] of 4-bit codes with a codebook for each row: `weights.PackedLevels`.

    Returns [..., out] in x's dtype. Raises TypeError or ValueError if an argument does not fit.
    """
    weight = PackedLevels(packed, levels, out_features, in_features)
    weight.check()
    return _by_rows(x, weight, bias, levels_cpu.linear)


def levels_linear_grad(grad: Tensor, packed: Tensor, levels: Tensor, out_features: int, in_features: int) -> Tensor:
    """The gradient with respect to x of `levels_linear`: grad [..., out] · W → [..., in]."""
    weight = PackedLevels(packed, levels, out_features, in_features)
    return matmul(grad, levels_cpu.dequantize(weight, product_dtype(grad)))


def vectors_linear(
    x: Tensor,
    packed: Tensor,
    table: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """x · Wᵀ + bias for a weight W [out, in] of bytes that select vectors: `weights.PackedVectors`.

    Returns [..., out] in x's dtype. Raises TypeError or ValueError if an argument does not fit.
    """
    weight = PackedVectors(packed, table, scale, out_features, in_features)
    weight.check()
    return _by_rows(x, weight, bias, vectors_cpu.linear)


def vectors_linear_grad(
    grad: Tensor, packed: Tensor, table: Tensor, scale: Tensor, out_features: int, in_features: int
) -> Tensor:
    """The gradient with respect to x of `vectors_linear`: grad [..., out] · W → [..., in]."""
    weight = PackedVectors(packed, table, scale, out_features, in_features)
    return matmul(grad, vectors_cpu.dequantize(weight, product_dtype(grad)))


def _by_rows(
    x: Tensor, weight: Packed, bias: Tensor | None, linear: Callable[[Tensor, Packed, Tensor | None], Tensor]
) -> Tensor:
    """Check x [..., in], bias and device, and call a backend's product on x as contiguous rows."""
    out_features, in_features = weight.out_features, weight.in_features
    check_input(x, out_features, in_features, bias)
    check_device(x, weight.packed, "the weight")
    if isinstance(weight, PackedInt | PackedInt8):
        check_device(x, weight.scale, "scale")
    rows = x.reshape(-1, in_features)
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    return linear(rows.contiguous(), weight, bias).view(*x.shape[:-1], out_features)


def _nf4_anywhere(x: Tensor, weight: PackedCodebook, bias: Tensor | None) -> Tensor:
    nested = weight.nested_absmax, weight.nested_codebook, weight.offset
    return reference.nf4_linear(
        x, weight.packed, weight.absmax, weight.codebook, *nested, bias, weight.out_features, weight.block_size
    )


def _int8_anywhere(x: Tensor, weight: PackedInt8, bias: Tensor | None) -> Tensor:
    return reference.int8_linear(x, weight.packed, weight.scale, weight.input_scale, bias)


for _function in (
    int_linear,
    int_linear_grad,
    codebook_linear,
    codebook_linear_grad,
    nf4_linear,
    nf4_linear_grad,
    int8_linear,
    int8_linear_grad,
    levels_linear,
    levels_linear_grad,
    vectors_linear,
    vectors_linear_grad,
):
    torch.library.impl(f"llmq::{_function.__name__}", "default", _function)
