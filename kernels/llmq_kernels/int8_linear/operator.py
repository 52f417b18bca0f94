"""8-bit weights whose inputs are rounded to 8 bits, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.backend import on_triton
from llmq_kernels.checks import FLOATS, check
from llmq_kernels.common import bias_grad, by_rows, linear_fake, refuse_weight_gradient
from llmq_kernels.int8_linear import cpu, reference
from llmq_kernels.int_linear.dense_bits import SLAB
from llmq_kernels.products import matmul, row_slabs
from llmq_kernels.weights import PackedInt8

torch.library.define(
    "llmq::int8_linear", "(Tensor x, Tensor weight, Tensor scale, Tensor? input_scale, Tensor? bias) -> Tensor"
)
torch.library.define("llmq::int8_linear_grad", "(Tensor grad, Tensor weight, Tensor scale) -> Tensor")


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
        from llmq_kernels.int8_linear import triton

        return by_rows(x, packed, bias, triton.linear)
    return by_rows(x, packed, bias, cpu.linear if x.device.type == "cpu" else _anywhere)


def int8_linear_grad(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient with respect to x of `int8_linear`, as if x were not rounded: grad [..., out] · W → [..., in]."""
    out_features, in_features = weight.shape
    flat = grad.reshape(-1, out_features)
    total = grad.new_zeros(flat.shape[0], in_features, dtype=torch.float32)
    for rows in row_slabs(out_features, in_features, SLAB):
        total += matmul(flat[:, rows], weight[rows].to(torch.float32) * scale[rows].to(torch.float32))
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


def _anywhere(x: Tensor, weight: PackedInt8, bias: Tensor | None) -> Tensor:
    return reference.int8_linear(x, weight.packed, weight.scale, weight.input_scale, bias)


def _fake(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return linear_fake(x, weight.shape[0], weight.shape[1], bias)


def _grad_fake(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, _, bias = inputs
    refuse_weight_gradient(scale=scale)
    ctx.save_for_backward(weight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = torch.ops.llmq.int8_linear_grad(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return x_grad, None, None, None, bias_grad(ctx, grad, 4)


torch.library.impl("llmq::int8_linear", "default", int8_linear)
torch.library.impl("llmq::int8_linear_grad", "default", int8_linear_grad)
torch.library.register_fake("llmq::int8_linear", _fake)
torch.library.register_fake("llmq::int8_linear_grad", _grad_fake)
torch.library.register_autograd("llmq::int8_linear", _backward, setup_context=_setup)
