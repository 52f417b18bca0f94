"""The low-bit matrix products as torch operators: `torch.ops.llmq.int_linear`, `nf4_linear` and `int8_linear`.

Importing this registers them. Each has an implementation that chooses the backend by device and layout, a fake one, so
that torch.compile and CUDA graphs work, and a gradient with respect to the input, which is all that training adapters
on a frozen low-bit base needs. What each means is said in `reference`, and every backend is tested against that.
"""

from __future__ import annotations

import torch
from torch import Tensor

import llmq_kernels.tracing  # noqa: F401  (defines the operators)
from llmq_kernels import int8_cpu, layouts, nf4_cpu, reference
from llmq_kernels.backend import on_triton
from llmq_kernels.checks import FLOATS, check, check_device, check_input
from llmq_kernels.products import matmul, product_dtype
from llmq_kernels.stream import SLAB


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
    ValueError when x, bias or the device does not fit the weight.
    """
    check_input(x, out_features, in_features, bias)
    check_device(x, packed, "the weight")
    check_device(x, scale, "scale")
    flat = x.reshape(-1, in_features)
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    y = layouts.layout(layout).linear(
        flat.contiguous(), packed, scale, zero, bias, bits, out_features, in_features, group_size
    )
    return y.view(*x.shape[:-1], out_features)


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
    weight = layouts.layout(layout).dequantize(
        packed, scale, zero, bits, out_features, in_features, group_size, product_dtype(grad)
    )
    return matmul(grad, weight)


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
    """x · Wᵀ + bias for a weight W [out, in] of 4-bit codes into a codebook, as bitsandbytes stores it.

    packed: uint8 [ceil(out·in/2)], flat; the rest as `reference.nf4_absmax` and `reference.nf4_dequantize` say.
    Returns [..., out] in x's dtype. Raises TypeError or ValueError when something does not fit.
    """
    check_input(x, out_features, in_features, bias)
    _check_nf4(packed, absmax, codebook, nested_absmax, nested_codebook, out_features * in_features, block_size)
    check_device(x, packed, "the weight")
    flat = x.reshape(-1, in_features)
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    weight = (packed, absmax, codebook, nested_absmax, nested_codebook, offset)
    if on_triton(x):
        from llmq_kernels.triton import nf4

        y = nf4.linear(flat.contiguous(), *weight, bias, out_features, in_features, block_size)
    elif x.device.type == "cpu":
        y = nf4_cpu.linear(flat.contiguous(), *weight, bias, out_features, in_features, block_size)
    else:
        y = reference.nf4_linear(flat, *weight, bias, out_features, block_size)
    return y.view(*x.shape[:-1], out_features)


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
    code = (packed, absmax, codebook, nested_absmax, nested_codebook, offset)
    if on_triton(grad):
        from llmq_kernels.triton import nf4

        return matmul(grad, nf4.dequantize(*code, out_features, in_features, block_size, product_dtype(grad)))
    return matmul(grad, nf4_cpu.dequantize(*code, out_features, in_features, block_size, product_dtype(grad)))


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded to int8, per token or by input_scale [1]; int32 sums, scaled at the end.

    x: float [..., in]; weight: int8 [out, in]; scale: float [out, 1]. Returns [..., out] in x's dtype. Raises TypeError
    or ValueError when something does not fit.
    """
    check("weight", weight, torch.int8, tuple(weight.shape))
    out_features, in_features = weight.shape
    check_input(x, out_features, in_features, bias)
    check("scale", scale, FLOATS, (out_features, 1))
    if input_scale is not None:
        check("input_scale", input_scale, FLOATS, (1,))
    check_device(x, weight, "the weight")
    flat = x.reshape(-1, in_features)
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    if on_triton(x):
        from llmq_kernels.triton import int8

        y = int8.linear(flat.contiguous(), weight, scale, input_scale, bias)
    elif x.device.type == "cpu":
        y = int8_cpu.linear(flat.contiguous(), weight, scale, input_scale, bias).contiguous()
    else:
        y = reference.int8_linear(flat, weight, scale, input_scale, bias)
    return y.view(*x.shape[:-1], out_features)


def int8_linear_grad(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient with respect to x of `int8_linear`, as if x were not rounded: grad [..., out] · W → [..., in]."""
    flat = grad.reshape(-1, weight.shape[0])
    total = grad.new_zeros(flat.shape[0], weight.shape[1], dtype=torch.float32)
    step = max(1, SLAB // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        dense = weight[part].to(torch.float32) * scale[part].to(torch.float32)
        total += matmul(flat[:, part], dense)
    return total.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])


def _check_nf4(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    size: int,
    block_size: int,
) -> None:
    blocks = -(-size // block_size)
    check("packed", packed, torch.uint8, (-(-size // 2),))
    check("codebook", codebook, torch.float32, (16,))
    if nested_absmax is None or nested_codebook is None:
        check("absmax", absmax, torch.float32, (blocks,))
        return
    check("absmax", absmax, torch.uint8, (blocks,))
    check("nested_absmax", nested_absmax, torch.float32, (-(-blocks // 256),))
    check("nested_codebook", nested_codebook, torch.float32, (256,))


for _function in (int_linear, int_linear_grad, nf4_linear, nf4_linear_grad, int8_linear, int8_linear_grad):
    torch.library.impl(f"llmq::{_function.__name__}", "default", _function)
