"""4-bit codes of codebooks, on the kernels of integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq_kernels.common import bias_grad, linear_fake, refuse_weight_gradient
from llmq_kernels.int_linear import planes
from llmq_kernels.int_linear.operator import planes_linear
from llmq_kernels.products import matmul, product_dtype
from llmq_kernels.weights import PackedInt

_WEIGHT = (
    "Tensor packed, Tensor scale, Tensor codebook, Tensor tables{bias}, int out_features, int in_features, "
    "int group_size"
)
torch.library.define("llmq::codebook_linear", f"(Tensor x, {_WEIGHT.format(bias=', Tensor? bias')}) -> Tensor")
torch.library.define("llmq::codebook_linear_grad", f"(Tensor grad, {_WEIGHT.format(bias='')}) -> Tensor")


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


def _fake(x: Tensor, *weight: Any) -> Tensor:
    *_, bias, out_features, in_features, _ = weight
    return linear_fake(x, out_features, in_features, bias)


def _grad_fake(grad: Tensor, *weight: Any) -> Tensor:
    *_, in_features, _ = weight
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, codebook, tables, bias, *rest = inputs
    refuse_weight_gradient(scale=scale, codebook=codebook)
    ctx.save_for_backward(packed, scale, codebook, tables)
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[0]
    x_grad = torch.ops.llmq.codebook_linear_grad(grad, *ctx.saved_tensors, *ctx.rest) if needed else None
    return (x_grad, *(None,) * 4, bias_grad(ctx, grad, 5), None, None, None)


torch.library.impl("llmq::codebook_linear", "default", codebook_linear)
torch.library.impl("llmq::codebook_linear_grad", "default", codebook_linear_grad)
torch.library.register_fake("llmq::codebook_linear", _fake)
torch.library.register_fake("llmq::codebook_linear_grad", _grad_fake)
torch.library.register_autograd("llmq::codebook_linear", _backward, setup_context=_setup)
