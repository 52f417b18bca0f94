"""Weights in float8 whose inputs are rounded to float8, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.backend import on_triton
from llmq_kernels.common import bias_grad, by_rows, linear_fake, refuse_weight_gradient
from llmq_kernels.float8_linear import dense, scaled
from llmq_kernels.products import matmul, product_dtype
from llmq_kernels.weights import PackedFloat8

torch.library.define(
    "llmq::float8_linear", "(Tensor x, Tensor weight, Tensor scale, Tensor? input_scale, Tensor? bias) -> Tensor"
)
torch.library.define("llmq::float8_linear_grad", "(Tensor grad, Tensor weight, Tensor scale) -> Tensor")


def float8_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias with x rounded to float8, per token or by input_scale [1]; float32 sums.

    x: float [..., in]; weight: float8_e4m3fn [out, in], without NaN; scale: float [out, 1]. Returns [..., out] in x's
    dtype. Raises TypeError or ValueError if an argument does not fit.
    """
    packed = PackedFloat8(weight, scale, input_scale)
    packed.check()
    return by_rows(x, packed, bias, scaled.linear if on_triton(x) else dense.linear)


def float8_linear_grad(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient with respect to x of `float8_linear`, as if x were not rounded: grad [..., out] · W → [..., in]."""
    return matmul(grad, dense.dequantize(PackedFloat8(weight, scale, None), product_dtype(grad)))


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
    x_grad = torch.ops.llmq.float8_linear_grad(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return x_grad, None, None, None, bias_grad(ctx, grad, 4)


torch.library.impl("llmq::float8_linear", "default", float8_linear)
torch.library.impl("llmq::float8_linear_grad", "default", float8_linear_grad)
torch.library.register_fake("llmq::float8_linear", _fake)
torch.library.register_fake("llmq::float8_linear_grad", _grad_fake)
torch.library.register_autograd("llmq::float8_linear", _backward, setup_context=_setup)
